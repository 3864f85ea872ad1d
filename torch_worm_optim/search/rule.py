"""When the ticket is found: the phases of a search and the rule that leads from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """How far the search is; it only ever moves forward."""

    #: Masks are drawn; nothing else differs from the base optimizer.
    SEARCHING = "searching"
    #: Entries that the newest mask removes have their gradients or updates truncated.
    TRUNCATING = "truncating"
    #: The ticket is frozen; sampling and truncation have stopped.
    CONVERGED = "converged"
    #: Removed entries go to zero, a step at a time, and the base optimizer moves them no more.
    FADING = "fading"
    #: The ticket is applied: removed entries are held at zero.
    PRUNED = "pruned"

    @property
    def converged(self) -> bool:
        """Whether the ticket is found."""
        return self in (Phase.CONVERGED, Phase.FADING, Phase.PRUNED)


class MaskSample(NamedTuple):
    """One mask: the step, its distances to those before it, and the phase after it.

    Attributes:
        step: Optimizer steps taken when the mask was drawn.
        distances: Distances in [0, 1] from this mask to each older one in the window, oldest first;
            empty until the window is full.
        max_distance: The largest of them, which is compared with the stopping point; None
            until then.
        mean_distance: Their mean, which is compared with the trigger point; None until then.
        phase: The phase after this mask.
    """

    step: int
    distances: tuple[float, ...]
    max_distance: float | None
    mean_distance: float | None
    phase: Phase


@dataclass(frozen=True)
class StoppingRule:
    r"""Lines 7 to 12 of Algorithm 1 in the WORM paper [1]: when to truncate and when to stop.

    .. math::

        \text{converged if } \max_j d_j < s, \qquad
        \text{else truncating if } \tfrac{1}{l-1} \sum_j d_j < s + \delta

    Both comparisons are strict, nothing is decided before the window is full, and no phase is left
    for an earlier one.

    Args:
        stopping_point: *s*, in [0, 1]; 0 never stops.
        margin: *δ*, in [0, 1]; the trigger point is ``stopping_point + margin``.
        window: *l*, how many masks are compared, the newest counted; at least 2.
        trigger: ``"distance"`` truncates from the trigger point on (WORM); ``"always"`` from the
            first mask on (section 4.1 of the paper).

    Example:
        >>> rule = StoppingRule(stopping_point=0.1, margin=0.05, window=3)
        >>> rule.next_phase(Phase.SEARCHING, (0.2, 0.05))
        <Phase.TRUNCATING: 'truncating'>
        >>> rule.next_phase(Phase.TRUNCATING, (0.09, 0.05))
        <Phase.CONVERGED: 'converged'>

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """

    stopping_point: float = 0.1
    margin: float = 0.05
    window: int = 5
    trigger: str = "distance"

    @property
    def trigger_point(self) -> float:
        """The mean distance under which truncation starts."""
        return self.stopping_point + self.margin

    def next_phase(self, phase: Phase, distances: Sequence[float]) -> Phase:
        """The phase after a mask at these distances.

        Args:
            phase: The phase before it.
            distances: The window's distances in [0, 1]; empty while the window is not full.

        Returns:
            The phase that holds from here on.
        """
        if phase.converged:
            return phase
        if distances and max(distances) < self.stopping_point:
            return Phase.CONVERGED
        if distances and sum(distances) / len(distances) < self.trigger_point:
            return Phase.TRUNCATING
        return Phase.TRUNCATING if self.trigger == "always" else phase


def decide(
    distances: tuple[float, ...], *, step: int, history: Sequence[MaskSample], rule: StoppingRule
) -> MaskSample:
    """The sample of a mask at these distances, with the phase that follows.

    Args:
        distances: From the newest mask to each older one, oldest first; empty while the window is
            not full.
        step: Optimizer steps taken so far.
        history: The samples before this one, oldest first.
        rule: When to truncate and when to stop.

    Returns:
        The new sample.

    Example:
        >>> sample = decide((0.2, 0.05), step=600, history=[], rule=StoppingRule(window=3))
        >>> sample.max_distance, sample.phase
        (0.2, <Phase.TRUNCATING: 'truncating'>)
    """
    return MaskSample(
        step=step,
        distances=distances,
        max_distance=max(distances) if distances else None,
        mean_distance=sum(distances) / len(distances) if distances else None,
        phase=rule.next_phase(history[-1].phase if history else Phase.SEARCHING, distances),
    )
