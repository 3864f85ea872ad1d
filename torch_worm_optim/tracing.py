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

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_worm_optim.resizing import is_conv1d

Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_aten = torch.ops.aten
# The label of all that must stay: spatial dimensions, inputs, outputs.
_PINNED = 0
# Values that stand for any value when it is asked whether a function of several is zero.
_PROBES = (-2.3, -0.6, 0.4, 1.7)


def _operators(*names: str) -> set[Any]:
    """Those of torch's operators that this release of torch has."""
    return {getattr(_aten, name) for name in names if hasattr(_aten, name)}


# Operators that work entry by entry, beside those that torch marks so. Older ones mark fewer.
_POINTWISE = _operators(
    *("hardswish", "hardswish_", "_prelu_kernel", "_to_copy", "detach", "alias", "copy_"),
    *("log_sigmoid_forward", "elu", "elu_", "gelu_", "hardtanh", "hardtanh_", "leaky_relu"),
    *("masked_fill_", "lift_fresh"),
    *("leaky_relu_", "hardsigmoid", "hardsigmoid_", "mish", "mish_", "softplus", "celu", "selu"),
)
# Operators that mix the last dimensions of each channel with one another, and of zeros make zeros.
_SPATIAL = _operators(
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "avg_pool1d"),
    *("adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
)
_BATCH_NORM = _operators(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
)
_REDUCTIONS = _operators("mean", "sum", "amax", "amin", "max", "min")
_SOFTMAX = _operators("_softmax", "_safe_softmax", "_log_softmax")
_LAYER_NORM = _operators("native_layer_norm", "_fused_rms_norm")
# Operators that make a new tensor of a shape and read no values.
_FACTORIES = _operators(
    *("new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like"),
    *("empty_like", "full_like", "rand_like", "randn_like", "sym_size"),
)


