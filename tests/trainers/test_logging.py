"""The logging that the quickstart shows: its very text is run, and what it wrote is read back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import BASES, small_cnn, train

from torch_worm_optim import Phase, WormOptimizer

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"
if not QUICKSTART.exists():
    pytest.skip("needs the repository's documentation", allow_module_level=True)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves of an event file: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in names}


def test_tensorboard_is_told_of_every_epoch(tmp_path, monkeypatch):
    """Phases and shares come from the first epoch on, distances once there are some."""
    pytest.importorskip("tensorboard", reason="needs a logger to write with")
    blocks = re.findall(r"^```python\n(.*?)^```$", QUICKSTART.read_text(), re.DOTALL | re.MULTILINE)
    [recipe] = [block for block in blocks if "SummaryWriter" in block]
    monkeypatch.chdir(tmp_path)
    model = small_cnn()
    optimizer = WormOptimizer(
        BASES["SGD momentum"](model.parameters()),
        model,
        sample_every=3,
        window=4,
        stopping_point=0.06,
        margin=0.2,
    )
    phases = []

    def train_epoch(model, optimizer):
        """Three steps, so that each epoch draws one mask, as on the page."""
        train(model, optimizer, range(3 * len(phases), 3 * len(phases) + 3))
        phases.append(optimizer.phase)

    exec(recipe, {"model": model, "optimizer": optimizer, "train_epoch": train_epoch})

    told = read_scalars(tmp_path / "runs" / "worm")
    assert phases[0] is Phase.SEARCHING
    assert phases[-1] is Phase.CONVERGED
    numbers = [list(Phase).index(phase) for phase in phases]
    assert told.pop("worm/phase") == list(enumerate(numbers, start=1))

    # The window is full at the fourth mask, and after the last one nothing changes. An event file
    # holds numbers of 32 bits, so that values are compared with a tolerance.
    samples = optimizer.history[3:]
    samples += [samples[-1]] * (len(phases) - len(optimizer.history))
    for which in ("max_distance", "mean_distance"):
        steps, values = zip(*told.pop(f"worm/{which}"), strict=True)
        assert steps == tuple(range(4, len(phases) + 1))
        assert values == pytest.approx([getattr(each, which) for each in samples])

    counts = optimizer.kept_counts()
    assert told.keys() == {f"worm/kept/{each.name}" for each in counts}
    for each in counts:
        curve = told[f"worm/kept/{each.name}"]
        assert [step for step, _ in curve] == list(range(1, len(phases) + 1))
        assert curve[-1][1] == pytest.approx(each.kept / each.numel)
