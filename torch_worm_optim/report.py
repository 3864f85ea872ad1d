"""What a mask leaves of each representative, counted, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.selectors import Representative

if TYPE_CHECKING:
    from torch_worm_optim.optimizer import WormOptimizer
    from torch_worm_optim.search import Phase, SearchSettings

# A representative that keeps a smaller share than this is a bottleneck that training rarely leaves.
_NARROW = 0.1


class KeptCount(NamedTuple):
    """How much of one representative a mask keeps; ``kept`` is None before the first mask."""

    name: str
    numel: int
    kept: int | None
    is_units: bool  # whether units are counted, and not entries


def kept_counts(
    representatives: Sequence[Representative], numels: Sequence[int], kept: Sequence[int | None]
) -> list[KeptCount]:
    """The counts of representatives, each with a name of its own."""
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
    """The counts of whole masks by parameter name, **True = kept**, as a given ticket has them."""
    return [
        KeptCount(canonical_name(name), mask.numel(), int(mask.sum()), False)
        for name, mask in masks.items()
    ]


def narrow_layers(counts: Sequence[KeptCount], settings: SearchSettings, what: str) -> str:
    """What to warn of where a mask keeps next to nothing of a representative; else empty."""
    least = min(_NARROW, (1 - settings.prune_ratio) / 2)
    narrow = [
        f"{each.name!r} ({each.kept} of {each.numel})"
        for each in counts
        if each.kept is not None and each.kept < least * each.numel
    ]
    if not narrow:
        return ""
    ways = ["a smaller `prune_ratio` leaves more"]
    if settings.prune_ratio < 0.8:
        ways.insert(0, "`min_keep=0.2` keeps a fifth of each")
    if settings.scope != "layer":
        ways.insert(0, '`scope="layer"` prunes all alike')
    return (
        f"{what} leaves little of {', '.join(narrow[:3])}"
        + f" and {len(narrow) - 3} more" * (len(narrow) > 3)
        + f", a bottleneck that a network may not recover from: {', or '.join(ways[:2])}."
    )


def counted(counts: Sequence[KeptCount]) -> str:
    """Whether entries, units or both are counted."""
    kinds = {each.is_units for each in counts}
    return "entries or units" if len(kinds) > 1 else "units" if True in kinds else "entries"


def total(counts: Sequence[KeptCount]) -> KeptCount:
    """The sums over all representatives; before the first mask none is kept or removed."""
    kept = [each.kept for each in counts if each.kept is not None]
    n_kept = sum(kept) if len(kept) == len(counts) else None
    return KeptCount("total", sum(each.numel for each in counts), n_kept, False)


def summary_text(counts: Sequence[KeptCount], phase: Phase, n_masks: int) -> str:
    """A row for each representative, one for the total, and a line with the phase."""
    what = counted(counts)
    rows = [("name", what, "kept", "share")]
    for each in [*counts, total(counts)]:
        name = each.name + " (units)" * (each.is_units and what == "entries or units")
        kept = "-" if each.kept is None else f"{each.kept:,}"
        share = 100 * (each.kept or 0) / max(1, each.numel)
        has_share = each.kept is not None and each.numel
        rows.append((name, f"{each.numel:,}", kept, f"{share:.1f} %" if has_share else "-"))
    name_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(name_width), *map(str.rjust, numbers, widths)])
        for name, *numbers in rows
    ]
    if n_masks:
        masks = f"{n_masks} mask{'s' * (n_masks > 1)} drawn"
        state = f"{masks}, {'the ticket' if phase.converged else 'the newest'} counted"
    else:
        state = "no mask drawn" + (", the given ticket counted" if phase.converged else " yet")
    return "\n".join([*lines, f"phase: {phase.value}, {state}"])


def description(opt: WormOptimizer, *, step: int, n_frozen: int) -> str:
    """What ``repr(opt)`` says: the phase, the last distances and the base optimizer."""
    settings, history, counts = opt.settings, opt.history, opt.kept_counts()
    frozen = f" ({n_frozen} more are frozen)" if n_frozen else ""
    lines = [
        f"phase: {opt.phase.value}",
        f"step: {step}",
        f"masks drawn: {len(history)} (window: {settings.window})",
        f"ranked entries: {sum(each.numel for each in counts)} of {len(counts)} representatives"
        + frozen,
    ]
    last = history[-1] if history else None
    if last is not None and last.max_distance is not None:
        lines += [
            f"distances: ({', '.join(f'{distance:.4f}' for distance in last.distances)})",
            f"max_distance: {last.max_distance:.4f} (converged below {settings.stopping_point:g})",
            f"mean_distance: {last.mean_distance:.4f} (truncating below "
            f"{settings.trigger_point:g})",
        ]
    lines.append("base_optim: " + repr(opt.base_optim).replace("\n", "\n  "))
    return f"{type(opt).__name__} (\n  " + "\n  ".join(lines) + "\n)"
