"""Scores to masks, masks to distances: pure functions on tensors.

All entries that are ranked make one flat mask, representative after representative, so that one
selection and one comparison serve the whole network. In every mask **True = kept**.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from torch_worm_optim.counting import count_all_differing, count_bits
from torch_worm_optim.threshold import AddUp, NotFiniteError, Scores, add_up_one, remove_lowest

# A byte holds one bit for each of the last eight masks.
_BITS = 8
# Entries that are compared at once, so that no copy of the window is made.
_PART = 120 << 12
# So few are compared, if their window is one row, and counted, all at once.
_FEW = 1 << 15
# Entries of a layer that are looked at first to see whether any are kept.
GLANCE = 1 << 12


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


class Drawn(NamedTuple):
    """What is to be known of a mask that was put into the window as it was drawn.

    Attributes:
        n_tied: As in :class:`Mask`.
        differences: On how many entries it differs from each older mask, oldest first.
    """

    n_tied: int
    differences: list[int]


class Held(NamedTuple):
    """What one rank holds of a representative whose entries are spread over several.

    Attributes:
        n_entries: How many entries all ranks hold together.
        positions: Turns positions among the entries here into positions among all, in order.
        add_up: Adds counts, an int64 tensor, over the ranks that hold the others.
        domain: The same for all representatives that are spread over the same ranks.
    """

    n_entries: int
    positions: Callable[[Tensor], Tensor]
    add_up: Callable[[Tensor], Tensor]
    domain: Hashable


@torch.no_grad()
def compute_mask(
    entries: Mapping[str, Tensor],
    prune_ratio: float,
    *,
    scope: str = "global",
    min_keep: int = 1,
    held: Mapping[str, Held] | None = None,
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
        held: For entries of which other ranks hold a part, what this one holds; the mask is that of
            all entries, and this is a collective call.

    Returns:
        The :class:`Mask` of the entries given, **True = kept**, on the first tensor's device.

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
    layers = [_layer(tensor, held.get(name) if held else None) for name, tensor in entries.items()]
    if sum(layer.n for layer in layers) == 0:
        raise ValueError("There are no entries to rank: every representative is empty.")
    try:
        if scope == "global":
            return _global_mask(layers, prune_ratio, min_keep)
        drawn = [
            _remove_lowest(
                [layer], min(round(prune_ratio * layer.n), layer.n - min(min_keep, layer.n))
            )
            for layer in layers
        ]
    except NotFiniteError as error:
        bad = [name for name, tensor in entries.items() if not _is_finite(tensor)]
        what = f"{bad[0]!r}: it has" if bad else "the entries that another rank holds: they have"
        raise ValueError(
            f"Cannot rank {what} NaN or infinite entries, so a mask drawn from it would "
            "mean nothing. Training has diverged: lower the learning rate, clip gradients, or go "
            "back to an earlier checkpoint."
        ) from error
    kept = torch.cat([each.kept.to(layers[0].entries.device) for each in drawn])
    return Mask(kept, sum(each.n_tied for each in drawn))


def _is_finite(tensor: Tensor) -> bool:
    magnitudes = tensor.detach().abs() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.isfinite(magnitudes).all())


class _Layer(NamedTuple):
    """What this process holds of one representative."""

    entries: Tensor
    held: Held | None
    n: int  # entries, wherever they are


def _layer(entries: Tensor, held: Held | None) -> _Layer:
    return _Layer(entries, held, entries.numel() if held is None else held.n_entries)


def _global_mask(layers: list[_Layer], prune_ratio: float, min_keep: int) -> Mask:
    n = sum(layer.n for layer in layers)
    n_remove = round(prune_ratio * n)
    mask = _remove_lowest(layers, n_remove)
    # The lowest of all are the lowest of each representative, so as long as enough of each are
    # left, the entries to be set aside are among them and the mask is what it would be with them
    # set aside.
    quotas = [min(min_keep, layer.n) for layer in layers]
    if _all_keep(mask.kept, layers, quotas):
        return mask
    highest = [
        _remove_lowest([layer], layer.n - quota).kept
        for layer, quota in zip(layers, quotas, strict=True)
    ]
    return _remove_lowest(layers, min(n_remove, n - sum(quotas)), highest)


def _all_keep(kept: Tensor, layers: list[_Layer], quotas: list[int]) -> bool:
    """Whether each layer keeps at least so many of its entries."""
    sizes = [layer.entries.numel() for layer in layers]
    domains, add_up = _domains([layer.held for layer in layers])
    if kept.numel() <= _FEW and add_up is add_up_one:
        asked = [quota for quota, size in zip(quotas, sizes, strict=True) if size]
        lasts = _lasts(tuple(size for size in sizes if size), kept.device)
        up_to = kept.cumsum(0).index_select(0, lasts).tolist()
        return all(n - m >= q for n, m, q in zip(up_to, [0, *up_to], asked, strict=False))
    # Most often a glance at the first few of each is enough to know.
    # All ranks must look as often, whatever they hold.
    for at_most in sorted({GLANCE, max(GLANCE, *(layer.n for layer in layers))}):
        parts = torch.split(kept, sizes)
        counts = torch.stack([part[:at_most].count_nonzero() for part in parts])
        if add_up is not add_up_one:
            of_domains = []
            for members in domains:
                of_domains.append(torch.zeros_like(counts))
                of_domains[-1][members] = counts[members]
            counts = add_up(of_domains)
        if all(n >= quota for n, quota in zip(counts.tolist(), quotas, strict=True)):
            return True
    return False


@lru_cache(maxsize=16)
def _lasts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the last of each layer is. To make it takes a tenth of a small network's sample."""
    return torch.tensor([end - 1 for end in accumulate(sizes)], device=device)


