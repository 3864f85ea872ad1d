"""The tables of ``benchmarks.tickets``: what they say of results that are written by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "ticket_tables.py"
if not PATH.exists():
    pytest.skip("needs the repository's benchmarks", allow_module_level=True)
spec = importlib.util.spec_from_file_location("ticket_tables", PATH)
assert spec is not None
assert spec.loader is not None
ticket_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ticket_tables)

DENSE = {
    "accuracies": [40.0, 60.0, 70.0, 80.0, 81.0, 82.0],
    "seconds": [2.0, 2.0, 2.0, 9.0, 2.0, 2.0],  # one was disturbed
    "complete": True,
}


def pruned(**changes):
    """A network whose ticket comes after two of six epochs, after which epochs are half as long."""
    row = {
        "accuracies": [40.0, 60.0, 50.0, 78.0, 82.0, 84.0],
        "seconds": [2.0, 2.0, 1.0, 1.0, 1.0, 1.0],
        "ticket epoch": 2,
        "shrunk at epoch": 2,
        "seconds of shrinking": 0.5,
        "before pruning": 60.0,
        "after pruning": 10.0,
        "BatchNorm recomputed": 20.0,
        "kept": [[3, 8], [5, 8]],
        "parameters": [4000, 1000],
        "MACs": [4e6, 1e6],
        "complete": True,
    }
    return row | changes


def case(seed=0, width=1, **methods):
    """The results of a seed."""
    settings = {"width": str(width), "limit": "None", "epochs": "20"}
    settings |= {"prune_ratio": "0.5", "scope": "global", "min_keep": "0", "scatter": "False"}
    identity = {"model": "vgg11", "momentum": 0.0, "l1": 0.0, "seed": seed}
    return identity | {"device": "cpu", "torch": "2", "settings": settings, "methods": methods}


def test_numbers_of_a_network_that_was_trained_on():
    """Seconds are of median epochs, shrinking counts, and the fastest sets the equal seconds."""
    found = ticket_tables.cells(case(dense=DENSE, WORM=pruned()), "WORM")

    assert found["epoch of the ticket"] == 2
    assert found["fewest channels kept in a layer"] == 3
    assert found["epochs to 90 % of the accuracy before"] == 2
    assert found["accuracy at equal epochs, %"] == pytest.approx((78 + 82 + 84) / 3)
    assert found["the same less dense, points"] == pytest.approx((78 + 82 + 84 - 80 - 81 - 82) / 3)
    assert found["seconds in all, of dense"] == pytest.approx((2 * 2 + 0.5 + 4 * 1) / (6 * 2))
    # The mean of three epochs is 80 or more when the fourth after shrinking ends.
    assert found["seconds to dense - 1 point, of dense"] == pytest.approx(8.5 / 12)
    dense = ticket_tables.cells(case(dense=DENSE, WORM=pruned()), "dense")
    assert dense["accuracy at equal seconds, %"] == pytest.approx((60 + 70 + 80) / 3)
    assert dense["seconds to dense - 1 point, of dense"] == 1
    assert "epoch of the ticket" not in dense


def test_a_fade_recovers_when_it_is_over():
    """Not while nothing is zero yet."""
    faded = pruned(accuracies=[40.0, 60.0, 58.0, 30.0, 40.0, 56.0], **{"shrunk at epoch": 3})
    found = ticket_tables.cells(case(dense=DENSE, faded=faded), "faded")
    assert found["epochs to 90 % of the accuracy before"] == 3


@pytest.mark.parametrize(
    "row",
    [
        pruned(complete=False),
        {"accuracies": [40.0], "seconds": [2.0], "distances": [], "note": "no ticket in 1 epochs"},
        pruned(**{"ticket epoch": 6, "shrunk at epoch": 6}),
        {},
    ],
)
def test_what_is_not_known_is_left_out(row):
    """A network that was broken off, had no ticket, or has it at the last epoch."""
    found = ticket_tables.cells(case(dense=DENSE, WORM=row), "WORM")
    assert "seconds an epoch after" not in found
    text = ticket_tables.tables([case(dense=DENSE, WORM=row)])
    assert "| accuracy at equal epochs, % | 81.00 |" in text


def test_seeds_are_pooled_and_other_settings_are_not():
    """A table for each width; the number of seeds where a number is not known of all."""
    first, second, wide = (
        case(seed, width, dense=DENSE, WORM=row)
        for seed, width, row in ((0, 1, pruned()), (1, 1, pruned(complete=False)), (0, 2, pruned()))
    )
    narrow, other = ticket_tables.tables([first, second, wide]).split("\n\nvgg11")
    assert "seeds 0, 1\n" in narrow
    assert "| epoch of the ticket | - | 2.00 ± 0.00 |" in narrow
    assert "| accuracy at equal epochs, % | 81.00 ± 0.00 | 81.33 (1 of 2) |" in narrow
    assert "width 2" in other
