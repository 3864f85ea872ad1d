"""A mask drawn on a CUDA device in two passes over the weights, with one list of numbers read back.

Ranked is the pair of an entry's magnitude and its position, as one whole number: no two are equal,
so that ties, however many, are nothing special.

1. A sorted sample of the pairs brackets the one of the wanted rank, the *cutoff*.
2. One pass counts what lies below the bracket and collects what lies inside it; sorted, that has
   the cutoff at a known place.
3. One pass compares with the cutoff, puts the mask into the window and counts how far it is from
   those before it.

Nothing is read back before all of that is queued. If it turns out then that the sample misled or a
representative keeps too few, the mask is taken out of the window again, and has to be drawn in the
ordinary way; where both ways work the masks are the same. Imported only where kernels run.
"""

# Annotations are objects here, not strings: Triton looks for `tl.constexpr` among them.

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from torch_worm_optim.masks import Drawn

_BLOCK = 4096
_WARPS = 8
# Pairs in the sample, and how many standard deviations of its ranks the bracket has on either side.
_SAMPLE = 1 << 20
_DEVIATIONS = 3.5
# How many times what the bracket is expected to hold there is room for.
_ROOM = 2
# Regions that pairs inside the bracket are collected in, of a large network.
_REGIONS = 256
# Above every pair: magnitudes have 31 bits and positions 32.
_ABOVE_ALL = (1 << 63) - 1
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F800000, torch.float16: 0x7C000000}
# Bytes that tensors have to begin at a multiple of, as torch makes them.
_ALIGNED = 16


@triton.jit
def _magnitudes(entries, real):  # type: ignore[no-untyped-def]
    """The bits of magnitudes, which are in the order of the numbers; 0 where there is none."""
    keys = tl.load(entries, real, other=0)
    if tl.constexpr(keys.dtype.primitive_bitwidth) == 16:  # older versions need it said
        keys = keys.to(tl.int32) << 16
    return keys & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def _of_block(  # type: ignore[no-untyped-def]
    table, tensor_of_block, like, even: tl.constexpr, block: tl.constexpr
):
    """Where a program's entries are: their addresses, which are real, and the first one's position.

    The table has a row for each tensor: its address, where it begins and ends among all entries,
    and the number of its first block. If all sizes are multiples of 16, several entries are read
    at a time.
    """
    row = table + 4 * tl.load(tensor_of_block + tl.program_id(0)).to(tl.int64)
    begin, end = tl.load(row + 1), tl.load(row + 2)
    start = (tl.program_id(0) - tl.load(row + 3)) * block
    here = start.to(tl.int32) + tl.arange(0, block)
    size, first = (end - begin).to(tl.int32), begin + start
    if even:
        size, first = tl.multiple_of(size, 16), tl.multiple_of(first, 16)
    entries = tl.multiple_of(tl.load(row).to(tl.pointer_type(like.dtype.element_ty)), 16)
    return entries + here, here < size, first


