"""Plots of a search: what is drawn is what the search says, and drawing changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from training import SCALES, SEARCH, at_phase, same, train, weights_of, wrapped

from torch_worm_optim import (
    MaskSample,
    Phase,
    QueryKeySelector,
    WormOptimizer,
    plot_kept,
    plot_trajectory,
)


def searched(n_steps: int, **options):
    """The optimizer of a small network after some steps."""
    model, opt = wrapped(**options)
    train(model, opt, range(n_steps))
    return opt


def converged(**options):
    """The optimizer of a small network that has just found its ticket."""
    return at_phase(Phase.CONVERGED, **options)[1]


@pytest.fixture
def ax():
    """Axes that pyplot knows nothing of."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture(autouse=True)
def no_other_figures():
    """What doctests left open is not counted."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def lines_of(ax):
    """The points of each line, by label."""
    return {
        line.get_label(): [tuple(point) for point in line.get_xydata().tolist()]
        for line in ax.get_lines()
    }


THRESHOLDS = {"stopping point 0.06", "trigger point 0.26"}
DISTANCES = {"largest distance", "mean distance", "mask drawn"}


def texts_of(ax):
    """All that is written inside."""
    return [text.get_text() for text in ax.texts]


def drawn(ax):
    """Draw it, so that whatever cannot be drawn raises."""
    ax.figure.draw_without_rendering()
    return ax


def test_lines_are_the_history(ax):
    """Distances, masks, thresholds, the start of truncation and the ticket, each where it was."""
    opt = converged()
    phases = [sample.phase for sample in opt.history]
    assert phases[0] is Phase.SEARCHING
    first = opt.history[phases.index(Phase.TRUNCATING)]
    last = opt.history[-1]

    assert plot_trajectory(opt, ax) is drawn(ax)
    compared = [sample for sample in opt.history if sample.distances]
    lines = lines_of(ax)
    assert lines["largest distance"] == [(s.step, s.max_distance) for s in compared]
    assert lines["mean distance"] == [(s.step, s.mean_distance) for s in compared]
    assert lines["mask drawn"] == [(s.step, 0) for s in opt.history]
    assert lines["truncation starts"] == [(first.step, first.mean_distance)]
    assert lines["ticket found"] == [(last.step, last.max_distance)]
    assert [y for _, y in lines["stopping point 0.06"]] == [SEARCH["stopping_point"]] * 2
    assert [y for _, y in lines["trigger point 0.26"]] == [0.06 + SEARCH["margin"]] * 2
    assert ax.get_legend() is not None


def test_a_history_is_drawn_as_its_optimizer_is_but_for_the_thresholds(ax):
    """Whoever kept only the list sees the same lines."""
    from matplotlib.figure import Figure

    opt = converged()
    lines = lines_of(plot_trajectory(opt, ax))
    shown = {label: points for label, points in lines.items() if label not in THRESHOLDS}

    for history in (opt.history, tuple(opt.history)):
        assert lines_of(plot_trajectory(history, Figure().subplots())) == shown
    assert lines.keys() - shown.keys() == THRESHOLDS


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"truncation": 1}, {*THRESHOLDS, "ticket found"}),
        ({"trigger": "always"}, {"stopping point 0.06", "truncation starts", "ticket found"}),
    ],
)
def test_what_does_not_happen_is_not_drawn(ax, options, shown):
    """Nothing is truncated with a truncation of 1; "always" has no trigger point."""
    lines = lines_of(plot_trajectory(converged(**options), ax))
    assert lines.keys() - DISTANCES == shown


def test_a_ticket_that_is_taken_by_force_has_its_star(ax):
    """At the newest mask, on the line once there is one, else at the bottom."""
    for n_steps in (3, 15):
        ax.clear()
        opt = searched(n_steps)
        opt.prune(force=True)
        last = opt.history[-1]
        assert last.phase is Phase.PRUNED
        star = lines_of(drawn(plot_trajectory(opt, ax)))["ticket found"]
        assert star == [(n_steps, last.max_distance or 0)]


def test_before_there_is_anything_the_axes_say_so(ax):
    """No mask, no full window, or a ticket that was given: words, and no error."""
    opt = searched(0)
    assert texts_of(drawn(plot_trajectory(opt, ax))) == ["no mask drawn yet"]
    ax.clear()
    assert texts_of(drawn(plot_trajectory([], ax))) == ["no mask drawn yet"]
    ax.clear()
    assert texts_of(drawn(plot_kept(opt, ax))) == ["no mask drawn yet"]
    ax.clear()
    assert "window not full yet" in texts_of(drawn(plot_trajectory(searched(6), ax)))
    ax.clear()
    given = searched(0, ticket=converged().final_mask)
    assert texts_of(drawn(plot_trajectory(given, ax))) == ["no mask drawn: the ticket was given"]


@pytest.mark.parametrize("make", [lambda: searched(6), converged])
def test_bars_are_the_masks(ax, make):
    """As long as representatives are wide, dark as far as they are kept, in the same order."""
    opt = make()
    masks = {name: opt.candidate_mask[name] for name in SCALES}

    assert plot_kept(opt, ax) is drawn(ax)
    sizes, kept = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert kept == [int(mask.sum()) for mask in masks.values()]
    assert sizes == [mask.numel() for mask in masks.values()]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(masks)
    assert texts_of(ax) == [f"{k} of {n}" for k, n in zip(kept, sizes, strict=True)]
    which = "ticket" if opt.converged else "newest mask"
    assert ax.get_title(loc="left") == f"{which}: 10 of 20 entries kept"
    top, bottom = ax.transData.transform([(0, 0), (0, 1)])[:, 1]
    assert top > bottom


def test_a_given_ticket_has_bars(ax):
    """Followers included, as in the summary."""
    ticket = converged().final_mask
    plot_kept(searched(0, ticket=ticket), ax)
    assert [label.get_text() for label in drawn(ax).get_yticklabels()] == list(ticket)


def test_units_are_what_bars_count(ax):
    """Heads, not the entries of their weights."""
    model = nn.MultiheadAttention(16, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = WormOptimizer(sgd, model, QueryKeySelector(granularity="head"), sample_every=None)
    opt.sample()

    assert texts_of(plot_kept(opt, ax)) == ["2 of 4"]
    assert ax.get_title(loc="left") == "newest mask: 2 of 4 units kept"


def test_drawing_changes_nothing(ax):
    """The search goes on as the one that nobody looked at, and pyplot knows no more figures."""
    from matplotlib import pyplot as plt
    from matplotlib import rcParams

    settings = dict(rcParams)
    (model, looked_at), (twin, alone) = wrapped(), wrapped()
    for step in range(45):
        train(model, looked_at, range(step, step + 1))
        train(twin, alone, range(step, step + 1))
        if step % 8 == 0:
            plot_trajectory(looked_at, ax)
            plot_kept(looked_at, ax.figure.add_subplot())

    assert looked_at.history == alone.history
    assert same(weights_of(model), weights_of(twin))
    assert dict(rcParams) == settings
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", [plot_trajectory, plot_kept])
def test_without_axes_there_is_a_figure_of_its_own(draw):
    """One new figure each time, known to pyplot, so that notebooks show it."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    opt = searched(6)
    first, second = draw(opt), draw(opt)
    try:
        assert first.figure is not second.figure
        assert len(plt.get_fignums()) == 2
        drawn(second)
    finally:
        plt.close(first.figure)
        plt.close(second.figure)


