"""Units of several entries, such as rows, heads and dimensions of heads: their scores, their masks.

A unit is a block of entries that stays or goes as a whole. ``units`` says how many blocks there are
along each leading dimension of the entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_magnitudes(parts: Sequence[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
    r"""Score of every unit: the mean magnitude of its entries, its L1 norm per entry.

    .. math:: s_u = \frac{1}{|u|} \sum_{i \in u} |w_i|

    The L1 norm of a filter ranks the filters of a layer in Li et al. [1]; divided by the number of
    entries it compares units of different sizes too.

    Args:
        parts: Entries that make up the same units, of any shapes, floating or complex dtypes and
            devices, each with the number of units along its dimensions, see :func:`expand_mask`.

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


def expand_mask(mask: Tensor, units: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """The mask of entries that a mask of units means.

    Args:
        mask: Bool mask of shape ``(n_units,)``, **True = kept**.
        units: How many units there are along each dimension of ``shape``, each a divisor of it;
            dimensions left out have one. ``()`` where every entry is a unit of its own.
        shape: Shape of the entries.

    Returns:
        Bool mask of that shape; a view of ``mask`` where that is possible.

    Example:
        >>> expand_mask(torch.tensor([True, False]), (1, 2), (2, 4))
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
