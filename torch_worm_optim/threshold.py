"""The score of the last entry that a mask removes, exactly, without a sorted or even a flat copy.

Scores are read chunk by chunk, so that all work on one stays in the processor's cache and what is
needed beside the weights does not grow with them. A strided sample of the scores brackets the
threshold; one pass counts what lies below the bracket and collects what lies inside; the threshold
is among those. Where the sample misled, or half of all scores are equal, bisection over the bit
patterns of floating point numbers finds it in as many passes as they have bits. Either way the
result is exact: it does not depend on the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

# Entries in a chunk: on the host what a core's cache holds; on a device few, large kernels. A sum
# of that many ones is exact in single precision.
_HOST_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 24
# So many scores are ranked at once.
_FEW = 1 << 15
# Scores in the sample, and how many standard deviations of its ranks lie on either side of it.
_SAMPLE = 1 << 16
_DEVIATIONS = 4.0


class NotFiniteError(ValueError):
    """A score is NaN or infinite, so that there is no ranking."""


class Scores:
    """Magnitudes of the entries of several tensors, one after the other, read chunk by chunk.

    A chunk is the reader's to write into; the next one overwrites it.

    Args:
        entries: Tensors of any shapes, strides, floating or complex dtypes and devices.
        aside: Positions that count as infinite, sorted, on the first tensor's device.

    Example:
        >>> scores = Scores([torch.tensor([-2.0, 1.0]), torch.ones(1, 2)])
        >>> [(start, chunk) for start, chunk in scores]
        [(0, tensor([2., 1., 1., 1.]))]
    """

    def __init__(self, entries: Sequence[Tensor], aside: Tensor | None = None) -> None:
        self.entries = [tensor.detach() for tensor in entries]
        self.aside = aside
        self.device = self.entries[0].device
        self.n = sum(tensor.numel() for tensor in self.entries)
        real = [t.dtype.to_real() if t.is_complex() else t.dtype for t in self.entries]
        # Scores of half precision compare as they are in single precision, at full speed.
        self.dtype = torch.float64 if torch.float64 in real else torch.float32
        self.size = _HOST_CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The position of each chunk, and its scores."""
        buffer = torch.empty(min(self.size, self.n), dtype=self.dtype, device=self.device)
        start = filled = 0
        for piece in self._pieces():
            if filled + piece.numel() > len(buffer):
                yield start, self._finish(start, buffer[:filled])
                start, filled = start + filled, 0
            place = buffer[filled : filled + piece.numel()]
            if piece.is_complex():
                place.copy_(piece.abs().flatten())
            elif (
                piece.dtype == self.dtype and piece.is_contiguous() and piece.device == self.device
            ):
                torch.abs(piece.view(-1), out=place)
            else:
                place.view(piece.shape).copy_(piece)
                place.abs_()
            filled += piece.numel()
        if filled:
            yield start, self._finish(start, buffer[:filled])

    def _pieces(self) -> Iterator[Tensor]:
        """The tensors, cut along their leading dimensions where they are larger than a chunk."""
        for tensor in self.entries:
            if tensor.is_contiguous():
                yield from torch.split(tensor.view(-1), self.size) if tensor.numel() else ()
                continue
            stack = [tensor]
            while stack:
                part = stack.pop()
                if part.numel() > self.size:
                    rows = max(1, self.size // max(1, part[0].numel()))
                    parts = torch.split(part, rows) if len(part) > 1 else (part[0],)
                    stack.extend(reversed(parts))
                elif part.numel():
                    yield part

    def _finish(self, start: int, scores: Tensor) -> Tensor:
        if self.aside is not None:
            ends = torch.tensor([start, start + len(scores)], device=self.aside.device)
            first, last = torch.searchsorted(self.aside, ends).tolist()
            scores[self.aside[first:last] - start] = math.inf
        return scores

    def sample(self) -> Tensor:
        """Some ``_SAMPLE`` of the scores, at equal distances."""
        stride = max(1, self.n // _SAMPLE) | 1  # odd, so that it wanders over rows and columns
        sampled = []
        ends = [0, *accumulate(tensor.numel() for tensor in self.entries)]
        for tensor, begin in zip(self.entries, ends, strict=False):
            offset = min(-begin % stride, tensor.numel())
            if tensor.is_contiguous():
                picked = tensor.view(-1)[offset::stride]
            else:
                positions = torch.arange(offset, tensor.numel(), stride, device=tensor.device)
                picked = tensor[torch.unravel_index(positions, tensor.shape)]
            wide = picked if picked.is_complex() else picked.to(self.dtype)
            sampled.append(wide.abs().to(self.device, self.dtype))
        return torch.cat(sampled)

    def count_equal(self, value: float) -> int:
        """How many scores are ``value``."""
        return self._count(torch.eq, value)

    def count_below(self, value: float) -> int:
        """How many scores are smaller than ``value``."""
        return self._count(torch.lt, value)

    def count_at_most(self, value: float) -> int:
        """How many scores are no larger than ``value``."""
        return self._count(torch.le, value)

    def _count(self, compare: Callable[..., Tensor], value: float) -> int:
        return total([compare(chunk, value, out=chunk).sum() for _, chunk in self])


def total(counts: list[Tensor]) -> int:
    """The sum of counts that are exact one by one; the device is waited for once.

    Args:
        counts: Scalars on one device.

    Returns:
        Their sum, 0 for none.
    """
    return int(torch.stack(counts).sum(dtype=torch.float64)) if counts else 0


def find_threshold(scores: Scores, count: int) -> float:
    """The ``count``-th lowest score.

    Args:
        scores: Finite scores, except those set aside.
        count: From 1 to the number of finite scores.

    Returns:
        The score, exactly, as a Python float.

    Raises:
        NotFiniteError: If a score is NaN or infinite.

    Example:
        >>> find_threshold(Scores([torch.tensor([0.3, -0.1, 0.2])]), 2) == torch.tensor(0.2)
        tensor(True)
    """
    if scores.n <= _FEW:
        [(_, all_scores)] = scores
        _check_finite([all_scores.amax()], scores)
        return float(all_scores.kthvalue(count).values)
    low, high = _bracket(scores.sample(), count / scores.n)
    highest, n_low, inside = [], [], []
    # Comparisons that write numbers run at the speed of arithmetic; those that write bools do not.
    room = torch.empty(2, min(scores.n, scores.size), dtype=scores.dtype, device=scores.device)
    for _, chunk in scores:
        at_most_low, between = room[0, : len(chunk)], room[1, : len(chunk)]
        torch.le(chunk, low, out=at_most_low)
        torch.lt(chunk, high, out=between).sub_(at_most_low)
        highest.append(chunk.amax())
        n_low.append(at_most_low.sum())
        if low < high:
            inside.append(_compressed(chunk, between.bool()))
    _check_finite(highest, scores)
    n_at_most_low, candidates = total(n_low), torch.cat(inside) if inside else chunk[:0]
    n_below_high = n_at_most_low + len(candidates)
    if n_at_most_low < count <= n_below_high and len(candidates) < scores.n:
        return find_threshold(Scores([candidates]), count - n_at_most_low)
    # It is one of the ends, where many scores are equal, or else the sample misled.
    if scores.count_below(low) < count <= n_at_most_low:
        return low
    if n_below_high < count <= scores.count_at_most(high):
        return high
    return _bisect(scores, count)


def check_finite(scores: Scores) -> None:
    """Raise :class:`NotFiniteError` if a score is NaN or infinite.

    Args:
        scores: Any scores.
    """
    _check_finite([chunk.amax() for _, chunk in scores], scores)


def _check_finite(highest: list[Tensor], scores: Scores) -> None:
    # max() hands NaN on, so that one number tells of both faults. What is set aside is infinite,
    # and was looked at before.
    if scores.aside is None and highest and not torch.stack(highest).amax().isfinite():
        raise NotFiniteError


def _bracket(sample: Tensor, share: float) -> tuple[float, float]:
    """Two scores of a sample that most likely hold the threshold between them."""
    n = len(sample)
    spread = _DEVIATIONS * math.sqrt(n * share * (1 - share)) + 2
    low, high = math.floor(share * n - spread), math.ceil(share * n + spread)
    return (
        float(sample.kthvalue(low + 1).values) if low >= 0 else -1.0,
        float(sample.kthvalue(high + 1).values) if high < n else math.inf,
    )


def _compressed(values: Tensor, chosen: Tensor) -> Tensor:
    """``values[chosen]``, made for few among many: groups of eight without any are passed over."""
    n = len(values) // 8 * 8
    groups = chosen[:n].view(torch.int64).nonzero().flatten()
    some, among = values[:n].view(-1, 8)[groups], chosen[:n].view(-1, 8)[groups]
    return torch.cat([some[among], values[n:][chosen[n:]]])


def _bisect(scores: Scores, count: int) -> float:
    """The smallest number that ``count`` scores do not exceed, bit by bit."""
    whole = torch.int32 if scores.dtype == torch.float32 else torch.int64
    # The bit patterns of non-negative floating point numbers are in the order of the numbers.
    low, high = 0, int(torch.tensor(math.inf, dtype=scores.dtype, device="cpu").view(whole))
    while low < high:
        middle = (low + high) // 2
        value = torch.tensor(middle, dtype=whole, device="cpu").view(scores.dtype).item()
        if scores.count_at_most(value) >= count:
            high = middle
        else:
            low = middle + 1
    return torch.tensor(low, dtype=whole, device="cpu").view(scores.dtype).item()
