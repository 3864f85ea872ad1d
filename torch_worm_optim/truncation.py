"""Holding back entries about to be pruned: in-place scaling of gradients and of updates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_worm_optim.kernels import kernels_run

# Optimizers that normalise a gradient by its own history, sign or spectrum, by what their class
# names have in common, since most of them live in other packages.
_NORMALISING = re.compile(
    r"Ada|Adopt|RMSprop|Rprop|LaProp|^Sign|Lamb(?!da)|LAMB|Lion|Prodigy|Sophia|Shampoo|SOAP|Muon|Kron"
    r"|NovoGrad|MADGRAD|^Mars|CAME|Yogi|AdEMAMix|Ranger|Tiger"
)

# Entries whose multipliers are made at once: a megabyte, so that they stay in the cache.
_BLOCK = 9 << 15

with torch.inference_mode(False):
    # As a tensor, since a number would be made one in every call.
    _NEWEST = torch.tensor(1, dtype=torch.uint8, device="cpu")


def fill_multiplier_(multiplier: Tensor, mask: Tensor, truncation: float) -> None:
    r"""Write what gradients are to be multiplied by: 1 where kept, r where removed, in place.

    Args:
        multiplier: Tensor of the gradient's dtype; modified in place.
        mask: Bool mask of the same shape, **True = kept**.
        truncation: *r*, in [0, 1].

    Example:
        >>> multiplier = torch.empty(2)
        >>> fill_multiplier_(multiplier, torch.tensor([True, False]), 0.003)
        >>> multiplier
        tensor([1.0000, 0.0030])
    """
    multiplier.fill_(1).masked_fill_(~mask, truncation)


@torch.no_grad()
def truncate_gradients_(
    gradients: Sequence[Tensor | None],
    multipliers: Sequence[Tensor],
    *,
    foreach: bool | None = None,
) -> None:
    r"""Scale the gradients of to-be-pruned entries by r, in place.

    .. math::

        \nabla_t(\theta) = r\,\nabla(\theta) \text{ if } m(\theta) = 1,
        \text{ else } \nabla(\theta)

    Section 4 of the WORM paper [1], where m = 1 marks what will be *pruned*; masks here mark what
    is kept. The gradient of a kept entry keeps its bits. Nothing is allocated and the device is not
    waited for.

    Args:
        gradients: Gradients, or views of the ranked part of them; ``None`` is passed over.
        multipliers: For each gradient, what :func:`fill_multiplier_` wrote: a tensor of its shape.
        foreach: Whether to scale all tensors of one device and dtype in one call (default: True,
            except for sparse gradients, which are always scaled one by one).

    Example:
        >>> gradient = torch.tensor([2.0, 2.0])
        >>> truncate_gradients_([gradient], [torch.tensor([1.0, 0.5])])
        >>> gradient
        tensor([2., 1.])

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """
    dense: list[tuple[Tensor, Tensor]] = []
    for gradient, multiplier in zip(gradients, multipliers, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:
            # Scaling is linear, so values that are not yet coalesced may be scaled one by one.
            gradient._values().mul_(multiplier[tuple(gradient._indices())])
        else:
            dense.append((gradient, multiplier))
    (_scale_loop_ if foreach is False else _scale_foreach_)(dense)


def _scale_loop_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """``a *= b`` for each pair."""
    for tensor, factor in pairs:
        tensor.mul_(factor)


def _scale_foreach_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """``a *= b`` for all pairs of one device and dtype in one call."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for tensor, factor in pairs:
        groups.setdefault((tensor.device, tensor.dtype), []).append((tensor, factor))
    for group in groups.values():
        tensors, factors = zip(*group, strict=True)
        torch._foreach_mul_(tensors, factors)


