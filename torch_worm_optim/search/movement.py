"""Whether anything that is ranked has moved since the last mask, told by one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_worm_optim.search.mask import Sharding, sum_over_ranks

# Entries that share a table of factors, few enough for a processor's cache.
_CHUNK = 1 << 16
# Integers of as many bits as an entry, or as a part of one.
_INTEGERS = {1: torch.int8, 2: torch.int16}
# 2^64 over the golden ratio, as a signed number: its multiples are spread evenly (Knuth, The Art of
# Computer Programming 3, section 6.4).
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# Tells tensors apart where small odd numbers tell chunks of one apart.
_OF_TENSORS = 0x5851F42D


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor], shards: Sequence[Sharding | None]) -> int:
    r"""A number that changes with any entry, its sign, and its place.

    .. math:: \sum_i b_i\,h(i) \bmod 2^{64}

    where :math:`b_i` are the bits of entry *i*, taken as an integer, and :math:`h(i)` is an odd
    number made of its position.

    Args:
        tensors: Tensors of any floating or complex dtypes, shapes and devices.
        shards: For each how it is split over ranks, or None if this rank has all of it. With shards
            this is a collective call, and the result is the same however the entries are split.

    Returns:
        The number, equal on all ranks.

    Example:
        >>> weight = torch.tensor([0.5, -1.0])
        >>> before = fingerprint([weight], [None])
        >>> fingerprint([weight * 1], [None]) == before
        True
        >>> fingerprint([weight.flip(0)], [None]) == before
        False
    """
    if not tensors:
        return 0
    sums = [
        _sum(tensor.detach(), shard) * (number * _OF_TENSORS | 1)
        for number, (tensor, shard) in enumerate(zip(tensors, shards, strict=True))
    ]
    return int(sum_over_ranks(torch.stack([each.to(sums[0].device) for each in sums]), shards))


def _sum(tensor: Tensor, shard: Sharding | None) -> Tensor:
    """The sum over one tensor, as an int64 tensor without dimensions."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    numbers = numbers.reshape(-1)
    if (
        numbers.stride(0) != 1
    ):  # A tensor of one entry may have any stride, and no view as integers.
        numbers = numbers.clone(memory_format=torch.contiguous_format)
    bits = numbers.view(_INTEGERS.get(numbers.element_size(), torch.int32))
    # A wide entry is several integers: each has a place of its own.
    n_parts = bits.numel() // max(1, tensor.numel())
    n_whole = bits.numel() if shard is None else shard.numel * n_parts
    table = torch.arange(min(_CHUNK, n_whole), device=tensor.device) * _GOLDEN
    table = (table ^ (table >> 32)) | 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, piece in enumerate(torch.split(bits, _CHUNK)):
        factors: Tensor | int = 2 * number + 1
        spread = table[: len(piece)]
        if shard is not None:
            index = torch.arange(number * _CHUNK, number * _CHUNK + len(piece), device=bits.device)
            index = shard.global_indices(index // n_parts) * n_parts + index % n_parts
            spread, factors = table[index % _CHUNK], 2 * (index // _CHUNK) + 1
        total += (piece * (spread * factors)).sum()
    return total
