"""The sliding window against masks that are kept one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import reference_distance
from strategies import mask_sequences

from torch_worm_optim.search import Window

windows = st.one_of(st.integers(2, 9), st.integers(10, 20))


def cut(mask: list[bool], numels: list[int]) -> list[list[bool]]:
    """A mask cut into those of its parts."""
    return [part.tolist() for part in torch.tensor(mask).split(numels)]


@st.composite
def cuts(draw: st.DrawFn, n: int) -> list[int]:
    """Sizes of parts that have n entries in all, some of them empty."""
    bounds = sorted(draw(st.lists(st.integers(0, n), max_size=4), label="bounds"))
    return [b - a for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


@given(mask_sequences(), windows, st.data())
@example([[True]] * 12, 9, None)
@example([[False], [True]] * 10, 17, None)
@example([[True, False] * 64, [False, False] * 64], 2, None)  # whole words
def test_differences_are_those_of_masks_compared_one_by_one(sequence, n_masks, data):
    """For each part and each older mask, oldest first; masks not yet drawn count as all False."""
    n = len(sequence[0])
    numels = [n] if data is None else data.draw(cuts(n), label="sizes of parts")
    window = Window(numels, n_masks)
    for mask in sequence:
        window.push(torch.tensor(mask))

    held = [[False] * n] * n_masks + sequence
    held = held[-n_masks:]
    assert [part.tolist() for part in window.newest()] == cut(held[-1], numels)
    for older, counts in zip(held[:-1], window.differences(), strict=True):
        pairs = zip(cut(held[-1], numels), cut(older, numels), strict=True)
        assert counts == [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs]
        assert sum(counts) / n == reference_distance(held[-1], older)


@given(mask_sequences(), windows, st.data())
def test_a_window_goes_through_bytes(sequence, n_masks, data):
    """Saved and loaded, a window goes on as if it never had been."""
    numels = data.draw(cuts(len(sequence[0])), label="sizes of parts")
    window, other = Window(numels, n_masks), Window(numels, n_masks)
    *before, last = sequence
    for mask in before:
        window.push(torch.tensor(mask))

    for index in range(len(numels)):
        rows = window.to_bytes(index)
        assert len(rows) == -(-n_masks // 8)
        other.from_bytes(index, rows)
    for each in (window, other):
        each.push(torch.tensor(last))

    assert window.differences() == other.differences()


def test_bits_of_a_byte_are_the_ages_of_masks():
    """The form in checkpoints: bit i is the mask pushed i pushes ago."""
    window = Window([2], 9)
    for mask in ([True, True], [False, True], [True, False]):
        window.push(torch.tensor(mask))

    assert [row.tolist() for row in window.to_bytes(0)] == [[0b101, 0b110], [0, 0]]


@pytest.mark.cuda
def test_masks_may_come_from_a_device():
    """They are packed on the host."""
    window = Window([3, 100], 2)
    mask = torch.rand(103, device="cuda") < 0.5
    window.push(mask)

    assert torch.equal(torch.cat(window.newest()), mask.cpu())
