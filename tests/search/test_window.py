"""The sliding window against masks that are kept one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import reference_distance
from strategies import mask_sequences

from torch_worm_optim.search import Window, pack, unpack


@given(mask_sequences(), st.integers(2, 20))
@example([[True]] * 12, 9)
@example([[False], [True]] * 10, 17)
@example([[True, False] * 64, [False, False] * 64], 2)
def test_distances_are_those_of_masks_compared_one_by_one(sequence, n_masks):
    """From the newest mask to each older one, oldest first; none before the window is full."""
    n = len(sequence[0])
    window = Window(n, n_masks)
    for number, mask in enumerate(sequence, start=1):
        window.push(pack(torch.tensor(mask)))

        assert unpack(window.rows[-1], n).tolist() == mask
        held = sequence[:number][-n_masks:]
        expected = tuple(reference_distance(mask, older) for older in held[:-1])
        assert window.distances() == (expected if len(held) == n_masks else ())


@given(st.lists(st.booleans(), max_size=100))
def test_packed_masks_come_back(mask):
    """Eight bits in a byte, whatever is left of the last one."""
    bits = pack(torch.tensor(mask, dtype=torch.bool))

    assert len(bits) == -(-len(mask) // 8)
    assert unpack(bits, len(mask)).tolist() == mask


@pytest.mark.cuda
def test_masks_may_come_from_a_device():
    """They are packed on the host."""
    mask = torch.rand(103, device="cuda") < 0.5

    assert torch.equal(unpack(pack(mask), 103), mask.cpu())
