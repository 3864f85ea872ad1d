"""A mask drawn on the host in one pass over weights and window, without a copy of its own.

The window's bytes take in the new mask, and are compared with those before it, while the chunk of
weights that it was drawn from is in the processor's cache. The few scores near the threshold are
decided afterwards, see :mod:`torch_worm_optim.threshold`, and what was counted is put right. A mask
of its own would be a byte an entry that the system has to find room for at every sample, which on
some machines takes as long as all the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from torch_worm_optim.counting import count_all_bits, count_bits, count_flags
from torch_worm_optim.masks import GLANCE, Drawn
from torch_worm_optim.threshold import (
    COARSE_INF,
    COARSE_NORMAL,
    FEW,
    Bracket,
    Scores,
    add_up_one,
    find_bracket,
    keep_highest,
    radix_select,
    where_set,
)

# Entries in a chunk: of few, a sixth, since a chunk takes some two bytes an entry. Whole lanes,
# see `counting`. Keys, which have two bytes, are made for half a chunk, in the processor's cache.
_CHUNK = 1024 * 1920
_LEAST_CHUNK = 192 * 1920
_CHUNKS = 6
# Coarse keys that a byte tells apart, besides one for all below and one for all above.
_WIDEST = 126


def can_draw(entries: Sequence[Tensor], window: Tensor) -> bool:
    """Whether a mask of these entries can be drawn so.

    Args:
        entries: The entries to rank.
        window: What the mask would be put into.

    Returns:
        Whether all is on the host, the window has one byte an entry, and there are many of them.

    Example:
        >>> can_draw([torch.zeros(1000, 1000)], torch.zeros(1, 1000000, dtype=torch.uint8))
        True
        >>> can_draw([torch.zeros(10)], torch.zeros(1, 10, dtype=torch.uint8))
        False
    """
    return (
        window.shape[0] == 1
        and window.shape[1] > FEW
        and all(tensor.device.type == "cpu" for tensor in (window, *entries))
    )


@torch.no_grad()
def draw_mask_(
    entries: Sequence[Tensor], window: Tensor, count: int, quotas: Sequence[int], n_older: int
) -> Drawn | None:
    """Draw a mask and put it into the window, in place, as the newest.

    Args:
        entries: The entries to rank, for which :func:`can_draw` holds.
        window: uint8 tensor of shape ``(1, n_entries)``; modified in place.
        count: How many go, at least 1.
        quotas: How many of each tensor have to stay.
        n_older: How many of the masks in the window are compared with the new one, at most 7.

    Returns:
        What is to be known of the mask; None if it has to be drawn otherwise, and then the window
        holds the masks that it held.

    Example:
        >>> window = torch.zeros(1, 100000, dtype=torch.uint8)
        >>> draw_mask_([torch.linspace(-1, 1, 100000)], window, 40000, [1], 1)
        Drawn(n_tied=0, differences=[60000])
        >>> int(window.sum())
        60000
    """
    scores = Scores(entries)
    scores.size = _chunk(scores.n) // 2
    bracket = _bracket(scores, count)
    if bracket is None:
        return None
    passed = _Pass(scores, window[0], bracket)
    drawn = None
    try:
        drawn = _draw_(passed, count, quotas, n_older)
    finally:  # out of memory or interrupted, it is a mask that nobody is told of
        if drawn is None:
            # The oldest bit is lost, that of a mask which would have fallen out of the window.
            passed.row[: sum(map(len, passed.pushed))].bitwise_right_shift_(1)
    return drawn


def _chunk(n: int) -> int:
    """Entries in a chunk, such that all threads get whole lanes where there is one for each."""
    lanes = 1920 * torch.get_num_threads()
    most, least = (size // lanes * lanes or size for size in (_CHUNK, _LEAST_CHUNK))
    return min(most, max(least, -(-n // (_CHUNKS * lanes)) * lanes))


def _bracket(scores: Scores, count: int) -> Bracket | None:
    """A bracket in the finest coarse keys of which a byte has room for all that are inside."""
    # float16 has three bits more, and is made as fast, except from bfloat16, which has no more. A
    # single magnitude above 65504 is infinite in it, and then the mask is drawn otherwise.
    no_more = all(tensor.dtype == torch.bfloat16 for tensor in scores.entries)
    for coarse in [torch.bfloat16] if no_more else [torch.float16, torch.bfloat16]:
        bracket = find_bracket([scores], count, coarse=coarse)
        # It is upside down if many are NaN.
        if bracket is None or not 0 <= bracket.high - bracket.low < _WIDEST:
            continue
        if coarse == torch.bfloat16 or _is_normal(bracket):
            return bracket
    return None


def _is_normal(bracket: Bracket) -> bool:
    """Whether coarse keys inside have one order in all dtypes, in every mode of the processor."""
    return bracket.low > COARSE_NORMAL[bracket.coarse]


def _draw_(passed: _Pass, count: int, quotas: Sequence[int], n_older: int) -> Drawn | None:
    scores, row, bracket = passed.scores, passed.row, passed.bracket
    bits = range(n_older, 0, -1)
    differences = count_bits(passed.differing(), bits, passed.room.view(torch.int64))
    inside = torch.cat(passed.inside)
    numbers = [torch.stack(passed.n_above).sum(), torch.stack(passed.highest).amax().long()]
    n_above, highest = torch.stack(numbers).tolist()
    rank = count - (scores.n - n_above - len(inside))
    if highest >= COARSE_INF[bracket.coarse] or not 0 < rank <= len(inside):
        return None
    higher = inside[:0]
    if _is_normal(bracket):
        # Coarse keys tell nearly all of them apart, so that few exact ones are fetched.
        places = torch.cat(passed.places)
        place, rank, _ = radix_select([places], rank, add_up_one, (0, _WIDEST))
        higher, inside = inside[places > place], inside[places == place]
        key = bracket.low + place
        bracket = Bracket(key, key, bracket.coarse)
    [stay], n_tied = keep_highest([scores], [inside], rank, bracket, scores.n)
    stay = torch.cat([higher, stay])
    held = row.index_select(0, stay)
    # They were taken for removed, and counted as differing from every mask that has them.
    differences += len(stay) - 2 * count_all_bits(held)[list(bits)]
    row.index_copy_(0, stay, held.bitwise_or_(1))
    ends = list(accumulate(each.numel() for each in scores.entries))
    for end, quota, entries in zip(ends, quotas, scores.entries, strict=True):
        own = row[end - entries.numel() : end]
        if quota and not (_n_kept(own[:GLANCE]) >= quota or _n_kept(own) >= quota):
            return None
    return Drawn(n_tied, differences.tolist())


def _n_kept(row: Tensor) -> int:
    return int((row & 1).count_nonzero())


class _Pass:
    """One pass over weights and window, and what was seen on the way.

    Args:
        scores: What is ranked.
        row: The bytes of the window; modified in place.
        bracket: Between which coarse keys the threshold is looked for.
    """

    def __init__(self, scores: Scores, row: Tensor, bracket: Bracket) -> None:
        self.scores, self.row, self.bracket = scores, row, bracket
        # For keys, then a chunk's flags, then to count in: each is done with before the next.
        self.room = torch.empty(scores.size, dtype=bracket.coarse, device=row.device)
        self.pushed: list[Tensor] = []
        self.inside: list[Tensor] = []
        self.places: list[Tensor] = []
        self.n_above: list[Tensor] = []
        self.highest: list[Tensor] = []

    def differing(self) -> Iterator[Tensor]:
        """Put what is above the bracket into the window, chunk by chunk, and compare it.

        Yields:
            The bytes of a chunk, with all bits flipped where the new mask has a one.
        """
        # Once as a tensor, since a number would be made one in every call.
        n_values = self.bracket.high - self.bracket.low + 1
        width = torch.tensor(n_values, dtype=torch.int8, device=self.row.device)
        unsigned = width.view(torch.uint8)
        for start, places in self._placed():
            m = len(places)
            # Comparisons that write numbers are as fast as arithmetic, those that write bools are
            # not; and without a sign -1 is 255. The keys are not needed any more by then.
            flags = self.room.view(torch.bool)[:m]
            torch.lt(places.view(torch.uint8), unsigned, out=flags.view(torch.uint8))
            found = where_set(flags)
            self.places.append(places.index_select(0, found))
            self.inside.append(found.add_(start))
            above = torch.ge(places, width, out=places).view(torch.uint8)
            self.n_above.append(count_flags(above.view(torch.bool)))
            held = self.row[start : start + m]
            # Pushed and noted in one call, between whose two halves nothing can interrupt.
            self.pushed.extend(map(partial(torch.add, alpha=2, out=held), [above], [held]))
            yield above.neg_().bitwise_xor_(held)

    def _placed(self) -> Iterator[tuple[int, Tensor]]:
        """The position of each chunk, and where its keys are: in a byte what there is room for.

        A chunk is twice as many as keys are made for at once, less where a strided tensor ends
        before, and is handed out as soon as those that follow may not fit.
        """
        low, high, coarse = self.bracket
        lowest = torch.tensor(low, dtype=torch.int16, device=self.row.device)
        chunk = torch.empty(2 * self.scores.size, dtype=torch.int8, device=self.row.device)
        start = filled = 0
        for _, keys in self.scores.chunks(coarse, self.room):
            self.highest.append(keys.amax())
            # -1 below, 0 and more inside, and above the one that follows those.
            places = keys.clamp_(low - 1, high + 1).sub_(lowest)
            chunk[filled : filled + len(keys)].copy_(places)
            filled += len(keys)
            if len(chunk) - filled < self.scores.size:
                yield start, chunk[:filled]
                start, filled = start + filled, 0
        if filled:
            yield start, chunk[:filled]
