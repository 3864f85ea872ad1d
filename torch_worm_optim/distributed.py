"""Sharded parameters: which entries of a DTensor this rank has, and where they lie among all.

The local tensor of a rank is a rectangle of the parameter: some of the indices of each dimension.
The ranked entries are a rectangle too, perhaps with gaps, as the query and key rows of a fused
projection are. So the ranked indices of a rank can be found for each dimension separately. Only
counts are sent to other ranks, never weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from torch_worm_optim.selectors import Part, Representative

# What wrappers put into parameter names. A saved search must not depend on whether the model was
# wrapped, and a user who writes a pattern thinks of the model as it was written.
_WRAPPER_PREFIXES = (
    "module.",
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
)


def canonical_name(name: str) -> str:
    """The parameter's name without what DDP, ``torch.compile`` and checkpoint wrappers add to it.

    Args:
        name: A name as in ``model.named_parameters()``.

    Returns:
        The same name as the bare model would have it.

    Example:
        >>> canonical_name("module._orig_mod.layer1.bn.weight")
        'layer1.bn.weight'
    """
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    for prefix in _WRAPPER_PREFIXES[1:]:
        name = name.replace(f".{prefix}", ".")
    return name


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Args:
        tensor: Any tensor.

    Example:
        >>> is_dtensor(torch.ones(2))
        False
    """
    # Asking for the class would import torch.distributed, which some builds do not have.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or a plain tensor itself, as a view without a gradient.

    Args:
        tensor: A parameter or a gradient.

    Example:
        >>> local_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def reshard_(model: nn.Module) -> None:
    """Make FSDP shard its parameters again after a forward pass without a backward.

    Args:
        model: Any model.

    Example:
        >>> reshard_(nn.Linear(1, 1))
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            getattr(module, "reshard")()  # noqa: B009 - a Module's attributes are tensors to mypy


def local_part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The local tensor that another tensor would have if it were sharded as a parameter is.

    Args:
        whole: A plain tensor, the same on all ranks, or a DTensor sharded in any way (then this is
            a collective call).
        like: A parameter of that shape, plain or a DTensor.

    Returns:
        A view of ``whole`` where nothing has to be fetched from other ranks.

    Example:
        >>> local_part_of(torch.arange(3), like=torch.zeros(3))
        tensor([0, 1, 2])
    """
    if is_dtensor(whole):
        if sharded_alike(whole, like):
            return local_tensor(whole)
        whole = whole.full_tensor()  # type: ignore[attr-defined]
    if not is_dtensor(like):
        return whole
    for dim, (begin, size) in enumerate(_rectangle(like)):
        whole = whole.narrow(dim, min(begin, whole.shape[dim]), size)
    return whole


def as_dtensor_like(parameter: Tensor, local: Tensor) -> Tensor:
    """Wrap the local part of a tensor as a DTensor that is sharded as a parameter is.

    Args:
        parameter: A parameter, plain or a DTensor.
        local: This rank's part of a tensor of its shape.

    Returns:
        A DTensor, or ``local`` itself for a plain parameter.

    Example:
        >>> as_dtensor_like(torch.zeros(3), torch.arange(3))
        tensor([0, 1, 2])
    """
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


