"""From weights to a mask: the entries of lowest magnitude go, exactly as many as asked for.

Magnitudes are compared as integers, called keys: the bits of a float without its sign are ordered
as magnitudes are. So nothing is rounded, and a processor that flushes tiny numbers to zero does not
change the order. The threshold is found 16 bits at a time from counts, on any device, and every
pass reads the scores anew: weights that are spread over ranks are gathered one at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_worm_optim.search.window import Bits, pack

SCOPES = ("global", "selector", "layer")
_DIGIT = 16  # bits


class Scores(NamedTuple):
    """What one representative is ranked by; ``read`` returns the scores, in any shape."""

    name: str
    numel: int
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Mask(NamedTuple):
    """A mask, and whether magnitudes alone decided it.

    ``n_tied`` entries have the highest magnitude that was removed, if entries of that magnitude
    were kept as well, so that their order decided; else it is 0.
    """

    kept: list[Bits]  # of each representative, True = kept
    n_tied: int


@torch.no_grad()
def compute_mask(
    scores: Sequence[Scores],
    prune_ratio: float,
    *,
    scope: str = "global",
    min_keep: int | float = 1,
    groups: Sequence[int] | None = None,
) -> Mask:
    r"""Mask that removes exactly the ``round(prune_ratio * n)`` entries of lowest magnitude.

    .. math:: m_i = [\,\mathrm{rank}(|w_i|) \ge \mathrm{round}(p\,n)\,]

    Equal magnitudes are ranked by position, the earlier lower, so the mask is a function of the
    weights alone. ``scope="global"`` ranks all entries together, ``"layer"`` each representative
    alone, ``"selector"`` those with the same number in ``groups``. The ``min_keep`` highest entries
    (or that share) of each representative are protected; where that leaves fewer than are to be
    removed, all others are removed. A NaN or infinite entry is a ``ValueError`` with its name.
    """
    if sum(each.numel for each in scores) == 0:
        raise ValueError("There are no entries to rank: every representative is empty.")
    together: dict[int, list[int]] = {}
    for index in range(len(scores)):
        of_selector = groups[index] if groups else 0
        key = {"global": 0, "selector": of_selector, "layer": index}[scope]
        together.setdefault(key, []).append(index)
    kept: dict[int, Bits] = {}
    n_tied = 0
    for indices in together.values():
        mask = _rank_together([scores[index] for index in indices], prune_ratio, min_keep)
        kept |= zip(indices, mask.kept, strict=True)
        n_tied += mask.n_tied
    return Mask([kept[index] for index in range(len(scores))], n_tied)


def _rank_together(scores: Sequence[Scores], prune_ratio: float, min_keep: int | float) -> Mask:
    """The mask of representatives that are ranked as one."""
    n = sum(each.numel for each in scores)
    n_removed = round(prune_ratio * n)
    n_protected = [
        min(max(1, round(min_keep * n)) if 0 < min_keep < 1 else int(min_keep), n)
        for n in (each.numel for each in scores)
    ]
    mask, n_kept = _remove_lowest(scores, n_removed, [0] * len(scores))
    if all(n >= least for n, least in zip(n_kept, n_protected, strict=True)):
        return mask  # Those to be protected are the highest, so they are kept already.
    return _remove_lowest(scores, min(n_removed, n - sum(n_protected)), n_protected)[0]


def _remove_lowest(
    scores: Sequence[Scores], n_removed: int, n_protected: Sequence[int]
) -> tuple[Mask, list[int]]:
    """The mask without the lowest entries that are not protected, and how many it keeps of each."""
    is_wide = any(each.dtype.itemsize == (16 if each.dtype.is_complex else 8) for each in scores)

    def unprotected_keys() -> Iterator[Tensor]:
        for each, n in zip(scores, n_protected, strict=True):
            yield _protect(_keys(each, is_wide), n)

    threshold, n_ties_removed = -1, 0
    if n_removed:
        threshold, n_ties_removed = _kth_lowest(unprotected_keys, n_removed, 64 if is_wide else 32)
    bits, n_kept, n_tied, n_left = [], [], 0, n_ties_removed
    for each, n in zip(scores, n_protected, strict=True):
        keys = _keys(each, is_wide)
        n_tied += int((keys == threshold).sum())
        keys = _protect(keys, n)
        kept = keys > threshold
        ties = (keys == threshold).nonzero().view(-1)
        kept[ties[n_left:]] = True
        n_left = max(0, n_left - len(ties))
        bits.append(pack(kept))
        n_kept.append(int(kept.sum()))
    return Mask(bits, n_tied if n_tied > n_ties_removed else 0), n_kept


def _keys(scores: Scores, is_wide: bool) -> Tensor:
    """The bits of each magnitude without the sign, as integers in one dimension."""
    values = scores.read().detach().reshape(-1)
    values = values.abs() if values.is_complex() else values
    kind, bits = (torch.float64, torch.int64) if is_wide else (torch.float32, torch.int32)
    keys = values.to(kind).view(bits) & torch.iinfo(bits).max
    infinity = int(torch.tensor(torch.inf, dtype=kind, device="cpu").view(bits))
    if len(keys) and int(keys.max()) >= infinity:
        raise ValueError(
            f"Cannot rank {scores.name!r}: it has NaN or infinite entries, so a mask drawn from "
            "them would mean nothing. Training has diverged: lower the learning rate, clip "
            "gradients, or go back to an earlier checkpoint."
        )
    return keys


def _protect(keys: Tensor, n: int) -> Tensor:
    """Keys with the n highest raised above all others."""
    if n == 0:
        return keys
    highest = torch.ones_like(keys, dtype=torch.bool)
    if n < len(keys):
        n_bits = 8 * keys.dtype.itemsize
        threshold, n_ties_removed = _kth_lowest(lambda: iter([keys]), len(keys) - n, n_bits)
        highest = keys > threshold
        highest[(keys == threshold).nonzero().view(-1)[n_ties_removed:]] = True
    return keys.masked_fill(highest, torch.iinfo(keys.dtype).max)


def _kth_lowest(read: Callable[[], Iterator[Tensor]], k: int, n_bits: int) -> tuple[int, int]:
    """The k-th lowest key, and how many of the keys equal to it are among the k lowest."""
    found = 0
    for shift in reversed(range(0, n_bits, _DIGIT)):
        totals = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for keys in _joined(read()):
            digits = keys >> shift
            if shift + _DIGIT < n_bits:
                digits = digits[digits >> _DIGIT == found] & ((1 << _DIGIT) - 1)
            totals += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        totals = totals.cumsum(0)
        digit = int(torch.searchsorted(totals, k))
        k -= int(totals[digit - 1]) if digit else 0
        found = found << _DIGIT | digit
    return found, k


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same entries in fewer tensors, since a count costs as much as 2 ** 16 entries do."""
    batch: list[Tensor] = []
    for each in tensors:
        batch.append(each.to(batch[0].device) if batch else each)
        if sum(map(len, batch)) >= 1 << _DIGIT:
            yield torch.cat(batch) if len(batch) > 1 else each
            batch = []
    if batch:
        yield torch.cat(batch)


