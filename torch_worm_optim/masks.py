"""Scores to masks, masks to distances: pure functions on tensors.

All entries that are ranked stand in one flat vector, representative after representative, so that
one selection, one comparison and one histogram serve the whole network. In every mask **True =
kept**.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A byte holds one bit for each of the last eight masks.
_BITS = 8


def magnitude_scores(entries: Mapping[str, Tensor]) -> Tensor:
    r"""Score of every entry, flattened: its magnitude.

    .. math:: s_i = |w_i|

    This is the ranking of magnitude pruning, and of BatchNorm scales in network slimming [1].

    Args:
        entries: Representative entries by parameter name, of any shapes, floating or complex dtypes
            and devices. The order of the mapping is the order in which ties are broken later.

    Returns:
        Tensor of shape ``(n,)`` on the first tensor's device, in the widest dtype among them
        (float32 for 8-bit floats; the real type for complex ones).

    Raises:
        ValueError: If there is no entry at all, or one is NaN or infinite; the message names the
            parameter.

    Example:
        >>> magnitude_scores({"bn.weight": torch.tensor([-2.0, 1.0]), "fc": torch.ones(1, 2)})
        tensor([2., 1., 1., 1.])

    References:
        [1] Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
        2017, https://arxiv.org/abs/1708.06519.
    """
    tensors = [tensor.detach() for tensor in entries.values()]
    if sum(tensor.numel() for tensor in tensors) == 0:
        raise ValueError("There are no entries to rank: every representative is empty.")
    device = tensors[0].device
    # 8-bit floats know neither abs() nor type promotion.
    flat = [(t.float() if t.dtype.itemsize == 1 else t).to(device).flatten() for t in tensors]
    scores = torch.cat(flat)
    scores = scores.abs() if scores.is_complex() else scores.abs_()
    # max() hands NaN on, so that one number tells of both faults.
    if not torch.isfinite(scores.max()):
        name = next(n for n, t in entries.items() if not torch.isfinite(t.detach().abs()).all())
        raise ValueError(
            f"Cannot rank {name!r}: it has NaN or infinite entries, so a mask drawn from it would "
            "mean nothing. Training has diverged: lower the learning rate, clip gradients, or go "
            "back to an earlier checkpoint."
        )
    return scores


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
    scores: Tensor,
    sizes: Sequence[int],
    prune_ratio: float,
    *,
    scope: str = "global",
    min_keep: int = 1,
) -> Mask:
    r"""Mask that removes exactly the lowest ``round(prune_ratio * n)`` scores.

    .. math:: m_i = [\,\mathrm{rank}(s_i) \ge \mathrm{round}(p\,n)\,]

    where entries are ranked by score and, among equal scores, by position: the earlier goes first.
    The mask is therefore a function of the scores alone, on every device. The first ``min_keep`` of
    each representative, counted from the top, are set aside before anything is removed.

    Args:
        scores: Finite non-negative scores of all representatives, one after the other, shape
            ``(n,)``.
        sizes: Number of entries of each representative; they add up to ``n``.
        prune_ratio: Share of entries to remove, in [0, 1).
        scope: ``"global"`` ranks all entries together, as EB Train does [1]; ``"layer"`` ranks each
            representative alone and removes ``round(prune_ratio * size)`` of each.
        min_keep: Entries of each representative that always survive, 0 or more. Where that leaves
            fewer than are to be removed, all that are left are removed.

    Returns:
        The :class:`Mask`, **True = kept**, on the device of ``scores``.

    Raises:
        ValueError: If ``prune_ratio`` or ``scope`` is none of these, or ``sizes`` do not add up to
            the number of scores.

    Example:
        >>> compute_mask(torch.tensor([0.3, 0.1, 0.2, 0.4]), [2, 2], 0.5).kept
        tensor([ True, False, False,  True])
        >>> compute_mask(torch.tensor([0.1, 0.2, 0.3, 0.4]), [2, 2], 0.5, min_keep=0).kept
        tensor([False, False,  True,  True])

    References:
        [1] You et al., "Drawing Early-Bird Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957.
    """
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"`prune_ratio` must be in [0, 1), got {prune_ratio}.")
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}.")
    if sum(sizes) != scores.numel():
        raise ValueError(
            f"`sizes` add up to {sum(sizes)} entries, but there are {scores.numel()} scores."
        )
    if scope == "layer":
        layers = [
            _remove_lowest(layer, min(round(prune_ratio * size), size - min(min_keep, size)))
            for layer, size in zip(torch.split(scores, list(sizes)), sizes, strict=True)
        ]
        kept = torch.cat([layer.kept for layer in layers])
        return Mask(kept, sum(layer.n_tied for layer in layers))

    n_remove = round(prune_ratio * scores.numel())
    mask = _remove_lowest(scores, n_remove)
    # The lowest of all are the lowest of each representative, so as long as enough of each are
    # left, the entries to be set aside are among them and the mask is what it would be with them
    # set aside.
    # On the host whatever the default device is: the counts are read there.
    quotas = torch.tensor([min(min_keep, size) for size in sizes], device="cpu")
    n_kept = torch.stack([part.count_nonzero() for part in torch.split(mask.kept, list(sizes))])
    if bool((n_kept.cpu() >= quotas).all()):
        return mask
    set_aside = torch.cat(
        [
            _remove_lowest(part, size - min(min_keep, size)).kept
            for part, size in zip(torch.split(scores, list(sizes)), sizes, strict=True)
        ]
    )
    n_left = scores.numel() - int(quotas.sum())
    return _remove_lowest(scores, min(n_remove, n_left), set_aside)


def _remove_lowest(scores: Tensor, count: int, set_aside: Tensor | None = None) -> Mask:
    """Mask without the ``count`` lowest scores not set aside, the earlier first among equals."""
    if count == 0:
        return Mask(torch.ones_like(scores, dtype=torch.bool), 0)
    ranked = scores if set_aside is None else scores.masked_fill(set_aside, torch.inf)
    threshold = ranked.kthvalue(count).values
    kept = ranked > threshold
    n_spared = scores.numel() - count - int(kept.count_nonzero())
    if n_spared == 0 and set_aside is None:
        return Mask(kept, 0)
    at_threshold = (ranked == threshold).nonzero().flatten()
    n_lost = at_threshold.numel() - n_spared
    kept[at_threshold[n_lost:]] = True
    n_tied = int((scores == threshold).count_nonzero())
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
    flip = (window[0] & 1).neg()  # 0 or, by wrapping around, 255
    histograms = torch.stack([(row ^ flip).bincount(minlength=1 << _BITS) for row in window])
    patterns = torch.arange(1 << _BITS, device="cpu")
    counts = [
        int(histogram[(patterns >> bit) & 1 == 1].sum())
        for histogram in histograms.cpu()
        for bit in range(_BITS)
    ]
    return tuple(counts[age] / n_entries for age in range(n_held - 1, 0, -1))
