"""When the ticket is found: the phases of a search, and the rule that leads through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch_worm_optim._checks import (
    check_choice,
    check_count,
    check_count_or_share,
    check_share,
)
from torch_worm_optim.search.mask import SCOPES


class Phase(Enum):
    """How far the search is; it only ever moves forward."""

    #: Masks are drawn; nothing else differs from the base optimizer.
    SEARCHING = "searching"
    #: Entries that the newest mask removes have their gradients or updates truncated.
    TRUNCATING = "truncating"
    #: The ticket is frozen; sampling and truncation have stopped.
    CONVERGED = "converged"
    #: The ticket is applied: removed entries are held at zero.
    PRUNED = "pruned"

    @property
    def converged(self) -> bool:
        """Whether the ticket is found."""
        return self in (Phase.CONVERGED, Phase.PRUNED)


class MaskSample(NamedTuple):
    """One mask: the step, its distances to those before it, and the phase after it.

    Attributes:
        step: Optimizer steps taken when the mask was drawn.
        distances: Distances in [0, 1] from this mask to each older one in the window, oldest first;
            empty until the window is full.
        max_distance: The largest of them, which is compared with the stopping point; None
            until then.
        mean_distance: Their mean, which is compared with the trigger point; None until then.
        phase: The phase after this mask; ``PRUNED`` if ``prune(force=True)`` took it as the ticket.
    """

    step: int
    distances: tuple[float, ...]
    max_distance: float | None
    mean_distance: float | None
    phase: Phase


@dataclass(frozen=True)
class SearchSettings:
    """The arguments of a search, checked; ``WormOptimizer`` documents them."""

    prune_ratio: float = 0.5
    stopping_point: float = 0.1
    margin: float = 0.05
    window: int = 5
    truncation: float = 3e-3
    sample_every: int | Callable[[int], bool] | None = 200
    scope: str = "layer"
    min_keep: int | float = 1
    truncate: str = "gradient"
    trigger: str = "distance"
    fade: float = 0.1

    def __post_init__(self) -> None:
        """Check every argument."""
        every = self.sample_every
        checked = {
            "prune_ratio": check_share("prune_ratio", self.prune_ratio, below_one=True),
            "stopping_point": check_share("stopping_point", self.stopping_point),
            "margin": check_share("margin", self.margin),
            "window": check_count("window", self.window, least=2),
            "truncation": check_share("truncation", self.truncation),
            "sample_every": every
            if every is None or callable(every)
            else check_count("sample_every", every, least=1),
            "scope": check_choice("scope", self.scope, SCOPES),
            "min_keep": check_count_or_share("min_keep", self.min_keep),
            "truncate": check_choice("truncate", self.truncate, ("gradient", "update")),
            "trigger": check_choice("trigger", self.trigger, ("distance", "always")),
            "fade": check_share("fade", self.fade, above_zero=True),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def fades(self, phase: Phase) -> bool:
        """Whether removed entries fade in a phase."""
        return phase is Phase.TRUNCATING and self.truncation < 1 and self.fade < 1

    @property
    def trigger_point(self) -> float:
        """The mean distance under which truncation starts."""
        return self.stopping_point + self.margin

    def is_due(self, step: int) -> bool:
        """Whether a mask is to be drawn after this many steps."""
        if self.sample_every is None:
            return False
        if callable(self.sample_every):
            return bool(self.sample_every(step))
        return step % self.sample_every == 0

    def next_phase(self, phase: Phase, distances: Sequence[float]) -> Phase:
        r"""The phase after a mask at these distances: lines 7 to 12 of the paper's Algorithm 1.

        .. math::

            \text{converged if } \max_j d_j < s, \qquad
            \text{else truncating if } \tfrac{1}{l-1} \sum_j d_j < s + \delta

        Nothing is decided before the window is full, and no phase is left for an earlier one.
        """
        if phase.converged:
            return phase
        if distances and max(distances) < self.stopping_point:
            return Phase.CONVERGED
        if distances and sum(distances) / len(distances) < self.trigger_point:
            return Phase.TRUNCATING
        return Phase.TRUNCATING if self.trigger == "always" else phase

    def never_ends(self, history: Sequence[MaskSample]) -> str:
        """What to warn of when a search has truncated for two windows and goes on; else empty."""
        n = sum(sample.phase is Phase.TRUNCATING for sample in history)
        if n != 2 * self.window + 1 or self.stopping_point == 0 or self.truncation == 1:
            return ""
        way = "`fade=0.1`" if self.fade == 1 else f"a smaller `fade` than {self.fade:g}"
        return (
            f"The search has truncated for {n} masks, more than two windows, and there is no "
            f"ticket: the largest distance is {history[-1].max_distance:.3g}, `stopping_point` is "
            f"{self.stopping_point:g}. What goes and what stays part sooner with {way}. Raise "
            "`stopping_point` to stop sooner, or take the newest mask as the ticket with "
            "`opt.prune(force=True)`."
        )

    def decide(self, step: int, phase: Phase, distances: tuple[float, ...]) -> MaskSample:
        """The sample of a mask at these distances, with the phase that follows."""
        return MaskSample(
            step=step,
            distances=distances,
            max_distance=max(distances) if distances else None,
            mean_distance=sum(distances) / len(distances) if distances else None,
            phase=self.next_phase(phase, distances),
        )
