"""The state machine over a sliding window, without a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import reference_search
from strategies import mask_sequences, shares

from torch_worm_optim.search import MaskSample, Phase, SearchSettings, Window, pack

windows = st.integers(2, 9)
triggers = st.sampled_from(["distance", "always"])


def rule(stopping_point: float, margin: float, window: int, trigger: str = "distance"):
    """The settings of a search by these thresholds."""
    return SearchSettings(
        stopping_point=stopping_point, margin=margin, window=window, trigger=trigger
    )


def run(sequence: list[list[bool]], settings: SearchSettings) -> list[MaskSample]:
    """What the search makes of masks that are given, up to the ticket."""
    window = Window(len(sequence[0]), settings.window)
    history: list[MaskSample] = []
    phase = Phase.SEARCHING
    for step, mask in enumerate(sequence, start=1):
        if phase.converged:
            break
        window.push(pack(torch.tensor(mask)))
        history.append(settings.decide(step, phase, window.distances()))
        phase = history[-1].phase
    return history


@given(mask_sequences(), shares, shares, windows, triggers)
@example([[True, False]] * 3, 0.0, 0.0, 2, "distance")
@example([[True, False]] * 3, 0.0, 0.1, 2, "distance")
def test_search_equals_algorithm_1(sequence, stopping_point, margin, window, trigger):
    """Distances, phases and the step of the ticket are those of the paper's algorithm."""
    history = run(sequence, rule(stopping_point, margin, window, trigger))

    expected = reference_search(
        sequence, stopping_point=stopping_point, margin=margin, window=window, trigger=trigger
    )
    assert expected == [(sample.distances, sample.phase.value) for sample in history]
    assert [sample.step for sample in history] == list(range(1, len(history) + 1))


@given(mask_sequences(), shares, shares, windows, triggers)
def test_phases_only_move_forward(sequence, stopping_point, margin, window, trigger):
    """SEARCHING, TRUNCATING, CONVERGED: no phase follows a later one."""
    order = list(Phase)

    history = run(sequence, rule(stopping_point, margin, window, trigger))

    phases = [order.index(sample.phase) for sample in history]
    assert phases == sorted(phases)


@given(mask_sequences(), shares, shares, windows)
def test_silent_until_the_window_is_full(sequence, stopping_point, margin, window):
    """No distance is reported and nothing is decided before `window` masks are held."""
    history = run(sequence, rule(stopping_point, margin, window))

    for sample in history[: window - 1]:
        assert sample[1:] == ((), None, None, Phase.SEARCHING)
    for sample in history[window - 1 :]:
        assert len(sample.distances) == window - 1
        assert sample.max_distance == max(sample.distances)
        assert sample.mean_distance == sum(sample.distances) / (window - 1)


@given(mask_sequences(), shares, windows, triggers)
def test_a_stopping_point_of_zero_never_stops(sequence, margin, window, trigger):
    """The comparison is strict: no distance is below 0."""
    history = run(sequence, rule(0.0, margin, window, trigger))

    assert len(history) == len(sequence)
    assert all(not sample.phase.converged for sample in history)


@given(mask_sequences(), st.data())
def test_older_masks_may_trade_places_and_the_newest_may_not(sequence, data):
    """Distances run from the newest mask: reordering the others reorders them, and no more."""
    older, newest = sequence[:-1], sequence[-1]
    if len(older) < 1:
        older = [newest]
    shuffled = data.draw(st.permutations(range(len(older))))
    settings = rule(0.0, 0.0, window=len(older) + 1)

    last = run([*older, newest], settings)[-1]
    other = run([*[older[i] for i in shuffled], newest], settings)[-1]

    assert tuple(last.distances[i] for i in shuffled) == other.distances
    assert last.max_distance == other.max_distance


def test_window_order_matters_as_the_paper_says():
    """The same three masks end or do not end a search, depending on which one is the newest."""
    a, b, c = [True] * 6, [True] * 5 + [False], [True] * 4 + [False] * 2
    settings = rule(stopping_point=0.2, margin=0.0, window=3)

    assert run([a, c, b], settings)[-1].phase is Phase.CONVERGED  # b is 1/6 from both others
    assert run([a, b, c], settings)[-1].phase is Phase.SEARCHING  # c is 2/6 from a


def test_a_search_may_skip_truncation():
    """Masks that stand still converge at once, from SEARCHING straight to CONVERGED."""
    history = run([[True, False]] * 9, SearchSettings())

    assert [sample.phase for sample in history] == [Phase.SEARCHING] * 4 + [Phase.CONVERGED]


def test_truncating_is_never_undone_by_larger_distances():
    """Once truncating, always truncating until converged."""
    near, far = [True] * 10, [False] * 10
    history = run([near, [*near[:9], False], far], rule(0.1, 0.05, window=2))

    assert [sample.phase for sample in history] == [
        Phase.SEARCHING,
        Phase.TRUNCATING,
        Phase.TRUNCATING,
    ]


@pytest.mark.parametrize("phase", [Phase.CONVERGED, Phase.PRUNED])
def test_nothing_follows_convergence(phase):
    """Whatever the distances, a search that is over stays over."""
    for trigger in ("distance", "always"):
        for distances in ((), (0.9,), (0.0,)):
            assert SearchSettings(trigger=trigger).next_phase(phase, distances) is phase