@dataclass
class Trace:
    """What a watched pass found.

    Attributes:
        kept: For each parameter and buffer of which something can go, for each dimension the
            indices that stay, or None if all do. Of a grouped convolution's weight those of the
            second dimension are indices of input channels, of all groups.
        left: For each parameter with channels that are zero and stay, how many and why.
    """

    kept: dict[str, tuple[Labels | None, ...]] = field(default_factory=dict)
    left: dict[str, dict[str, int]] = field(default_factory=dict)


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
    watch = _Watch(model, cut_splits, cut_heads, scattered, multiple_of)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with torch.no_grad(), watch:
        outputs = model(*args, **kwargs)
    for tensor in (*inputs, *(o for o in tree_leaves(outputs) if isinstance(o, Tensor))):
        watch.pin(tensor, "the model's output")
    return watch.result()


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
        zero = _all_zero(rows, np.arange(rows.shape[1]))
        if (shift := getattr(module, bias)) is not None:
            zero &= (shift.detach() == 0).cpu().numpy()
        if zero.any():
            found[name] = (dim, zero)
    return found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels of all tensors of a pass, and what joins, reads and pins them."""

    def __init__(
        self,
        model: nn.Module,
        cut_splits: bool,
        cut_heads: bool,
        scattered: Collection[str],
        multiple_of: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cut_splits, self.cut_heads, self.scattered = cut_splits, cut_heads, scattered
        self.multiple_of = multiple_of
        self.n_labels = _PINNED + 1
        self.joined: list[tuple[Labels, Labels]] = []
        self.pinned: list[tuple[Labels, str]] = []
        self.read_alive: list[Labels] = []
        self.fixed = {_PINNED}  # labels of which it is known already that they stay
        self.balanced: list[list[Labels]] = []
        self.labels: dict[int, list[Labels]] = {}
        self.zeros: dict[int, tuple[int, Flags]] = {}
        self.strides: dict[int, tuple[int, ...]] = {}
        self.alive: list[Tensor] = []  # an id belongs to another tensor once its own is gone
        # Tensors that do not depend on the input, with the parameters that they are made of.
        self.made_of: dict[int, set[str]] = {}
        self.seen: set[int] = set()
        self.inputs_of_grouped: dict[int, Labels] = {}  # by the id of a convolution's weight
        self.named: dict[str, Tensor] = {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }
        self.zero_channels = zero_channels(model)
        self.name_of = {id(tensor): name for name, tensor in self.named.items()}
        for name, tensor in self.named.items():
            self.label(tensor, [self.new(size) for size in tensor.shape])
            self.made_of[id(tensor)] = {name}
        self.convolutions = {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, _ConvNd)
        }

    # ---- labels

    def new(self, size: int) -> Labels:
        """Labels that no index has yet."""
        self.n_labels += size
        return np.arange(self.n_labels - size, self.n_labels)

    def label(self, tensor: Tensor, labels: Sequence[Labels], zeros: Any = None) -> None:
        """Give a tensor its labels, and the dimension and flags of channels that are zero."""
        self.alive.append(tensor)
        self.labels[id(tensor)] = list(labels)
        self.strides[id(tensor)] = tensor.stride()
        self.zeros.pop(id(tensor), None)
        if zeros is not None:
            self.zeros[id(tensor)] = zeros

    def of(self, tensor: Tensor) -> list[Labels]:
        """The labels of a tensor. One that nothing is known of is pinned."""
        if id(tensor) not in self.labels:
            self.label(tensor, [_fixed(size) for size in tensor.shape])
        self.seen.add(id(tensor))
        return self.labels[id(tensor)]

    def zeros_along(self, tensor: Tensor, dim: int) -> Flags:
        """Which indices of a dimension are zero whatever the input is."""
        known = self.zeros.get(id(tensor))
        if known is not None and known[0] == dim:
            return known[1]
        if id(tensor) in self.made_of:
            rows = tensor.detach().movedim(dim, 0).unsqueeze(-1)
            return _all_zero(rows, np.arange(rows.shape[1]))
        return np.zeros(tensor.shape[dim], dtype=bool)

    def join(self, a: Labels, b: Labels) -> None:
        """Have indices go together, one by one."""
        if a is not b:
            self.joined.append((a, b))
            a, b = np.broadcast_arrays(a, b)
            self.fixed.update(a[b == _PINNED].tolist(), b[a == _PINNED].tolist())

    def shared(self, size: int, places: Sequence[tuple[Tensor, int]]) -> Labels:
        """Join a dimension of some size of several tensors, and return labels for it.

        Along a dimension that a tensor was expanded in it is the same at all indices, so that any
        of them may go.
        """
        labels = [
            each
            for tensor, d in places
            for each in (self.of(tensor)[d],)
            if tensor.stride(d) != 0 or each.any()
        ]
        for each in labels[1:]:
            self.join(labels[0], each)
        # Where indices of one are known to stay, they do in all.
        return labels[0] if labels and all(each.any() for each in labels) else _fixed(size)

    def pin(self, tensor: Tensor, why: str) -> None:
        """Have all indices of a tensor stay."""
        for labels in self.of(tensor):
            self.pinned.append((labels, why))

    def read(self, labels: Labels, sees_zero: Flags) -> None:
        """Take note of a sum over a dimension that sees zero at some indices."""
        self.read_alive.append(labels[~sees_zero])

    # ---- operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and label what it returns."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func.overloadpacket in _FACTORIES:
            # Nothing is known of their sizes, until something is written there.
            for tensor in outputs:
                self.label(tensor, [self.new(size) for size in tensor.shape])
            return out
        if not inputs:
            return out
        rule = self._rule(func)
        if rule is None or not rule(func, args, kwargs, out):
            for tensor in (*inputs, *outputs):
                self.pin(tensor, f"unknown operator {func.overloadpacket}")
        if all(id(tensor) in self.made_of for tensor in inputs):
            names = set().union(*(self.made_of[id(tensor)] for tensor in inputs))
            self.made_of |= {id(tensor): names for tensor in outputs}
        return out

    def _rule(self, func: Any) -> Callable[..., bool] | None:
        """What labels the result of an operator; it returns False where it does not know."""
        operator = func.overloadpacket
        if torch.Tag.pointwise in func.tags or operator in _POINTWISE:
            return self._pointwise
        if operator in _SPATIAL:
            return self._spatial
        if operator in _BATCH_NORM:
            return self._batch_norm
        if operator in _REDUCTIONS:
            return self._reduction
        if operator in _SOFTMAX:
            return self._softmax
        if operator in _LAYER_NORM:
            return self._layer_norm
        rules: dict[Any, Callable[..., bool]] = {
            _aten.convolution: self._convolution,
            _aten.addmm: self._linear,
            _aten.mm: self._linear,
            _aten.bmm: self._bmm,
            _aten.baddbmm: self._baddbmm,
            _aten.embedding: self._embedding,
            _aten.index: self._index,
            _aten.index_select: self._index_select,
            _aten.gather: self._gather,
            _aten.view_as_complex: self._view_as_complex,
            _aten.view_as_real: self._view_as_real,
            _aten.cat: self._cat,
            _aten.stack: self._stack,
            _aten.view: self._view,
            _aten._unsafe_view: self._view,
            _aten.reshape: self._view,
            _aten.permute: self._permute,
            _aten.transpose: self._permute,
            _aten.t: self._permute,
            _aten.unsqueeze: self._view,
            _aten.squeeze: self._view,
            _aten.expand: self._expand,
            _aten.repeat: self._repeat,
            _aten.roll: self._roll,
            _aten.as_strided_: self._as_strided,
            _aten.split: self._split,
            _aten.split_with_sizes: self._split,
            _aten.slice: self._slice,
            _aten.select: self._select,
            _aten.unbind: self._unbind,
            _aten.glu: self._glu,
            _aten.constant_pad_nd: self._pad,
        }
        return rules.get(operator)

    def _pointwise(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A function of entries: indices of all tensors that broadcast to one index go together."""
        result = out if isinstance(out, Tensor) else out[0]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(isinstance(arg, Tensor) for arg in kwargs.values()):
            return False
        n = result.dim()
        labels = []
        for d, size in enumerate(result.shape):
            places = [(each, d - n + each.dim()) for each in tensors if each.dim() >= n - d]
            for each, e in places:
                if each.shape[e] != size:
                    self.pinned.append((self.of(each)[e], "broadcast"))
            same = [(each, e) for each, e in places if each.shape[e] == size]
            labels.append(self.shared(size, same))
        dim = next((self.zeros[id(t)][0] - t.dim() for t in tensors if id(t) in self.zeros), None)
        flags = [self._zeros_from_end(each, dim, result) for each in tensors]
        zeros = None
        if dim is not None:
            zero = self._zero_where(func, args, kwargs, flags, result.shape[dim])
            zeros = (n + dim, zero) if zero is not None and zero.any() else None
        self.label(result, labels, zeros)
        return True

    def _zeros_from_end(self, tensor: Tensor, dim: int | None, result: Tensor) -> Flags | None:
        """The zeros of an argument along a dimension that is counted from the end; None if none."""
        if dim is None or tensor.dim() < -dim:
            return None
        size, wanted = tensor.shape[dim], result.shape[dim]
        if size not in (1, wanted):
            return None
        zeros = self.zeros_along(tensor, tensor.dim() + dim)
        return np.broadcast_to(zeros, (wanted,)) if zeros.any() else None

    def _zero_where(
        self, func: Any, args: Any, kwargs: Any, flags: list[Flags | None], size: int
    ) -> Flags | None:
        """Where a function is zero if these arguments are, whatever the others are."""
        known = [np.zeros(size, dtype=bool) if each is None else each for each in flags]
        zero = np.zeros(size, dtype=bool)
        patterns, inverse = np.unique(np.stack(known), axis=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T):
            if not pattern.any():
                continue
            is_zero = iter(pattern)
            probes = [
                _probe(arg, next(is_zero), position) if isinstance(arg, Tensor) else arg
                for position, arg in enumerate(args)
            ]
            value = func(*probes, **kwargs)
            value = value if isinstance(value, Tensor) else value[0]
            zero[inverse.reshape(-1) == number] = bool((value == 0).all())
        return zero

    def _spatial(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Pooling, resizing and padding within channels."""
        x, result = args[0], out if isinstance(out, Tensor) else out[0]
        labels = list(self.of(x))
        n_lead = {"1d": 1, "2d": 2, "3d": 3}[next(d for d in ("1d", "2d", "3d") if d in str(func))]
        for d in range(x.dim() - n_lead, x.dim()):
            self.pinned.append((labels[d], "spatial"))
            labels[d] = _fixed(result.shape[d])
        self.label(result, labels, self.zeros.get(id(x)))
        return True

    def _pad(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Padding with a constant, of any dimensions."""
        x, value = args[0], args[2] if len(args) > 2 else 0
        padded = [d for d in range(x.dim()) if out.shape[d] != x.shape[d]]
        labels, zeros = list(self.of(x)), self.zeros.get(id(x))
        for d in padded:
            self.pinned.append((labels[d], "padded"))
            labels[d] = _fixed(out.shape[d])
        if zeros is not None and (value != 0 or zeros[0] in padded):
            zeros = None
        self.label(out, labels, zeros)
        return True

    def _convolution(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """A convolution of any kind: a sum over input channels."""
        x, weight, bias, *_ = args
        transposed, groups = args[6], args[8]
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        of_x, of_weight = self.of(x), self.of(weight)
        n_in, n_out = x.shape[1], out.shape[1]
        if x.dim() != weight.dim() or id(weight) not in self.made_of:
            return False
        # The number of groups has to be set anew, which only a convolution's own can.
        owned = not self.convolutions.isdisjoint(self.made_of[id(weight)])
        if groups > 1 and (transposed or not owned):
            return False
        for labels in (*of_x[2:], *of_weight[2:]):
            self.pinned.append((labels, "spatial"))
        zero_in = self.zeros_along(x, 1)
        if groups == 1:
            self.join(of_x[1], of_weight[in_dim])
            self.read(of_x[1], zero_in | self.zeros_along(weight, in_dim))
            zero_out = _all_zero(weight.detach().movedim(out_dim, 0), np.flatnonzero(~zero_in))
        elif groups == n_in:
            self.pinned.append((of_weight[1], "depthwise"))
            # Several filters of one channel go with it, and so with each other.
            self.join(np.repeat(of_x[1], n_out // n_in), of_weight[0])
            zero_out = np.repeat(zero_in, n_out // n_in) | self.zeros_along(weight, 0)
        else:
            self.pinned.append((of_weight[1], "grouped"))
            self.read(of_x[1], zero_in)
            self.balanced += [np.split(of_x[1], groups), np.split(of_weight[0], groups)]
            self.inputs_of_grouped[id(weight)] = of_x[1]
            zero_out = self.zeros_along(weight, 0)
        if bias is not None:
            self.join(of_weight[out_dim], self.of(bias)[0])
            zero_out = zero_out & self.zeros_along(bias, 0)
        spatial = [_fixed(size) for size in out.shape[2:]]
        self.label(out, [of_x[0], of_weight[out_dim], *spatial], (1, zero_out))
        return True

    def _linear(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """A product of matrices: a sum over the columns of the first."""
        bias, (x, weight) = (args[0], args[1:]) if len(args) == 3 else (None, args)
        if kwargs or id(weight) not in self.made_of:
            return False
        of_x, of_weight = self.of(x), self.of(weight)
        zero_in = self.zeros_along(x, 1)
        self.join(of_x[1], of_weight[0])
        self.read(of_x[1], zero_in | self.zeros_along(weight, 0))
        zero_out = _all_zero(weight.detach().t(), np.flatnonzero(~zero_in))
        if bias is not None:
            self.join(self.of(bias)[-1], of_weight[1])
            zero_out = zero_out & self.zeros_along(bias, bias.dim() - 1)
        self.label(out, [of_x[0], of_weight[1]], (1, zero_out))
        return True

    def _bmm(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Products of matrices, one for each index of the first dimension."""
        a, b = args
        (batch, rows, inner), (batch_b, inner_b, columns) = self.of(a), self.of(b)
        self.join(batch, batch_b)
        self.join(inner, inner_b)
        self.read(inner, self.zeros_along(a, 2) | self.zeros_along(b, 1))
        zeros = [
            (0, self.zeros_along(a, 0) | self.zeros_along(b, 0)),
            (1, self.zeros_along(a, 1)),
            (2, self.zeros_along(b, 2)),
        ]
        self.label(out, [batch, rows, columns], max(zeros, key=lambda each: each[1].mean()))
        return True

    def _baddbmm(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Products of matrices, and something added to them."""
        self._bmm(func, args[1:], kwargs, out)
        labels = self.of(out)
        for d, each in enumerate(self.of(args[0]), start=3 - args[0].dim()):
            if len(each) == out.shape[d]:
                self.join(each, labels[d])
            else:
                self.pinned.append((each, "broadcast"))
        self.label(out, labels)
        return True

    def _softmax(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """A softmax: indices of its dimension depend on one another, others do not."""
        labels = self.of(args[0])
        self.pinned.append((labels[args[1]], "softmax"))
        self.label(out, labels)
        return True

    def _layer_norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A norm over the last dimensions: their indices depend on one another, others do not."""
        x, shape = args[:2]
        for tensor in args:
            if isinstance(tensor, Tensor):
                for labels in self.of(tensor)[-len(shape) :]:
                    self.pinned.append((labels, "normalised over"))
        self.label(out[0], self.of(x))
        return True

    def _embedding(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Rows of a matrix, picked by index."""
        rows, columns = self.of(args[0])
        self.pinned.append((rows, "picked by index"))
        self.label(out, [*(_fixed(size) for size in out.shape[:-1]), columns])
        return True

    def _index(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Indices of one dimension, picked by a tensor."""
        x, picks = args
        given = [d for d, pick in enumerate(picks) if pick is not None]
        if len(given) != 1 or picks[given[0]].dtype == torch.bool:
            return False
        [dim] = given
        labels = self.of(x)
        self.pinned.append((labels[dim], "picked by index"))
        picked = [_fixed(size) for size in picks[dim].shape]
        self.label(out, [*labels[:dim], *picked, *labels[dim + 1 :]])
        return True

    def _index_select(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Indices of one dimension, picked by a vector."""
        x, dim, picks = args
        return self._index(func, (x, [*[None] * (dim % x.dim()), picks]), kwargs, out)

    def _gather(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Indices of one dimension, others picked at each index of the other dimensions."""
        x, dim, picks = args
        dim %= x.dim()
        labels = list(self.of(x))
        for d, of_picks in enumerate(self.of(picks)):
            if d == dim or len(labels[d]) != len(of_picks):
                self.pinned.append((labels[d], "picked by index"))
                labels[d] = of_picks
            else:
                labels[d] = self.shared(len(of_picks), [(x, d), (picks, d)])
        self.label(out, labels)
        return True

    def _view_as_complex(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Pairs of real numbers as complex ones."""
        *labels, pairs = self.of(args[0])
        self.pinned.append((pairs, "pairs"))
        self.label(out, labels)
        return True

    def _view_as_real(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Complex numbers as pairs of real ones."""
        self.label(out, [*self.of(args[0]), _fixed(2)])
        return True

    def _batch_norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A BatchNorm: a scale, a shift and running statistics for each channel."""
        x, scale, shift, *statistics = args[:5]
        result = out[0]
        of_x = list(self.of(x))
        channels = of_x[1]
        zero = np.zeros(len(channels), dtype=bool)
        name = "" if scale is None else self.name_of.get(id(scale), "")
        for tensor in (scale, shift, *statistics):
            if isinstance(tensor, Tensor):
                self.join(channels, self.of(tensor)[0])
        if scale is not None and shift is not None:
            zero = self.zeros_along(scale, 0) & self.zeros_along(shift, 0)
        if name in self.scattered:
            # What is written into the wider tensor is read there: only zeros may be left out.
            self.read(channels, zero)
            of_x[1] = _fixed(len(channels))
        self.label(result, of_x, (1, zero))
        return True

    def _cat(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Tensors one after another along a dimension."""
        tensors = [each for each in args[0] if each.numel() or each.dim() == out.dim()]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        parts = [self.of(each) for each in tensors]
        labels = []
        for d in range(out.dim()):
            if d == dim:
                labels.append(np.concatenate([part[d] for part in parts]))
                continue
            labels.append(self.shared(out.shape[d], [(each, d) for each in tensors]))
        along = {self.zeros[id(each)][0] for each in tensors if id(each) in self.zeros}
        zeros = None
        if len(along) == 1:
            [d] = along
            flags = [self.zeros_along(each, d) for each in tensors]
            zeros = (d, np.concatenate(flags) if d == dim else np.logical_and.reduce(flags))
        self.label(out, labels, zeros)
        return True

    def _view(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Another shape of the same entries, in the same order."""
        x = args[0]
        of_x, zeros = self.of(x), self.zeros.get(id(x))
        labels: list[Labels] = [_fixed(size) for size in out.shape]
        new_zeros = None
        for source, target in _matching_dims(tuple(x.shape), tuple(out.shape)):
            free = [
                d for d in source if x.shape[d] > 1 and not self.fixed.issuperset(of_x[d].tolist())
            ]
            if not free:
                continue
            large = [d for d in target if out.shape[d] > 1]
            if len(free) > 1:
                for d in free:
                    self.pinned.append((of_x[d], "merged by a view"))
                continue
            [d] = free
            inner = math.prod(x.shape[e] for e in source if e > d)
            outer = math.prod(x.shape[e] for e in source if e < d)
            sizes = [out.shape[t] for t in large]
            grid = np.tile(np.repeat(of_x[d], inner), outer).reshape(sizes)
            flags = np.zeros(len(of_x[d]), dtype=bool)
            if zeros is not None and zeros[0] == d:
                flags = zeros[1]
            zero_grid = np.tile(np.repeat(flags, inner), outer).reshape(sizes)
            lines = [np.moveaxis(grid, axis, 0).reshape(n, -1) for axis, n in enumerate(sizes)]
            zero = [
                np.moveaxis(zero_grid, axis, 0).reshape(n, -1).all(1)
                for axis, n in enumerate(sizes)
            ]
            alike = [axis for axis, line in enumerate(lines) if (line == line[:, :1]).all()]
            if alike:
                axis = alike[0]
            elif self.cut_heads:
                # Indices of one of the dimensions stay apart: of the one that has most zeros, such
                # as heads, and of the last but one, where heads usually are, if there are none.
                axis = max(range(len(sizes)), key=lambda i: (zero[i].mean(), i == len(sizes) - 2))
                self.join(
                    lines[axis][:, :1].repeat(lines[axis].shape[1] - 1), lines[axis][:, 1:].ravel()
                )
            else:
                self.pinned.append((of_x[d], "split by a view"))
                continue
            labels[large[axis]] = lines[axis][:, 0]
            if zero[axis].any():
                new_zeros = (large[axis], zero[axis])
        self.label(out, labels, new_zeros)
        return True

    def _permute(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Dimensions in another order."""
        x, n = args[0], args[0].dim()
        order = list(range(n))
        if func.overloadpacket is _aten.permute:
            order = [d % n for d in args[1]]
        elif func.overloadpacket is _aten.t:
            order.reverse()
        else:
            a, b = args[1] % n, args[2] % n
            order[a], order[b] = b, a
        zeros = self.zeros.get(id(x))
        of_x = self.of(x)
        self.label(out, [of_x[d] for d in order], zeros and (order.index(zeros[0]), zeros[1]))
        return True

    def _expand(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Dimensions of size one repeated."""
        x = args[0]
        added = out.dim() - x.dim()
        labels = [_fixed(size) for size in out.shape]
        for d, each in enumerate(self.of(x), start=added):
            if len(each) == out.shape[d]:
                labels[d] = each
        zeros = self.zeros.get(id(x))
        if zeros is not None:
            d = zeros[0] + added
            zeros = (d, np.broadcast_to(zeros[1], (out.shape[d],)))
        self.label(out, labels, zeros)
        return True

    def _repeat(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Whole dimensions over and over."""
        x, times = args
        n_added = len(times) - x.dim()
        of_x = [*(_fixed(1) for _ in range(n_added)), *self.of(x)]
        labels = [np.tile(each, n) for each, n in zip(of_x, times, strict=True)]
        zeros = self.zeros.get(id(x))
        if zeros is not None:
            d = zeros[0] + n_added
            zeros = (d, np.tile(zeros[1], times[d]))
        self.label(out, labels, zeros)
        return True

    def _roll(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Entries moved along some dimensions, in a circle."""
        x, dims = args[0], args[2] if len(args) > 2 else ()
        labels, zeros = self.of(x), self.zeros.get(id(x))
        moved = {d % x.dim() for d in dims} or set(range(x.dim()))
        for d in moved:
            self.pinned.append((labels[d], "rolled"))
        labels = [_fixed(len(each)) if d in moved else each for d, each in enumerate(labels)]
        self.label(out, labels, None if zeros is None or zeros[0] in moved else zeros)
        return True

    def _as_strided(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Other strides, in place, as pooling in channels_last sets them where a size is one."""
        x = args[0]
        labels, strides = self.of(x), self.strides[id(x)]
        if [len(each) for each in labels] != list(out.shape) or out.storage_offset() != 0:
            return False
        same = zip(out.shape, strides, out.stride(), strict=True)
        if any(size > 1 and before != after for size, before, after in same):
            return False
        self.label(out, labels, self.zeros.get(id(x)))
        return True

    def _reduction(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A sum, mean or extremum over some dimensions."""
        x = args[0]
        if len(args) < 2 or isinstance(args[1], (Tensor, type(None))):
            return False
        reduced = {d % x.dim() for d in ([args[1]] if isinstance(args[1], int) else args[1])}
        results = [out] if isinstance(out, Tensor) else out
        keeps = results[0].dim() == x.dim()
        labels, zeros, known = [], None, self.zeros.get(id(x))
        for d, each in enumerate(self.of(x)):
            if d in reduced:
                self.pinned.append((each, "reduced"))
                if keeps:
                    labels.append(_fixed(1))
                continue
            if known is not None and known[0] == d:
                zeros = (len(labels), known[1])
            labels.append(each)
        for position, result in enumerate(results):  # the indices of an extremum are the second
            self.label(result, labels, None if position else zeros)
        return True

    def _split(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A tensor cut into parts along a dimension."""
        x = args[0]
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
        of_x, zeros = self.of(x), self.zeros.get(id(x))
        parts, start = [], 0
        for each in out:
            part = slice(start, start + each.shape[dim])
            labels = list(of_x)
            labels[dim] = of_x[dim][part]
            flags = zeros
            if zeros is not None and zeros[0] == dim:
                flags = (dim, zeros[1][part])
            self.label(each, labels, flags)
            parts.append(labels[dim])
            start = part.stop
        if self.cut_splits and len({len(part) for part in parts}) == 1:
            self.balanced.append(parts)
        else:
            self.pinned.append((of_x[dim], "split"))
        return True

    def _slice(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Some of the indices of a dimension."""
        x = args[0]
        given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        dim, start, stop, step = given
        dim %= x.dim()
        labels, zeros = list(self.of(x)), self.zeros.get(id(x))
        if out.shape[dim] != x.shape[dim]:
            chosen = slice(start, stop, step)
            self.pinned.append((labels[dim], "sliced"))
            labels[dim] = labels[dim][chosen]
            if zeros is not None and zeros[0] == dim:
                zeros = (dim, zeros[1][chosen])
        self.label(out, labels, zeros)
        return True

    def _select(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """One index of a dimension."""
        x, dim, index = args
        self._without_dim(x, dim % x.dim(), [(index, out)])
        return True

    def _unbind(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Each index of a dimension."""
        x, dim = args[0], args[1] if len(args) > 1 else 0
        self._without_dim(x, dim % x.dim(), list(enumerate(out)))
        return True

    def _without_dim(self, x: Tensor, dim: int, parts: Sequence[tuple[int, Tensor]]) -> None:
        """Label parts that have one index of a dimension each."""
        labels, zeros = self.of(x), self.zeros.get(id(x))
        self.pinned.append((labels[dim], "taken apart"))
        for _, part in parts:
            flags = None
            if zeros is not None and zeros[0] != dim:
                flags = (zeros[0] - (zeros[0] > dim), zeros[1])
            self.label(part, [*labels[:dim], *labels[dim + 1 :]], flags)

    def _stack(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Tensors side by side along a dimension of their own."""
        tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        labels = [
            self.shared(size, [(each, d) for each in tensors])
            for d, size in enumerate(tensors[0].shape)
        ]
        self.label(out, [*labels[:dim], _fixed(len(tensors)), *labels[dim:]])
        return True

    def _glu(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """The first half of a dimension times the sigmoid of the second."""
        x, dim = args[0], (args[1] if len(args) > 1 else -1) % out.dim()
        labels, n = list(self.of(x)), out.shape[dim]
        zero = self.zeros_along(x, dim)[:n]
        self.join(labels[dim][:n], labels[dim][n:])
        labels[dim] = labels[dim][:n]
        self.label(out, labels, (dim, zero))
        return True

    # ---- what follows

    def result(self) -> Trace:
        """Which indices of parameters and buffers stay, and which zeros stay and why."""
        root = _components(self.n_labels, self.joined)
        why: dict[int, str] = {}
        stays = np.zeros(self.n_labels, dtype=bool)
        stays[root[_PINNED]] = True
        for labels, reason in self.pinned:
            roots = root[labels]
            for each in np.unique(roots[~stays[roots]]).tolist():
                why[each] = reason
            stays[roots] = True
        for labels in self.read_alive:
            roots = root[labels]
            for each in np.unique(roots[~stays[roots]]).tolist():
                why[each] = "other layers write to the same channel (residual stream)"
            stays[roots] = True
        of_named = {
            name: [root[labels] for labels in self.labels[id(tensor)]]
            for name, tensor in self.named.items()
        }
        for name, tensor in self.named.items():
            if id(tensor) not in self.seen:
                for roots in of_named[name]:
                    for each in np.unique(roots[~stays[roots]]).tolist():
                        why[each] = "this forward does not use it"
                    stays[roots] = True
        goes = ~stays
        balanced = [[root[part] for part in parts] for parts in self.balanced]
        dims = [roots for each in of_named.values() for roots in each]
        _keep_some(goes, dims, balanced, self.multiple_of, why)
        trace = Trace()
        for name, dims in of_named.items():
            kept = [None if not goes[r].any() else np.flatnonzero(~goes[r]) for r in dims]
            channels = self.inputs_of_grouped.get(id(self.named[name]))
            if channels is not None and goes[root[channels]].any():
                kept[1] = np.flatnonzero(~goes[root[channels]])
            if any(each is not None for each in kept):
                trace.kept[name] = tuple(kept)
        for name, (dim, zero) in self.zero_channels.items():
            roots = of_named[name][dim][zero]
            for each in roots[~goes[roots]].tolist():
                reasons = trace.left.setdefault(name, {})
                reason = why.get(each, "something that stays goes with it")
                reasons[reason] = reasons.get(reason, 0) + 1
        return trace


def _fixed(size: int) -> Labels:
    """Labels of a dimension that stays as it is."""
    return np.zeros(size, dtype=np.int64)


def _probe(like: Tensor, is_zero: bool, shift: int) -> Tensor:
    """A few values of a tensor's dtype: zeros, or such as stand for any."""
    values = [0.0] * len(_PROBES) if is_zero else [*_PROBES[shift:], *_PROBES[:shift]]
    probe = torch.tensor(values, device=like.device)
    return probe > 0 if like.dtype == torch.bool else probe.to(like.dtype)


def _all_zero(rows: Tensor, columns: Labels) -> Flags:
    """Which rows of a tensor hold only zeros in some columns."""
    zero = (rows[:, columns[:1]].flatten(1) == 0).all(1)
    # Few rows are zero in their first column, so that hardly any is read to its end.
    rest = zero.nonzero()[:, 0]
    zero[rest] = (rows[rest][:, columns].flatten(1) == 0).all(1)
    return np.asarray(zero.cpu().numpy())


def _matching_dims(
    source: tuple[int, ...], target: tuple[int, ...]
) -> Iterable[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same entries in two shapes of one tensor."""
    i = j = 0
    while i < len(source) or j < len(target):
        first_i, first_j = i, j
        p = q = 1
        if i < len(source):
            p, i = source[i], i + 1
        if j < len(target):
            q, j = target[j], j + 1
        while p != q:
            if p < q:
                p, i = p * source[i], i + 1
            else:
                q, j = q * target[j], j + 1
        yield list(range(first_i, i)), list(range(first_j, j))


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
