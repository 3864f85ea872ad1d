"""Which channels of a network can be cut out without changing what it computes.

One forward pass is watched, operator by operator. Every index of every dimension of every tensor
gets a label, an integer. Indices that can only be removed together, such as a convolution's output
channel and the scale of the BatchNorm behind it, have labels that are joined. Of each activation it
is known which channels are zero whatever the input is.

A channel is *read* where a convolution or a linear layer sums over it. A label can go when every
read of it sees zero, since the sum does not change then. What an operator does that is not known
pins the labels of all tensors that it touches: they stay. So an unknown operator costs channels,
never exactness.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_worm_optim.shrink.labels import PINNED, Book, Flags, Labels, all_zero, fixed
from torch_worm_optim.shrink.operators import FACTORIES, PICKING, rule_of
from torch_worm_optim.shrink.resize import is_conv1d, states_its_size

# The name of an operator, and the shapes of its results, None where nothing is known of one.
Step = tuple[str, tuple["tuple[int, ...] | None", ...]]
# Operators that arrange entries anew. Which of them run depends on strides, which cutting changes.
_ARRANGING = re.compile(
    r"view|reshape|clone|copy|expand|permute|transpose|^t$|squeeze|alias|detach|strided|lift|empty"
)


@dataclass
class Trace:
    """What a watched pass found.

    Attributes:
        kept: For each parameter and buffer of which something can go, for each dimension the
            indices that stay, or None if all do. Of a grouped convolution's weight those of the
            second dimension are indices of input channels, of all groups.
        left: For each parameter with channels that are zero and stay, how many and why.
        steps: The operators that compute, in order, with the shapes that their results will have.
    """

    kept: dict[str, tuple[Labels | None, ...]] = field(default_factory=dict)
    left: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def trace_channels(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    cut_splits: bool = True,
    cut_heads: bool = True,
    scattered: Collection[str] = (),
    multiple_of: int = 1,
) -> Trace:
    """Watch a forward pass, and say what can be cut out of the model's parameters and buffers.

    Args:
        model: The model, in the mode to watch; nothing of it is changed.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        cut_splits: Whether channels may go from a tensor that is split into equal parts, as many
            from each part. A forward that reads the size of the parts from an attribute fails then.
        cut_heads: Whether runs of channels may go that a view makes an index of, as the channels of
            a head of attention. Of a forward that reads the number of heads, the same holds.
        scattered: Names of BatchNorm scales whose output goes into a wider tensor by index, so that
            they lose channels that the tensor keeps.
        multiple_of: What the number of indices of a dimension that loses some is a multiple of.

    Returns:
        The :class:`Trace`.

    Example:
        >>> conv, bn = nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3)
        >>> model = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
        >>> with torch.no_grad():
        ...     _ = bn.weight[1].zero_()
        >>> trace_channels(model, [torch.ones(1, 1, 2, 2)], {}).kept["0.weight"]
        (array([0, 2]), None, None, None)
    """
    book = Book(model, cut_splits, cut_heads, scattered)
    for module in model.modules():
        if states_its_size(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    book.pin(tensor, f"{type(module).__name__} states its size")
    book.seen.clear()  # Nothing has run yet.
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with torch.no_grad(), _Watch(book):
        outputs = model(*args, **kwargs)
    for tensor in (*inputs, *(o for o in tree_leaves(outputs) if isinstance(o, Tensor))):
        book.pin(tensor, "the model's output")
    return _result(book, zero_channels(model), multiple_of)


def check_shapes(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], steps: Sequence[Step]
) -> None:
    """Watch the forward pass of a model that was cut, and compare the shapes of all results.

    Outputs alone do not tell whether heads were cut as heads: with one position, or equal ones,
    attention is the same whatever its scores are.

    Args:
        model: The model, in the mode that it was traced in.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        steps: Those of the :class:`Trace` that it was cut by.

    Raises:
        RuntimeError: If an operator returns another shape than the trace says, or other operators
            run.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> steps = trace_channels(layer, [torch.ones(1, 2)], {}).steps
        >>> steps
        [('addmm', ((1, 3),))]
        >>> check_shapes(layer, [torch.ones(1, 2)], {}, steps)
    """
    seen: list[Step] = []
    with torch.no_grad(), _Shapes(seen):
        model(*args, **kwargs)
    for number, (expected, step) in enumerate(zip_longest(steps, seen, fillvalue=("none", ()))):
        same = expected[0] == step[0] and len(expected[1]) == len(step[1])
        if not same or any(
            a is not None and a != b for a, b in zip(expected[1], step[1], strict=True)
        ):
            raise RuntimeError(
                f"a forward computes otherwise once it is cut: operator {number} should be "
                f"{expected} and is {step}"
            )


def zero_channels(model: nn.Module) -> dict[str, tuple[int, Flags]]:
    """Channels of BatchNorms and linear layers that are zero whatever the input is.

    Args:
        model: Any model.

    Returns:
        For the name of each scale or matrix the dimension of its channels, and which are zero, the
        shift or bias included.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight[1].zero_()
        >>> zero_channels(layer)
        {'weight': (0, array([False,  True, False]))}
    """
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        weight, bias, dim = "weight", "bias", 0
        if isinstance(module, nn.MultiheadAttention):
            weight, bias = "in_proj_weight", "in_proj_bias"
        elif is_conv1d(module):
            dim = 1
        elif not isinstance(module, (nn.Linear, _BatchNorm)):
            continue
        rows = getattr(module, weight)
        if id(rows) not in names or (isinstance(module, _BatchNorm) and module.bias is None):
            continue
        name = names[id(rows)]
        rows = rows.detach().movedim(dim, 0).unsqueeze(-1).flatten(1)
        zero = all_zero(rows, np.arange(rows.shape[1]))
        if (shift := getattr(module, bias)) is not None:
            zero &= (shift.detach() == 0).cpu().numpy()
        if zero.any():
            found[name] = (dim, zero)
    return found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators, and has their rules label what they return."""

    def __init__(self, book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.book = book

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and label what it returns."""
        book, kwargs = self.book, kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func.overloadpacket in FACTORIES:
            # Nothing is known of their sizes, until something is written there.
            for tensor in outputs:
                book.label(tensor, [book.new(size) for size in tensor.shape])
            return out
        if not inputs:
            return out
        is_constant = all(id(tensor) in book.made_of for tensor in inputs)
        rule = rule_of(func)
        known = False
        if rule is not None:
            # A form of the operator that a rule does not know is as good as no rule.
            with contextlib.suppress(IndexError, TypeError, ValueError, AttributeError):
                known = rule(book, func, args, kwargs, out)
        if not known:
            for tensor in inputs:
                book.pin(tensor, f"unknown operator {func.overloadpacket}")
            for tensor in outputs:
                book.label(tensor, [fixed(size) for size in tensor.shape])
        for tensor in _written(func, args, kwargs):
            book.written(tensor, depends_on_input=not is_constant)
        if is_constant and func.overloadpacket not in PICKING:
            names = set().union(*(book.made_of[id(tensor)] for tensor in inputs))
            book.made_of |= {id(tensor): names for tensor in outputs}
        if _computes(func):
            book.steps.append((_name(func), [book.labels.get(id(each)) for each in outputs]))
        return out


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of what operators return."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps = steps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and take note."""
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        if _computes(func) and any(isinstance(leaf, Tensor) for leaf in leaves):
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.steps.append((_name(func), tuple(tuple(each.shape) for each in outputs)))
        return out


def _name(func: Any) -> str:
    return str(func.overloadpacket).rpartition(".")[2]


def _computes(func: Any) -> bool:
    return func.overloadpacket not in FACTORIES and not _ARRANGING.search(_name(func))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    names = [each.name for each in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [
        leaf
        for each in func._schema.arguments
        if each.alias_info is not None and each.alias_info.is_write
        for leaf in tree_leaves(given.get(each.name))
        if isinstance(leaf, Tensor)
    ]


def _result(book: Book, zero: Mapping[str, tuple[int, Flags]], multiple_of: int) -> Trace:
    """Which indices of parameters and buffers stay, and which zeros stay and why."""
    root = _components(book.n_labels, book.joined)
    why: dict[int, str] = {}
    stays = np.zeros(book.n_labels, dtype=bool)
    stays[root[PINNED]] = True

    def keep(roots: Labels, reason: str) -> None:
        for each in np.unique(roots[~stays[roots]]).tolist():
            why[each] = reason
        stays[roots] = True

    for labels, reason in book.pinned:
        keep(root[labels], reason)
    for labels in book.read_alive:
        keep(root[labels], "other layers write to the same channel (residual stream)")
    of_named = {
        name: [root[labels] for labels in book.labels[id(tensor)]]
        for name, tensor in book.named.items()
    }
    for name, tensor in book.named.items():
        if id(tensor) not in book.seen:
            for roots in of_named[name]:
                keep(roots, "this forward does not use it")
    goes = ~stays
    balanced = [[root[part] for part in parts] for parts in book.balanced]
    dims = [roots for each in of_named.values() for roots in each]
    _keep_some(goes, dims, balanced, multiple_of, why)
    trace = Trace()
    for operator, results in book.steps:
        shapes = [
            None if each is None else tuple(int((~goes[root[labels]]).sum()) for labels in each)
            for each in results
        ]
        trace.steps.append((operator, tuple(shapes)))
    for name, of_dims in of_named.items():
        kept = [None if not goes[r].any() else np.flatnonzero(~goes[r]) for r in of_dims]
        channels = book.inputs_of_grouped.get(id(book.named[name]))
        if channels is not None and goes[root[channels]].any():
            kept[1] = np.flatnonzero(~goes[root[channels]])
        if any(each is not None for each in kept):
            trace.kept[name] = tuple(kept)
    for name, (dim, flags) in zero.items():
        roots = of_named[name][dim][flags]
        for each in roots[~goes[roots]].tolist():
            reasons = trace.left.setdefault(name, {})
            reason = why.get(each, "something that stays goes with it")
            reasons[reason] = reasons.get(reason, 0) + 1
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


def _keep_some(
    goes: Flags,
    dims: Sequence[Labels],
    balanced: Sequence[Sequence[Labels]],
    multiple_of: int,
    why: dict[int, str],
) -> None:
    """Have a multiple of some number stay of each dimension, and equal numbers of some parts."""
    changed = True
    while changed:
        changed = False
        for roots in dims:
            n_lacking = -int((~goes[roots]).sum()) % multiple_of
            for root in roots[goes[roots]][:n_lacking].tolist():
                goes[root] = False
                why.setdefault(root, f"sizes stay a multiple of {multiple_of}")
                changed = True
            if len(roots) and goes[roots].all():
                goes[roots[0]] = False
                why.setdefault(int(roots[0]), "the last one of its layer")
                changed = True
        for parts in balanced:
            least = min(int(goes[part].sum()) for part in parts)
            if least == len(parts[0]):
                least -= 1
            for part in parts:
                for root in part[goes[part]][least:].tolist():
                    goes[root] = False
                    why.setdefault(root, "groups and split parts lose equal numbers")
                    changed = True
