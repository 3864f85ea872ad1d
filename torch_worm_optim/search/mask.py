"""From weights to a mask: the entries of lowest magnitude go, exactly as many as asked for.

Magnitudes are compared as integers, called keys: the bits of a float without its sign are ordered
as magnitudes are, with infinity and NaN above all numbers. So nothing is rounded, and a processor
that flushes tiny numbers to zero does not change the order.

There are two ways to the same mask. On the host a sample brackets the threshold, and one pass keeps
what is above the bracket and collects the few entries inside it. On an accelerator, over several
ranks, and where a large share of all entries is equal, the threshold is found digit by digit, from
counts alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim._checks import check_choice

SCOPES = ("global", "selector", "layer")
# Keys of this many entries stay in the processor's cache while they are compared.
_HOST_CHUNK = 1 << 16
# On an accelerator each operator has a price of its own, so chunks only bound the memory.
_DEVICE_CHUNK = 1 << 24
# Entries looked at to bracket the threshold. Its rank in a sample of this size has a standard
# deviation of at most 0.1 %; four of them on each side make a bracket of 0.8 % of all entries.
_SAMPLE = 1 << 18
_STANDARD_DEVIATIONS = 4
# If more than this share of the entries is inside the bracket, as when many are equal, the
# threshold is found by counting instead: to store their positions would take eight bytes each.
_LARGEST_BRACKET = 1 / 32


class Mask(NamedTuple):
    """A mask, and whether magnitudes alone decided it.

    Attributes:
        kept: Bool tensor of shape ``(n,)``; **True = kept**.
        n_tied: How many entries have the highest magnitude that was removed, if some entries of
            that magnitude were kept, so that their order decided which; else 0. The sum of these
            where not all are ranked together.
    """

    kept: Tensor
    n_tied: int


class Sharding(Protocol):
    """What :func:`compute_mask` asks about a tensor of which other ranks hold a part."""

    @property
    def numel(self) -> int:
        """How many entries all ranks hold together."""
        ...

    @property
    def group(self) -> Hashable:
        """Equal for tensors that are split over the same ranks."""
        ...

    def global_indices(self, local_indices: Tensor) -> Tensor:
        """Flat indices into the entries of all ranks, given those into this rank's, in order."""
        ...

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The sum of an int64 tensor over the ranks of the group; a collective call."""
        ...


@torch.no_grad()
def compute_mask(
    entries: Mapping[str, Tensor],
    prune_ratio: float,
    *,
    scope: str = "global",
    min_keep: int | float = 1,
    shards: Sequence[Sharding | None] | None = None,
    groups: Sequence[int] | None = None,
) -> Mask:
    r"""Mask that removes exactly the ``round(prune_ratio * n)`` entries of lowest magnitude.

    .. math:: m_i = [\,\mathrm{rank}(|w_i|) \ge \mathrm{round}(p\,n)\,]

    where entries are ranked by magnitude, the ranking of magnitude pruning and, for BatchNorm
    scales, of network slimming [2]; and, among equals, by position: the earlier goes first. The
    mask is therefore a function of the weights alone, on every device. The ``min_keep`` highest of
    each representative are set aside before anything is removed.

    Args:
        entries: The entries to rank, or scores of units, by the name to use in error messages;
            tensors of any shapes, floating or complex dtypes and devices, ``n`` entries in all.
        prune_ratio: Share of entries to remove, in [0, 1).
        scope: ``"global"`` ranks all entries together, as EB Train does [1]; ``"layer"`` ranks each
            representative alone, and ``"selector"`` those of each group; both remove
            ``round(prune_ratio * size)`` of each.
        min_keep: How many entries of each representative always survive, 0 or more; or, in (0, 1),
            which share, ``round(min_keep * size)`` and at least one. Where that leaves fewer than
            are to be removed, all that are left are removed.
        shards: For each tensor how it is split over ranks, or None if this rank has all of it
            (default: None for all). With shards this is a collective call.
        groups: For each tensor the number of its group, for ``"selector"`` (default: all of one).

    Returns:
        The :class:`Mask` of the entries given, **True = kept**, on the first tensor's device.

    Raises:
        ValueError: If ``prune_ratio`` or ``scope`` is not one of the values above, if there
            is no entry, or if one is NaN or infinite; the message names the parameter.

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
    check_choice("scope", scope, SCOPES)
    layers = [
        _Layer(name, tensor.detach(), shard)
        for (name, tensor), shard in zip(
            entries.items(), shards or [None] * len(entries), strict=True
        )
    ]
    if sum(layer.numel for layer in layers) == 0:
        raise ValueError("There are no entries to rank: every representative is empty.")
    together: dict[int, list[int]] = {}
    for index in range(len(layers)):
        of_selector = groups[index] if groups else 0
        key = {"global": 0, "selector": of_selector, "layer": index}[scope]
        together.setdefault(key, []).append(index)
    kept: dict[int, Tensor] = {}
    n_tied = 0
    for indices in together.values():
        members = [layers[index] for index in indices]
        mask = _rank_together(members, prune_ratio, min_keep)
        n_tied += mask.n_tied
        parts = torch.split(mask.kept, [layer.entries.numel() for layer in members])
        kept |= zip(indices, parts, strict=True)
    if len(together) == 1:
        return mask
    device = layers[0].entries.device
    return Mask(torch.cat([kept[index].to(device) for index in range(len(layers))]), n_tied)


