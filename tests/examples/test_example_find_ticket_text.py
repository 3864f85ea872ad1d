"""The example for transformers: what it compares, and what gets smaller."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
if not EXAMPLES.exists():
    pytest.skip("needs the repository's examples", allow_module_level=True)
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason="needs what the examples need")

# Few characters, and tickets as soon as two masks can be compared.
SMALL = ["--limit=4000", "--batch-size=16", "--sample-every=1", "--window=2", "--stopping-point=1"]


@pytest.mark.filterwarnings("ignore")  # of so short a search some layers keep next to nothing
@pytest.mark.parametrize(("select", "scope"), [("qk", "global"), ("heads+ffn", "selector")])
def test_searches_stand_beside_dense_training(select, scope, tmp_path, monkeypatch, capsys):
    """All train for as many steps; whole heads and rows are cut out, entries are not."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import find_ticket_text

    arguments = ["find_ticket_text.py", *SMALL, f"--select={select}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--device=cpu"])
    find_ticket_text.main()
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arguments"]["scope"] == scope
    runs = results["runs"]
    assert [run["method"] for run in runs] == ["dense", "EB Train", "WORM"]
    assert [run["found"] for run in runs] == [None, True, True]
    assert len({len(run["losses"]) for run in runs}) == 1
    dense, eb_train, worm = runs
    # Nothing was truncated before the ticket, so that the two searches are one.
    assert worm["scores"] == eb_train["scores"]
    assert worm["losses"] == eb_train["losses"]
    n_parameters = [run["sizes"]["M parameters"] for run in runs]
    if select == "qk":
        assert n_parameters == [dense["sizes"]["M parameters"]] * 3
        assert "after shrinking" not in said
    else:
        assert n_parameters[1] == n_parameters[2]
        before, after = n_parameters[2]
        # Half of the heads and of the feed-forward rows, which are nearly all of it.
        assert 0.5 * before < after < 0.6 * before
        assert "zero channels: 896 of 896 gone" in said
    assert all((tmp_path / name).exists() for name in ("trajectory.png", "losses.png"))


@pytest.mark.filterwarnings("ignore")  # of so short a search some layers keep next to nothing
def test_without_a_terminal_each_epoch_has_a_line(tmp_path, monkeypatch, capsys):
    """Whoever reads a log sees how far each training is before it ends."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import find_ticket_text

    # An epoch has three steps here, so that the ticket is found at the end of the first.
    arguments = ["find_ticket_text.py", *SMALL, "--window=3", f"--out={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    find_ticket_text.main()
    said = capsys.readouterr().out.splitlines()
    epochs = [line.partition(": loss ")[0] for line in said if ": loss " in line]
    assert epochs == [
        "seed 0, EB Train: search, epoch 1",
        "seed 0, WORM: search, epoch 1",
        "seed 0, EB Train: retrain, epoch 2",
        "seed 0, WORM: retrain, epoch 2",
        "seed 0, dense, epoch 1",
        "seed 0, dense, epoch 2",
    ]
    searches = [line for line in said if ": search, " in line]
    assert all(re.search(r"largest distance 0\.\d{3}, \d+\.\d s$", line) for line in searches)
