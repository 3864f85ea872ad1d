"""Whether a network that was cut computes what it did, and what to keep where it does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from traceback import walk_tb
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_worm_optim.shrink.labels import tensors_in
from torch_worm_optim.shrink.passes import Pass, Run, Step, computes, watched
from torch_worm_optim.shrink.trace import Place, Trace, place_of


class ComputesOtherwiseError(RuntimeError):
    """A network that is cut computes otherwise; `stay` has what to keep first, and what then."""

    def __init__(self, message: str, stay: Sequence[Mapping[Place, str]]) -> None:
        super().__init__(message)
        self.stay = stay


def check_steps(found: Trace, run: Run) -> None:
    """Raise where an operator was given or returned another shape than a trace says.

    Outputs alone do not tell whether heads were cut as heads: with one position, or equal ones,
    attention is the same whatever its scores are.
    """
    message, stay = first_difference(found, run.steps[: run.n_certain], run.n_certain)
    if message:
        raise ComputesOtherwiseError(message, stay)


def first_difference(
    found: Trace, seen: Sequence[Step], n: int | None = None
) -> tuple[str, list[dict[Place, str]]]:
    """What differs from a trace first, of n operators, and what to keep so that it does not."""
    none = Step("none", (), ())
    for number, (a, b) in enumerate(zip_longest(found.steps[:n], seen, fillvalue=none)):
        is_given = a.operator == b.operator and _agree(a.inputs, b.inputs)
        # How many views there are depends on strides, which cutting changes.
        is_given &= len(a.views) != len(b.views) or _agree(a.views, b.views)
        # A forward may divide by how many channels there are, whatever comes of that here.
        is_counted = not all(map(_is_about, a.numbers, b.numbers))
        if is_given and not is_counted and _agree(a.results, b.results):
            continue
        previous: dict[Place, str] = {(("after", number - 1),): found.steps[number - 1].operator}
        at = [(place, name) for n_before, place, name in found.places if n_before == number]
        # What it is given comes from the step before, through operators that arrange it. What it
        # allocates itself, as a BatchNorm does, is in its own place.
        own = dict(at[-1:])
        before = {place: name for place, name in at[:-1] if place not in own}
        first = (own if is_given else before) or previous
        message = (
            f"a forward computes otherwise once it is cut: operator {number} should be {tuple(a)} "
            f"and is {tuple(b)}"
        )
        if is_given and is_counted:
            return message, last_places(found, number)
        near = {**before, **previous, (("at", number),): a.operator}
        return message, [first, near, _forwards_of(found, first)]
    return "", []


def failed_at(found: Trace, error: Exception) -> list[dict[Place, str]]:
    """Where a forward raised, if it calls an operator there."""
    frames = list(itertools.takewhile(_is_outside, walk_tb(error.__traceback__)))
    place, names = place_of(reversed(frames)), {place: name for _, place, name in found.places}
    return [{place: names[place]}] if place in names else []


def _is_outside(at: tuple[FrameType, int]) -> bool:
    """Whether a frame is not inside of an operator that is watched."""
    return at[0].f_code.co_name != "__torch_dispatch__"


def _forwards_of(found: Trace, places: Mapping[Place, str]) -> dict[Place, str]:
    """All that the forwards do which places are in, such as to reshape to the width of an input."""
    around = {place[-1] for place in places}
    return {place: name for _, place, name in found.places if place[-1] in around}


def first_other_value(before: Sequence[float], after: Sequence[float], rounding: float) -> int:
    """The number of the first step that returns other magnitudes, or that of all."""
    pairs = zip(before, after, strict=False)
    differ = (n for n, (a, b) in enumerate(pairs) if a != b and abs(a - b) > rounding * abs(a))
    return next(differ, len(before))


def last_places(found: Trace, number: int) -> list[dict[Place, str]]:
    """A step, and more and more of those before it."""
    steps = list(enumerate(found.steps))[: number + 1]
    return [{(("at", at),): step.operator for at, step in steps[-n:]} for n in (1, 2, 4)]


def magnitudes(model: nn.Module, passes: Sequence[Pass], found: Trace | None = None) -> list[float]:
    """For each step the sum of the magnitudes that it returns, of indices that stay in a trace."""
    sums: list[float] = []

    def watch(func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        is_step = computes(func) and bool(tensors_in((args, kwargs)))

        def finish(out: Any) -> None:
            if not is_step:
                return
            results = [each.detach().double() for each in tensors_in(out) if not each.is_complex()]
            if found is not None and len(sums) < len(found.results):
                for n, labels in enumerate(found.results[len(sums)][: len(results)]):
                    fits = labels and [len(each) for each in labels] == list(results[n].shape)
                    for dim, each in enumerate(labels if fits else ()):
                        indices = torch.as_tensor(np.flatnonzero(found.stays[each]))
                        results[n] = results[n].index_select(dim, indices.to(results[n].device))
            sums.append(sum(float(each.abs().sum()) for each in results))

        return finish

    for _ in watched(model, passes, watch):
        pass
    return sums


def _agree(expected: Any, seen: Any) -> bool:
    """Whether shapes are those that are expected, where any are."""
    if seen is None or len(expected) != len(seen):
        return False
    known = [(x, y) for x, y in zip(expected, seen, strict=True) if x is not None]
    return all(
        len(x) == len(y) and all(a is None or a == b for a, b in zip(x, y, strict=True))
        for x, y in known
    )


def _is_about(a: float, b: float) -> bool:
    """Whether two numbers are the same to rounding."""
    return a == b or math.isnan(a) or math.isclose(a, b, rel_tol=1e-5)


def difference_of(expected: Run, result: Run) -> str:
    """What to say of outputs that differ; nothing where they do not."""
    difference = largest_difference(expected.outputs, result.outputs)
    rounding = tolerance(expected.outputs)
    if difference <= rounding:
        return ""
    return (
        f"outputs differ by {difference:.2g} of the largest, and rounding would explain "
        f"{rounding:.2g}"
    )


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, over the largest entry; infinite if shapes differ."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return math.inf
        x, y = x.double(), y.double()
        differs = x != y  # which two equal infinities, as of masked scores, do not
        if differs.any():
            finite = x[x.isfinite()].abs()
            scale = max(float(finite.max()) if finite.numel() else 0.0, 1e-30)
            gap = float((x - y)[differs].abs().max()) / scale
            worst = math.inf if math.isnan(gap) else max(worst, gap)
    return worst


def tolerance(outputs: Sequence[Tensor]) -> float:
    """What rounding may change: the root of the coarsest dtype's precision."""
    precisions = [
        # Convolutions of single precision are rounded to TF32 on a CUDA device, if not told else.
        2**-10 if each.is_cuda and each.dtype == torch.float32 else torch.finfo(each.dtype).eps
        for each in outputs
        if each.is_floating_point()
    ]
    return math.sqrt(max(precisions, default=0.0))