@dataclass(frozen=True, eq=False)
class Shard:
    """How a representative's ranked entries are split over ranks, and which this rank has.

    Attributes:
        shape: How many indices of each dimension of the parameter are ranked, on all ranks.
        local_indices: For each dimension the ranked indices into this rank's local tensor.
        positions: For each dimension where those are among all that are ranked.
        mesh: The ranks that the parameter is split over.
        placements: The parameter's DTensor placements, one for each dimension of ``mesh``.
    """

    shape: tuple[int, ...]
    local_indices: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    mesh: Any
    placements: tuple[Any, ...]

    def matches(self, parameter: Tensor) -> bool:
        """Whether a parameter is split in this way."""
        return is_dtensor(parameter) and bool(
            parameter.device_mesh == self.mesh  # type: ignore[attr-defined]
            and parameter.placements == self.placements  # type: ignore[attr-defined]
        )

    @property
    def numel(self) -> int:
        """How many ranked entries all ranks have together."""
        return math.prod(self.shape)

    @property
    def local_shape(self) -> list[int]:
        """How many indices of each dimension are ranked on this rank."""
        return [len(each) for each in self.local_indices]

    @property
    def local_numel(self) -> int:
        """How many ranked entries this rank has."""
        return math.prod(self.local_shape)

    @property
    def split_dims(self) -> tuple[int, ...]:
        """The dimensions of the mesh that the parameter is cut along."""
        return tuple(i for i, each in enumerate(self.placements) if not each.is_replicate())

    @property
    def group(self) -> Hashable:
        """Equal for parameters that are split over the same ranks."""
        return self.mesh, self.split_dims

    @cached_property
    def slices(self) -> tuple[slice, ...] | None:
        """The local indices as slices; None if there are gaps between them."""
        slices = []
        for indices in self.local_indices:
            first = int(indices[0]) if len(indices) else 0
            if len(indices) and int(indices[-1]) != first + len(indices) - 1:
                return None
            slices.append(slice(first, first + len(indices)))
        return tuple(slices)

    def ranked(self, local: Tensor) -> Tensor:
        """The ranked entries of a local tensor; a copy if there are gaps between them."""
        if self.slices is not None:
            return local[self.slices]
        for dim, indices in enumerate(self.local_indices):
            local = local.index_select(dim, indices.to(local.device))
        return local

    def masked(self, local: Tensor) -> Tensor:
        """A view for masks to apply to: the ranked entries, or all if they have gaps."""
        return local if self.slices is None else local[self.slices]

    def write(self, values: Tensor, local: Tensor) -> None:
        """Write flat values of the ranked entries to their places in a local tensor."""
        values = values.view(self.local_shape)
        if self.slices is not None:
            local[self.slices] = values
        elif values.numel():
            on_device = [indices.to(local.device) for indices in self.local_indices]
            local[torch.meshgrid(*on_device, indexing="ij")] = values

    def global_indices(self, local_indices: Tensor) -> Tensor:
        """Flat indices among the ranked entries of all ranks, given those among this rank's.

        Args:
            local_indices: int64 tensor.
        """
        indices = torch.zeros_like(local_indices)
        stride = 1
        for positions, size in zip(reversed(self.positions), reversed(self.shape), strict=True):
            indices += positions.to(indices.device)[local_indices % len(positions)] * stride
            local_indices = local_indices // len(positions)
            stride *= size
        return indices

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The sum of counts over the ranks that have the other parts; the only traffic there is."""
        # Where weights are offloaded to the host, the ranks still talk device to device.
        sums = counts.to(self.mesh.device_type, copy=True)
        for dim in self.split_dims:
            torch.distributed.all_reduce(sums, group=self.mesh.get_group(dim))
        return sums.to(counts.device)


def shard_of(representative: Representative, parameter: Tensor) -> Shard | None:
    """How a representative is split over ranks, or None if every rank has all of it.

    Args:
        representative: What is ranked, without regard to its followers.
        parameter: Its parameter.

    Raises:
        RuntimeError: If the parameter is split in a way that is not supported.

    Example:
        >>> from torch_worm_optim import Representative
        >>> shard_of(Representative("weight"), torch.ones(2))
    """
    if not is_dtensor(parameter):
        return None
    name = representative.name
    placements: Sequence[Any] = parameter.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"{name!r} is a DTensor of partial sums ({placements}), so that no rank knows its "
            "entries. Redistribute it to Shard or Replicate placements first."
        )
    if all(placement.is_replicate() for placement in placements):
        return None
    if len(representative.parts) > 1 or representative.parts[0].units:
        raise RuntimeError(
            f"{name!r} is sharded, and {representative} ranks units of several entries, which may "
            'lie on different ranks. Rank entries (granularity="entry"), or train with DDP or '
            "with tensors that are replicated."
        )
    ranked = ranked_indices(representative.parts[0], tuple(parameter.shape))
    local_indices, positions = [], []
    for indices, (begin, size) in zip(ranked, _rectangle(parameter), strict=True):
        first, last = torch.searchsorted(
            indices, torch.tensor([begin, begin + size], device="cpu")
        ).tolist()
        local_indices.append(indices[first:last] - begin)
        positions.append(torch.arange(first, last, device="cpu"))
    shape = tuple(len(indices) for indices in ranked)
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return Shard(shape, tuple(local_indices), tuple(positions), mesh, tuple(placements))


def ranked_indices(part: Part, shape: tuple[int, ...]) -> list[Tensor]:
    """For each dimension of a parameter, which of its indices are ranked.

    Args:
        part: Its ``view`` may only split dimensions, its ``index`` is made of slices.
        shape: The parameter's shape.

    Example:
        The queries and keys of two heads that lie head by head, without the values:

        >>> from torch_worm_optim import Part
        >>> index = (slice(None), slice(0, 2))
        >>> ranked_indices(Part("w", view=(2, 3, 1), index=index), (6,))
        [tensor([0, 1, 3, 4])]
    """
    sizes = list(part.view or shape)
    parts = [*part.index, *[slice(None)] * (len(sizes) - len(part.index))]
    ranked = []
    for index, size in enumerate(shape):
        n_view, product = 0, 1
        last = index == len(shape) - 1
        while n_view < len(sizes) and (n_view == 0 or last or product < size):
            product *= sizes[n_view]
            n_view += 1
        indices = torch.arange(size, device="cpu").view(sizes[:n_view])[tuple(parts[:n_view])]
        ranked.append(indices.reshape(-1))
        sizes, parts = sizes[n_view:], parts[n_view:]
    return ranked


def _rectangle(parameter: Tensor) -> list[tuple[int, int]]:
    """For each dimension the first index that this rank has, and how many it has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: DTensor = parameter  # type: ignore[assignment]
    for i, placement in enumerate(dtensor.placements):
        # FSDP says so of a dimension that tensor parallelism has cut before it. Any other factor
        # means that this rank has every so-and-so-many-th index, which is no rectangle.
        factor, dim = getattr(placement, "split_factor", 1), getattr(placement, "dim", None)
        inner = [
            dtensor.device_mesh.size(j)
            for j, other in enumerate(dtensor.placements)
            if j > i and getattr(other, "dim", None) == dim
        ]
        if factor not in (1, math.prod(inner)):
            raise RuntimeError(
                f"A parameter of shape {tuple(parameter.shape)} is sharded by {placement}, of "
                "which a rank's part has gaps. Shard with fully_shard or parallelize_module."
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


def sharded_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are both plain, or DTensors with one mesh and equal placements."""
    if not (is_dtensor(a) or is_dtensor(b)):
        return True
    return (
        is_dtensor(a)
        and is_dtensor(b)
        and a.device_mesh == b.device_mesh  # type: ignore[attr-defined]
        and a.placements == b.placements  # type: ignore[attr-defined]
    )
