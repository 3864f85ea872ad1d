"""Find the ranked entries and their followers in a model's current parameters.

Parameters are looked up by name at every use: sharding, ``module.to()``, ``swap_tensors`` and
``convert_sync_batchnorm`` put new parameters and modules in the places of old ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_worm_optim.distributed import (
    Shard,
    as_dtensor_like,
    is_dtensor,
    local_part_of,
    local_tensor,
    ranked_indices,
    reshard_,
    shard_of,
    sharded_alike,
)
from torch_worm_optim.search import expand_mask, fingerprint, unit_magnitudes
from torch_worm_optim.selectors import Part, Representative, check_visible
from torch_worm_optim.ticket import Entries

# Optimizers that keep matrices for a parameter's rows and columns, which may have its shape.
_PRECONDITIONING = re.compile("Shampoo|SOAP|Kron")


class Layout:
    """The entries that masks rank and apply to, in a model's parameters on this rank.

    Args:
        model: The model.
        representatives: What a selector found in it, checked.
        optimizer: The base optimizer, which trains the parameters.
    """

    def __init__(
        self, model: nn.Module, representatives: Sequence[Representative], optimizer: Optimizer
    ) -> None:
        self.model, self.representatives, self.optimizer = model, representatives, optimizer
        # The shapes when the search begins, which surgery on the model changes.
        self._shapes = {
            part.name: attrgetter(part.name)(model).shape
            for each in representatives
            for part in each.members
        }
        self._shards: dict[int, Shard] = {}  # of representatives, by index
        self._placements: dict[str, Any] = {}  # how DTensors are split, by name

    def __getstate__(self) -> dict[str, Any]:
        """All but the shards, which hold process groups and are found again."""
        return {**self.__dict__, "_shards": {}, "_placements": {}}

    def parameter(self, name: str) -> Tensor:
        """The parameter of that name.

        Raises:
            RuntimeError: If there is none any more, if it has another shape than when the search
                began, or if it has become a plain tensor, computed from another parameter.
        """
        try:
            parameter: Tensor = attrgetter(name)(self.model)
        except AttributeError:
            parameter = None  # type: ignore[assignment]
        if parameter is None or parameter.shape != self._shapes.get(name, parameter.shape):
            found = "is gone" if parameter is None else f"has shape {tuple(parameter.shape)}"
            was = f", and had {tuple(self._shapes[name])}" if name in self._shapes else ""
            raise RuntimeError(
                f"{name!r} {found}{was} when the search began: the model was changed under the "
                "optimizer, as by fusing a BatchNorm or replacing a layer. Build WormOptimizer "
                "after such surgery, or cut what is pruned out with `opt.shrink()`."
            )
        if name in self._placements and self._placements[name] != _placement(parameter):
            # After a forward pass without a backward FSDP leaves a parameter there that it has
            # gathered, whole or still split by tensor parallelism.
            reshard_(self.model)
            parameter = attrgetter(name)(self.model)
        if is_dtensor(parameter):
            self._placements.setdefault(name, _placement(parameter))
        if type(parameter) is Tensor:
            raise RuntimeError(
                f"{name!r} is no parameter any more but computed from another, as "
                "torch.nn.utils.prune and parametrize make it, so nothing that is done to it "
                "lasts. Reparametrise before WormOptimizer is built and select what it is computed "
                "from, or make it a parameter again with torch.nn.utils.prune.remove() or "
                "parametrize.remove_parametrizations()."
            )
        return parameter

    def state_like(self, parameter: Tensor) -> list[Tensor]:
        """What the base optimizer, and those inside of it, keep for each entry of a parameter."""
        return [
            value
            for optimizer in _with_inner(self.optimizer)
            if not _PRECONDITIONING.search(type(optimizer).__name__)
            for value in optimizer.state.get(parameter, {}).values()
            # A subclass of Tensor, or integers, may be a code of which 0 is no zero.
            if (type(value) is Tensor or is_dtensor(value))
            and (value.is_floating_point() or value.is_complex())
            and value.shape == parameter.shape
        ]

    def check_owned(self) -> None:
        """Raise if the base optimizer does not train what is ranked.

        Raises:
            RuntimeError: If a parameter that requires a gradient is not the base optimizer's.
        """
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for representative in self.representatives:
            for part in representative.parts:
                parameter = self.parameter(part.name)
                if parameter.requires_grad and id(parameter) not in owned:
                    raise RuntimeError(
                        f"The base optimizer does not train {part.name!r}, which is ranked, as it "
                        "is in the model now. load_state_dict(assign=True), to_empty() and "
                        "replaced layers make new parameters: build the optimizers after that, or "
                        "put the new parameters into `param_groups`."
                    )

    def shapes_changed(self) -> None:
        """Parameters have the shapes that they are to have from now on."""
        self._shapes = {}

    def shards(self) -> list[Shard | None]:
        """For each representative how it is split over ranks; None if this rank has all of it.

        Raises:
            RuntimeError: If it is split in a way that is not supported, in another way than before
                or than its followers, or into parameters that the base optimizer does not own.
        """
        return [self._shard(index) for index in range(len(self.representatives))]

    def _shard(self, index: int) -> Shard | None:
        """How one representative is split over ranks."""
        representative = self.representatives[index]
        parameter = self.parameter(representative.name)
        if not is_dtensor(parameter):
            return None
        known = self._shards.get(index)
        if known is not None and known.matches(parameter):
            return known
        if known is not None:
            raise RuntimeError(
                f"{representative.name!r} is sharded in another way than before. Save a checkpoint "
                "before sharding anew, build WormOptimizer anew, and load the checkpoint."
            )
        shard = shard_of(representative, parameter)
        if shard is None:
            return None
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if id(parameter) not in owned:
            raise RuntimeError(
                f"{representative.name!r} was sharded after the base optimizer was built, which "
                "still holds the parameter that it was before. Build the optimizer after sharding, "
                "or put the new parameters into its `param_groups`."
            )
        for part in representative.members:
            same_place = part == replace(representative.parts[0], name=part.name)
            other = self.parameter(part.name)
            if not (same_place and other.shape == parameter.shape):
                raise RuntimeError(
                    f"{part.name!r} goes with {representative.name!r}, and its entries lie "
                    "elsewhere in it, which is not supported for sharded parameters. Select "
                    "without followers."
                )
            if not sharded_alike(other, parameter):
                raise RuntimeError(
                    f"{part.name!r} goes with {representative.name!r}, and is not sharded in the "
                    "same way. Shard both alike, or select without followers."
                )
        self._shards[index] = shard
        return shard

    def numels(self) -> list[int]:
        """How many entries or units each representative has, on all ranks together."""
        return [self._numel(each) for each in self.representatives]

    def _numel(self, representative: Representative) -> int:
        """How many entries or units one representative has, on all ranks together."""
        parameter = self.parameter(representative.name)
        if representative.parts[0].units or not is_dtensor(parameter):
            return representative.n_units(parameter)
        indices = ranked_indices(representative.parts[0], tuple(parameter.shape))
        return math.prod(len(each) for each in indices)

    def local_numels(self) -> list[int]:
        """How many entries or units of each representative this rank has."""
        return [
            self._numel(representative) if shard is None else shard.local_numel
            for representative, shard in zip(self.representatives, self.shards(), strict=True)
        ]

    def scores(self) -> dict[str, Tensor]:
        """What is ranked, by what to call it in a message: entries, or the magnitudes of units."""
        scores: dict[str, Tensor] = {}
        for index, (representative, shard) in enumerate(
            zip(self.representatives, self.shards(), strict=True)
        ):
            label = " and ".join(dict.fromkeys(part.name for part in representative.parts))
            if label in scores:  # two representatives may be parts of one parameter
                label = f"{label} (representative {index})"
            parameter = self.parameter(representative.name)
            check_visible(representative.name, parameter)
            parts = self._ranked(representative, shard)
            if representative.parts[0].units or len(parts) > 1:
                units = [
                    part.units or tuple(entries.shape)
                    for part, entries in zip(representative.parts, parts, strict=True)
                ]
                scores[label] = unit_magnitudes(list(zip(parts, units, strict=True)))
            else:
                scores[label] = parts[0]
        return scores

    def fingerprint(self) -> int:
        """A number that changes when anything that is ranked does, see `movement`."""
        tensors: list[Tensor] = []
        shards: list[Shard | None] = []
        for representative, shard in zip(self.representatives, self.shards(), strict=True):
            parts = self._ranked(representative, shard)
            tensors += parts
            shards += [shard] * len(parts)
        return fingerprint(tensors, shards)

    def _ranked(self, representative: Representative, shard: Shard | None) -> list[Tensor]:
        """The entries of a representative that this rank has, and those of its partners."""
        if shard is not None:
            return [shard.ranked(local_tensor(self.parameter(representative.name)))]
        return [
            part.entries(local_tensor(self.parameter(part.name))) for part in representative.parts
        ]

    def targets(self) -> list[Target]:
        """Every part of a parameter that a mask applies to, followers included."""
        return [
            Target(index, part, self.parameter(part.name), shard, self)
            for index, (representative, shard) in enumerate(
                zip(self.representatives, self.shards(), strict=True)
            )
            for part in representative.members
        ]

    def parameter_masks(
        self, masks: Sequence[Tensor], *, followers: bool = False
    ) -> dict[str, Tensor]:
        """The masks of representatives in the shape of their parameters, by name.

        Args:
            masks: For each representative the mask of its entries or units on this rank.
            followers: Whether to return those of followers as well.

        Returns:
            Bool tensors, DTensors for parameters that are DTensors; entries that are not ranked are
            True.
        """
        full: dict[str, Tensor] = {}
        for representative, shard, mask in zip(
            self.representatives, self.shards(), masks, strict=True
        ):
            for part in representative.members if followers else representative.parts:
                parameter = local_tensor(self.parameter(part.name))
                if part.name not in full:
                    contiguous = torch.contiguous_format
                    full[part.name] = torch.ones_like(
                        parameter, dtype=torch.bool, memory_format=contiguous
                    )
                _write(part, shard, mask, full[part.name])
        return {name: as_dtensor_like(self.parameter(name), mask) for name, mask in full.items()}

    def parameter_bytes(self, rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What a window holds of each representative, in the shape of its parameter.

        Representatives that are parts of one parameter share their tensors.

        Args:
            rows: For each representative flat tensors of its entries on this rank.

        Returns:
            For each representative as many tensors; those of units, which have no place of their
            own in a parameter, as they were.
        """
        placed: dict[str, list[Tensor]] = {}
        for representative, shard, own in zip(
            self.representatives, self.shards(), rows, strict=True
        ):
            if representative.parts[0].units:
                continue
            parameter = local_tensor(self.parameter(representative.name))
            if representative.name not in placed:
                zeros = torch.zeros_like(parameter, dtype=torch.uint8)
                placed[representative.name] = [zeros.clone() for _ in own]
            for row, full in zip(own, placed[representative.name], strict=True):
                _write(representative.parts[0], shard, row, full)
        for name, full_rows in placed.items():
            parameter = self.parameter(name)
            full_rows[:] = [as_dtensor_like(parameter, row) for row in full_rows]
        return [
            list(own) if representative.parts[0].units else placed[representative.name]
            for representative, own in zip(self.representatives, rows, strict=True)
        ]

    def entries_of(self, index: int, full: Tensor) -> Tensor:
        """The flat entries of one representative on this rank, from its parameter's shape.

        Args:
            index: Which representative.
            full: A tensor of the shape of its parameter, plain or a DTensor sharded in any way.
        """
        representative, shard = self.representatives[index], self._shard(index)
        if representative.parts[0].units:
            return full
        part = local_part_of(full, like=self.parameter(representative.name))
        entries = representative.parts[0].entries(part) if shard is None else shard.ranked(part)
        return entries.reshape(-1)


