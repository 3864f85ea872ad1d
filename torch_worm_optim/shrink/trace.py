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

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torch_worm_optim.shrink.labels import PINNED, Flags, LabelMap, Labels, Zeros, all_zero, pinned
from torch_worm_optim.shrink.operators import FACTORIES, PICKING, rule_of
from torch_worm_optim.shrink.resize import is_conv1d, states_its_size

logger = logging.getLogger(__name__)

# The name of an operator, and the shapes of its results, None where nothing is known of one.
Step = tuple[str, tuple["tuple[int, ...] | None", ...]]
# Operators that arrange entries anew. Which of them run depends on strides, which cutting changes.
_ARRANGING = re.compile(
    r"view|reshape|clone|copy|expand|permute|transpose|^t$|squeeze|alias|detach|strided|lift|empty"
)


@dataclass
class Trace:
    """What a watched pass found."""

    # By name, for each dimension the indices that stay, or None if all do. Of a grouped
    # convolution's weight those of the second dimension are input channels, of all groups.
    kept: dict[str, tuple[Labels | None, ...]] = field(default_factory=dict)
    left: dict[str, Counter[str]] = field(default_factory=dict)  # why zero channels stay
    n_zero: int = 0
    steps: list[Step] = field(default_factory=list)  # with the shapes that results will have


