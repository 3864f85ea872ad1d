"""Holding back entries about to be pruned: in-place scaling of gradients and of updates."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

# Optimizers that normalise a gradient by its own history, sign or spectrum, by what their class
# names have in common, since most of them live in other packages.
_NORMALISING = re.compile(
    r"Ada|Adopt|RMSprop|Rprop|LaProp|^Sign|Lamb(?!da)|LAMB|Lion|Prodigy|Sophia|Shampoo|SOAP|Muon|Kron"
    r"|NovoGrad|MADGRAD|^Mars|CAME|Yogi|AdEMAMix|Ranger|Tiger"
)


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
def truncate_updates_(
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    masks: Sequence[Tensor],
    truncation: float,
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
        truncation: *r*, in [0, 1].

    Example:
        >>> parameter, before = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> truncate_updates_([parameter], [before], [torch.tensor([True, False])], 0.25)
        >>> parameter
        tensor([2.0000, 1.2500])
    """
    for parameter, old, mask in zip(parameters, before, masks, strict=True):
        torch.where(mask, parameter, old.lerp_(parameter, truncation), out=parameter)


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
