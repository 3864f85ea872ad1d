"""What each operator does to labels: one rule for each kind of operator.

A rule labels what an operator returns, and says of what it was given which indices go together,
which are summed over and which must stay. It returns False where it does not know, and all that the
operator touches is pinned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_worm_optim.shrink.labels import Flags, LabelMap, all_zero, pinned, tensors_in
from torch_worm_optim.shrink.rearrange import rearrange

Rule = Callable[[LabelMap, Any, Any, Any, Any], bool]

_aten = torch.ops.aten
# Values that stand for any value when it is asked whether a function of several is zero.
_PROBES = (-2.3, -0.6, 0.4, 1.7)


def _operators(names: str) -> set[Any]:
    """Those of torch's operators that this release of torch has."""
    return {getattr(_aten, name) for name in names.split() if hasattr(_aten, name)}


# Operators that work entry by entry, beside those that torch marks so. Older ones mark fewer.
_POINTWISE = _operators("""
    hardswish hardswish_ _prelu_kernel _to_copy detach alias copy_ log_sigmoid_forward elu elu_
    gelu_ hardtanh hardtanh_ leaky_relu leaky_relu_ masked_fill masked_fill_ lift_fresh hardsigmoid
    hardsigmoid_ mish mish_ softplus celu selu
""")
# Operators that mix the last dimensions of each channel with one another, and of zeros make zeros.
_SPATIAL = _operators("""
    max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
""")
# Operators whose result depends on what is picked. What one input picks another may not.
PICKING = _operators("slice select index index_select gather embedding")
_REARRANGING = PICKING | _operators("""
    view _unsafe_view reshape unsqueeze squeeze permute transpose t expand repeat roll split
    split_with_sizes unbind
""")
# Operators that make a new tensor of a shape and read no values.
FACTORIES = _operators("""
    new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like rand_like
    randn_like sym_size
""")


