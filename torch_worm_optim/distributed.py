"""Names and parts of parameters in models that are wrapped, compiled or spread over ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What wrappers put into parameter names. A saved search must not depend on whether the model was
# wrapped, and a user who writes a pattern thinks of the model as it was written.
_WRAPPER_PREFIXES = (
    "module.",
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
)


def canonical_name(name: str) -> str:
    """The parameter's name without what DDP, ``torch.compile`` and other wrappers add to it."""
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    for prefix in _WRAPPER_PREFIXES[1:]:
        name = name.replace(f".{prefix}", ".")
    return name


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Asking for the class would import torch.distributed, which some builds do not have; asking a
    # plain tensor for what it lacks takes longer than a small operator.
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or a plain tensor itself, as a view without a gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_data_ptr(tensor: Tensor) -> int:
    """Where the memory of a tensor begins, or of this rank's part of it."""
    local: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local.data_ptr()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All entries of a tensor; those of a DTensor are gathered, in a call that every rank makes."""
    if not is_dtensor(tensor):
        return tensor.detach()
    dtensor: DTensor = tensor.detach()  # type: ignore[assignment]
    local, mesh = dtensor.to_local(), dtensor.device_mesh
    if local.device.type != mesh.device_type:
        # Where weights are offloaded to the host, the ranks still talk device to device.
        dtensor = as_dtensor_like(dtensor, local.to(mesh.device_type))  # type: ignore[assignment]
    return dtensor.full_tensor()


def local_part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor, or of another DTensor, that belongs where ``like`` is local."""
    if is_dtensor(whole) and placement(whole) == placement(like):
        return local_tensor(whole)
    whole = whole_tensor(whole)
    if is_dtensor(like):
        for dim, (begin, size) in enumerate(_rectangle(like)):
            whole = whole.narrow(dim, min(begin, whole.shape[dim]), size)
    return whole


def as_dtensor_like(parameter: Tensor, local: Tensor) -> Tensor:
    """Wrap a local tensor as a DTensor sharded as a parameter is; not for a plain parameter."""
    if not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor

    dtensor: DTensor = parameter  # type: ignore[assignment]
    return DTensor.from_local(
        local,
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )


def placement(tensor: Tensor) -> object:
    """On which mesh a DTensor is split and how; None for other tensors."""
    if not is_dtensor(tensor):
        return None
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


def reshard_(model: nn.Module) -> None:
    """Make FSDP shard its parameters again after a forward pass without a backward."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            getattr(module, "reshard")()  # noqa: B009 - a Module's attributes are tensors to mypy


def check_gatherable(name: str, parameter: Tensor) -> None:
    """Raise for a parameter whose entries cannot be gathered."""
    # What parameters of FSDP1 and ZeRO-3 have that others do not.
    if any(hasattr(parameter, mark) for mark in ("_fsdp_flattened", "ds_id")):
        raise RuntimeError(
            f"{name!r} is sharded by FSDP1 or DeepSpeed ZeRO-3, which hide where its entries are. "
            "Shard with fully_shard (FSDP2), or train with DDP."
        )
    if is_dtensor(parameter):
        placements = parameter.placements  # type: ignore[attr-defined]
        if any(each.is_partial() for each in placements):
            raise RuntimeError(
                f"{name!r} is a DTensor of partial sums ({placements}), so that no rank knows its "
                "entries. Redistribute it to Shard or Replicate placements first."
            )
        _rectangle(parameter)


def _rectangle(parameter: Tensor) -> list[tuple[int, int]]:
    """For each dimension the first index that this rank has, and how many it has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: DTensor = parameter  # type: ignore[assignment]
    for i, each in enumerate(dtensor.placements):
        # FSDP says so of a dimension that tensor parallelism has cut before it. Any other factor
        # means that this rank has every so-and-so-many-th index, which is no rectangle.
        factor, dim = getattr(each, "split_factor", 1), getattr(each, "dim", None)
        inner = [
            dtensor.device_mesh.size(j)
            for j, other in enumerate(dtensor.placements)
            if j > i and getattr(other, "dim", None) == dim
        ]
        if factor not in (1, math.prod(inner)):
            raise RuntimeError(
                f"A parameter of shape {tuple(parameter.shape)} is sharded by {each}, of which a "
                "rank's part has gaps. Shard with fully_shard or parallelize_module."
            )
    sizes, begins = compute_local_shape_and_global_offset(
        dtensor.shape, dtensor.device_mesh, dtensor.placements
    )
    local_shape = tuple(local_tensor(parameter).shape)
    if tuple(sizes) != local_shape:
        raise RuntimeError(
            f"This rank has {local_shape} of a parameter of shape {tuple(parameter.shape)}, where "
            f"{dtensor.placements} mean {tuple(sizes)}. Such a layout is not supported: shard with "
            "fully_shard or parallelize_module."
        )
    return list(zip(begins, sizes, strict=True))
