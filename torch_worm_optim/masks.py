"""Scores to masks, masks to distances: pure functions on tensors.

All entries that are ranked make one flat mask, representative after representative, so that one
selection and one comparison serve the whole network. In every mask **True = kept**.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_worm_optim.threshold import (
    NotFiniteError,
    Scores,
    check_finite,
    find_threshold,
    total,
)

# A byte holds one bit for each of the last eight masks.
_BITS = 8
# Entries that are compared at once, so that no copy of the window is made.
_PART = 1 << 20


def unit_magnitudes(parts: Sequence[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
    r"""Score of every unit: the mean magnitude of its entries, its L1 norm per entry.

    .. math:: s_u = \frac{1}{|u|} \sum_{i \in u} |w_i|

    The L1 norm of a filter ranks the filters of a layer in Li et al. [1]; divided by the number of
    entries it compares units of different sizes too.

    Args:
        parts: Entries that make up the same units, of any shapes, floating or complex dtypes and
            devices, each with the number of units along its dimensions, see :func:`spread_mask`.

    Returns:
        Tensor of shape ``(n_units,)`` on the first part's device, in float32 or wider: sums of
        half-precision magnitudes are not exact in their own type.

    Example:
        >>> query, key = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0], [-7.0]])
        >>> unit_magnitudes([(query, (2,)), (key, (2,))])
        tensor([2.0000, 4.6667])

    References:
        [1] Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017,
        https://arxiv.org/abs/1608.08710.
    """
    sums = []
    for entries, units in parts:
        blocks = entries.detach()
        blocks = (blocks.float() if blocks.dtype.itemsize == 1 else blocks).view(
            _block_shape(entries.shape, units)
        )
        magnitudes = blocks.abs()
        wide = torch.promote_types(magnitudes.dtype, torch.float32)
        within = tuple(range(1, blocks.ndim, 2))
        sums.append(magnitudes.sum(within, dtype=wide).flatten().to(parts[0][0].device))
    n_entries = sum(entries.numel() for entries, _ in parts)
    return torch.stack(sums).sum(0).div_(n_entries // sums[0].numel())


def spread_mask(mask: Tensor, units: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """The mask of entries that a mask of units means.

    Args:
        mask: Bool mask of shape ``(n_units,)``, **True = kept**.
        units: How many units there are along each dimension of ``shape``, each a divisor of it;
            dimensions left out have one. ``()`` where every entry is a unit of its own.
        shape: Shape of the entries.

    Returns:
        Bool mask of that shape; a view of ``mask`` where that is possible.

    Example:
        >>> spread_mask(torch.tensor([True, False]), (1, 2), (2, 4))
        tensor([[ True,  True, False, False],
                [ True,  True, False, False]])
    """
    if not units:
        return mask.view(tuple(shape))
    blocks = _block_shape(shape, units)
    one_each = [size if i % 2 == 0 else 1 for i, size in enumerate(blocks)]
    return mask.view(one_each).expand(blocks).reshape(tuple(shape))


def _block_shape(shape: Sequence[int], units: tuple[int, ...]) -> list[int]:
    """Each dimension as (units, entries in a unit)."""
    filled = [*units, *[1] * (len(shape) - len(units))]
    pairs = [(n, size // n) for n, size in zip(filled, shape, strict=True)]
    return [size for pair in pairs for size in pair]


class Mask(NamedTuple):
    """A mask and how far chance had a hand in it.

    Attributes:
        kept: Bool tensor of shape ``(n,)``; **True = kept**.
        n_tied: How many entries have the highest score that was removed, if some of them were kept
            all the same, so that their order decided and not their score; else 0. In ``"layer"``
            scope the sum over layers.
    """

    kept: Tensor
    n_tied: int


def compute_mask(
    entries: Mapping[str, Tensor],
    prune_ratio: float,
    *,
    scope: str = "global",
    min_keep: int = 1,
) -> Mask:
    r"""Mask that removes exactly the ``round(prune_ratio * n)`` entries of lowest magnitude.

    .. math:: m_i = [\,\mathrm{rank}(|w_i|) \ge \mathrm{round}(p\,n)\,]

    where entries are ranked by magnitude, the ranking of magnitude pruning and, for BatchNorm
    scales, of network slimming [2]; and, among equals, by position: the earlier goes first. The
    mask is therefore a function of the weights alone, on every device. The first ``min_keep`` of
    each representative, counted from the top, are set aside before anything is removed.

    Args:
        entries: The entries to rank, or scores of units, by the name of their parameter; tensors of
            any shapes, floating or complex dtypes and devices, ``n`` entries in all.
        prune_ratio: Share of entries to remove, in [0, 1).
        scope: ``"global"`` ranks all entries together, as EB Train does [1]; ``"layer"`` ranks each
            representative alone and removes ``round(prune_ratio * size)`` of each.
        min_keep: Entries of each representative that always survive, 0 or more. Where that leaves
            fewer than are to be removed, all that are left are removed.

    Returns:
        The :class:`Mask`, **True = kept**, on the first tensor's device.

    Raises:
        ValueError: If ``prune_ratio`` or ``scope`` is none of these, if there is no entry at all,
            or if one is NaN or infinite; the message names the parameter.

    Example:
        >>> weights = {"bn.weight": torch.tensor([-0.3, 0.1]), "fc": torch.tensor([[0.2, 0.4]])}
        >>> compute_mask(weights, 0.5).kept
        tensor([ True, False, False,  True])
        >>> compute_mask(weights, 0.75, min_keep=0).kept
        tensor([False, False, False,  True])

    References:
        [1] You et al., "Drawing Early-Bird Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957.

        [2] Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
        2017, https://arxiv.org/abs/1708.06519.
    """
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"`prune_ratio` must be in [0, 1), got {prune_ratio}.")
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")
    tensors = [tensor.detach() for tensor in entries.values()]
    sizes = [tensor.numel() for tensor in tensors]
    if sum(sizes) == 0:
        raise ValueError("There are no entries to rank: every representative is empty.")
    try:
        if scope == "global":
            return _global_mask(tensors, sizes, prune_ratio, min_keep)
        layers = [
            _remove_lowest(
                Scores([tensor]), min(round(prune_ratio * size), size - min(min_keep, size))
            )
            for tensor, size in zip(tensors, sizes, strict=True)
        ]
    except NotFiniteError as error:
        name = next(n for n, t in entries.items() if not torch.isfinite(t.detach().abs()).all())
        raise ValueError(
            f"Cannot rank {name!r}: it has NaN or infinite entries, so a mask drawn from it would "
            "mean nothing. Training has diverged: lower the learning rate, clip gradients, or go "
            "back to an earlier checkpoint."
        ) from error
    kept = torch.cat([layer.kept.to(tensors[0].device) for layer in layers])
    return Mask(kept, sum(layer.n_tied for layer in layers))


def _global_mask(
    tensors: list[Tensor], sizes: list[int], prune_ratio: float, min_keep: int
) -> Mask:
    n_remove = round(prune_ratio * sum(sizes))
    mask = _remove_lowest(Scores(tensors), n_remove)
    # The lowest of all are the lowest of each representative, so as long as enough of each are
    # left, the entries to be set aside are among them and the mask is what it would be with them
    # set aside.
    parts = torch.split(mask.kept, sizes)
    quotas = [min(min_keep, size) for size in sizes]
    n_kept = torch.stack([part.count_nonzero() for part in parts]).tolist()
    if all(n >= quota for n, quota in zip(n_kept, quotas, strict=True)):
        return mask
    highest = [
        _remove_lowest(Scores([tensor]), size - quota).kept.to(tensors[0].device)
        for tensor, size, quota in zip(tensors, sizes, quotas, strict=True)
    ]
    aside = torch.cat(highest).nonzero().flatten()
    return _remove_lowest(Scores(tensors, aside), min(n_remove, sum(sizes) - len(aside)))


def _remove_lowest(scores: Scores, count: int) -> Mask:
    """Mask without the ``count`` lowest scores not set aside, the earlier first among equals."""
    kept = torch.ones(scores.n, dtype=torch.bool, device=scores.device)
    if count == 0:
        check_finite(scores)
        return Mask(kept, 0)
    threshold = find_threshold(scores, count)
    n_above = []
    for start, chunk in scores:
        # Written as numbers first: that is faster than comparing into bools and counting those.
        n_above.append(torch.gt(chunk, threshold, out=chunk).sum())
        kept[start : start + len(chunk)].copy_(chunk)
    n_spared = scores.n - count - total(n_above)
    if n_spared == 0 and scores.aside is None:
        return Mask(kept, 0)
    n_equal = scores.count_equal(threshold)
    n_tied = n_equal if scores.aside is None else Scores(scores.entries).count_equal(threshold)
    n_lost = n_equal - n_spared
    seen = 0
    for start, chunk in scores:
        equal = (chunk == threshold).nonzero().flatten()
        kept[start + equal[max(0, n_lost - seen) :]] = True
        seen += len(equal)
    return Mask(kept, n_tied if n_tied > n_lost else 0)


def mask_distance(a: Tensor, b: Tensor) -> float:
    r"""Share of entries on which two masks differ.

    .. math:: d(a, b) = \frac{1}{n}\,\bigl|\{\,i : a_i \ne b_i\,\}\bigr|

    The normalised Hamming distance of Early-Bird tickets [1]: 0 for equal masks, 1 for opposite
    ones.

    Args:
        a: Bool mask of any shape; **True = kept**.
        b: Mask of the same shape and device.

    Returns:
        The distance in [0, 1], one division of two integers.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> mask_distance(torch.tensor([True, True]), torch.tensor([True, False]))
        0.5

    References:
        [1] You et al., "Drawing Early-Bird Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957.
    """
    if a.shape != b.shape:
        raise ValueError(f"Masks must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    return int((a ^ b).count_nonzero()) / a.numel()


def new_window(n_entries: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """A window that holds no mask yet.

    A mask needs one bit an entry, so a byte holds the last eight: bit ``i`` of an entry's byte is
    that entry in the mask drawn ``i`` samples ago. Windows of more than eight masks take further
    bytes.

    Args:
        n_entries: Number of ranked entries.
        window: How many masks are held, the newest counted.
        device: Where the window lives.

    Returns:
        uint8 tensor of shape ``(ceil(window / 8), n_entries)``, all zero.

    Example:
        >>> new_window(3, window=5)
        tensor([[0, 0, 0]], dtype=torch.uint8)
    """
    return torch.zeros(-(-window // _BITS), n_entries, dtype=torch.uint8, device=device)


def push_mask_(window: Tensor, mask: Tensor) -> None:
    """Put a mask into the window as its newest, in place; the oldest falls out.

    Args:
        window: What :func:`new_window` made; modified in place.
        mask: Bool mask of shape ``(n_entries,)``, **True = kept**.

    Example:
        >>> window = new_window(2, window=5)
        >>> push_mask_(window, torch.tensor([True, False]))
        >>> push_mask_(window, torch.tensor([True, True]))
        >>> window
        tensor([[3, 1]], dtype=torch.uint8)
    """
    for row in range(window.shape[0] - 1, 0, -1):
        carried = window[row - 1] >> (_BITS - 1)
        window[row].bitwise_left_shift_(1).bitwise_or_(carried)
    window[0].bitwise_left_shift_(1).bitwise_or_(mask)


def newest_mask(window: Tensor) -> Tensor:
    """The mask pushed last.

    Args:
        window: A window that at least one mask was pushed into.

    Returns:
        Bool tensor of shape ``(n_entries,)``, **True = kept**; a copy.

    Example:
        >>> window = new_window(2, window=5)
        >>> push_mask_(window, torch.tensor([True, False]))
        >>> newest_mask(window)
        tensor([ True, False])
    """
    return (window[0] & 1).bool()


def window_distances(window: Tensor, n_held: int) -> tuple[float, ...]:
    r"""Distances from the newest mask to each older one, oldest first, in one pass.

    .. math:: d_j = d(m_\mathrm{newest}, m_j) \quad \text{for each older mask } m_j

    An entry's byte, flipped where the newest mask has a one, has a bit set for every older mask
    that differs from the newest. How often each of the 256 bytes occurs gives all distances at
    once.

    Args:
        window: What :func:`push_mask_` filled.
        n_held: How many masks it holds, the newest counted; at least 1.

    Returns:
        ``n_held - 1`` distances in [0, 1], the same as :func:`mask_distance` of the masks one by
        one.

    Example:
        >>> window = new_window(2, window=5)
        >>> for mask in ([True, False], [False, False], [True, True]):
        ...     push_mask_(window, torch.tensor(mask))
        >>> window_distances(window, n_held=3)
        (0.5, 1.0)
    """
    n_entries = window.shape[1]
    histograms = torch.zeros(len(window), 1 << _BITS, dtype=torch.int64, device=window.device)
    for part in torch.split(window, _PART, dim=1):
        flip = (part[0] & 1).neg_()  # 0 or, by wrapping around, 255
        for histogram, row in zip(histograms, part, strict=True):
            histogram += (row ^ flip).bincount(minlength=1 << _BITS)
    patterns = torch.arange(1 << _BITS, device="cpu")
    counts = [
        int(histogram[(patterns >> bit) & 1 == 1].sum())
        for histogram in histograms.cpu()
        for bit in range(_BITS)
    ]
    return tuple(counts[age] / n_entries for age in range(n_held - 1, 0, -1))