def _pointwise(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A function of entries: indices of all tensors that broadcast to one index go together."""
    result, tensors = tensors_in(out)[0], [arg for arg in args if isinstance(arg, Tensor)]
    if tensors_in(kwargs):
        return False
    n, labels = result.dim(), []
    for d, size in enumerate(result.shape):
        places = [(each, d - n + each.dim()) for each in tensors if each.dim() >= n - d]
        for each, e in places:
            if each.shape[e] != size:
                known.pin(known.labels_of(each)[e], "broadcast")
        same = [(each, e) for each, e in places if each.shape[e] == size]
        labels.append(known.broadcast_join(size, same))
    zeros_of = [(each, known.info(each).zeros) for each in tensors]
    dims = [n + zeros[0] - each.dim() for each, zeros in zeros_of if zeros is not None]
    zeros = None
    if dims:
        d, flags = dims[0], np.zeros((len(tensors), result.shape[dims[0]]), dtype=bool)
        for row, each in zip(flags, tensors, strict=True):
            e = d - n + each.dim()
            if e >= 0 and each.shape[e] in (1, len(row)):
                row[:] = known.zeros_along(each, e)
        zeros = d, _zero_where(func, args, kwargs, flags)
        n_streams = sum(
            each.is_floating_point() and known.info(each).constant_of is None for each in tensors
        )
        known.lose(labels[d][flags.any(0) & ~zeros[1]], _why_lost(known, n_streams))
    known.label(result, labels, zeros)
    return True


def _why_lost(known: LabelMap, n_activations: int) -> str:
    """Why a channel that was zero before an operator is not so behind it."""
    if n_activations < 2:
        return f"`{known.operator}` makes something else of zero"
    way_out = "" if known.scattered else "; pass `scatter=True`"
    return f"other layers write to the same channel (residual stream{way_out})"


def _zero_where(func: Any, args: Any, kwargs: Any, flags: Flags) -> Flags:
    """Where a function is zero if these arguments are, whatever the others are."""
    patterns, inverse = np.unique(flags, axis=1, return_inverse=True)
    # A probe has no dimensions, of which no memory format is told.
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    is_zero = [
        bool(pattern.any())
        and not any(_at_probe(func, args, kwargs, pattern, n) for n in range(len(_PROBES)))
        for pattern in patterns.T
    ]
    return np.array(is_zero)[inverse.reshape(-1)]


def _at_probe(func: Any, args: Any, kwargs: Any, pattern: Flags, number: int) -> bool:
    """Whether a function is other than zero where some arguments are, for a value of the others."""
    probes, is_zero = [], iter(pattern)
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            value = 0.0 if next(is_zero) else _PROBES[(number + position) % len(_PROBES)]
            probe = torch.tensor(value, device=arg.device)
            arg = probe > 0 if arg.dtype == torch.bool else probe.to(arg.dtype)
        probes.append(arg)
    return bool(tensors_in(func(*probes, **kwargs))[0])


def _convolution(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A convolution of any kind: a sum over input channels."""
    x, weight, bias, *_ = args
    transposed, groups = args[6], args[8]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    of_x, of_weight = known.labels_of(x), known.labels_of(weight)
    n_in, n_out = x.shape[1], out.shape[1]
    constant_of = known.info(weight).constant_of
    if x.dim() != weight.dim() or constant_of is None:
        return False
    # The number of groups has to be set anew, which only a convolution's own can.
    if groups > 1 and (transposed or known.convolutions.isdisjoint(constant_of)):
        return False
    for labels in (*of_x[2:], *of_weight[2:]):
        known.pin(labels, "spatial")
    zero_in = known.zeros_along(x, 1)
    if groups == 1:
        known.join(of_x[1], of_weight[in_dim])
        known.read(of_x[1], zero_in | known.zeros_along(weight, in_dim))
        zero_out = all_zero(weight.detach().movedim(out_dim, 0), np.flatnonzero(~zero_in))
    elif groups == n_in:
        known.pin(of_weight[1], "depthwise")
        # Several filters of one channel go with it, and so with each other.
        known.join(np.repeat(of_x[1], n_out // n_in), of_weight[0])
        zero_out = np.repeat(zero_in, n_out // n_in) | known.zeros_along(weight, 0)
    else:
        known.pin(of_weight[1], "grouped")
        known.read(of_x[1], zero_in)
        known.balanced += [np.split(of_x[1], groups), np.split(of_weight[0], groups)]
        known.info(weight).group_inputs = of_x[1]
        zero_out = known.zeros_along(weight, 0)
    if bias is not None:
        known.join(of_weight[out_dim], known.labels_of(bias)[0])
        zero_out = zero_out & known.zeros_along(bias, 0)
    spatial = [pinned(size) for size in out.shape[2:]]
    known.label(out, [of_x[0], of_weight[out_dim], *spatial], (1, zero_out))
    return True


def _linear(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A product of matrices: a sum over the columns of the first."""
    bias, (x, weight) = (args[0], args[1:]) if len(args) == 3 else (None, args)
    if kwargs or known.info(weight).constant_of is None:
        return False
    of_x, of_weight = known.labels_of(x), known.labels_of(weight)
    zero_in = known.zeros_along(x, 1)
    known.join(of_x[1], of_weight[0])
    known.read(of_x[1], zero_in | known.zeros_along(weight, 0))
    zero_out = all_zero(weight.detach().t(), np.flatnonzero(~zero_in))
    if bias is not None:
        known.join(known.labels_of(bias)[-1], of_weight[1])
        zero_out = zero_out & known.zeros_along(bias, bias.dim() - 1)
    known.label(out, [of_x[0], of_weight[1]], (1, zero_out))
    return True


def _bmm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Products of matrices, one for each index of the first dimension."""
    a, b = args
    (batch, rows, inner), (batch_b, inner_b, columns) = known.labels_of(a), known.labels_of(b)
    known.join(batch, batch_b)
    known.join(inner, inner_b)
    if known.info(a).constant_of is None and known.info(b).constant_of is None:
        # The scale of attention scores is made of the number of channels that they are summed over.
        known.pin(inner, "summed over by a product of activations")
    else:
        known.read(inner, known.zeros_along(a, 2) | known.zeros_along(b, 1))
    zeros = [
        (0, known.zeros_along(a, 0) | known.zeros_along(b, 0)),
        (1, known.zeros_along(a, 1)),
        (2, known.zeros_along(b, 2)),
    ]
    known.label(out, [batch, rows, columns], max(zeros, key=lambda each: each[1].mean()))
    return True


def _baddbmm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Products of matrices, and something added to them."""
    _bmm(known, func, args[1:], kwargs, out)
    return _pointwise(known, _aten.add.Tensor, (args[0], out), {}, out)


def _batch_norm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A BatchNorm: a scale, a shift and running statistics for each channel."""
    x, scale, shift, *statistics = args[:5]
    labels = list(known.labels_of(x))
    channels = labels[1]
    zero = np.zeros(len(channels), dtype=bool)
    for tensor in (scale, shift, *statistics):
        if isinstance(tensor, Tensor):
            known.join(channels, known.labels_of(tensor)[0])
    if scale is not None and shift is not None:
        zero = known.zeros_along(scale, 0) & known.zeros_along(shift, 0)
    lost = known.known_zeros(x, 1) & ~zero
    known.lose(channels[lost], "a later BatchNorm makes something else of zero")
    if id(scale) in known.scattered:
        # What is written into the wider tensor is read there: only zeros may be left out.
        known.read(channels, zero)
        labels[1] = pinned(len(channels))
    known.label(out[0], labels, (1, zero))
    return True


def _mixed(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Indices of some dimensions depend on one another, those of the others do not."""
    x, results = args[0], tensors_in(out)
    reason, mixing = _MIXING[func.overloadpacket]
    dims, keeps_zeros = mixing(func, args)
    if not all(isinstance(d, int) for d in dims):
        return False
    mixed = {d % x.dim() for d in dims}
    labels, zeros = known.labels_of(x), known.info(x).zeros
    for d in mixed:
        known.pin(labels[d], reason)
    for tensor in tensors_in(args[1:]):  # scales and shifts
        known.pin_all(tensor, reason)
    if zeros is not None and (zeros[0] in mixed or not keeps_zeros):
        zeros = None
    for result in results:
        left = [d for d in range(x.dim()) if result.dim() == x.dim() or d not in mixed]
        sizes = zip(left, result.shape, strict=True)
        of_result = [
            pinned(n) if d in mixed and n != len(labels[d]) else labels[d] for d, n in sizes
        ]
        known.label(result, of_result, zeros and (left.index(zeros[0]), zeros[1]))
        zeros = None  # of a second result, as indices of maxima, none are known
    return True


def _glu(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The first half of a dimension times the sigmoid of the second."""
    x, dim = args[0], (args[1] if len(args) > 1 else -1) % out.dim()
    labels, n = list(known.labels_of(x)), out.shape[dim]
    zero = known.zeros_along(x, dim)[:n]
    known.join(labels[dim][:n], labels[dim][n:])
    labels[dim] = labels[dim][:n]
    known.label(out, labels, (dim, zero))
    return True


def _cat(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Tensors one after another along a dimension, or side by side along one of their own."""
    tensors = [each for each in args[0] if each.numel() or each.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    stacks = func.overloadpacket is _aten.stack
    labels = []
    for d, size in enumerate(tensors[0].shape):
        if d == dim and not stacks:
            labels.append(np.concatenate([known.labels_of(each)[d] for each in tensors]))
        else:
            labels.append(known.broadcast_join(size, [(each, d) for each in tensors]))
    zeros_of = [known.info(each).zeros for each in tensors]
    along = {zeros[0] for zeros in zeros_of if zeros is not None}
    zeros = None
    if stacks:
        labels.insert(dim, pinned(len(tensors)))
    elif len(along) == 1:
        [d] = along
        flags = [known.zeros_along(each, d) for each in tensors]
        zeros = d, np.concatenate(flags) if d == dim else np.logical_and.reduce(flags)
    known.label(out, labels, zeros)
    return True


def _complex(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Pairs of real numbers as complex ones, or complex ones as pairs."""
    labels, n = known.labels_of(args[0]), out.dim()
    for pairs in labels[n:]:
        known.pin(pairs, "pairs")
    known.label(out, [*labels[:n], *(pinned(2) for _ in range(n - len(labels)))])
    return True


def _as_strided(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Other strides, in place, as pooling in channels_last sets them where a size is one."""
    info = known.info(args[0])
    if [len(each) for each in info.labels] != list(out.shape) or out.storage_offset() != 0:
        return False
    same = zip(out.shape, info.strides, out.stride(), strict=True)
    if any(size > 1 and before != after for size, before, after in same):
        return False
    known.label(out, info.labels, info.zeros)
    return True


# Why operators mix dimensions, which those are, given the operator and its arguments, and whether
# zeros along others stay zeros. A dimension that is no number is not known.
_MIXING: dict[Any, tuple[str, Callable[[Any, Any], tuple[Iterable[Any], bool]]]] = {
    **dict.fromkeys(
        _SPATIAL,
        ("spatial", lambda func, _: (range(-int(re.findall(r"(\d)d", str(func))[0]), 0), True)),
    ),
    **dict.fromkeys(
        _operators("mean sum amax amin max min"),
        ("reduced", lambda _, args: (tree_leaves(args[1:2]) or [None], True)),
    ),
    **dict.fromkeys(
        _operators("_softmax _safe_softmax _log_softmax"),
        ("softmax", lambda _, args: (args[1:2], False)),
    ),
    **dict.fromkeys(
        _operators("native_layer_norm _fused_rms_norm"),
        ("normalised over", lambda _, args: (range(-len(args[1]), 0), False)),
    ),
    _aten.linalg_vector_norm: ("reduced", lambda _, args: (tree_leaves(args[2:3]) or [None], True)),
    _aten.constant_pad_nd: (
        "padded",
        lambda _, args: ([-1 - i // 2 for i, n in enumerate(args[1]) if n], not any(args[2:3])),
    ),
}
_BATCH_NORM = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_no_update cudnn_batch_norm miopen_batch_norm
"""
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_operators(_BATCH_NORM), _batch_norm),
    **dict.fromkeys(_MIXING, _mixed),
    **dict.fromkeys(_REARRANGING, rearrange),
    **dict.fromkeys((_aten.addmm, _aten.mm), _linear),
    **dict.fromkeys((_aten.cat, _aten.stack), _cat),
    **dict.fromkeys((_aten.view_as_complex, _aten.view_as_real), _complex),
    _aten.convolution: _convolution,
    _aten.bmm: _bmm,
    _aten.baddbmm: _baddbmm,
    _aten.glu: _glu,
    _aten.as_strided_: _as_strided,
}


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator as `TorchDispatchMode` sees it, such as `aten.mm.default`."""
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    return _RULES.get(func.overloadpacket)