class Target(NamedTuple):
    """A part of a parameter that a mask applies to.

    Attributes:
        owner: The index of the representative that it belongs to.
        part: Where its entries are in the parameter.
        parameter: The parameter.
        shard: How the representative is split over ranks; None if this rank has all of it.
        layout: Where it was found.
    """

    owner: int
    part: Part
    parameter: Tensor
    shard: Shard | None
    layout: Layout

    def entries(self, masks: Callable[[], Sequence[Tensor]]) -> Entries:
        """The entries with their gradient and their mask, given what returns the newest masks."""
        return Entries(
            self._view(self.parameter), self._gradient, lambda: self._mask(masks()), self._state
        )

    def _state(self) -> list[Tensor]:
        """The same views of the base optimizer's state."""
        return [self._view(each) for each in self.layout.state_like(self.parameter)]

    def _view(self, tensor: Tensor) -> Tensor:
        """The part of the parameter, or of its gradient, that this rank's mask covers."""
        local = local_tensor(tensor)
        return self.part.entries(local) if self.shard is None else self.shard.masked(local)

    def _gradient(self) -> Tensor | None:
        """The same view of the gradient."""
        gradient = self.parameter.grad
        if gradient is not None and gradient.is_sparse and (self.part.view or self.part.index):
            raise RuntimeError(
                f"{self.part.name!r} has a sparse gradient, of which a part cannot be truncated by "
                "itself. Select the whole parameter, or make its gradient dense (`sparse=False`)."
            )
        return None if gradient is None else self._view(gradient)

    def _mask(self, masks: Sequence[Tensor]) -> Tensor:
        """The mask in the shape of the view, on the parameter's device."""
        view = self._view(self.parameter)
        mask = masks[self.owner].to(view.device)
        if self.shard is None:
            return expand_mask(mask, self.part.units, view.shape)
        if self.shard.slices is not None:
            return mask.view(view.shape)
        full = torch.ones_like(view, dtype=torch.bool)
        self.shard.write(mask, full)
        return full


def _placement(parameter: Any) -> Any:
    """On which mesh a DTensor is split and how; None for other tensors."""
    return (parameter.device_mesh, parameter.placements) if is_dtensor(parameter) else None


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it wraps."""
    found = [optimizer]
    for each in found:  # which grows
        inner = [value for value in vars(each).values() if isinstance(value, Optimizer)]
        found += [value for value in inner if all(value is not other for other in found)]
    return found


def _write(part: Part, shard: Shard | None, values: Tensor, full: Tensor) -> None:
    """Write values of a representative's entries or units to their places in a parameter."""
    if shard is not None:
        shard.write(values.to(full.device), full)
    else:
        part.write_(values, full)