def trace_channels(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    cut_splits: bool = True,  # lose channels that are split into parts, as many from each
    cut_heads: bool = True,  # lose runs of channels that a view makes an index of
    scattered: Collection[str] = (),  # scales of BatchNorms that write into a wider tensor by index
    multiple_of: int = 1,
) -> Trace:
    """Watch a forward pass, and say what can be cut out of the model's parameters and buffers."""
    known = LabelMap(model, cut_splits, cut_heads, scattered)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with torch.no_grad(), _Watch(known):
        outputs = model(*args, **kwargs)
    for tensor in (*inputs, *(o for o in tree_leaves(outputs) if isinstance(o, Tensor))):
        known.pin_all(tensor, "the model's output")
    return _result(known, model, multiple_of)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators, and has their rules label what they return."""

    def __init__(self, known: LabelMap) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and label what it returns."""
        known, kwargs = self.known, kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func.overloadpacket in FACTORIES:
            # Nothing is known of their sizes, until something is written there.
            for tensor in outputs:
                known.label(tensor, [known.new(size) for size in tensor.shape])
            return out
        if not inputs:
            return out
        sources = [known.info(tensor).constant_of for tensor in inputs]
        names = [each for each in sources if each is not None]
        constant_of = frozenset[str]().union(*names) if len(names) == len(sources) else None
        if not self._apply_rule(func, args, kwargs, out):
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
            known.steps.append((_name(func), [known.known_labels(each) for each in outputs]))
        return out

    def _apply_rule(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether the operator, in this form, has a rule that knows it."""
        rule = rule_of(func)
        try:
            return rule is not None and rule(self.known, func, args, kwargs, out)
        except Exception:  # a fault of the rule costs channels, and is to be found
            logger.debug("The rule for %s failed; what it touches stays.", func, exc_info=True)
            return False


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of what operators return, and counts multiplications.

    The module hooks of ``FlopCounterMode`` fail where a module gets a parameter as its input and no
    gradients are computed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.n_flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and take note."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.n_flops += count(*args, **kwargs, out_val=out)
        leaves = tree_leaves((args, kwargs))
        if _computes(func) and any(isinstance(leaf, Tensor) for leaf in leaves):
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.steps.append((_name(func), tuple(tuple(each.shape) for each in outputs)))
        return out


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


def _name(func: Any) -> str:
    return str(func.overloadpacket).rpartition(".")[2]


def _computes(func: Any) -> bool:
    return func.overloadpacket not in FACTORIES and not _ARRANGING.search(_name(func))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    arguments = func._schema.arguments
    given = {**dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}
    return [
        leaf
        for each in arguments
        if each.alias_info is not None and each.alias_info.is_write
        for leaf in tree_leaves(given.get(each.name))
        if isinstance(leaf, Tensor)
    ]


def _zero_channels(model: nn.Module) -> Iterator[tuple[str, Zeros]]:
    """The zero channels of BatchNorms and linear layers, by the name of the scale or matrix."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        weight, bias, dim = "weight", "bias", 0
        if isinstance(module, nn.MultiheadAttention):
            weight, bias = "in_proj_weight", "in_proj_bias"
        elif is_conv1d(module):
            dim = 1
        elif not isinstance(module, (nn.Linear, _BatchNorm)):
            continue
        rows, shift = getattr(module, weight), getattr(module, bias)
        if id(rows) not in names or (isinstance(module, _BatchNorm) and shift is None):
            continue
        matrix = rows.detach().movedim(dim, 0).unsqueeze(-1).flatten(1)
        zero = all_zero(matrix, np.arange(matrix.shape[1]))
        if shift is not None:
            zero &= (shift.detach() == 0).cpu().numpy()
        if zero.any():
            yield names[id(rows)], (dim, zero)


def _result(known: LabelMap, model: nn.Module, multiple_of: int) -> Trace:
    """Which indices of parameters and buffers stay, and which zeros stay and why."""
    root = _components(known.n_labels, known.joined)
    removable = np.ones(known.n_labels, dtype=bool)
    removable[root[PINNED]] = False
    why: dict[int, str] = {}

    def keep(labels: Labels, reason: str) -> None:
        roots = root[labels]
        why.update(dict.fromkeys(roots[removable[roots]].tolist(), reason))
        removable[roots] = False

    for module in model.modules():
        if states_its_size(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                for labels in known.info(tensor).labels if tensor is not None else ():
                    keep(labels, f"{type(module).__name__} states its size")
    for labels, reason in known.pins:
        keep(labels, reason)
    for labels in known.live_reads:
        keep(labels, "other layers write to the same channel (residual stream)")
    infos = {name: known.info(tensor) for name, tensor in known.named.items()}
    for info in infos.values():
        for labels in () if info.is_used else info.labels:
            keep(labels, "this forward does not use it")
    roots_of = {name: [root[labels] for labels in info.labels] for name, info in infos.items()}
    dims = [roots for of_dims in roots_of.values() for roots in of_dims]
    balanced = [[root[part] for part in parts] for parts in known.balanced]
    _round_kept(removable, dims, balanced, multiple_of, why)
    stays, trace = ~removable[root], Trace()
    for operator, results in known.steps:
        shapes = (
            None if each is None else tuple(int(stays[labels].sum()) for labels in each)
            for each in results
        )
        trace.steps.append((operator, tuple(shapes)))
    for name, info in infos.items():
        dims = list(info.labels)
        if info.group_inputs is not None:
            dims[1] = info.group_inputs
        if not all(stays[labels].all() for labels in dims):
            trace.kept[name] = tuple(
                None if stays[labels].all() else np.flatnonzero(stays[labels]) for labels in dims
            )
    for name, (dim, zero) in dict(_zero_channels(model)).items():
        trace.n_zero += int(zero.sum())
        roots = roots_of[name][dim][zero]
        reasons = [
            why.get(r, "something that stays goes with it") for r in roots[~removable[roots]]
        ]
        if reasons:
            trace.left[name] = Counter(reasons)
    return trace


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


def _round_kept(
    removable: Flags,
    dims: Sequence[Labels],
    balanced: Sequence[Sequence[Labels]],
    multiple_of: int,
    why: dict[int, str],
) -> None:
    """Have a multiple of some number stay of each dimension, and equal numbers of some parts."""

    def keep(roots: Labels, reason: str) -> bool:
        removable[roots] = False
        for root in roots.tolist():
            why.setdefault(root, reason)
        return len(roots) > 0

    changed = True
    while changed:
        changed = False
        for roots in dims:
            n_lacking = -int((~removable[roots]).sum()) % multiple_of
            lacking = roots[removable[roots]][:n_lacking]
            changed |= keep(lacking, f"sizes stay a multiple of {multiple_of}")
            if len(roots) and removable[roots].all():
                changed |= keep(roots[:1], "the last one of its layer")
        for parts in balanced:
            least = min(int(removable[part].sum()) for part in parts)
            least -= least == len(parts[0])
            for part in parts:
                surplus = part[removable[part]][least:]
                changed |= keep(surplus, "groups and split parts lose equal numbers")