@triton.jit  # type: ignore[untyped-decorator]
def _cut(pair, first, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The magnitude of a pair, and its position counted from the first of a block.

    With these a comparison of pairs takes whole numbers of 32 bits: ``a < b`` is
    ``magnitude_a < magnitude_b + (position_a < position_b)``.
    """
    position = (pair & 0xFFFFFFFF) - first
    position = tl.minimum(tl.maximum(position, -1), block)
    return (pair >> 32).to(tl.int32), position.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _sample(  # type: ignore[no-untyped-def]
    table, like, n_tensors, stride, n, out, halvings: tl.constexpr, block: tl.constexpr
):
    """The pair of every ``stride``-th entry."""
    number = tl.program_id(0) * block + tl.arange(0, block)
    real = number < n
    position = number.to(tl.int64) * stride
    # The last tensor that begins at or before the position and is not empty: the first that ends
    # behind it.
    low = tl.zeros_like(number)
    high = tl.zeros_like(number) + n_tensors - 1
    for _ in tl.static_range(halvings):
        middle = (low + high) // 2
        behind = tl.load(table + 4 * middle + 2, real, other=0) > position
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, tl.minimum(middle + 1, high))
    address = tl.load(table + 4 * low, real, other=0)
    entries = address.to(tl.pointer_type(like.dtype.element_ty))
    keys = _magnitudes(entries + position - tl.load(table + 4 * low + 1, real, other=0), real)
    tl.store(out + number, (keys.to(tl.int64) << 32) | position, real)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    table,
    tensor_of_block,
    like,
    low,
    high,
    room,
    capacity,
    n_inside,
    regions,
    seen,
    even: tl.constexpr,
    block: tl.constexpr,
):
    """Count pairs below the bracket, find the highest magnitude, collect pairs inside."""
    program = tl.program_id(0)
    entries, real, first = _of_block(table, tensor_of_block, like, even, block)
    keys = _magnitudes(entries, real)
    at = tl.arange(0, block)
    low_key, low_at = _cut(tl.load(low), first, block)
    high_key, high_at = _cut(tl.load(high), first, block)
    below = real & (keys < low_key + (at < low_at).to(tl.int32))
    above = keys > high_key - (at > high_at).to(tl.int32)
    inside = real & (below == 0) & (above == 0)
    # A counter for each of some regions: all programs at one would queue up.
    region = program % regions
    counters = n_inside + region * 8 + tl.zeros_like(at)
    slots = tl.atomic_add(counters, 1, mask=inside, sem="relaxed")
    pairs = (keys.to(tl.int64) << 32) | (first + at)
    tl.store(room + region * capacity + slots, pairs, inside & (slots < capacity))
    tl.store(seen + 2 * program, tl.sum(below.to(tl.int32), 0))
    tl.store(seen + 2 * program + 1, tl.max(keys, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _push(  # type: ignore[no-untyped-def]
    table,
    tensor_of_block,
    like,
    newest,
    cutoff,
    counts,
    n_words: tl.constexpr,
    even: tl.constexpr,
    block: tl.constexpr,
):
    """Put the mask into the window; count what it keeps, what ties, and what differs.

    Two counts are added as one word of 32 bits, which they cannot overflow from.
    """
    entries, real, first = _of_block(table, tensor_of_block, like, even, block)
    keys = _magnitudes(entries, real)
    at = tl.arange(0, block)
    key, last = _cut(tl.load(cutoff), first, block)
    kept = real & (keys > key - (at > last).to(tl.int32))
    equal = real & (keys == key)
    bit = kept.to(tl.int32)
    masks = (tl.load(newest + first + at, real, other=0).to(tl.int32) << 1) | bit
    tl.store(newest + first + at, masks.to(tl.uint8), real)
    counts += tl.program_id(0) * n_words
    tl.store(counts, tl.sum(bit | (equal.to(tl.int32) << 16), 0))
    tl.store(counts + 1, tl.sum((kept & equal).to(tl.int32), 0))
    # Bit i is 1 where the mask i before it differs.
    differs = (masks ^ (0 - bit)) & 0xFF
    for word in tl.static_range(2, n_words):
        age = 2 * word - 3
        both = ((differs >> age) | (differs << (15 - age))) & 0x00010001
        tl.store(counts + word, tl.sum(both, 0))


def can_draw(entries: Sequence[Tensor], window: Tensor) -> bool:
    """Whether :func:`draw_mask_` is made for such tensors.

    Args:
        entries: The entries to rank.
        window: What :func:`~torch_worm_optim.masks.new_window` made.
    """
    return (
        window.shape[0] == 1
        and 0 < window.shape[1] < 1 << 31
        and entries[0].dtype in _INFINITY
        and all(
            type(each) in (Tensor, nn.Parameter)  # others may hold their numbers elsewhere
            and each.dtype == entries[0].dtype
            and each.device == window.device
            and each.is_contiguous()
            and each.data_ptr() % _ALIGNED == 0
            and (each.data_ptr() != 0 or each.numel() == 0)  # not given back, as offloading does
            for each in entries
        )
    )


@torch.no_grad()
def draw_mask_(
    entries: Sequence[Tensor], window: Tensor, count: int, quotas: Sequence[int], n_older: int
) -> Drawn | None:
    """Draw the mask without the ``count`` lowest entries and push it into the window, in place.

    The device is waited for once, at the end.

    Args:
        entries: The entries to rank, for which :func:`can_draw` holds.
        window: uint8 tensor of shape ``(1, n_entries)``; modified in place.
        count: How many go, at least 1.
        quotas: How many of each tensor have to stay.
        n_older: How many of the masks in the window are compared with the new one, at most 7.

    Returns:
        What is to be known of the mask; None if it has to be drawn otherwise, and then the window
        holds the masks that it held.
    """
    sizes = [each.numel() for each in entries]
    begins = list(accumulate(sizes, initial=0))
    n_blocks = [triton.cdiv(size, _BLOCK) for size in sizes]
    block_ends = list(accumulate(n_blocks))
    n = begins[-1]
    device = window.device
    # Kernels read whole numbers, and are told of which kind by a tensor that is like the others.
    like = entries[0].view(torch.int32 if entries[0].dtype == torch.float32 else torch.int16)
    even = all(size % 16 == 0 for size in sizes)
    rows = zip(entries, begins, sizes, n_blocks, block_ends, strict=False)
    host = [[t.data_ptr(), b, b + s, end - blocks] for t, b, s, blocks, end in rows]
    # Copied so, some thousand numbers are on their way before the host goes on, and not waited for.
    table = torch.tensor(host, device="cpu").to(device, non_blocking=True)
    last_blocks = torch.tensor(block_ends, device="cpu").to(device, non_blocking=True)
    tensor_of_block = torch.bucketize(
        torch.arange(block_ends[-1], device=device), last_blocks, out_int32=True, right=True
    )
    made = table.new_full
    with torch.cuda.device_of(window):  # type: ignore[no-untyped-call]
        # The sample
        stride = max(1, n // _SAMPLE) | 1
        n_sampled = triton.cdiv(n, stride)
        sampled = made((n_sampled,), 0)
        _sample[(triton.cdiv(n_sampled, _BLOCK),)](
            *(table, like, len(entries), stride, n_sampled, sampled),
            halvings=len(entries).bit_length(),
            block=_BLOCK,
            num_warps=_WARPS,
        )
        sampled = sampled.sort().values
        share = count / n
        spread = _DEVIATIONS * math.sqrt(n_sampled * share * (1 - share)) + 2
        lowest, highest = (math.floor(share * n_sampled + each) for each in (-spread, spread))
        low = sampled[lowest] if lowest >= 0 else made((), 0)
        high = sampled[highest] if highest < n_sampled else made((), _ABOVE_ALL)

        # The cutoff
        n_expected = min(n, stride * (highest - lowest + 2))
        regions = min(_REGIONS, max(1, n_expected // _BLOCK))
        capacity = min(n, _ROOM * triton.cdiv(n_expected, regions))
        room = made((regions, capacity), _ABOVE_ALL)
        n_inside = made((regions, 8), 0, dtype=torch.int32)  # each in a sector of its own
        seen = made((block_ends[-1], 2), 0, dtype=torch.int32)
        _collect[(block_ends[-1],)](
            *(table, tensor_of_block, like, low, high, room, capacity, n_inside, regions, seen),
            even=even,
            block=_BLOCK,
            num_warps=_WARPS,
        )
        rank = count - seen[:, 0].sum()
        cutoff = room.view(-1).sort().values.gather(0, (rank - 1).clamp(0, room.numel() - 1)[None])

        # The mask
        n_words = 2 + triton.cdiv(n_older, 2)
        counts = made((block_ends[-1], n_words), 0, dtype=torch.int32)
        _push[(block_ends[-1],)](
            *(table, tensor_of_block, like, window, cutoff, counts),
            n_words=n_words,
            even=even,
            block=_BLOCK,
            num_warps=_WARPS,
        )
    try:
        kept = (counts[:, 0] & 0xFFFF).cumsum(0)
        kept = torch.cat([kept.new_zeros(1), kept]).index_select(0, last_blocks)
        of_regions = n_inside[:, 0]
        found = [seen[:, 1].amax().long(), of_regions.amax().long(), of_regions.sum(), rank]
        halves = [(counts & 0xFFFF).sum(0), (counts >> 16).sum(0)]
        numbers = torch.cat([torch.stack(found), *halves, kept]).tolist()
    except BaseException:  # out of memory, or interrupted: a mask that nobody is told of
        window.bitwise_right_shift_(1)
        raise

    top, fullest, inside, rank_inside = numbers[:4]
    lower, upper = numbers[4 : 4 + n_words], numbers[4 + n_words : 4 + 2 * n_words]
    up_to = numbers[4 + 2 * n_words :]
    if (
        top >= _INFINITY[entries[0].dtype]
        or fullest > capacity
        or not 0 < rank_inside <= inside
        or any(b - a < q for a, b, q in zip([0, *up_to], up_to, quotas, strict=False))
    ):
        # The oldest bit is lost, that of a mask which would have fallen out of the window.
        window.bitwise_right_shift_(1)
        return None
    by_age = [n for both in zip(lower[2:], upper[2:], strict=True) for n in both]
    return Drawn(upper[0] if lower[1] else 0, by_age[:n_older][::-1])
