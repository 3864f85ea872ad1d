"""Counting set bits in bytes, eight bytes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BYTES = 8
# The lowest bit of each byte of a word: eight lanes, each of which can count to 255.
_LANES = 0x0101010101010101
# Words that are added in one lane: 240 of the lowest bit, 15 of bit 4, and 240 / 2 ** i of bit i.
_ROWS = 240
# Elements for which torch does not ask another thread.
_GRAIN = 1 << 15
# So few words are not worth the trouble.
_FEW = 16 * _ROWS
# Bits above this one are moved down so far before they are added: too few would fill a lane.
_HIGHEST = 4
_DOWN = 3

with torch.inference_mode(False):
    # As tensors, since a number would be made one in every call.
    _LANES_OF_BIT = [torch.tensor(_LANES << bit, device="cpu") for bit in range(_HIGHEST + 1)]
    _BITS_OF = (torch.arange(256, device="cpu") >> torch.arange(8, device="cpu")[:, None]) & 1
    # Which bits of each byte differ from its lowest, the highest first.
    _DIFFERS = (_BITS_OF ^ _BITS_OF[0]).flip(0)


def count_bits(parts: Iterable[Tensor], bits: Sequence[int], room: Tensor | None = None) -> Tensor:
    """For each of some bits, how many bytes have it set.

    Eight bytes are added as one word, each in a lane of its own, and as many words as no lane
    overflows from. Adding flags one by one takes ten times as long on a processor.

    Args:
        parts: uint8 tensors of shape ``(n,)``, contiguous, on one device; each may be overwritten
            when the next one is asked for. At least one.
        bits: Which bits, each from 0, the lowest, to 7.
        room: An int64 tensor of as many bytes as any part to count in, overwritten (default: one is
            made).

    Returns:
        int64 tensor of shape ``(len(bits),)``.

    Example:
        >>> count_bits([torch.tensor([1, 2, 3], dtype=torch.uint8)], [0, 1])
        tensor([2, 2])
    """
    # By how far bits are moved down before they are added, where they are then.
    places = {
        moved: [bit - moved for bit in bits if (bit > _HIGHEST) == (moved > 0)]
        for moved in (0, _DOWN)
    }
    summed: dict[int, list[Tensor]] = {moved: [] for moved, some in places.items() if some}
    few = []
    for values in parts:
        start, end = _whole_words(values)
        n_words = (end - start) // _BYTES
        if n_words < _FEW:
            few.append(count_all_bits(values))
            continue
        few += [count_all_bits(rest) for rest in (values[:start], values[end:]) if len(rest)]
        words = values[start:end].view(torch.int64)
        if room is None or len(room) < n_words:
            room = torch.empty_like(words)
        for moved, sums in summed.items():
            source = words >> moved if moved else words
            sums.append(_count_low_bits(source, places[moved], room[:n_words]))
    counts = torch.stack([*few, torch.zeros(8, dtype=torch.int64, device=values.device)]).sum(0)
    for moved, sums in summed.items():
        if sums:
            counts[[moved + place for place in places[moved]]] += torch.stack(sums).sum(0)
    return counts[list(bits)]


def _count_low_bits(words: Tensor, places: Sequence[int], room: Tensor) -> Tensor:
    """For each of some bits, up to bit 4, how many bytes have it set; ``room`` is overwritten."""
    highest = max(places)
    rows = _ROWS >> highest
    some = words.new_empty(len(places), len(words) // rows)
    # One bit after the other, since the lanes of all would leave the processor's cache.
    for place, own in zip(places, some, strict=True):
        torch.bitwise_and(words, _LANES_OF_BIT[place], out=room)
        _add_rows(room, rows, own)
    # As many as fit where the bits are; then, moved down, as many more as fit. What is moved is a
    # number with a sign, which must not fill the highest lane: no count has that many bits.
    some >>= torch.tensor(places, device=words.device)[:, None]
    some &= _LANES * (0xFF >> highest) if highest else -1
    lanes = some.view(len(places), _ROWS // rows, -1).sum(1)
    # Not those of many parts at once: each byte is made a word before it is added.
    return lanes.view(torch.uint8).sum(1, dtype=torch.int64)


def _add_rows(words: Tensor, rows: int, out: Tensor) -> Tensor:
    """Add so many words each to one."""
    # Each thread of the host adds what most likely was written by itself, an equal share of all:
    # to read what lies in another one's cache takes twice as long.
    n_threads = min(torch.get_num_threads(), -(-len(words) // _GRAIN))
    n_shares = n_threads if words.device.type == "cpu" and len(out) % n_threads == 0 else 1
    torch.sum(words.view(n_shares, rows, -1), 1, out=out.view(n_shares, -1))
    return out


def count_flags(flags: Tensor) -> Tensor:
    """How many of many flags are set, as :func:`count_bits` counts.

    Args:
        flags: Bool tensor of shape ``(n,)``, contiguous.

    Returns:
        int64 tensor of shape ``()``.

    Example:
        >>> count_flags(torch.tensor([True, False, True]))
        tensor(2)
    """
    start, end = _whole_words(flags)
    if start == end:
        return flags.count_nonzero()
    words = flags[start:end].view(torch.int64)
    lanes = _add_rows(words, _ROWS, words.new_empty(len(words) // _ROWS))
    count = lanes.view(torch.uint8).sum(dtype=torch.int64)
    for rest in (flags[:start], flags[end:]):
        if len(rest):
            count += rest.count_nonzero()
    return count


def _whole_words(values: Tensor) -> tuple[int, int]:
    """Where the bytes begin and end that make up words, and these whole lanes."""
    start = -int(values.storage_offset()) % _BYTES  # words must lie at whole words
    n_lanes = max(0, len(values) - start) // (_ROWS * _BYTES)
    return start, start + n_lanes * _ROWS * _BYTES


def count_all_bits(values: Tensor) -> Tensor:
    """How many bytes have each bit set, from how often each of the 256 bytes occurs: for few bytes.

    Args:
        values: uint8 tensor of shape ``(n,)``.

    Returns:
        int64 tensor of shape ``(8,)``, the lowest bit first.

    Example:
        >>> count_all_bits(torch.tensor([1, 2, 3], dtype=torch.uint8))
        tensor([2, 2, 0, 0, 0, 0, 0, 0])
    """
    return _count_by_byte(values, _BITS_OF)


def count_all_differing(values: Tensor) -> Tensor:
    """In how many bytes each bit differs from the lowest, as :func:`count_all_bits` counts.

    Args:
        values: uint8 tensor of shape ``(n,)``.

    Returns:
        int64 tensor of shape ``(8,)``, the highest bit first: that is the oldest mask in a window.

    Example:
        >>> count_all_differing(torch.tensor([1, 2, 3], dtype=torch.uint8))
        tensor([2, 2, 2, 2, 2, 2, 2, 0])
    """
    return _count_by_byte(values, _DIFFERS)


def _count_by_byte(values: Tensor, counted: Tensor) -> Tensor:
    occurrences = values.bincount(minlength=1 << _BYTES)
    if values.device.type != "cpu":  # CUDA multiplies no matrices of whole numbers
        return (counted.to(values.device) * occurrences).sum(1)
    return torch.mv(counted, occurrences)
