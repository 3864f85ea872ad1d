"""What every way of drawing a mask into the window is held against."""

from __future__ import annotations

import torch

from torch_worm_optim.masks import compute_mask, new_window, push_mask_, window_distances


def check_equal(how, entries, ratio, window, min_keep, may_give_up):
    """One mask after the other, until the window is full, is that of the ordinary way.

    `how` is a module that has `can_draw` and `draw_mask_`. Returns how often it gave up.
    """
    weights = list(entries.values())
    n = sum(tensor.numel() for tensor in weights)
    quotas = [min(min_keep, tensor.numel()) for tensor in weights]
    bits, twin = new_window(n, window), new_window(n, window)
    gave_up = 0
    for n_held in range(1, window + 2):
        assert how.can_draw(weights, bits)
        mask = compute_mask(entries, ratio, min_keep=min_keep)
        before = bits.clone()
        push_mask_(twin, mask.kept)
        drawn = how.draw_mask_(weights, bits, round(ratio * n), quotas, window - 1)
        if drawn is None:
            gave_up += 1
            assert may_give_up
            # The oldest of eight may be lost: it would have fallen out.
            assert torch.equal(bits & 0x7F, before & 0x7F)
            push_mask_(bits, mask.kept)
        else:
            assert drawn.n_tied == mask.n_tied
            full = tuple(count / n for count in drawn.differences)
            assert full == window_distances(twin, window)
        assert torch.equal(bits, twin)
        # Half of them change places.
        for tensor in weights:
            flat = tensor.reshape(-1)
            flat[n_held % 2 :: 2] = flat[n_held % 2 :: 2].flip(0)
            tensor.copy_(flat.view(tensor.shape))
    return gave_up