def _rank_together(layers: Sequence[_Layer], prune_ratio: float, min_keep: int | float) -> Mask:
    """The mask of tensors that are ranked as one."""
    n = sum(layer.numel for layer in layers)
    count = round(prune_ratio * n)
    mask = _remove_lowest(layers, count)
    # If every representative keeps as many anyway, its highest entries are among those kept, and to
    # set them aside first would change nothing.
    quotas = [
        min(max(1, round(min_keep * n)) if 0 < min_keep < 1 else int(min_keep), n)
        for n in (layer.numel for layer in layers)
    ]
    if all(n >= quota for n, quota in zip(_n_kept(layers, mask.kept), quotas, strict=True)):
        return mask
    del mask  # a byte an entry, which the next one needs
    highest = [
        _remove_lowest([layer], layer.numel - quota).kept.nonzero().view(-1)
        for layer, quota in zip(layers, quotas, strict=True)
    ]
    return _remove_lowest(layers, min(count, n - sum(quotas)), highest)


def sum_over_ranks(counts: Tensor, shards: Sequence[Sharding | None]) -> Tensor:
    """Add up counts of several tensors, over the tensors and over the ranks that share them.

    Args:
        counts: int64 tensor of shape ``(..., n_tensors)``, of this rank's entries.
        shards: For each tensor how it is split over ranks, or None if this rank has all of it. With
            shards this is a collective call.

    Returns:
        int64 tensor of shape ``(...)``, equal on all ranks.

    Example:
        >>> sum_over_ranks(torch.tensor([[1, 2], [3, 4]]), [None, None])
        tensor([3, 7])
    """
    totals = torch.zeros_like(counts[..., 0])
    for indices in _groups(shards):
        of_group, shard = counts[..., indices].sum(-1), shards[indices[0]]
        totals += of_group if shard is None else shard.all_reduce(of_group)
    return totals


class _Layer(NamedTuple):
    """One of the tensors to rank."""

    name: str
    entries: Tensor
    shard: Sharding | None

    @property
    def numel(self) -> int:
        """How many entries it has on all ranks."""
        return self.entries.numel() if self.shard is None else self.shard.numel


