"""Which channels of a network can be cut out without changing what it computes.

Forward passes are watched, operator by operator. Every index of every dimension of every tensor
gets a label, an integer. Indices that can only be removed together, such as a convolution's output
channel and the scale of the BatchNorm behind it, have labels that are joined. Of each activation it
is known which channels are zero whatever the input is.

A channel is *read* where a convolution or a linear layer sums over it. A label is removable when
every read of it sees zero, since the sum does not change then. What an operator does that is not
known pins the labels of all tensors that it touches: they stay. So an unknown operator costs
channels, never exactness.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torch_worm_optim.shrink.labels import (
    PINNED,
    Flags,
    LabelMap,
    Labels,
    Limits,
    Zeros,
    tensors_in,
    tensors_of,
)
from torch_worm_optim.shrink.operators import FACTORIES, VARYING, VIEWS, ZEROS, rule_of
from torch_worm_optim.shrink.passes import Pass, Step, computes, numbers_in, watched, written
from torch_worm_optim.shrink.resize import is_conv1d, rows_of, states_its_size

logger = logging.getLogger(__name__)

# Lines of code from where an operator is called up to the `forward` that it stands in, and where
# that begins, so that what one line does in each of many layers is one place. Or "at" or "after"
# the number of a step, for all that it touches or for its results.
Place = tuple[tuple[str, int], ...]
_TORCH = str(Path(torch.__file__).parent)
# What torch calls between an operator and those who watch it.
_BETWEEN = (str(Path(__file__).parent), str(Path(_TORCH, "_compile.py")))


class Trace(NamedTuple):
    """What a watched pass found."""

    # By name, for each dimension the indices that stay, or None if all do. Of a grouped
    # convolution's weight those of the second dimension are input channels, of all groups.
    kept: dict[str, tuple[Tensor | None, ...]]
    left: dict[str, Counter[str]]  # why zero channels stay
    n_zero: int
    steps: list[Step]  # with the shapes that tensors will have
    # Of each operator: how many steps were before, its place, and its name.
    places: list[tuple[int, Place, str]]
    results: list[Any]  # of each step, the labels of its results
    stays: Flags  # by label


def trace_channels(model: nn.Module, passes: Sequence[Pass], limits: Limits) -> Trace:
    """Watch passes of a model, and say what can be cut out of its parameters and buffers."""
    known = LabelMap(model, limits)
    for module in filter(states_its_size, model.modules()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            known.pin_all(tensor, f"{type(module).__name__} states its size")
    steps: list[Step] = []
    places: list[tuple[int, Place, str]] = []
    views: list[Any] = []

    def watch(func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        place = place_of(walk_stack(sys._getframe()))
        known.operator = func.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        # Of parameters it is known what shape they will have, and what arranges one is no cause.
        inputs = tuple(
            None if isinstance(each, nn.Parameter) else known.told_labels(each) for each in tensors
        )
        if not tensors or any(each is not None for each in inputs):
            places.append((len(steps), place, known.operator))

        def finish(out: Any) -> None:
            is_step = computes(func) and bool(inputs)
            _label(known, func, args, kwargs, out)
            here: list[tuple[Place, Any]] = [(place, (args, kwargs, out))]
            if is_step:
                here += [((("at", len(steps)),), here[0][1]), ((("after", len(steps)),), out)]
            for where, touched in here:
                for tensor in tensors_in(touched) if where in limits.stay else ():
                    known.pin_all(tensor, f"the forward states a width, `{limits.stay[where]}`")
            if is_step:
                results = tuple(map(known.known_labels, tensors_in(out)))
                numbers = numbers_in(func, (args, kwargs))
                steps.append(Step(known.operator, numbers, inputs, tuple(views), results))
                views.clear()
            elif func.overloadpacket in VIEWS:
                views.append(known.told_labels(out))

        return finish

    with _scripts_pinned(known, model):
        for each, outputs in zip(passes, watched(model, passes, watch), strict=True):
            for tensor in tensors_in((each.args, each.kwargs)) + tensors_of(outputs):
                known.pin_all(tensor, "the model's output")
    for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
        own = [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]
        is_used = {known.info(tensor).is_used for tensor in own if tensor.dim()}
        for tensor in own if len(is_used) > 1 else ():  # one may be another layer's as well
            known.pin_all(tensor, "no batch uses all of a layer; pass `batches=`")
    return _result(known, model, steps, places)


@contextlib.contextmanager
def _scripts_pinned(known: LabelMap, model: nn.Module) -> Iterator[None]:
    """Have what ScriptModules are given stay: once compiled, they may hide their operators."""

    def pin(module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in((args, kwargs)):
            known.pin_all(tensor, f"{type(module).__name__} states its size")

    scripts = [each for each in model.modules() if isinstance(each, ScriptModule)]
    # Their own method refuses what Python calls all the same.
    hooks = [nn.Module.register_forward_pre_hook(m, pin, with_kwargs=True) for m in scripts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def place_of(frames: Iterable[tuple[FrameType, int]]) -> Place:
    """The place that frames are at, from the innermost on."""
    lines: list[tuple[str, int]] = []
    for frame, line in frames:
        code = frame.f_code
        if code.co_filename.startswith(_BETWEEN):
            continue
        lines.append((code.co_filename, line))
        if code.co_name == "forward" and not code.co_filename.startswith(_TORCH):
            lines.append((code.co_filename, code.co_firstlineno))
            break
    return tuple(lines)


def _label(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label what an operator returned."""
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
    if func.overloadpacket in FACTORIES:
        # Nothing is known of their sizes, until something is written there.
        for tensor in outputs:
            known.label(tensor, [known.new(size) for size in tensor.shape])
            known.info(tensor).is_zero = func.overloadpacket in ZEROS
        return
    if not inputs:
        return
    for tensor in inputs:
        known.info(tensor).is_used = True
    sources = [known.info(tensor).constant_of for tensor in inputs]
    names = [each for each in sources if each is not None]
    constant_of = frozenset[str]().union(*names) if len(names) == len(sources) else None
    rule = rule_of(func)
    try:
        is_known = rule is not None and rule(known, func, args, kwargs, out)
    except Exception:  # a fault of the rule costs channels, and is to be found
        logger.debug("The rule for %s failed; what it touches stays.", func, exc_info=True)
        is_known = False
    if not is_known:
        kind = "unknown operator" if rule is None else "a form that is not known of"
        why = f"{kind} {func.overloadpacket}"
        for tensor in outputs:
            known.label(tensor, [known.new(size) for size in tensor.shape])
        for tensor in (*inputs, *outputs):
            known.pin_all(tensor, why)
    for tensor in written(func, args, kwargs):
        known.invalidate(tensor, depends_on_input=constant_of is None)
    if constant_of is not None and func.overloadpacket not in VARYING:
        for tensor in outputs:
            known.info(tensor).constant_of = constant_of