def _domains(shares: Sequence[Held | None]) -> tuple[list[list[int]], AddUp]:
    """Which are spread over the same ranks, by index, and what adds up a count of each."""
    if all(held is None for held in shares):
        return [list(range(len(shares)))], add_up_one
    members: dict[Hashable, list[int]] = {}
    for index, held in enumerate(shares):
        members.setdefault(held and held.domain, []).append(index)
    holders = [shares[first] for first, *_ in members.values()]

    def add_up(counts: Sequence[Tensor]) -> Tensor:
        sums = [
            count if held is None else held.add_up(count)
            for held, count in zip(holders, counts, strict=True)
        ]
        return torch.stack(sums).sum(0)

    return list(members.values()), add_up


def _remove_lowest(layers: list[_Layer], count: int, aside: list[Tensor] | None = None) -> Mask:
    """Mask without the ``count`` lowest entries not set aside, the earlier first among equals."""
    device = layers[0].entries.device
    domains, add_up = _domains([layer.held for layer in layers])
    if add_up is add_up_one:
        spared = None if aside is None else torch.cat([each.to(device) for each in aside])
        positions = None if spared is None else spared.nonzero().view(-1)
        place = Scores([layer.entries for layer in layers], aside=positions, device=device)
        selection = remove_lowest([place], count)
        return Mask(selection.kept[0], selection.n_tied)
    begins = list(accumulate((layer.n for layer in layers), initial=0))
    places = []
    for members in domains:
        own = [layers[index] for index in members]
        starts = [begins[index] for index in members]
        spared = None if aside is None else torch.cat([aside[i].to(device) for i in members])
        places.append(
            Scores(
                [layer.entries for layer in own],
                partial(_positions, own, starts),
                None if spared is None else spared.nonzero().view(-1),
                device,
            )
        )
    selection = remove_lowest(places, count, add_up)
    if len(places) == 1:
        return Mask(selection.kept[0], selection.n_tied)
    parts: list[Tensor] = [*layers[0].entries.new_empty(len(layers), 0)]
    for members, kept in zip(domains, selection.kept, strict=True):
        sizes = [layers[index].entries.numel() for index in members]
        for index, part in zip(members, torch.split(kept, sizes), strict=True):
            parts[index] = part
    return Mask(torch.cat(parts), selection.n_tied)


