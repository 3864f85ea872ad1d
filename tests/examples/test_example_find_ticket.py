"""The example that a newcomer starts with: what it writes, broken off and resumed, and refuses."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
if not EXAMPLES.exists():
    pytest.skip("needs the repository's examples", allow_module_level=True)
for package in ("matplotlib", "sklearn", "timm", "tqdm"):
    pytest.importorskip(package, reason="needs what the examples need")

# A narrow network, few images, and tickets as soon as two masks can be compared.
SMALL = ["--width=0.05", "--limit=256", "--batch-size=64", "--epochs=3", "--window=2"]
SMALL += ["--stopping-point=1", "--device=cpu"]


@pytest.fixture
def find_ticket(monkeypatch):
    """The example as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import find_ticket

    return find_ticket


def run(find_ticket, monkeypatch, out, *arguments):
    """Call it as from the command line; what is in results.json afterwards."""
    monkeypatch.setattr(sys, "argv", ["find_ticket.py", *SMALL, f"--out={out}", *arguments])
    find_ticket.main()
    return json.loads((out / "results.json").read_text())


@pytest.mark.filterwarnings("ignore")  # of so small a network some layers keep next to nothing
def test_it_writes_what_it_says_and_goes_on_after_a_break(
    find_ticket, tmp_path, monkeypatch, capsys
):
    """Trainings that are finished are kept, the others made up for; the small network loads."""
    train = find_ticket.train

    def power_cut(args, data, method, seed, prune_at):
        if (method, seed) == ("WORM", 0):
            raise KeyboardInterrupt
        return train(args, data, method, seed, prune_at)

    monkeypatch.setattr(find_ticket, "train", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(find_ticket, monkeypatch, tmp_path)
    before = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [each["method"] for each in before] == ["dense", "EB Train"]
    assert not (tmp_path / "ticket.pt").exists()

    monkeypatch.setattr(find_ticket, "train", train)
    capsys.readouterr()
    results = run(find_ticket, monkeypatch, tmp_path, "--resume")
    said = capsys.readouterr().out
    assert "EB Train, epoch" not in said
    assert "seed 0, WORM, epoch 3 of 3: accuracy" in said

    assert results["arguments"]["prune_ratio"] == 0.5
    assert results["arguments"]["data_dir"] is None
    runs = results["runs"]
    assert runs[:2] == before
    assert [each["method"] for each in runs] == ["dense", "EB Train", "WORM", "random ticket"]
    dense, eb_train, worm, random = runs
    assert [each["found"] for each in runs] == [None, True, True, None]
    assert eb_train["search_epochs"] == worm["search_epochs"] == random["search_epochs"] == 2
    # Until the ticket these are one training.
    assert [c[2] for c in dense["curve"][:2]] == [c[2] for c in random["curve"][:2]]
    assert random["scores"]["before pruning"] == eb_train["scores"]["before pruning"]
    assert len(dense["curve"]) == 3
    assert worm["sizes"]["M parameters"][0] == dense["sizes"]["M parameters"][0]

    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [each["method"] for each in runs]
    assert rows[0]["after pruning"] == ""
    assert float(rows[2]["at the end"]) == worm["scores"]["at the end"]

    masks = torch.load(tmp_path / "masks.pt", weights_only=True)
    n_removed = [sum(int((~mask).sum()) for mask in each.values()) for each in masks.values()]
    assert len(set(n_removed)) == 1  # the random ticket removes as many
    ticket = torch.load(tmp_path / "ticket.pt", weights_only=True)
    assert ticket.keys() == masks["WORM, seed 0"].keys()
    assert len(list(tmp_path.glob("*.png"))) == 4

    lines = [line for line in said.splitlines() if line.startswith(("import", "model", "torch_"))]
    names: dict[str, torch.nn.Module] = {}
    exec("\n".join(lines), names)
    n = sum(parameter.numel() for parameter in names["model"].parameters())
    assert n == worm["sizes"]["M parameters"][1] * 1e6

    with pytest.raises(SystemExit, match="2"):
        run(find_ticket, monkeypatch, tmp_path, "--resume", "--lr=0.02")
    assert capsys.readouterr().err.endswith(
        "was made with lr 0.01, not 0.02; choose another --out\n"
    )


@pytest.mark.filterwarnings("ignore")
def test_without_a_ticket_there_is_none_to_load(find_ticket, tmp_path, monkeypatch, capsys):
    """A search that gives up exits with 1, and its pictures say why there is little to see."""
    with pytest.raises(SystemExit, match="1"):
        run(find_ticket, monkeypatch, tmp_path, "--stopping-point=0", "--seeds=2")
    assert "No ticket within 3 epochs: EB Train, seed 0; WORM" in capsys.readouterr().err
    assert not (tmp_path / "ticket.pt").exists()
    assert not (tmp_path / "small.pt").exists()
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("--seeds 0", "--seeds: must be a whole number of at least 1, got '0'"),
        ("--epochs many", "--epochs: must be a whole number of at least 1, got 'many'"),
        ("--epochs 4", "--epochs 4 draw too few masks to fill a --window 5"),
        ("--prune-ratio 1", "--prune-ratio: must be a number from 0 to below 1, got '1'"),
        ("--window 1", "--window: must be a whole number of at least 2, got '1'"),
        ("--stopping-point nan", "--stopping-point: must be a number from 0 to 1, got 'nan'"),
        ("--min-keep 1.5", "--min-keep: must be a number from 0 to below 1, got '1.5'"),
        ("--device tpu9", "--device: cannot use 'tpu9'"),
        ("--model nosuch", "timm has no 'nosuch'"),
        ("--model vgg11", "vgg11 has no BatchNorm2d"),
        ("--model vgg11_bn --width 0.5", "--width is for ResNets"),
        ("--data cifar10", "--data cifar10 needs --data-dir"),
        ("--limit 20", "--limit 20 does not fill a --batch-size 32"),
        ("--resume --out nowhere", "there is no nowhere"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(find_ticket, capsys, arguments, what):
    """One line says what is wrong, below the one that says how it is called."""
    with pytest.raises(SystemExit, match="2"):
        find_ticket.parse(arguments.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage:")
    assert what in error


def test_help_names_no_default_where_there_is_none(find_ticket, capsys):
    """Arguments stand in groups, with the defaults that say something."""
    with pytest.raises(SystemExit, match="0"):
        find_ticket.parse(["--help"])
    said = capsys.readouterr().out
    assert "(default: None)" not in said
    assert "(default: False)" not in said
    assert "(default: 0.5)" in said
    for group in ("data:", "network and training:", "search:", "what comes after:", "output:"):
        assert f"\n{group}\n" in said
