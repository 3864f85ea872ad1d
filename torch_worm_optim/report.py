"""What a mask leaves of each representative, counted, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.search import Phase
from torch_worm_optim.selectors import Representative


class KeptCount(NamedTuple):
    """How much of one representative a mask keeps, on all ranks together.

    Attributes:
        name: The parameter's name in the bare model. Where several representatives are parts of one
            parameter, it says which.
        numel: How many entries it has, or units.
        kept: How many of them are kept; None before the first mask.
        is_units: Whether units are counted.
    """

    name: str
    numel: int
    kept: int | None
    is_units: bool


def kept_counts(
    representatives: Sequence[Representative], numels: Sequence[int], kept: Sequence[int | None]
) -> list[KeptCount]:
    """The counts of representatives, each with a name of its own.

    Args:
        representatives: The representatives.
        numels: How many entries or units each has.
        kept: How many of them are kept; None before the first mask.

    Returns:
        One :class:`KeptCount` each.

    Example:
        >>> kept_counts([Representative("module.bn.weight")], [8], [3])
        [KeptCount(name='bn.weight', numel=8, kept=3, is_units=False)]
    """
    names = [canonical_name(each.name) for each in representatives]
    times = Counter(names)
    return [
        KeptCount(
            name if times[name] == 1 else f"{name} (representative {index})",
            numel,
            n_kept,
            bool(each.parts[0].units),
        )
        for index, (each, name, numel, n_kept) in enumerate(
            zip(representatives, names, numels, kept, strict=True)
        )
    ]


def kept_counts_of(masks: Mapping[str, Tensor]) -> list[KeptCount]:
    """The counts of whole masks by parameter name, **True = kept**.

    Args:
        masks: Bool tensors, such as a ticket that was given.

    Returns:
        One :class:`KeptCount` each.
    """
    return [
        KeptCount(canonical_name(name), mask.numel(), int(mask.sum()), False)
        for name, mask in masks.items()
    ]


def counted(counts: Sequence[KeptCount]) -> str:
    """What is counted, in a word or three."""
    kinds = {each.is_units for each in counts}
    return "entries or units" if len(kinds) > 1 else "units" if True in kinds else "entries"


def summary_text(counts: Sequence[KeptCount], phase: Phase, n_masks: int) -> str:
    """A row for each representative, one for all together, and how far the search is.

    Args:
        counts: What is kept of each.
        phase: The phase.
        n_masks: How many masks were drawn.

    Returns:
        Lines, the last one without an end.

    Example:
        >>> counts = [KeptCount("bn.weight", 8, 3, False), KeptCount("q", 4, 3, True)]
        >>> print(summary_text(counts, Phase.CONVERGED, 7))
        name       entries or units  kept   share
        bn.weight                 8     3  37.5 %
        q (units)                 4     3  75.0 %
        total                    12     6  50.0 %
        phase: converged, 7 masks drawn, the ticket counted
    """
    what = counted(counts)
    rows = [("name", what, "kept", "share")]
    for each in [*counts, total(counts)]:
        name = each.name + " (units)" * (each.is_units and what == "entries or units")
        rows.append((name, f"{each.numel:,}", *_kept(each)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    return "\n".join([*lines, f"phase: {phase.value}, {_mask_counted(phase, n_masks)}"])


def _mask_counted(phase: Phase, n_masks: int) -> str:
    """How many masks were drawn, and which of them is counted."""
    if not n_masks:
        drawn = "no mask drawn"
        return f"{drawn}, the given ticket counted" if phase.converged else f"{drawn} yet"
    which = "the ticket" if phase.converged else "the newest"
    return f"{n_masks} mask{'s' * (n_masks > 1)} drawn, {which} counted"


def total(counts: Sequence[KeptCount]) -> KeptCount:
    """All of them together; before the first mask none is kept or removed."""
    kept = [each.kept for each in counts if each.kept is not None]
    n_kept = sum(kept) if len(kept) == len(counts) else None
    return KeptCount("total", sum(each.numel for each in counts), n_kept, False)


def _kept(count: KeptCount) -> tuple[str, str]:
    """How many and which share are kept, where there is a mask and something to share."""
    if count.kept is None:
        return "-", "-"
    share = f"{100 * count.kept / count.numel:.1f} %" if count.numel else "-"
    return f"{count.kept:,}", share
