"""A ticket: by the name of each parameter that it reaches, which of its entries are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_worm_optim.distributed import (
    as_dtensor_like,
    canonical_name,
    local_part_of,
    local_tensor,
    whole_tensor,
)
from torch_worm_optim.report import KeptCount, kept_counts_of
from torch_worm_optim.search import Bits, MaskSearch, pack, unpack
from torch_worm_optim.selectors import Part, Selector, selected
from torch_worm_optim.shrink import Kept, ShrinkReport, checked_ticket, composed, cut_tensor


class PackedMask(NamedTuple):
    """A bool mask of a whole parameter, one bit an entry."""

    bits: Bits
    shape: tuple[int, ...]

    def unpacked(self) -> Tensor:
        """The bool tensor."""
        return unpack(self.bits, torch.Size(self.shape).numel()).view(self.shape)


@dataclass
class Ticket:
    """Which entries are kept, and what is left of their parameters once the network is shrunk."""

    masks: dict[str, PackedMask]  # by parameter name, whole, in the dense shape, True = kept
    counts: list[KeptCount]  # what is kept of each representative
    kept: dict[str, Kept] = field(default_factory=dict)  # as in `ShrinkReport`, by canonical name
    groups: dict[str, int] = field(default_factory=dict)  # likewise
    is_shrunk: bool = False

    @classmethod
    def newest_of(cls, search: MaskSearch | None) -> Ticket:
        """The ticket that the newest mask of a search means."""
        if search is None:
            raise RuntimeError("There is no search to take a ticket from.")
        places: dict[str, list[tuple[Part, int]]] = {}
        for index, representative in enumerate(search.representatives):
            for part in representative.members:
                places.setdefault(part.name, []).append((part, index))
        packed = {}
        for name, parts in places.items():
            shape = search.binding.parameter(name).shape
            whole = torch.ones(shape, dtype=torch.bool, device="cpu")
            for part, index in parts:
                part.write_(search.newest(index), whole)
            packed[name] = PackedMask(pack(whole), tuple(shape))
        return cls(packed, search.kept_counts())

    @classmethod
    def given(
        cls, model: nn.Module, ticket: Mapping[str, Tensor], selector: Selector | None
    ) -> Ticket:
        """One that was found elsewhere, and the followers of what it holds, if it lacks them."""
        if not ticket:
            raise ValueError(
                "`ticket` has no mask in it. Pass `opt.final_mask` of another run, or None."
            )
        try:
            representatives = selected(selector, model)
        except ValueError:
            if selector is not None:
                raise
            representatives = []  # The default finds nothing, so it knows of no followers.
        whole = {
            name: whole_tensor(mask).cpu() for name, mask in checked_ticket(model, ticket).items()
        }
        names = set(whole)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for representative in representatives:
            first = representative.parts[0]
            lacking = [part for part in representative.followers if part.name not in names]
            if first.name not in names or not lacking:
                continue
            blocks = first.blocks(whole[first.name])
            units = blocks.any(dim=tuple(range(1, blocks.ndim, 2)))
            for part in lacking:
                shape = parameters[part.name].shape
                ones = torch.ones(shape, dtype=torch.bool, device="cpu")
                part.write_(units, whole.setdefault(part.name, ones))
        packed = {name: PackedMask(pack(m), tuple(m.shape)) for name, m in whole.items()}
        return cls(packed, kept_counts_of(whole))

    def shrunk(self, report: ShrinkReport) -> Ticket:
        """The same after shrinking, perhaps not for the first time."""
        kept = dict(self.kept)
        for name, indices in report.kept.items():
            kept[canonical_name(name)] = composed(kept.get(canonical_name(name)), indices)
        groups = {canonical_name(name): n for name, n in report.groups.items()}
        return replace(self, kept=kept, groups=groups, is_shrunk=True)

    def mask(self, name: str) -> Tensor:
        """The mask of a parameter in the shape that it has now, whole and on the host."""
        mask, key = self.masks[name].unpacked(), canonical_name(name)
        if key in self.kept:
            return cut_tensor(mask, self.kept[key], self.groups.get(key, 1))
        return mask

    def final_mask(self, parameter: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The masks in the dense shapes; DTensors for sharded parameters that were not cut."""
        masks = {}
        for name, packed in self.masks.items():
            mask, like = packed.unpacked(), parameter(name)
            if not self.is_shrunk:
                mask = local_part_of(mask, like).clone(memory_format=torch.contiguous_format)
                mask = as_dtensor_like(like, mask.to(local_tensor(like).device))
            masks[name] = mask.to(like.device)
        return masks

    def removed(self, parameter: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """For each parameter which of the entries that this rank has are removed."""
        for name in self.masks:
            like = parameter(name)
            yield name, ~local_part_of(self.mask(name).to(local_tensor(like).device), like)


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
    ticket = checked_ticket(model, ticket)  # which may put FSDP's sharded parameters back in place
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in ticket.items():
        removed = ~local_part_of(mask, like=parameters[name])
        local = local_tensor(parameters[name])
        local.masked_fill_(removed.to(local.device), 0)
