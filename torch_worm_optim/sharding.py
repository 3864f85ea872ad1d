"""What one rank holds of a parameter that is spread over several, as a DTensor.

A rank holds a rectangle of a parameter: some of the indices of each dimension. The ranked entries
are a rectangle, too, though perhaps one with gaps, as the query and key rows of a fused projection
are. What both have in common is what this rank ranks, and where its entries lie among those of all
ranks follows dimension by dimension. Nothing here sends a weight to another rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_worm_optim.masks import Held
from torch_worm_optim.selectors.base import Representative

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Args:
        tensor: Any tensor.

    Example:
        >>> is_distributed(torch.ones(2))
        False
    """
    # Asking for the class would import torch.distributed, which some builds do not have.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a view without a gradient; all of it if it is plain.

    Args:
        tensor: A parameter or a gradient.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    tensor = tensor.detach()
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def reshard_(model: nn.Module) -> None:
    """Have FSDP put the sharded parameters back that a forward pass without a backward took out.

    Args:
        model: Any model.

    Example:
        >>> reshard_(nn.Linear(1, 1))
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            getattr(module, "reshard")()  # noqa: B009 - a Module's attributes are tensors to mypy


def local_part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank would hold of a tensor if that were spread as another one is.

    Args:
        whole: A plain tensor, the same on all ranks, or a DTensor spread in any way (then this is a
            collective call).
        like: A parameter of that shape, plain or a DTensor.

    Returns:
        A view of ``whole`` where nothing has to be fetched from other ranks.

    Example:
        >>> local_part_of(torch.arange(3), like=torch.zeros(3))
        tensor([0, 1, 2])
    """
    if is_distributed(whole):
        if spread_alike(whole, like):
            return local(whole)
        whole = whole.full_tensor()  # type: ignore[attr-defined]
    if not is_distributed(like):
        return whole
    for dim, (begin, size) in enumerate(_rectangle(like)):
        whole = whole.narrow(dim, min(begin, whole.shape[dim]), size)
    return whole


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this rank holds a part, spread as another one is.

    Args:
        part: What this rank holds.
        like: A parameter, plain or a DTensor.

    Returns:
        ``part`` itself, or a DTensor of the shape of ``like``.

    Example:
        >>> spread_like(torch.arange(3), like=torch.zeros(3))
        tensor([0, 1, 2])
    """
    if not is_distributed(like):
        return part
    from torch.distributed.tensor import DTensor

    distributed: DTensor = like  # type: ignore[assignment]
    return DTensor.from_local(
        part,
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=distributed.shape,
        stride=distributed.stride(),
    )


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of a representative's ranked entries.

    Attributes:
        shape: How many indices of each dimension of the parameter are ranked, on all ranks.
        here: For each dimension the indices into what this rank holds that are ranked.
        positions: For each dimension where those are among all that are ranked.
        mesh: The ranks that hold the parameter.
        placements: How they do, for each dimension of ``mesh``.
    """

    shape: tuple[int, ...]
    here: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    mesh: Any
    placements: tuple[Any, ...]

    def is_of(self, parameter: Tensor) -> bool:
        """Whether this is how a parameter is spread."""
        return is_distributed(parameter) and bool(
            parameter.device_mesh == self.mesh  # type: ignore[attr-defined]
            and parameter.placements == self.placements  # type: ignore[attr-defined]
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the mesh that the parameter is cut along."""
        return tuple(i for i, each in enumerate(self.placements) if not each.is_replicate())

    @property
    def size(self) -> int:
        """How many ranked entries this rank holds."""
        return math.prod(len(each) for each in self.here)

    @cached_property
    def slices(self) -> tuple[slice, ...] | None:
        """The ranked indices as slices, if there are no gaps between them."""
        slices = []
        for indices in self.here:
            first = int(indices[0]) if len(indices) else 0
            if len(indices) and int(indices[-1]) != first + len(indices) - 1:
                return None
            slices.append(slice(first, first + len(indices)))
        return tuple(slices)

    def ranked(self, held: Tensor) -> Tensor:
        """The ranked entries of what this rank holds; a copy if there are gaps between them."""
        if self.slices is not None:
            return held[self.slices]
        for dim, indices in enumerate(self.here):
            held = held.index_select(dim, indices.to(held.device))
        return held

    def reached(self, held: Tensor) -> Tensor:
        """What a mask is applied to: the ranked entries, or all if there are gaps between them."""
        return held if self.slices is None else held[self.slices]

    def spread(self, mask: Tensor, held: Tensor, rest: int) -> Tensor:
        """A flat mask of the ranked entries in the shape of what it is applied to.

        Args:
            mask: Mask or bytes of shape ``(size,)``.
            held: What this rank holds.
            rest: What entries get that are not ranked.
        """
        ranked = mask.view([len(each) for each in self.here])
        if self.slices is not None:
            return ranked
        return self.fill(ranked, torch.full_like(held, rest, dtype=mask.dtype))

    def part_of(self, rows: Tensor) -> Tensor:
        """What this rank holds of rows that hold the ranked entries of all ranks."""
        whole = rows.view(len(rows), *self.shape)
        for dim, positions in enumerate(self.positions):
            whole = whole.index_select(dim + 1, positions.to(rows.device))
        return whole.reshape(len(rows), -1)

    def fill(self, ranked: Tensor, held: Tensor) -> Tensor:
        """Write the ranked entries into what this rank holds; returns that."""
        ranked = ranked.view([len(each) for each in self.here])
        if self.slices is not None:
            held[self.slices] = ranked
        elif ranked.numel():
            n = len(self.here)
            grid = [
                each.to(held.device).view([-1 if i == dim else 1 for i in range(n)])
                for dim, each in enumerate(self.here)
            ]
            held[tuple(grid)] = ranked
        return held

    def among_all(self, here: Tensor) -> Tensor:
        """Flat positions among the ranked entries of all ranks, of flat positions among those here.

        Args:
            here: int64 tensor.
        """
        there = torch.zeros_like(here)
        stride = 1
        for positions, size in zip(reversed(self.positions), reversed(self.shape), strict=True):
            there += positions.to(here.device)[here % len(positions)] * stride
            here = here // len(positions)
            stride *= size
        return there

    def add_up(self, counts: Tensor) -> Tensor:
        """Add counts over the ranks that hold the other parts; the only traffic there is."""
        # Where weights are offloaded to the host, the ranks still talk device to device.
        there = counts.to(self.mesh.device_type, copy=True)
        for dim in self.dims:
            torch.distributed.all_reduce(there, group=self.mesh.get_group(dim))
        return there.to(counts.device)

    @property
    def held(self) -> Held:
        """This as what masks are drawn with."""
        domain = (self.mesh, self.dims)
        return Held(math.prod(self.shape), self.among_all, self.add_up, domain)


def shard_of(representative: Representative, parameter: Tensor) -> Shard | None:
    """What this rank holds of a representative, or None if every rank holds all of it.

    Args:
        representative: What is ranked, without regard to its followers and partners.
        parameter: Its parameter.

    Raises:
        RuntimeError: If the parameter is spread in a way that does not work here.

    Example:
        >>> shard_of(Representative("weight"), torch.ones(2))
    """
    if not is_distributed(parameter):
        return None
    name, distributed = representative.name, parameter
    placements: Sequence[Any] = distributed.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"{name!r} is a DTensor of partial sums ({placements}), so that no rank knows its "
            "entries. Redistribute it to Shard or Replicate placements first."
        )
    if all(placement.is_replicate() for placement in placements):
        return None
    if representative.units:
        raise RuntimeError(
            f"{name!r} is sharded, and {representative} ranks units of several entries, which may "
            'lie on different ranks. Rank entries (granularity="entry"), or train with DDP or '
            "with tensors that are replicated."
        )
    ranked = ranked_indices(representative, tuple(parameter.shape))
    here, positions = [], []
    for indices, (begin, size) in zip(ranked, _rectangle(parameter), strict=True):
        first, last = torch.searchsorted(
            indices, torch.tensor([begin, begin + size], device="cpu")
        ).tolist()
        here.append(indices[first:last] - begin)
        positions.append(torch.arange(first, last, device="cpu"))
    shape = tuple(len(indices) for indices in ranked)
    mesh = distributed.device_mesh  # type: ignore[attr-defined]
    return Shard(shape, tuple(here), tuple(positions), mesh, tuple(placements))


def ranked_indices(representative: Representative, shape: tuple[int, ...]) -> list[Tensor]:
    """For each dimension of a parameter, which of its indices are ranked.

    Args:
        representative: Its ``view`` may only split dimensions, its ``part`` is made of slices.
        shape: The parameter's shape.

    Example:
        The queries and keys of two heads that lie head by head, without the values:

        >>> part = (slice(None), slice(0, 2))
        >>> ranked_indices(Representative("w", view=(2, 3, 1), part=part), (6,))
        [tensor([0, 1, 3, 4])]
    """
    sizes = list(representative.view or shape)
    parts = [*representative.part, *[slice(None)] * (len(sizes) - len(representative.part))]
    ranked = []
    for index, size in enumerate(shape):
        n_view, product = 0, 1
        last = index == len(shape) - 1
        while n_view < len(sizes) and (last or product < size):
            product *= sizes[n_view]
            n_view += 1
        indices = torch.arange(size, device="cpu").view(sizes[:n_view])[tuple(parts[:n_view])]
        ranked.append(indices.reshape(-1))
        sizes, parts = sizes[n_view:], parts[n_view:]
    return ranked


def _rectangle(parameter: Tensor) -> list[tuple[int, int]]:
    """The first index that this rank holds of each dimension, and how many."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    distributed: DTensor = parameter  # type: ignore[assignment]
    sizes, begins = compute_local_shape_and_global_offset(
        parameter.shape, distributed.device_mesh, distributed.placements
    )
    held = tuple(local(parameter).shape)
    if tuple(sizes) != held:
        raise RuntimeError(
            f"This rank holds {held} of a parameter of shape {tuple(parameter.shape)}, where "
            f"{distributed.placements} mean {tuple(sizes)}. Such a layout is not supported: shard "
            "with fully_shard or parallelize_module."
        )
    return list(zip(begins, sizes, strict=True))


def spread_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are both plain, or spread over the same ranks in the same way."""
    if not (is_distributed(a) or is_distributed(b)):
        return True
    return (
        is_distributed(a)
        and is_distributed(b)
        and a.device_mesh == b.device_mesh  # type: ignore[attr-defined]
        and a.placements == b.placements  # type: ignore[attr-defined]
    )
