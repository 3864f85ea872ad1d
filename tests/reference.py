"""The slow twin: masks, search and truncation as the paper words them, one entry at a time.

Nothing here is shared with the package. Masks are lists of bools, **True = kept**.
"""

from __future__ import annotations


def removal_order(scores: list[float]) -> list[int]:
    """Positions from the first to go to the last: lower scores first, earlier ones among equals."""
    return sorted(range(len(scores)), key=lambda position: (scores[position], position))


def reference_mask(
    layers: list[list[float]], prune_ratio: float, scope: str, min_keep: int
) -> list[bool]:
    """The mask of all layers, one after the other."""
    if scope == "layer":
        return [
            kept
            for layer in layers
            for kept in reference_mask([layer], prune_ratio, "global", min_keep)
        ]
    scores = [score for layer in layers for score in layer]
    set_aside, start = set(), 0
    for layer in layers:
        best_first = [start + position for position in reversed(removal_order(layer))]
        set_aside.update(best_first[:min_keep])
        start += len(layer)
    candidates = [position for position in removal_order(scores) if position not in set_aside]
    removed = set(candidates[: round(prune_ratio * len(scores))])
    return [position not in removed for position in range(len(scores))]


def reference_ties(layers: list[list[float]], prune_ratio: float, scope: str, min_keep: int) -> int:
    """How many entries have the highest score that was removed, if some of them were kept."""
    if scope == "layer":
        return sum(reference_ties([layer], prune_ratio, "global", min_keep) for layer in layers)
    scores = [score for layer in layers for score in layer]
    kept = reference_mask(layers, prune_ratio, scope, min_keep)
    removed = [score for score, stays in zip(scores, kept, strict=True) if not stays]
    if not removed:
        return 0
    fates = [s for score, s in zip(scores, kept, strict=True) if score == max(removed)]
    return len(fates) if any(fates) else 0


def reference_distance(a: list[bool], b: list[bool]) -> float:
    """Share of entries on which two masks differ."""
    return sum(x != y for x, y in zip(a, b, strict=True)) / len(a)


def reference_search(
    masks: list[list[bool]],
    *,
    stopping_point: float,
    margin: float,
    window: int,
    trigger: str = "distance",
) -> list[tuple[tuple[float, ...], str]]:
    """Algorithm 1, lines 5 to 12, for masks that are given: distances and phase after each."""
    held: list[list[bool]] = []
    phase = "searching"
    results = []
    for mask in masks:
        if phase == "converged":
            break
        held = [*held, mask][-window:]
        distances: tuple[float, ...] = ()
        if len(held) == window:
            distances = tuple(reference_distance(mask, older) for older in held[:-1])
        if trigger == "always":
            phase = "truncating"
        if distances and max(distances) < stopping_point:
            phase = "converged"
        elif distances and sum(distances) / len(distances) < stopping_point + margin:
            phase = "truncating"
        results.append((distances, phase))
    return results


def exact_count(prune_ratio: float, sizes: list[int], scope: str) -> int:
    """How many entries a mask removes when nothing is set aside."""
    if scope == "layer":
        return sum(round(prune_ratio * size) for size in sizes)
    return round(prune_ratio * sum(sizes))
