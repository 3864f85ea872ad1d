"""A ticket applied to a model: removed entries become zero, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_worm_optim.distributed import canonical_name, local_part_of, local_tensor, reshard_


@torch.no_grad()
def apply_ticket_(model: nn.Module, ticket: Mapping[str, Tensor]) -> None:
    """Apply a ticket to a model that need not be the one it was found in, in place.

    This is what a lottery-ticket experiment needs that rewinds to another set of weights, and what
    prunes an average of the weights or an older checkpoint. It acts once: later optimizer steps may
    bring the entries back, where ``WormOptimizer(..., ticket=)`` and
    :meth:`WormOptimizer.prune() <torch_worm_optim.WormOptimizer.prune>` hold them.

    Args:
        model: The model to prune.
        ticket: Bool masks by parameter name, **True = kept**, such as ``WormOptimizer.final_mask``;
            only the named parameters are touched, and parameters and masks may be DTensors. What
            DDP, ``torch.compile`` or ``AveragedModel`` adds to names is ignored on both sides.

    Raises:
        ValueError: If the ticket is for another model: it names a parameter that the model does not
            have, or one of another shape. The model is left as it was.
        TypeError: If a mask is not a bool tensor. The model is left as it was.

    Example:
        >>> model = nn.BatchNorm1d(3)
        >>> apply_ticket_(model, {"weight": torch.tensor([True, False, True])})
        >>> model.weight.data
        tensor([1., 0., 1.])
    """
    ticket = checked_ticket(model, ticket)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in ticket.items():
        removed = ~local_part_of(mask, like=parameters[name])
        local = local_tensor(parameters[name])
        local.masked_fill_(removed.to(local.device), 0)


def checked_ticket(model: nn.Module, ticket: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ticket with the names that parameters have in this model, if it is for this model.

    Args:
        model: Any model.
        ticket: Bool masks by parameter name, **True = kept**.

    Returns:
        The same masks.

    Raises:
        ValueError: If it names a parameter that the model does not have, or one of another shape.
        TypeError: If a mask is not a bool tensor.

    Example:
        >>> checked_ticket(nn.BatchNorm1d(2), {"module.weight": torch.tensor([True, False])})
        {'weight': tensor([ True, False])}
    """
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