def unit_magnitudes(parts: Iterable[Tensor]) -> Tensor:
    r"""Score of every unit: the mean magnitude of its entries, its L1 norm per entry.

    .. math:: s_u = \frac{1}{|u|} \sum_{i \in u} |w_i|

    The L1 norm of a filter ranks the filters of a layer in Li et al., "Pruning Filters for
    Efficient ConvNets" (ICLR 2017). ``parts`` make up the same units, each with its dimensions in
    pairs (units, entries in a unit), see ``Part.blocks``. Sums are float32 or wider.
    """
    sums: list[Tensor] = []
    n_entries = 0
    for blocks in parts:
        magnitudes = (blocks.float() if blocks.dtype.itemsize == 1 else blocks).abs()
        wide = torch.promote_types(magnitudes.dtype, torch.float32)
        of_part = magnitudes.sum(tuple(range(1, blocks.ndim, 2)), dtype=wide).flatten()
        sums.append(of_part.to(sums[0].device) if sums else of_part)
        n_entries += blocks.numel()
    return torch.stack(sums).sum(0).div_(n_entries // sums[0].numel())


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that changes with any bit of the tensors, signs included, and with its place."""
    crc = 0
    for each in tensors:
        flat = each.detach().contiguous()
        flat = flat.as_strided((flat.numel(),), (1,))  # One entry may keep a stride of its own.
        crc = zlib.crc32(flat.view(torch.uint8).cpu().numpy().data, crc)
    return crc
