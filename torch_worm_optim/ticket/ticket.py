"""A ticket that is held without a search: in a network that was shrunk, or one that was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_worm_optim.distributed import canonical_name, is_dtensor, local_part_of, local_tensor
from torch_worm_optim.report import KeptCount, kept_counts_of
from torch_worm_optim.shrink import Kept, ShrinkReport, composed, cut_tensor
from torch_worm_optim.ticket.restraint import Entries

if TYPE_CHECKING:
    from torch_worm_optim.layout import Layout


@dataclass
class HeldTicket:
    """A ticket in the shapes of the dense network, and what is left of its parameters.

    It is the ticket of a network that was shrunk, or one that was given to begin with.

    Attributes:
        final_mask: The masks of what was ranked, by parameter name, **True = kept**; whole ones,
            also where parameters are sharded.
        ticket: The same with the masks of followers.
        kept: For each parameter that was cut the indices that stayed, as in
            :class:`~torch_worm_optim.ShrinkReport`.
        groups: For each grouped convolution's weight how many groups it has.
        is_shrunk: Whether the network was shrunk.
        identity: What the masks of the dense network depended on.
        counts: What it keeps of each representative of the search; empty if it was given.
    """

    final_mask: dict[str, Tensor]
    ticket: dict[str, Tensor]
    kept: dict[str, Kept] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    is_shrunk: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    counts: list[KeptCount] = field(default_factory=list)

    @classmethod
    def given(cls, ticket: Mapping[str, Tensor]) -> HeldTicket:
        """One that was found elsewhere; every rank gets the whole masks of sharded parameters."""
        whole = {
            name: (mask.full_tensor() if is_dtensor(mask) else mask).clone()  # type: ignore[attr-defined]
            for name, mask in ticket.items()
        }
        return cls(whole, whole)

    def shrunk(self, report: ShrinkReport) -> HeldTicket:
        """The same after shrinking, perhaps not for the first time."""
        kept = dict(self.kept)
        for name, indices in report.kept.items():
            kept[canonical_name(name)] = composed(kept.get(canonical_name(name)), indices)
        groups = {canonical_name(name): n for name, n in report.groups.items()}
        return replace(self, kept=kept, groups=groups, is_shrunk=True)

    def kept_counts(self) -> list[KeptCount]:
        """How much it keeps of each representative, or of each parameter if it was given."""
        return self.counts or kept_counts_of(self.final_mask)

    def mask(self, name: str) -> Tensor:
        """The ticket's mask of a parameter in the shape that it has now."""
        key = canonical_name(name)
        kept = self.kept.get(key)
        if kept is None:
            return self.ticket[name]
        return cut_tensor(self.ticket[name], kept, self.groups.get(key, 1))

    def entries(self, layout: Layout) -> list[Entries]:
        """The entries to hold at zero, in parameters of the size that they have now."""
        return [self._entries_of(name, layout) for name in self.ticket]

    def _entries_of(self, name: str, layout: Layout) -> Entries:
        """The entries of one parameter that this rank has."""
        parameter = layout.parameter(name)
        return Entries(
            local_tensor(parameter),
            lambda: None if parameter.grad is None else local_tensor(parameter.grad),
            lambda: local_part_of(self.mask(name).to(parameter.device), like=parameter),
            lambda: [local_tensor(each) for each in layout.state_like(parameter)],
        )
