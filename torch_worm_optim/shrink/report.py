"""What shrinking cut out of a network, and what it could not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.shrink.cut import Cut, Kept, named_tensors


@dataclass(kw_only=True)
class ShrinkReport:
    """What was cut out of a network, and what could not be.

    Attributes:
        parameters: How many parameters there were before and after.
        macs: Multiplications of one forward pass of the batch given, before and after.
        layers: For each module that has parameters of its own, by name, how many those were before
            and after. One of the model itself stands under its own name.
        kept: For each parameter and buffer that was cut, by name, for each dimension the indices
            that stayed, a 1-D int64 tensor on the host, or None if all did. Of a grouped
            convolution's weight those of the second dimension are input channels, of all groups.
        reasons: For each BatchNorm scale or matrix of a linear layer with zero channels that
            stayed, for each reason how many. A row of a matrix is a channel, so a head is as many
            as its queries, keys and values have rows.
        channels: How many zero channels there were, and how many of them stayed.
        unused: The names of parameters that no batch used, which stay as they are.
        zero: The names of trainable matrices and scales that were zero as a whole and were cut, if
            there was no ticket.
        max_difference: The largest difference of outputs before and after, over the largest output.

    Example:
        >>> from torch_worm_optim import shrink_
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        ...                       nn.Conv2d(4, 1, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight[:2].zero_()
        >>> report = shrink_(model, torch.ones(1, 1, 2, 2))
        >>> print(report)
        parameters 17 -> 9 (47 % gone)
        multiplications 32 -> 16 (50 % gone)
        zero channels: 2 of 2 gone
        layers that changed most:
          1: 8 -> 4
          0: 4 -> 2
          3: 5 -> 3
        >>> report.kept["1.weight"]
        (tensor([2, 3]),)
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    layers: dict[str, tuple[int, int]]
    kept: dict[str, Kept]
    reasons: Mapping[str, Mapping[str, int]]
    channels: tuple[int, int]
    max_difference: float
    unused: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict, repr=False)
    shapes: dict[str, torch.Size] = field(default_factory=dict, repr=False)
    is_scattered: bool = field(default=False, repr=False)

    @property
    def left(self) -> dict[str, str]:
        """For each scale or matrix with zero channels that stayed, how many did so and why."""
        return {
            name: ", ".join(f"{why}: {n}" for why, n in each.items())
            for name, each in self.reasons.items()
        }

    def totals(self) -> list[tuple[str, int]]:
        """For each reason how many zero channels stayed, the most frequent first."""
        return sum(map(Counter, self.reasons.values()), Counter[str]()).most_common()

    def as_dict(self) -> dict[str, float]:
        """The figures of the whole network as numbers, for a logger."""
        return {
            "parameters_before": self.parameters[0],
            "parameters_after": self.parameters[1],
            "macs_before": self.macs[0],
            "macs_after": self.macs[1],
            "zero_channels": self.channels[0],
            "zero_channels_left": self.channels[1],
            "max_difference": self.max_difference,
        }

    def apply_(self, model: nn.Module) -> None:
        """Cut a copy of the network in the same way, such as an average of its weights.

        Its zeros must be where the network's are, see
        :func:`~torch_worm_optim.apply_ticket_`; that is not checked.

        Args:
            model: A model with the parameters that the network had before.

        Raises:
            ValueError: If it has other parameters or buffers than the network had where that was
                cut, or the network was shrunk with ``scatter``. The model is left as it was.
        """
        if self.is_scattered:
            raise ValueError(
                "The network was shrunk with `scatter`, so some BatchNorms write by index, which "
                "those of a copy do not. Prune the copy, and shrink it with `scatter` by itself."
            )
        names = {canonical_name(name): name for name in named_tensors(model)}
        cut = Cut(model)
        for name, shape in self.shapes.items():
            found = cut.before.get(names.get(canonical_name(name), ""))
            if found is None or found.shape != shape:
                has = "none of that name" if found is None else f"one of {tuple(found.shape)}"
                raise ValueError(
                    f"{name!r} had shape {tuple(shape)} before it was cut, and "
                    f"{type(model).__name__} has {has}. Pass a copy of the network as it was."
                )
        cut.cut_({names[canonical_name(name)]: kept for name, kept in self.kept.items()})

    def __str__(self) -> str:
        """A few lines: parameters, multiplications, channels, why some stayed, and five layers."""
        zero, stayed = self.channels
        lines = [
            f"{what} {before:,} -> {after:,} ({100 * (before - after) / max(before, 1):.0f} % gone)"
            for what, (before, after) in (
                ("parameters", self.parameters),
                ("multiplications", self.macs),
            )
        ]
        lines.append(f"zero channels: {zero - stayed:,} of {zero:,} gone")
        lines += [f"  {n:,} stay: {reason}" for reason, n in self.totals()]
        if self.unused:
            lines.append(f"not used by this batch: {len(self.unused)} parameters, {self.unused[0]}")
        smaller = [(name, *sizes) for name, sizes in self.layers.items() if sizes[0] > sizes[1]]
        smaller.sort(key=lambda each: each[2] - each[1])
        lines += ["layers that changed most:"] if smaller else []
        lines += [f"  {name}: {before:,} -> {after:,}" for name, before, after in smaller[:5]]
        return "\n".join(lines)
