"""What a search remembers once its network is shrunk: the ticket, and where its entries are now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_worm_optim.layout import Layout
from torch_worm_optim.selectors import canonical_name
from torch_worm_optim.sharding import local_part_of, local_tensor
from torch_worm_optim.shrinking import Kept, ShrinkReport, composed, cut_tensor
from torch_worm_optim.truncation import Entries


@dataclass
class Shrunk:
    """A ticket in the shapes of the dense network, and what is left of its parameters.

    Attributes:
        final_mask: The masks of what was ranked, by parameter name, **True = kept**; whole ones,
            also where parameters are sharded.
        ticket: The same with the masks of followers.
        kept: For each parameter that was cut the indices that stayed, as in
            :class:`~torch_worm_optim.ShrinkReport`.
        groups: For each grouped convolution's weight how many groups it has.
        identity: What the masks of the dense network depended on.
    """

    final_mask: dict[str, Tensor]
    ticket: dict[str, Tensor]
    kept: dict[str, Kept]
    groups: dict[str, int]
    identity: dict[str, Any]

    @classmethod
    def after(
        cls,
        report: ShrinkReport,
        final_mask: dict[str, Tensor],
        ticket: dict[str, Tensor],
        identity: dict[str, Any],
        before: Shrunk | None,
    ) -> Shrunk:
        """What to remember after shrinking, perhaps not for the first time."""
        kept = {} if before is None else dict(before.kept)
        for name, indices in report.kept.items():
            kept[canonical_name(name)] = composed(kept.get(canonical_name(name)), indices)
        groups = {canonical_name(name): n for name, n in report.groups.items()}
        return cls(final_mask, ticket, kept, groups, identity)

    def mask(self, name: str) -> Tensor:
        """The ticket's mask of a parameter in the shape that it has now."""
        key = canonical_name(name)
        kept = self.kept.get(key)
        if kept is None:
            return self.ticket[name]
        return cut_tensor(self.ticket[name], kept, self.groups.get(key, 1))

    def entries(self, layout: Layout) -> list[Entries]:
        """The entries to hold at zero, in parameters of the size that they have now."""
        return [self._entries_of(name, layout.parameter(name)) for name in self.ticket]

    def _entries_of(self, name: str, parameter: Tensor) -> Entries:
        """The entries of one parameter that this rank has."""
        return Entries(
            local_tensor(parameter),
            lambda: None if parameter.grad is None else local_tensor(parameter.grad),
            lambda: local_part_of(self.mask(name).to(parameter.device), like=parameter),
        )
