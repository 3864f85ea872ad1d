"""Which zeros count: those that a ticket holds, and not those that training will move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_worm_optim.distributed import canonical_name, reshard_, whole_tensor
from torch_worm_optim.shrink.cut import Cut, cut_tensor

# What stands for a zero that training will move.
_TINY = 1e-3


def checked_ticket(model: nn.Module, ticket: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ticket with the names that parameters have in this model, if it is for this model."""
    reshard_(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own_names = {canonical_name(name): name for name in parameters}
    checked = {}
    for saved_name, mask in ticket.items():
        name = own_names.get(canonical_name(saved_name), saved_name)
        if name not in parameters:
            raise ValueError(
                f"The ticket is for another model: it has a mask for {name!r}, and "
                f"{type(model).__name__} has no parameter of that name. Build the model that the "
                "ticket was found in."
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"The mask of {name!r} must be a bool tensor with True = kept, got {kind}."
            )
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"The ticket is for another model: its mask for {name!r} has shape "
                f"{tuple(mask.shape)}, the parameter has {tuple(parameters[name].shape)}. Build "
                "the model that it was found in."
            )
        checked[name] = mask
    return checked


def held_masks(model: nn.Module, ticket: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a ticket, by the first name of each parameter, if it is applied to the model."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    masks = {}
    for name, mask in checked_ticket(model, ticket).items():
        parameter = every[name].detach()
        mask = whole_tensor(mask).to(parameter.device)
        if parameter[~mask].any():
            raise ValueError(
                f"{name!r} has entries that the ticket removes and that are not zero. Call "
                "apply_ticket_(model, ticket) before."
            )
        masks[first[id(every[name])]] = mask
    return masks


@contextlib.contextmanager
def only_held_zeros(cut: Cut, masks: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The model with those zeros of trainable parameters that no mask removes replaced."""
    if masks is None:
        yield
        return
    stand_ins: dict[int, nn.Parameter] = {}
    for name, parameter in cut.model.named_parameters():
        if not parameter.requires_grad:
            continue
        alive = parameter.detach() == 0
        if name in masks:
            mask = masks[name]
            if name in cut.kept:
                mask = cut_tensor(mask, cut.kept[name], cut.groups.get(name, 1))
            alive &= mask
        if alive.any():
            stand_ins[id(parameter)] = nn.Parameter(parameter.detach().masked_fill(alive, _TINY))
    places: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, key, parameter)
        for module in cut.model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in stand_ins
    ]
    try:
        for parameters, key, parameter in places:
            parameters[key] = stand_ins[id(parameter)]
        yield
    finally:
        for parameters, key, parameter in places:
            parameters[key] = parameter