def _positions(layers: Sequence[_Layer], begins: Sequence[int], here: Tensor) -> Tensor:
    """Positions among all entries of all layers, of positions among those of these layers here."""
    sizes = [layer.entries.numel() for layer in layers]
    ends = torch.tensor(list(accumulate(sizes, initial=0)), device=here.device)
    cuts = torch.searchsorted(here, ends).tolist()
    there = torch.empty_like(here)
    for layer, begin, start, first, last in zip(
        layers, begins, ends.tolist(), cuts, cuts[1:], strict=False
    ):
        if first < last:
            within = here[first:last] - start
            there[first:last] = begin + (layer.held.positions(within) if layer.held else within)
    return there


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
    for held, new in zip(_parts(window[0]), _parts(mask), strict=True):
        torch.add(new.view(torch.uint8), held, alpha=2, out=held)


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


def window_distances(
    window: Tensor, n_held: int, shares: Sequence[tuple[int, Held | None]] | None = None
) -> tuple[float, ...]:
    r"""Distances from the newest mask to each older one, oldest first, in one pass.

    .. math:: d_j = d(m_\mathrm{newest}, m_j) \quad \text{for each older mask } m_j

    Args:
        window: What :func:`push_mask_` filled.
        n_held: How many masks it holds, the newest counted; at least 1.
        shares: For each representative how many entries are in this window, and what other ranks
            hold, if they do; then this is a collective call (default: all are here).

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
    if shares is None:
        n_entries = window.shape[1]
        return tuple(n / n_entries for n in window_differences(window, n_held).tolist())
    domains, add_up = _domains([held for _, held in shares])
    if len(domains) == 1:
        counts = [window_differences(window, n_held)]
    else:
        parts = torch.split(window, [size for size, _ in shares], dim=1)
        counts = [
            torch.stack([window_differences(parts[index], n_held) for index in members]).sum(0)
            for members in domains
        ]
    n_entries = sum(held.n_entries if held else size for size, held in shares)
    return tuple(count / n_entries for count in add_up(counts).tolist())


def window_differences(window: Tensor, n_held: int) -> Tensor:
    """On how many entries the newest mask differs from each older one, oldest first.

    An entry's byte, flipped where the newest mask has a one, has a bit set for every older mask
    that differs from the newest.

    Args:
        window: What :func:`push_mask_` filled, or some of its columns.
        n_held: How many masks it holds, the newest counted; at least 1.

    Returns:
        int64 tensor of shape ``(n_held - 1,)``.

    Example:
        >>> window = new_window(2, window=5)
        >>> for mask in ([True, False], [False, False], [True, True]):
        ...     push_mask_(window, torch.tensor(mask))
        >>> window_differences(window, n_held=3)
        tensor([1, 2])
    """
    if window.shape[0] == 1 and window.shape[1] <= _FEW:
        return count_all_differing(window[0])[_BITS - n_held : _BITS - 1]
    counts = []
    for number, row in enumerate(window):
        ages = range(max(1, number * _BITS), min(n_held, (number + 1) * _BITS))
        if ages:
            flipped = _flipped(window[0], row)
            counts.append(count_bits(flipped, [age % _BITS for age in reversed(ages)]))
    return torch.cat(counts[::-1]) if counts else window.new_zeros(0, dtype=torch.int64)


def _flipped(newest: Tensor, row: Tensor) -> Iterator[Tensor]:
    """The bytes of a row, part by part, with all bits flipped where the newest mask has a one."""
    flip = newest.new_empty(min(_PART, len(newest)))
    for first, part in zip(_parts(newest), _parts(row), strict=True):
        out = flip[: len(part)]
        # 0 or, by wrapping around, 255
        yield torch.bitwise_and(first, 1, out=out).neg_().bitwise_xor_(part)


def _parts(row: Tensor) -> Sequence[Tensor]:
    return torch.split(row, _PART) if len(row) > _PART else (row,)