@torch.no_grad()
def truncate_removed_(
    gradients: Sequence[Tensor | None], newest: Sequence[Tensor], truncation: float | Tensor
) -> None:
    r"""Scale gradients as :func:`truncate_gradients_` does, with no more in memory than the masks.

    Multipliers are made for some entries at a time, in the processor's cache, from the bytes in
    which the window holds the masks; on a CUDA device a kernel reads the bytes themselves. The bits
    are those that the multipliers of :func:`fill_multiplier_` give, but that a tensor holds *r* in
    single precision, for double ones too.

    Args:
        gradients: Gradients, or views of the ranked part of them; ``None`` is passed over.
        newest: For each gradient a uint8 tensor of as many entries in the same order, contiguous;
            an entry is kept where bit 0 is 1, as in a row of
            :func:`~torch_worm_optim.masks.new_window`.
        truncation: *r*, in [0, 1]; or a float32 scalar on the gradients' device that holds it, for
            a recorded CUDA graph, which reads it again at every replay.

    Example:
        >>> gradient = torch.tensor([2.0, 2.0])
        >>> truncate_removed_([gradient], [torch.tensor([5, 4], dtype=torch.uint8)], 0.5)
        >>> gradient
        tensor([2., 1.])
    """
    pieces: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for gradient, row in zip(gradients, newest, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:
            kept = row.view(gradient.shape)[tuple(gradient._indices())] & 1
            gradient._values().mul_(_multiplier_(kept.to(gradient.dtype.to_real()), truncation))
        elif isinstance(truncation, Tensor) and _has_kernel(gradient, row, truncation):
            from torch_worm_optim.truncation_kernel import scale_removed_

            scale_removed_(gradient, row, truncation)
        else:
            kind = gradient.device, gradient.dtype.to_real()
            pieces.setdefault(kind, []).extend(_pieces(gradient, row))
    for (device, dtype), pairs in pieces.items():
        most = max(row.numel() for _, row in pairs)
        bits = torch.empty(most, dtype=torch.uint8, device=device)
        numbers = torch.empty(most, dtype=dtype, device=device)
        kept, multiplier = bits, numbers  # views of these, as long as the piece
        for piece, row in pairs:
            if len(kept) != len(row):  # most pieces have one length
                kept, multiplier = bits[: len(row)], numbers[: len(row)]
            multiplier.copy_(torch.bitwise_and(row, _NEWEST, out=kept))
            piece.mul_(_multiplier_(multiplier, truncation).view_as(piece))


def _multiplier_(kept: Tensor, truncation: float | Tensor) -> Tensor:
    """1 where ``kept`` is 1, *r* where it is 0: the larger of the two, in place."""
    if isinstance(truncation, Tensor):
        return torch.maximum(kept, truncation.to(kept.dtype), out=kept)
    return kept.clamp_(min=truncation)


def _has_kernel(gradient: Tensor, row: Tensor, strength: Tensor) -> bool:
    return (
        gradient.is_cuda
        and type(gradient) is Tensor  # a subclass may hold its numbers elsewhere
        and gradient.device == row.device == strength.device
        and gradient.is_contiguous()
        and gradient.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and kernels_run(gradient.device)
    )


def _pieces(gradient: Tensor, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A gradient and its bytes, cut where it is larger than a block: flat, or between rows."""
    whole = gradient.view(-1) if gradient.is_contiguous() else gradient
    if gradient.numel() <= _BLOCK or len(whole) == 1:
        yield whole, row
        return
    n_pieces = -(-gradient.numel() // _BLOCK)
    n_rows = -(-len(whole) // n_pieces)
    yield from zip(
        torch.split(whole, n_rows),
        torch.split(row, n_rows * (row.numel() // len(whole))),
        strict=True,
    )


@torch.no_grad()
def truncate_updates_(
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    masks: Sequence[Tensor],
    truncation: float | Tensor,
) -> None:
    r"""Scale what an optimizer did to to-be-pruned entries by r, in place.

    .. math:: w \leftarrow w_\mathrm{old} + r\,(w_\mathrm{new} - w_\mathrm{old})

    on removed entries. Unlike a scaled gradient this holds under every optimizer, its momentum,
    second moments and weight decay included. A kept entry keeps the bits that the optimizer gave
    it.

    Args:
        parameters: Parameters after the optimizer's step, or views of the ranked part; modified in
            place.
        before: The same entries as they were before it; overwritten, they are not needed any more.
        masks: For each parameter a bool mask of its shape, **True = kept**.
        truncation: *r*, in [0, 1], or a scalar tensor that holds it.

    Example:
        >>> parameter, before = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> truncate_updates_([parameter], [before], [torch.tensor([True, False])], 0.25)
        >>> parameter
        tensor([2.0000, 1.2500])
    """
    for parameter, old, mask in zip(parameters, before, masks, strict=True):
        share = truncation.to(old.dtype) if isinstance(truncation, Tensor) else truncation
        torch.where(mask, parameter, old.lerp_(parameter, share), out=parameter)


def is_normalising(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes a constant factor in a gradient out again.

    Adam and its kin divide a gradient by its own running size: scaled by a constant, the update is
    soon what it was before.

    Args:
        optimizer: Any optimizer; it is judged by the names of its class and the classes above it.

    Returns:
        Whether ``truncate="update"`` is needed for a truncation that lasts.

    Example:
        >>> parameter = torch.zeros(1, requires_grad=True)
        >>> is_normalising(torch.optim.AdamW([parameter]))
        True
        >>> is_normalising(torch.optim.SGD([parameter]))
        False
    """
    return any(_NORMALISING.search(kind.__name__) for kind in type(optimizer).__mro__)