class _Group:
    """Tensors that are split over the same ranks, read as one sequence of keys.

    Args:
        layers: The tensors.
        starts: Where each starts among the entries of all tensors of all ranks.
        spared: For each tensor the indices of this rank's entries that must be kept, sorted.
        dtype: The float type whose bits are the keys, as wide as the widest tensor.
        device: The device on which keys are compared.
    """

    def __init__(
        self,
        layers: Sequence[_Layer],
        starts: Sequence[int],
        spared: Sequence[Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.starts = layers, starts
        self.dtype, self.device = dtype, device
        self.key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
        self.spared_key = torch.iinfo(self.key_dtype).max
        self.infinity = int(torch.tensor(math.inf, dtype=dtype, device="cpu").view(self.key_dtype))
        self.numels = [layer.entries.numel() for layer in layers]
        self.n = sum(self.numels)
        self.spared: Tensor | None = None
        self.keys_of_spared: Tensor | None = None
        if spared is not None:
            offsets = accumulate(self.numels, initial=0)
            shifted = [each.to(device) + n for each, n in zip(spared, offsets, strict=False)]
            self.spared = torch.cat(shifted)
            values = [
                self._magnitudes(layer.entries.reshape(-1)[each])
                for layer, each in zip(layers, spared, strict=True)
            ]
            self.keys_of_spared = self._keys(torch.cat(values))

    def chunks(self, stride: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The keys of every `stride`-th entry by chunks, each with the index where it begins."""
        start = 0
        for piece in self._pieces():
            first = -start % stride
            keys = self._keys(piece[first::stride])
            if self.spared is not None:
                ends = torch.tensor([start, start + len(piece)], device=self.device)
                begin, end = torch.searchsorted(self.spared, ends).tolist()
                spared = self.spared[begin:end] - start - first
                keys[spared[spared % stride == 0] // stride] = self.spared_key
            yield start, keys
            start += len(piece)

    def _pieces(self) -> Iterator[Tensor]:
        """All entries as flat tensors: small ones joined, large ones cut, views if possible."""
        size = _HOST_CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK
        small: list[Tensor] = []
        n_small = 0
        for layer in self.layers:
            tensor, n = layer.entries, layer.entries.numel()
            if small and n_small + n > size:
                yield torch.cat(small)
                small, n_small = [], 0
            if n <= size:
                small.append(self._magnitudes(tensor.reshape(-1)))
                n_small += n
            elif tensor.is_contiguous():
                yield from torch.split(tensor.view(-1), size)
            else:
                n_rows = max(1, size * len(tensor) // n)
                yield from (rows.reshape(-1) for rows in torch.split(tensor, n_rows))
        if small:
            yield torch.cat(small)

    def _magnitudes(self, tensor: Tensor) -> Tensor:
        """In the type whose bits are the keys, still with a sign unless they were complex."""
        return (tensor.abs() if tensor.is_complex() else tensor).to(self.device, self.dtype)

    def _keys(self, piece: Tensor) -> Tensor:
        """The bits of each magnitude without the sign, a new tensor."""
        bits = self._magnitudes(piece).view(self.key_dtype)
        if self.device.type != "cpu":
            return bits & self.spared_key
        # torch would wake a second thread for each chunk.
        array = bits.numpy()
        return torch.from_numpy(array & array.dtype.type(self.spared_key))

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The sum of counts over the ranks that the tensors are split over."""
        shard = self.layers[0].shard
        return counts if shard is None else shard.all_reduce(counts)

    def global_indices(self, start: int, n: int) -> Tensor:
        """Where `n` entries from `start` on lie among the entries of all tensors of all ranks."""
        parts = []
        begin = 0
        for layer, global_start, numel in zip(self.layers, self.starts, self.numels, strict=True):
            first, last = max(start, begin) - begin, min(start + n, begin + numel) - begin
            if first < last:
                indices = torch.arange(first, last, device=self.device)
                if layer.shard is not None:
                    indices = layer.shard.global_indices(indices)
                parts.append(indices.add_(global_start))
            begin += numel
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.arange(0, device=self.device)


def _groups(shards: Sequence[Sharding | None]) -> list[list[int]]:
    """Which tensors are split over the same ranks, by index, in the order of the first of each."""
    members: dict[Hashable, list[int]] = {}
    for index, shard in enumerate(shards):
        members.setdefault(None if shard is None else shard.group, []).append(index)
    return list(members.values())


def _remove_lowest(
    layers: Sequence[_Layer], count: int, spared: Sequence[Tensor] | None = None
) -> Mask:
    """Mask without the `count` lowest entries, the earlier among equals.

    Of each layer those whose indices are in `spared` are passed over.
    """
    device = layers[0].entries.device
    wide = any(layer.entries.dtype in (torch.float64, torch.complex128) for layer in layers)
    starts = list(accumulate((layer.numel for layer in layers), initial=0))
    members = _groups([layer.shard for layer in layers])
    groups = [
        _Group(
            [layers[i] for i in indices],
            [starts[i] for i in indices],
            None if spared is None else [spared[i] for i in indices],
            torch.float64 if wide else torch.float32,
            device,
        )
        for indices in members
    ]
    mask = None
    if device.type == "cpu" and all(layer.shard is None for layer in layers):
        mask = _keep_above_sampled_bracket(groups[0], count)
    if mask is None:
        kept, n_tied = _keep_above_counted_threshold(groups, count, starts[-1])
        if len(groups) == 1:
            return Mask(kept[0], n_tied)
        of_layer: dict[int, Tensor] = {}
        for indices, group, of_group in zip(members, groups, kept, strict=True):
            of_layer |= zip(indices, torch.split(of_group, group.numels), strict=True)
        mask = Mask(torch.cat([of_layer[i] for i in range(len(layers))]), n_tied)
    return mask


def _keep_above_sampled_bracket(group: _Group, count: int) -> Mask | None:
    """The mask in one pass; None where the bracket missed the threshold or holds too many."""
    low, high = _bracket(group, count)
    kept = np.empty(group.n, dtype=bool)
    inside, indices = [], []
    n_left = group.n if group.n < 2 * _SAMPLE else group.n * _LARGEST_BRACKET
    for start, chunk in group.chunks():
        keys = chunk.numpy()
        if group.spared is None and keys.size and keys.max() >= group.infinity:
            raise _not_finite(group.layers)
        above = np.greater(keys, high, out=kept[start : start + len(keys)])
        found = np.flatnonzero((keys >= low) ^ above)
        n_left -= len(found)
        if n_left < 0:
            return None
        inside.append(keys[found])
        indices.append(found + start)
    bracketed, where = np.concatenate(inside), np.concatenate(indices)
    n_above = int(np.count_nonzero(kept))
    rank = count - (group.n - n_above - len(bracketed))
    if not 0 < rank <= len(bracketed):
        return None
    threshold = np.partition(bracketed, rank - 1)[rank - 1]
    tied = where[bracketed == threshold]
    n_removed = rank - int(np.count_nonzero(bracketed < threshold))
    kept[where[bracketed > threshold]] = True
    kept[tied[n_removed:]] = True
    n_tied = len(tied)
    if group.keys_of_spared is not None:
        n_tied += int(_counts([group.keys_of_spared == threshold]))
    return Mask(torch.from_numpy(kept), n_tied if n_tied > n_removed else 0)


def _bracket(group: _Group, rank: int) -> tuple[int, int]:
    """Two keys that most likely have the `rank`-th lowest between them."""
    lowest, highest = 0, group.infinity - 1
    if group.n < 2 * _SAMPLE:
        return lowest, highest
    stride = group.n // _SAMPLE
    # Rows of matrices mostly have lengths of small factors. A stride that shares one with them
    # would see the same few columns of all rows.
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    sample = np.concatenate([keys.numpy() for _, keys in group.chunks(stride)])
    expected = rank / group.n * len(sample)
    margin = _STANDARD_DEVIATIONS * math.sqrt(len(sample)) / 2
    first, last = int(expected - margin), int(expected + margin)
    sample.partition([max(first, 0), min(last, len(sample) - 1)])
    return (
        int(sample[first]) if first >= 0 else lowest,
        min(int(sample[last]), highest) if last < len(sample) else highest,
    )


def _keep_above_counted_threshold(
    groups: Sequence[_Group], count: int, n: int
) -> tuple[list[Tensor], int]:
    """For each group the mask of its entries, and how many are tied, from counts over all ranks."""
    device = groups[0].device

    def n_up_to(keys: Tensor) -> Tensor:
        """For each of these keys, how many entries have it or a lower one."""
        keys = keys.clamp(max=groups[0].spared_key)
        return _count(groups, lambda _group, _start, chunk: [chunk <= key for key in keys])

    highest_finite = torch.tensor([groups[0].infinity - 1], device=device)
    if groups[0].spared is None and int(n_up_to(highest_finite)) < n:
        raise _not_finite([layer for group in groups for layer in group.layers])
    if count == 0:
        return [torch.ones(group.n, dtype=torch.bool, device=device) for group in groups], 0
    n_bits = torch.iinfo(groups[0].key_dtype).bits - 1
    threshold = _lowest_that_reaches(count, n_up_to, n_bits, device)
    n_below, n_reached = n_up_to(torch.stack([threshold - 1, threshold])).tolist()
    n_removed, n_tied = count - n_below, n_reached - n_below

    def tied_up_to(last: Tensor, group: _Group, start: int, keys: Tensor) -> list[Tensor]:
        """For each of these indices, which entries equal the threshold and lie at or before it."""
        tied, indices = keys == threshold, group.global_indices(start, len(keys))
        return [tied & (indices <= each) for each in last]

    some_tied_stay = n_removed < n_tied
    last_removed = torch.zeros((), dtype=torch.int64, device=device)
    if some_tied_stay:
        last_removed = _lowest_that_reaches(
            n_removed,
            lambda last: _count(groups, functools.partial(tied_up_to, last)),
            n.bit_length(),
            device,
        )
    kept = [torch.empty(group.n, dtype=torch.bool, device=device) for group in groups]
    for group, of_group in zip(groups, kept, strict=True):
        for start, keys in group.chunks():
            stays = keys >= threshold if some_tied_stay else keys > threshold
            if some_tied_stay:
                [lost] = tied_up_to(last_removed[None], group, start, keys)
                stays ^= lost
            of_group[start : start + len(keys)] = stays
    for group in groups:
        if group.keys_of_spared is not None:
            n_tied += int(group.all_reduce(_counts([group.keys_of_spared == threshold])))
    return kept, n_tied if n_tied > n_removed else 0


def _count(
    groups: Sequence[_Group], flags: Callable[[_Group, int, Tensor], list[Tensor]]
) -> Tensor:
    """How many are True, over all chunks, groups and ranks, in each tensor that `flags` returns."""
    totals = []
    for group in groups:
        counts = [_counts(flags(group, start, keys)) for start, keys in group.chunks()]
        totals.append(group.all_reduce(torch.stack(counts).sum(0)))
    return torch.stack(totals).sum(0)


def _lowest_that_reaches(
    wanted: int, count: Callable[[Tensor], Tensor], n_bits: int, device: torch.device
) -> Tensor:
    """The lowest number of `n_bits` bits whose count is at least `wanted`, on the device.

    Three bits are found in each round, from seven counts that ranks add up in one message.
    """
    found = torch.zeros((), dtype=torch.int64, device=device)
    steps = torch.arange(1, 8, device=device)
    for shift in reversed(range(0, n_bits, 3)):
        last_of_each = found + (steps << shift) - 1
        found = found + ((count(last_of_each) < wanted).sum() << shift)
    return found


def _n_kept(layers: Sequence[_Layer], kept: Tensor) -> list[int]:
    """How many entries of each tensor a mask keeps, on all ranks."""
    counts = _counts(list(torch.split(kept, [layer.entries.numel() for layer in layers])))
    for indices in _groups([layer.shard for layer in layers]):
        shard = layers[indices[0]].shard
        if shard is not None:
            counts[indices] = shard.all_reduce(counts[indices])
    totals: list[int] = counts.tolist()
    return totals


def _counts(flags: Sequence[Tensor]) -> Tensor:
    """How many are True in each bool tensor, as int64 on their device."""
    if flags[0].device.type == "cpu":
        # numpy counts bytes some twenty times as fast as torch.
        return torch.tensor([np.count_nonzero(each.numpy()) for each in flags], device="cpu")
    return torch.stack([each.count_nonzero() for each in flags])


def _not_finite(layers: Sequence[_Layer]) -> ValueError:
    """The error for a NaN or infinite entry, with the name of the first tensor that has one."""
    bad = [layer.name for layer in layers if not _is_finite(layer.entries)]
    what = f"{bad[0]!r}: it has" if bad else "the entries that another rank holds: they have"
    return ValueError(
        f"Cannot rank {what} NaN or infinite entries, so a mask drawn from them would mean "
        "nothing. Training has diverged: lower the learning rate, clip gradients, or go back to an "
        "earlier checkpoint."
    )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no magnitude is NaN or infinite; torch cannot ask 8-bit floats themselves."""
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).abs().isfinite().all())
