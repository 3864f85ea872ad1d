"""Which entries go: the lowest of many scores, exactly, without a sorted or even a flat copy.

Magnitudes are compared as integers. The bit patterns of non-negative floating point numbers are in
the order of the numbers, NaN above infinity, so that no number is lost to rounding, underflow or a
mode of the processor. Most work is done on *coarse* keys, the pattern of a magnitude rounded to
bfloat16, or to float16 in `mask_pass`: rounding keeps the order, two bytes are read faster than
four, and a table has room for all of them.

1. A sample of the coarse keys brackets the threshold.
2. One pass keeps what lies above the bracket and notes where the few inside it are.
3. A radix select among the exact keys of those gives the threshold, and another one among the
   positions of those that equal it says which of them go.

Where the sample misled, or a large share of all scores are (nearly) equal, more passes count what
would be noted. Either way the result does not depend on the sample.

Scores may lie in several places, see :class:`Scores`; what is decided is decided from counts, which
``add_up`` adds over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from torch_worm_optim.counting import count_flags

# Entries in a chunk: on a device few, large kernels; on the host what lies in a processor's cache,
# and of few scores a small share, since a chunk takes four bytes an entry.
_DEVICE_CHUNK = 1 << 24
_HOST_CHUNK = 1 << 20
_LEAST_CHUNK = 1 << 19
_CHUNKS = 24
# So many scores of one place are ranked at once.
FEW = 1 << 15
# Scores in the sample at most, and the share of all that it is otherwise; and how many standard
# deviations of its ranks the bracket has on either side.
_SAMPLE = 1 << 20
_SAMPLED = 32
_DEVIATIONS = 3.5
_RUN = 16
# A bracket that holds more than this share of the sample is not worth noting one by one.
_CROWDED = 1 / 16
# Bits that a radix select looks at in a round, which sends 8 KiB of counts.
_RADIX = 10

# Coarse keys of infinity and of the smallest normal number.
COARSE_INF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
COARSE_NORMAL = {torch.bfloat16: 0x0080, torch.float16: 0x0400}
_EXACT_INF = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_WHOLE = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

with torch.inference_mode(False):
    # As tensors, since a number would be wrapped as int64 and converted at every mask.
    _LARGEST = {
        whole: torch.tensor(torch.iinfo(whole).max, dtype=whole, device="cpu")
        for whole in _WHOLE.values()
    }

AddUp = Callable[[Sequence[Tensor]], Tensor]


class NotFiniteError(ValueError):
    """A score is NaN or infinite, so that there is no ranking."""


class Selection(NamedTuple):
    """What is left, and how far chance had a hand in it.

    Attributes:
        kept: For each place a bool tensor of its scores, **True = kept**.
        n_tied: How many scores equal the highest that was removed, if some of them were kept all
            the same; else 0.
    """

    kept: list[Tensor]
    n_tied: int


class Bracket(NamedTuple):
    """Two coarse keys that most likely have the threshold between them.

    Attributes:
        low: The lowest coarse key inside.
        high: The highest one.
        coarse: What magnitudes are rounded to.
    """

    low: int
    high: int
    coarse: torch.dtype = torch.bfloat16


class Scores:
    """Magnitudes of the entries of several tensors, one after the other, as integer keys.

    Args:
        entries: Tensors of any shapes, strides, floating or complex dtypes and devices; none for a
            place that holds nothing.
        positions: Turns positions here, an int64 tensor, into positions among the scores of all
            places, in the same order (default: these are all).
        aside: Positions here that are kept whatever their score, sorted.
        device: Where keys are made and masks lie (default: the first tensor's).

    Example:
        >>> scores = Scores([torch.tensor([-2.0, 1.0]), torch.ones(1, 2)])
        >>> [(start, keys.tolist()) for start, keys in scores.chunks(torch.bfloat16)]
        [(0, [16384, 16256, 16256, 16256])]
    """

    def __init__(
        self,
        entries: Sequence[Tensor],
        positions: Callable[[Tensor], Tensor] | None = None,
        aside: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.entries = entries
        self.positions = positions or (lambda here: here)
        self.aside = aside
        self.device = device or self.entries[0].device
        self.ends = list(accumulate([tensor.numel() for tensor in self.entries], initial=0))
        self.n = self.ends[-1]
        self.kinds = {(tensor.dtype, tensor.device) for tensor in self.entries}
        self.wide = any(kind in (torch.float64, torch.complex128) for kind, _ in self.kinds)
        if self.device.type == "cpu":
            # A multiple of eight, so that flags are looked at eight by eight to the last.
            self.size = min(_HOST_CHUNK, max(_LEAST_CHUNK, self.n // _CHUNKS // 8 * 8))
        else:
            self.size = _DEVICE_CHUNK

    def chunks(
        self, dtype: torch.dtype, room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The position of each chunk, and its keys; they may be overwritten, as by the next chunk.

        Args:
            dtype: A half precision for coarse keys, for exact ones the widest that is ranked.
            room: A tensor of that dtype and of ``size`` elements to make keys in (default: one is
                made).
        """
        buffer = room
        if buffer is None:
            buffer = torch.empty(min(self.size, self.n), dtype=dtype, device=self.device)
        start = filled = 0
        for tensor in self.entries:
            for piece in [tensor.view(-1)] if tensor.is_contiguous() else self._pieces(tensor):
                while piece.numel():
                    left = len(buffer) - filled
                    if left < piece.numel() and (left == 0 or piece.ndim > 1):
                        yield start, self._finish(start, buffer[:filled])
                        start, filled, left = start + filled, 0, len(buffer)
                    part, piece = (
                        (piece, piece[:0]) if piece.ndim > 1 else (piece[:left], piece[left:])
                    )
                    place = buffer[filled : filled + part.numel()].view(part.shape)
                    place.copy_(part.abs() if part.is_complex() else part)
                    filled += part.numel()
        if filled:
            yield start, self._finish(start, buffer[:filled])

    def _pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """A strided tensor, cut along its leading dimensions until each piece fits into a chunk."""
        stack = [tensor]
        while stack:
            part = stack.pop()
            if part.numel() > self.size:
                rows = max(1, self.size // max(1, part[0].numel()))
                parts = torch.split(part, rows) if len(part) > 1 else (part[0],)
                stack.extend(reversed(parts))
            elif part.numel():
                yield part

    def _finish(self, start: int, magnitudes: Tensor) -> Tensor:
        keys = _keys_(magnitudes)
        if self.aside is not None:
            ends = torch.tensor([start, start + len(keys)], device=self.aside.device)
            first, last = torch.searchsorted(self.aside, ends).tolist()
            keys[self.aside[first:last] - start] = torch.iinfo(keys.dtype).max
        return keys

    def all_keys(self, dtype: torch.dtype) -> Tensor:
        """All keys at once, for few scores.

        Args:
            dtype: As in :meth:`chunks`.
        """
        flat = [each if each.ndim == 1 else each.reshape(-1) for each in self.entries]
        if self.kinds != {(dtype, self.device)}:
            flat = [
                (each.abs() if each.is_complex() else each).to(self.device, dtype) for each in flat
            ]
        return self._finish(0, torch.cat(flat) if len(flat) > 1 else flat[0].clone())

    def keys_at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys of single scores.

        Args:
            positions: Positions here, sorted, an int64 tensor.
            dtype: As in :meth:`chunks`.
        """
        bounds = torch.tensor(self.ends, device=positions.device)
        cuts = torch.searchsorted(positions, bounds).tolist()
        keys = torch.empty(len(positions), dtype=dtype, device=self.device)
        for tensor, begin, first, last in zip(
            self.entries, self.ends, cuts, cuts[1:], strict=False
        ):
            if first < last:
                keys[first:last].copy_(_at(tensor, positions[first:last] - begin))
        return _keys_(keys)

    def sample(self, stride: int, dtype: torch.dtype) -> Tensor:
        """The keys of one in ``stride`` scores, those set aside among them.

        Large tensors are sampled in runs: most of the time goes into waiting for memory, which
        comes in lines.

        Args:
            stride: At least 1.
            dtype: As in :meth:`chunks`.
        """
        sampled = []
        for tensor, begin in zip(self.entries, self.ends, strict=False):
            offset = min(-begin % stride, tensor.numel())
            if tensor.is_contiguous() and tensor.numel() > _RUN * stride:
                picked = tensor.view(-1).unfold(0, _RUN, _RUN * stride).reshape(-1)
            elif tensor.is_contiguous():
                picked = tensor.view(-1)[offset::stride]
            else:
                positions = torch.arange(offset, tensor.numel(), stride, device=tensor.device)
                picked = _at(tensor, positions)
            picked = picked.abs() if picked.is_complex() else picked
            sampled.append(picked.to(self.device, dtype, copy=True))
        return _keys_(torch.cat([torch.empty(0, dtype=dtype, device=self.device), *sampled]))


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries at flat positions; magnitudes where the tensor is complex."""
    positions = positions.to(tensor.device)
    if tensor.is_contiguous():
        picked = tensor.view(-1).index_select(0, positions)
    else:
        picked = tensor[torch.unravel_index(positions, tensor.shape)]
    return picked.abs() if picked.is_complex() else picked


def _keys_(magnitudes: Tensor) -> Tensor:
    """The bit patterns of numbers without their signs, in the memory of the numbers."""
    keys = magnitudes.view(_WHOLE[magnitudes.dtype])
    return keys.bitwise_and_(_LARGEST[keys.dtype])


def _exact(places: Sequence[Scores]) -> torch.dtype:
    """The type of exact keys. Half precision ranks as it is in single precision."""
    return torch.float64 if any(scores.wide for scores in places) else torch.float32


def _nowhere(scores: Scores) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=scores.device)


def _stride(n: int) -> int:
    stride = max(1, n // _SAMPLE, min(_SAMPLED, n // FEW))
    # Rows have lengths like 768 or 640. A stride that has a factor in common with them would see
    # the same few columns of all rows.
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride -= 1
    return stride


def add_up_one(counts: Sequence[Tensor]) -> Tensor:
    """What ``add_up`` is where there is one place."""
    [count] = counts
    return count


def remove_lowest(places: Sequence[Scores], count: int, add_up: AddUp = add_up_one) -> Selection:
    """Remove the ``count`` lowest scores that are not set aside, the earlier first among equals.

    Args:
        places: All scores, each in one place.
        count: How many go; at most as many as there are without those set aside.
        add_up: Adds int64 counts, one for each place, of one shape.

    Returns:
        The :class:`Selection`.

    Raises:
        NotFiniteError: If a score is NaN or infinite.

    Example:
        >>> remove_lowest([Scores([torch.tensor([0.3, -0.1, 0.1])])], 1)
        Selection(kept=[tensor([ True, False,  True])], n_tied=2)
    """
    if count == 0:
        _check_finite(places, [_highest(scores) for scores in places], add_up)
        return Selection([_all_kept(scores) for scores in places], 0)
    if add_up is add_up_one and places[0].n <= FEW:
        return _remove_lowest_of_few(places[0], count)
    bracket = find_bracket(places, count, add_up)
    if bracket is None:
        _check_finite(places, [_highest(scores) for scores in places], add_up)
        return _remove_by_counting(places, count, add_up)
    passed = [_split(scores, bracket.low, bracket.high) for scores in places]
    _check_finite(places, [each.highest for each in passed], add_up)
    n, n_above, n_inside = _numbers(
        [
            [scores.n, each.n_above, len(each.inside)]
            for scores, each in zip(places, passed, strict=True)
        ],
        places,
        add_up,
    )
    rank = count - (n - n_above - n_inside)
    if not 0 < rank <= n_inside:
        return _remove_by_counting(places, count, add_up)
    stay, n_tied = keep_highest(places, [each.inside for each in passed], rank, bracket, n, add_up)
    for each, positions in zip(passed, stay, strict=True):
        each.kept.index_fill_(0, positions, True)
    return Selection([each.kept for each in passed], n_tied)


def keep_highest(
    places: Sequence[Scores],
    inside: Sequence[Tensor],
    rank: int,
    bracket: Bracket,
    n: int,
    add_up: AddUp = add_up_one,
) -> tuple[list[Tensor], int]:
    """Of the scores inside a bracket, which stay when the ``rank`` lowest of them go.

    Args:
        places: All scores, each in one place.
        inside: For each place the positions of those inside, sorted.
        rank: At least 1, and at most as many as there are inside.
        bracket: Coarse keys between which those of all inside are.
        n: How many scores there are in all places.
        add_up: Adds int64 counts, one for each place, of one shape.

    Returns:
        For each place the positions of those that stay; and the ties, see :class:`Selection`.

    Example:
        >>> scores = Scores([torch.tensor([0.5, -0.25, 0.25])])
        >>> keep_highest([scores], [torch.tensor([0, 1, 2])], 1, Bracket(0, 0x7F7F), 3)
        ([tensor([0, 2])], 2)
    """
    exact = _exact(places)
    keys = [scores.keys_at(each, exact) for scores, each in zip(places, inside, strict=True)]
    threshold, n_lost, n_equal = radix_select(keys, rank, add_up, _exact_range(bracket, exact))
    higher = [each[own > threshold] for each, own in zip(inside, keys, strict=True)]
    equal = [each[own == threshold] for each, own in zip(inside, keys, strict=True)]
    spared = _spared(places, equal, n_lost, n_equal, n, add_up)
    n_tied = _count_ties(places, threshold, n_lost, n_equal, add_up)
    return [torch.cat(both) for both in zip(higher, spared, strict=True)], n_tied


def _all_kept(scores: Scores) -> Tensor:
    return torch.ones(scores.n, dtype=torch.bool, device=scores.device)


def _numbers(rows: Sequence[Sequence[int]], places: Sequence[Scores], add_up: AddUp) -> list[int]:
    """Numbers known on the host, added over all places."""
    counts = [torch.tensor(row, device=s.device) for row, s in zip(rows, places, strict=True)]
    summed: list[int] = add_up(counts).tolist()
    return summed


def _highest(scores: Scores) -> int:
    return max((int(keys.amax()) for _, keys in scores.chunks(torch.bfloat16)), default=0)


def _check_finite(places: Sequence[Scores], highest: Sequence[int], add_up: AddUp) -> None:
    """Raise if a coarse key is that of no number; a number may have been rounded up to infinity."""
    if any(scores.aside is not None for scores in places):
        return  # what is set aside was found among scores that were looked at
    suspects = [[int(high >= COARSE_INF[torch.bfloat16])] for high in highest]
    if not _numbers(suspects, places, add_up)[0]:
        return
    bad, exact = [], _exact(places)
    for scores, (suspect,) in zip(places, suspects, strict=True):
        n_bad = 0
        if suspect:
            infinity = _EXACT_INF[exact]
            n_bad = sum(int((keys >= infinity).sum()) for _, keys in scores.chunks(exact))
        bad.append([n_bad])
    if _numbers(bad, places, add_up)[0]:
        raise NotFiniteError


def _remove_lowest_of_few(scores: Scores, count: int) -> Selection:
    exact = _exact([scores])
    keys = scores.all_keys(exact)
    highest = keys.amax() if scores.aside is None else 0
    # On CUDA kthvalue refuses to run where all is to be deterministic.
    threshold = keys.sort().values[count - 1] if keys.is_cuda else keys.kthvalue(count).values
    kept = keys > threshold
    n_kept = int(kept.count_nonzero())
    if int(highest) >= _EXACT_INF[exact]:
        raise NotFiniteError
    if scores.n - count == n_kept and scores.aside is None:
        return Selection([kept], 0)
    equal = (keys == threshold).nonzero().flatten()
    n_lost = count - (scores.n - n_kept - len(equal))
    kept[equal[n_lost:]] = True
    n_tied = _count_ties([scores], int(threshold), n_lost, len(equal), add_up_one)
    return Selection([kept], n_tied)


def _count_ties(
    places: Sequence[Scores], threshold: int, n_lost: int, n_equal: int, add_up: AddUp
) -> int:
    """How many equal the threshold, those set aside included, if some of them are kept."""
    n_tied = n_equal
    if any(scores.aside is not None for scores in places):
        everything = [Scores(scores.entries, device=scores.device) for scores in places]
        n_tied = _count(everything, torch.eq, threshold, add_up)
    return n_tied if n_tied > n_lost else 0


def find_bracket(
    places: Sequence[Scores],
    count: int,
    add_up: AddUp = add_up_one,
    coarse: torch.dtype = torch.bfloat16,
) -> Bracket | None:
    """Two coarse keys that most likely have the threshold between them.

    Args:
        places: All scores, each in one place.
        count: How many go, at least 1.
        add_up: Adds int64 counts, one for each place, of one shape.
        coarse: What magnitudes are rounded to.

    Returns:
        The bracket; None if so many scores are inside that they are not worth noting.

    Example:
        >>> low, high, _ = find_bracket([Scores([torch.linspace(0, 1, 1000)])], 500)
        >>> low < torch.tensor(0.5).bfloat16().view(torch.int16) < high
        tensor(True)
    """
    [n] = _numbers([[scores.n] for scores in places], places, add_up)
    tables = [
        scores.sample(_stride(n), coarse).bincount(minlength=1 << 15).int() for scores in places
    ]
    ranks = add_up(tables).cumsum(0).cpu()
    n_sampled = int(ranks[-1])
    share = count / n
    spread = _DEVIATIONS * math.sqrt(n_sampled * share * (1 - share)) + 2
    ends = [share * n_sampled - spread, share * n_sampled + spread]
    wanted = torch.tensor(ends, device="cpu")
    low, high = torch.searchsorted(ranks.float(), wanted, right=False).tolist()
    high = min(high, COARSE_INF[coarse])
    if int(ranks[high]) - (int(ranks[low - 1]) if low else 0) > n_sampled * _CROWDED + 64:
        return None
    return Bracket(low, high, coarse)


def _exact_range(bracket: Bracket, exact: torch.dtype) -> tuple[int, int]:
    """Exact keys between which all are that round to a coarse key inside."""
    low, high, coarse = bracket
    # Some processors and modes round what is below the smallest normal number to zero.
    ends = [max(0, low - 1), min(COARSE_INF[coarse], max(high + 1, COARSE_NORMAL[coarse]))]
    around = torch.tensor(ends, dtype=torch.int16, device="cpu")
    first, last = around.view(coarse).to(exact).view(_WHOLE[exact]).tolist()
    return first, last


class _Split(NamedTuple):
    """A pass over one place: what lies above a bracket, and where the others inside it are."""

    kept: Tensor
    inside: Tensor
    n_above: int
    highest: int


def _split(scores: Scores, low: int, high: int) -> _Split:
    kept = torch.empty(scores.n, dtype=torch.bool, device=scores.device)
    compared = torch.empty(min(scores.size, scores.n), dtype=torch.int16, device=scores.device)
    within = compared.view(torch.bool)  # what was compared is not needed any more by then
    highest, inside = [_nowhere(scores).new_zeros((), dtype=torch.int16)], [_nowhere(scores)]
    for start, keys in scores.chunks(torch.bfloat16):
        m = len(keys)
        above, flags = kept[start : start + m], within[:m]
        highest.append(keys.amax())
        # Comparisons that write numbers are as fast as arithmetic, those that write bools are not.
        above.copy_(torch.gt(keys, high, out=compared[:m]))
        flags.copy_(torch.ge(keys, low, out=keys))
        flags.view(torch.uint8).bitwise_xor_(above.view(torch.uint8))
        inside.append(where_set(flags).add_(start))
    numbers = torch.stack([count_flags(kept), torch.stack(highest).amax().long()]).tolist()
    return _Split(kept, torch.cat(inside), *numbers)


def where_set(flags: Tensor) -> Tensor:
    """Where flags are set, made for few among many: eight at a time are looked at.

    Args:
        flags: Bool tensor of shape ``(n,)``, contiguous, that begins at a whole word.

    Returns:
        int64 tensor of their positions, sorted.

    Example:
        >>> where_set(torch.tensor([False, True, False, False, False, False, False, True, True]))
        tensor([1, 7, 8])
    """
    n_whole = len(flags) // 8 * 8
    eights, rest = flags[:n_whole].view(torch.int64), flags[n_whole:]
    words = eights.nonzero().view(-1)
    some = eights.index_select(0, words).view(torch.bool).nonzero().view(-1)
    found = words.index_select(0, some >> 3).mul_(8).add_(some.bitwise_and_(7))
    return torch.cat([found, rest.nonzero().view(-1) + n_whole]) if len(rest) else found


def radix_select(
    keys: Sequence[Tensor], rank: int, add_up: AddUp, bounds: tuple[int, int]
) -> tuple[int, int, int]:
    """The ``rank``-th lowest key, its rank among its equals, and how many there are.

    Bits are looked at from the highest on; each round counts the keys by the next few, and goes on
    with those that have the ones that the rank falls on.

    Args:
        keys: For each place a tensor of whole numbers.
        rank: At least 1, and at most as many as there are keys.
        add_up: Adds int64 counts, one for each place, of one shape.
        bounds: The lowest and the highest that a key may be.

    Example:
        >>> radix_select([torch.tensor([3, 5, 5, 9])], 3, add_up_one, (0, 9))
        (5, 2, 2)
    """
    lowest, highest = bounds
    n_bits = max(1, (highest - lowest).bit_length())
    keys = [each - lowest for each in keys]
    prefix = 0
    while True:
        width = min(_RADIX, n_bits)
        n_bits -= width
        tables = [
            (each >> n_bits).sub_(prefix << width).int().bincount(minlength=1 << width)
            for each in keys
        ]
        ends = [0, *add_up(tables).cumsum(0).tolist()]
        digit = next(i for i, end in enumerate(ends[1:]) if end >= rank)
        prefix = prefix << width | digit
        rank -= ends[digit]
        if n_bits == 0:
            return lowest + prefix, rank, ends[digit + 1] - ends[digit]
        keys = [each[(each >> n_bits) == prefix] for each in keys]


def _spared(
    places: Sequence[Scores],
    equal: Sequence[Tensor],
    n_lost: int,
    n_equal: int,
    n: int,
    add_up: AddUp,
) -> list[Tensor]:
    """Of positions in each place those that stay, when the first ``n_lost`` over all places go."""
    if n_lost == n_equal:
        return [each[:0] for each in equal]
    if add_up is add_up_one:
        return [equal[0][n_lost:]]
    everywhere = [s.positions(each) for s, each in zip(places, equal, strict=True)]
    last, _, _ = radix_select(everywhere, n_lost, add_up, (0, n - 1))
    return [each[where > last] for each, where in zip(equal, everywhere, strict=True)]


def _remove_by_counting(places: Sequence[Scores], count: int, add_up: AddUp) -> Selection:
    """As :func:`remove_lowest`, by passes that count."""
    exact = _exact(places)
    [n] = _numbers([[scores.n] for scores in places], places, add_up)
    threshold = _guess(places, count, n, add_up)
    n_below = _count(places, torch.lt, threshold, add_up)
    if not n_below < count <= _count(places, torch.le, threshold, add_up):
        threshold = _bisect(places, count, add_up)
        n_below = _count(places, torch.lt, threshold, add_up)
    n_equal = _count(places, torch.eq, threshold, add_up)
    kept, equal = [], []
    for scores in places:
        own, found = _all_kept(scores), [_nowhere(scores)]
        for start, keys in scores.chunks(exact):
            own[start : start + len(keys)].copy_(keys > threshold)
            found.append((keys == threshold).nonzero().view(-1) + start)
        kept.append(own)
        equal.append(torch.cat(found))
    n_lost = count - n_below
    for own, rest in zip(kept, _spared(places, equal, n_lost, n_equal, n, add_up), strict=True):
        own[rest] = True
    return Selection(kept, _count_ties(places, threshold, n_lost, n_equal, add_up))


def _guess(places: Sequence[Scores], count: int, n: int, add_up: AddUp) -> int:
    """The key of that rank in a sample: if one score is very common, most likely the threshold."""
    sampled = [scores.sample(_stride(n), _exact(places)) for scores in places]
    [n_sampled] = _numbers([[len(each)] for each in sampled], places, add_up)
    rank = min(max(1, round(count / n * n_sampled)), n_sampled)
    return radix_select(sampled, rank, add_up, (0, torch.iinfo(_WHOLE[_exact(places)]).max))[0]


def _bisect(places: Sequence[Scores], count: int, add_up: AddUp) -> int:
    """The lowest key that ``count`` scores do not exceed, bit by bit."""
    low, high = 0, torch.iinfo(_WHOLE[_exact(places)]).max
    while low < high:
        middle = (low + high) // 2
        if _count(places, torch.le, middle, add_up) >= count:
            high = middle
        else:
            low = middle + 1
    return low


def _count(
    places: Sequence[Scores], compare: Callable[..., Tensor], key: int, add_up: AddUp
) -> int:
    """How many exact keys compare so with a key."""
    counts = []
    for scores in places:
        own = torch.zeros(1, dtype=torch.int64, device=scores.device)
        for _, keys in scores.chunks(_exact(places)):
            own += compare(keys, key).count_nonzero()
        counts.append(own)
    return int(add_up(counts))
