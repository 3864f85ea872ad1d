"""Which channels of a network can be cut out without changing what it computes.

One forward pass is watched, operator by operator. Every index of every dimension of every tensor
gets a label, an integer. Indices that can only be removed together, such as a convolution's output
channel and the scale of the BatchNorm behind it, have labels that are joined. Of each activation it
is known which channels are zero whatever the input is.

A channel is *read* where a convolution or a linear layer sums over it. A label is removable when
every read of it sees zero, since the sum does not change then. What an operator does that is not
known pins the labels of all tensors that it touches: they stay. So an unknown operator costs
channels, never exactness.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torch_worm_optim.shrink.labels import (
    PINNED,
    Flags,
    LabelMap,
    Labels,
    Limits,
    Zeros,
    pinned,
    tensors_in,
)
from torch_worm_optim.shrink.operators import FACTORIES, PICKING, rule_of
from torch_worm_optim.shrink.resize import is_conv1d, states_its_size

logger = logging.getLogger(__name__)

# The name of an operator, and the shapes of its results, None where nothing is known of one.
Step = tuple[str, tuple["tuple[int, ...] | None", ...]]
# Operators that arrange entries anew. Which of them run depends on strides, which cutting changes.
_ARRANGING = re.compile(
    r"view|reshape|clone|copy|expand|permute|transpose|^t$|squeeze|alias|detach|strided|lift|empty"
)


class Trace(NamedTuple):
    """What a watched pass found."""

    # By name, for each dimension the indices that stay, or None if all do. Of a grouped
    # convolution's weight those of the second dimension are input channels, of all groups.
    kept: dict[str, tuple[Tensor | None, ...]]
    left: dict[str, Counter[str]]  # why zero channels stay
    n_zero: int
    steps: list[Step]  # with the shapes that results will have


class Run(NamedTuple):
    """What a forward pass returns, what its operators return, and how many operations they take."""

    outputs: Any
    steps: list[Step]
    n_flops: int


def trace_channels(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], limits: Limits
) -> Trace:
    """Watch a forward pass, and say what can be cut out of the model's parameters and buffers."""
    known = LabelMap(model, limits)
    for module in filter(states_its_size, model.modules()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            known.pin_all(tensor, f"{type(module).__name__} states its size")
    outputs = _watched(model, args, kwargs, functools.partial(_label, known))
    for tensor in tensors_in((args, kwargs, outputs)):
        known.pin_all(tensor, "the model's output")
    return _result(known, model)


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    """Take note of what operators return while a model runs, and count multiplications."""
    steps: list[Step] = []
    flops: list[int] = []

    def take_note(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        # The hooks of `FlopCounterMode` fail where a module gets a parameter as its input.
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            flops.append(count(*args, **kwargs, out_val=out))
        if _computes(func) and tensors_in((args, kwargs)):
            shapes = tuple(tuple(each.shape) for each in tensors_in(out))
            steps.append((func.overloadpacket.__name__, shapes))

    return Run(_watched(model, args, kwargs, take_note), steps, sum(flops))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each operator that runs: which it is, its arguments, and what it returns."""

    def __init__(self, tell: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and tell of it."""
        out = func(*args, **kwargs or {})
        self.tell(func, args, kwargs or {}, out)
        return out


def _watched(model: nn.Module, args: Any, kwargs: Any, tell: Callable[..., None]) -> Any:
    """What a model returns in evaluation mode, where `tell` hears of each operator."""
    # Modules forget what they keep in evaluation, as LeViT's do their biases of positions.
    model.train()
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(), _Watch(tell):
        torch.manual_seed(0)
        return model(*args, **kwargs)


def _label(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label what an operator returned."""
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
    if func.overloadpacket in FACTORIES:
        # Nothing is known of their sizes, until something is written there.
        for tensor in outputs:
            known.label(tensor, [known.new(size) for size in tensor.shape])
        return
    if not inputs:
        return
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
        for tensor in inputs:
            known.pin_all(tensor, f"unknown operator {func.overloadpacket}")
        for tensor in outputs:
            known.label(tensor, [pinned(size) for size in tensor.shape])
    for tensor in _written(func, args, kwargs):
        known.invalidate(tensor, depends_on_input=constant_of is None)
    if constant_of is not None and func.overloadpacket not in PICKING:
        for tensor in outputs:
            known.info(tensor).constant_of = constant_of
    if _computes(func):
        labels = [known.known_labels(each) for each in outputs]
        known.steps.append((func.overloadpacket.__name__, labels))


def check_steps(expected: Sequence[Step], seen: Sequence[Step]) -> None:
    """Raise where an operator returned another shape than a trace says, or another one ran.

    Outputs alone do not tell whether heads were cut as heads: with one position, or equal ones,
    attention is the same whatever its scores are.
    """
    for number, (a, b) in enumerate(zip_longest(expected, seen, fillvalue=("none", ()))):
        same = a[0] == b[0] and len(a[1]) == len(b[1])
        if not same or any(x is not None and x != y for x, y in zip(a[1], b[1], strict=True)):
            raise RuntimeError(
                f"a forward computes otherwise once it is cut: operator {number} should be "
                f"{a} and is {b}"
            )


def _computes(func: Any) -> bool:
    packet = func.overloadpacket
    return packet not in FACTORIES and not _ARRANGING.search(packet.__name__)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    arguments = func._schema.arguments
    given = {**dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}
    written = [each.name for each in arguments if each.alias_info and each.alias_info.is_write]
    return tensors_in([given.get(name) for name in written])


def _zero_channels(known: LabelMap, model: nn.Module) -> dict[str, Zeros]:
    """The zero channels of BatchNorms and linear layers, by the name of the scale or matrix."""
    names, zeros = {id(tensor): name for name, tensor in model.named_parameters()}, {}
    for module in model.modules():
        prefix = "in_proj_" if isinstance(module, nn.MultiheadAttention) else ""
        dim = int(is_conv1d(module))
        if not (prefix or dim or isinstance(module, (nn.Linear, _BatchNorm))):
            continue
        rows, shift = (getattr(module, f"{prefix}{name}") for name in ("weight", "bias"))
        if id(rows) not in names or (isinstance(module, _BatchNorm) and shift is None):
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

    def keep(labels: Labels, reason: str) -> bool:
        roots = root[labels]
        why.update(dict.fromkeys(roots[removable[roots]].tolist(), reason))
        removable[roots] = False
        return len(roots) > 0

    for labels, reason in known.pins:
        keep(labels, reason)
    for labels in known.live_reads:
        keep(labels, "other layers write to the same channel (residual stream)")
    infos = [known.info(tensor) for tensor in known.named.values()]
    for info in infos:
        for labels in () if info.is_used else info.labels:
            keep(labels, "this forward does not use it")
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


def _result(known: LabelMap, model: nn.Module) -> Trace:
    """Which indices of parameters and buffers stay, and which zeros stay and why."""
    root, removable, why = _removable(known)
    stays = ~removable[root]
    steps: list[Step] = []
    for operator, results in known.steps:
        shapes = (
            None if each is None else tuple(int(stays[labels].sum()) for labels in each)
            for each in results
        )
        steps.append((operator, tuple(shapes)))
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
            left[name] = Counter(why.get(r, "something that stays goes with it") for r in staying)
    return Trace(kept, left, sum(int(zero.sum()) for _, zero in zeros.values()), steps)


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