def test_two_searches_fit_into_one_picture(ax):
    """The second has a colour and a name of its own, and the first stays in sight."""
    long, short = converged(), searched(15)
    plot_trajectory(short, ax)
    first = ax.get_lines()[0].get_color()
    n = len(ax.get_lines())
    plot_trajectory(long, ax, label="long")

    assert ax.get_lines()[n].get_color() != first
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"largest distance", "long, largest distance", "long, mean distance"} <= set(told)
    assert len(told) == len(set(told))
    assert drawn(ax).get_xlim()[1] >= long.history[-1].step


def test_what_cannot_be_drawn_is_refused(ax):
    """The message gives the rule, what came, and what to pass instead."""
    opt = searched(6)
    with pytest.raises(TypeError, match=r"must be a WormOptimizer or its history.*got SGD\. Pass"):
        plot_trajectory(opt.base_optim, ax)
    with pytest.raises(TypeError, match="list of MaskSample, got int in a MaskSample"):
        plot_trajectory(opt.history[-1], ax)
    with pytest.raises(TypeError, match="got NoneType in a list"):
        plot_trajectory([None], ax)
    with pytest.raises(TypeError, match=r"must be a WormOptimizer, got list\. Pass the optimizer"):
        plot_kept(opt.history, ax)
    for draw in (plot_trajectory, plot_kept):
        with pytest.raises(TypeError, match=r"`ax` must be the matplotlib axes .*got Figure\. Pas"):
            draw(opt, ax.figure)


@pytest.mark.parametrize("draw", [plot_trajectory, plot_kept])
def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, draw):
    """At the call, and not before."""
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ImportError, match=r'pip install "torch-worm-optim\[plot\]"'):
        draw(searched(6))


def test_importing_the_package_does_not_import_matplotlib():
    """Nobody who draws nothing waits for it."""
    code = "import sys, torch_worm_optim; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("n", range(5))
def test_a_history_may_end_anywhere(ax, n):
    """It is drawn as far as it goes, at step 0, too."""
    drawn(plot_trajectory(searched(15).history[:n], ax))
    drawn(plot_trajectory([MaskSample(0, (), None, None, Phase.TRUNCATING)], ax))