def _zero_channels(known: LabelMap, model: nn.Module) -> dict[str, Zeros]:
    """The zero channels of layers, by the name of the scale or matrix."""
    names, zeros = {id(tensor): name for name, tensor in model.named_parameters()}, {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        is_attention = isinstance(module, nn.MultiheadAttention)
        dim = int(is_conv1d(module) or isinstance(module, _ConvTransposeNd))
        is_layer = is_conv1d(module) or isinstance(module, (nn.Linear, _ConvNd, _NormBase))
        if not (is_attention or is_layer):
            continue
        rows = module.in_proj_weight if is_attention else rows_of(module)
        shift = module.in_proj_bias if is_attention else module.bias
        is_norm = isinstance(module, _NormBase)
        # Rows of a grouped transposed convolution are of each of its groups.
        is_grouped = dim and getattr(module, "groups", 1) > 1
        # A weight norm over all of a matrix has one scale, of no row.
        is_of_rows = id(rows) in names and rows.dim() > dim
        if not is_of_rows or (is_norm and shift is None) or is_grouped:
            continue
        zero = known.zeros_along(rows, dim)
        if shift is not None:
            zero = zero & known.zeros_along(shift, 0)
        if zero.any():
            zeros[names[id(rows)]] = dim, zero
    return zeros


def _removable(known: LabelMap) -> tuple[Labels, Flags, dict[int, str]]:
    """For each label the one that stands for all it is joined with; which of those go; why not."""
    root = _components(known.n_labels, known.joined)
    removable = np.ones(known.n_labels, dtype=bool)
    removable[root[PINNED]] = False
    why: dict[int, str] = {}

    def keep(labels: Labels, reason: str, better: Mapping[int, str] = {}) -> bool:
        roots = root[labels]
        why.update({r: better.get(r, reason) for r in roots[removable[roots]].tolist()})
        removable[roots] = False
        return len(roots) > 0

    for labels, reason in known.pins:
        keep(labels, reason)
    ends = {r: reason for labels, reason in known.losses[::-1] for r in root[labels].tolist()}
    for labels, reason in known.live_reads:
        keep(labels, reason, ends)
    infos = [known.info(tensor) for tensor in known.named.values()]
    for info in infos:
        for labels in () if info.is_used else info.labels:
            keep(labels, "no batch uses it; pass `batches=`")
    for labels in _read_beside_unused(known, root):
        keep(labels, "a part that no batch uses may read it; pass `batches=`")
    for labels, reason in known.joined_to_pinned:
        keep(labels, reason)
    # What no operator reads may be read by other code, as a list of indices is.
    is_read = np.zeros(known.n_labels, dtype=bool)
    is_read[root[np.concatenate([root[:0], *known.dead_reads])]] = True
    keep(np.flatnonzero(~is_read[root]), "no operator that is known reads it")
    # Sizes may have to be multiples of a number, and some parts as large as others.
    changed = True
    while changed:
        changed = False
        for labels in (each for info in infos for each in info.labels):
            roots = root[labels]
            n_lacking = -int((~removable[roots]).sum()) % known.limits.multiple_of
            lacking = roots[removable[roots]][:n_lacking]
            changed |= keep(lacking, f"sizes stay a multiple of {known.limits.multiple_of}")
            if len(roots) and removable[roots].all():
                changed |= keep(roots[:1], "the last one of its layer")
        for parts in known.balanced:
            least = min(int(removable[root[part]].sum()) for part in parts)
            least -= least == len(parts[0])
            for part in parts:
                surplus = part[removable[root[part]]][least:]
                changed |= keep(surplus, "groups and split parts lose equal numbers")
    return root, removable, why


def _read_beside_unused(known: LabelMap, root: Labels) -> Iterator[Labels]:
    """What parts share with others that have a twin which is not used, such as another head."""
    roots = {
        name: root[np.concatenate([root[:0], *known.info(tensor).labels])]
        for name, tensor in known.named.items()
    }
    is_used = {name: known.info(tensor).is_used for name, tensor in known.named.items()}
    for twin in (name for name, used in is_used.items() if not used):
        for name in (name for name, used in is_used.items() if used):
            pairs = list(zip(name.split("."), twin.split("."), strict=False))
            differ = [n for n, (a, b) in enumerate(pairs) if a != b]
            is_twin = len(differ) == 1 and name.count(".") == twin.count(".")
            if is_twin and known.named[name].shape == known.named[twin].shape:
                part = ".".join(name.split(".")[: differ[0] + 1]) + "."
                others = [each for other, each in roots.items() if not other.startswith(part)]
                yield np.intersect1d(roots[name], np.concatenate([root[:0], *others]))


def _result(known: LabelMap, model: nn.Module, steps: list[Step], places: Any) -> Trace:
    """Which indices of parameters and buffers stay, and which zeros stay and why."""
    root, removable, why = _removable(known)
    stays = ~removable[root]

    def shapes(tensors: Any) -> tuple[Any, ...]:
        return tuple(
            None
            if each is None
            else tuple(None if d is None else int(stays[d].sum()) for d in each)
            for each in tensors
        )

    of_results = [step.results or () for step in steps]
    steps = [Step(*each[:2], *(shapes(told or ()) for told in each[2:])) for each in steps]
    kept, left = {}, {}
    for name, tensor in known.named.items():
        info = known.info(tensor)
        dims = list(info.labels)
        if info.group_inputs is not None:
            dims[1] = info.group_inputs
        if not all(stays[labels].all() for labels in dims):
            kept[name] = tuple(
                None if stays[labels].all() else torch.from_numpy(np.flatnonzero(stays[labels]))
                for labels in dims
            )
    zeros = _zero_channels(known, model)
    for name, (dim, zero) in zeros.items():
        roots = root[known.info(known.named[name]).labels[dim][zero]]
        staying = roots[~removable[roots]].tolist()
        if staying:
            left[name] = Counter(why[r] for r in staying)
    n_zero = sum(int(zero.sum()) for _, zero in zeros.values())
    return Trace(kept, left, n_zero, steps, places, of_results, stays)


def _components(n: int, pairs: Sequence[tuple[Labels, Labels]]) -> Labels:
    """For each label the lowest label that it is joined with, directly or through others."""
    lowest = np.arange(n)
    if not pairs:
        return lowest
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        roots_a, roots_b = lowest[a], lowest[b]
        if (roots_a == roots_b).all():
            return lowest
        least = np.minimum(roots_a, roots_b)
        np.minimum.at(lowest, roots_a, least)
        np.minimum.at(lowest, roots_b, least)
        while (lowest != lowest[lowest]).any():
            lowest = lowest[lowest]
