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

from torch_worm_optim.shrink.labels import (
    PINNED,
    Flags,
    LabelMap,
    Labels,
    all_zero,
    pinned,
    tensors_in,
)
from torch_worm_optim.shrink.rearrange import rearrange

Rule = Callable[[LabelMap, Any, Any, Any, Any], bool]

_aten = torch.ops.aten
# Values that stand for any value when it is asked whether a function of several is zero.
_PROBES = (-2.3, -0.6, 0.0, 0.4, 1.7)


def _operators(names: str) -> set[Any]:
    """Those of torch's operators that this release of torch has."""
    return {getattr(_aten, name) for name in names.split() if hasattr(_aten, name)}


# Operators that work entry by entry, beside those that torch marks so. Older ones mark fewer.
_POINTWISE = _operators("""
    hardswish hardswish_ _prelu_kernel _to_copy detach alias copy_ log_sigmoid_forward elu elu_
    gelu_ hardtanh hardtanh_ leaky_relu leaky_relu_ masked_fill masked_fill_ lift_fresh hardsigmoid
    hardsigmoid_ mish mish_ softplus celu selu rrelu_with_noise rrelu_with_noise_
""")
# Operators that mix the last dimensions of each channel with one another, and of zeros make zeros.
_SPATIAL = _operators("""
    max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
    _upsample_nearest_exact1d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d fractional_max_pool2d fractional_max_pool3d
""")
# Operators that write numbers that are not known, random or the forward's.
_FILLING = _operators("""
    bernoulli_ uniform_ normal_ random_ exponential_ geometric_ cauchy_ log_normal_ fill_
""")
# Operators that make a new tensor of a shape and read no values.
FACTORIES = _operators("""
    zeros ones empty full rand randn new_zeros new_ones new_empty new_full new_empty_strided
    sym_size
""")
ZEROS = _operators("zeros new_zeros")  # those that make zeros
_LIKE = _operators("zeros_like ones_like empty_like full_like rand_like randn_like randint_like")
_PICKING = _operators("slice select index index_select embedding")
# Operators whose result depends on more than what they are given, or on what is picked: what one
# input picks another may not.
VARYING = _PICKING | _FILLING | _LIKE | _operators("gather native_dropout rrelu_with_noise")
VIEWS = _operators("view _unsafe_view reshape")  # those that may state sizes
_REARRANGING = _PICKING | _operators("""
    unsqueeze squeeze permute transpose t expand repeat roll split split_with_sizes unbind flip
    rot90 unfold
""")


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by name, with the defaults of those that were not given."""
    arguments = func._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**defaults, **dict(zip((e.name for e in arguments), args, strict=False)), **kwargs}


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
            if known.info(each).is_zero:
                row[:] = True
            elif e >= 0 and each.shape[e] in (1, len(row)):
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
    result = tensors_in(func(*probes, **kwargs))[0]
    return bool(result) and not bool(result.isnan())  # as of zero over zero


def _convolution(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A convolution of any kind: a sum over input channels."""
    x, weight, bias, *_ = args
    transposed, groups = args[6], args[8]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    of_x, of_weight = known.labels_of(x), known.labels_of(weight)
    n_in, n_out, of_out = x.shape[1], out.shape[1], of_weight[out_dim]
    constant_of = known.info(weight).constant_of
    is_depthwise = 1 < groups == n_in
    if x.dim() != weight.dim() or (constant_of is None and not is_depthwise):
        return False
    # A convolution's own number of groups is set anew, and a function's follows its input.
    if 1 < groups < n_in and (transposed or known.convolutions.isdisjoint(constant_of or ())):
        return False
    is_expanded = weight.stride(0) == 0 and not of_weight[0].any()  # the same for each channel
    # Who loads what is left would not know which filters of a buffer are, if it is not saved.
    if is_depthwise and not is_expanded and not known.saved.issuperset(constant_of or ()):
        return False
    for labels in (*of_x[2:], *of_weight[2:]):
        known.pin(labels, f"spatial, in `{known.operator}`")
    zero_in = known.zeros_along(x, 1)
    if groups == 1:
        known.join(of_x[1], of_weight[in_dim])
        known.read(of_x[1], zero_in | known.zeros_along(weight, in_dim))
        zero_out = all_zero(weight.detach().movedim(out_dim, 0), np.flatnonzero(~zero_in))
    elif is_depthwise:
        known.pin(of_weight[1], "depthwise")
        # Several filters of one channel go with it, and so with each other.
        of_out = np.repeat(of_x[1], n_out // n_in)
        if not is_expanded:
            known.join(of_x[1] if transposed else of_out, of_weight[0])
        zero_filters = known.zeros_along(weight, 0)
        zero_out = np.repeat(zero_in, n_out // n_in)
        zero_out |= np.repeat(zero_filters, n_out // len(zero_filters))
    else:
        known.pin(of_weight[1], "grouped")
        known.read(of_x[1], zero_in)
        known.balanced += [np.split(of_x[1], groups), np.split(of_weight[0], groups)]
        known.info(weight).group_inputs = of_x[1]
        zero_out = known.zeros_along(weight, 0)
    if bias is not None:
        known.join(of_out, known.labels_of(bias)[0])
        zero_out = zero_out & known.zeros_along(bias, 0)
    spatial = [pinned(size) for size in out.shape[2:]]
    known.label(out, [of_x[0], of_out, *spatial], (1, zero_out))
    return True


def _linear(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A product of matrices: a sum over the columns of the first."""
    bias, (x, weight) = (args[0], args[1:]) if len(args) == 3 else (None, args)
    if kwargs:
        return False
    if known.info(weight).constant_of is None or x.layout != torch.strided:
        return _product(known, func, args, kwargs, out)
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


def _product(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Products of matrices, one for each index of the dimensions before, added to something."""
    *added, a, b = args
    for tensor in (a, b):
        if tensor.layout != torch.strided:
            known.pin_all(tensor, "sparse")
    (*batch, rows, inner), (*batch_b, inner_b, columns) = known.labels_of(a), known.labels_of(b)
    for own, other in zip(batch, batch_b, strict=True):
        known.join(own, other)
    known.join(inner, inner_b)
    if known.info(a).constant_of is None and known.info(b).constant_of is None:
        # The scale of attention scores is made of the number of channels that they are summed over.
        known.pin(inner, "summed over by a product of activations")
    else:
        known.read(inner, known.zeros_along(a, a.dim() - 1) | known.zeros_along(b, b.dim() - 2))
    zeros = [
        *((d, known.zeros_along(a, d) | known.zeros_along(b, d)) for d in range(len(batch))),
        (a.dim() - 2, known.zeros_along(a, a.dim() - 2)),
        (b.dim() - 1, known.zeros_along(b, b.dim() - 1)),
    ]
    known.label(out, [*batch, rows, columns], max(zeros, key=lambda each: each[1].mean()))
    return not added or _pointwise(known, _aten.add.Tensor, (added[0], out), {}, out)


def _batch_norm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A BatchNorm: a scale, a shift and running statistics for each channel."""
    x, scale, shift, *statistics = args[:5]
    labels = list(known.labels_of(x))
    channels = labels[1]
    for tensor in (scale, shift, *statistics):
        if isinstance(tensor, Tensor):
            known.join(channels, known.labels_of(tensor)[0])
    for normalised in (labels[0], *labels[2:]):
        known.pin(normalised, f"normalised over, in `{known.operator}`")
    # Without running statistics a channel of zeros has a mean of zero.
    has_statistics = any(isinstance(each, Tensor) for each in statistics)
    zero = known.known_zeros(x, 1) & (not has_statistics)
    if scale is not None:
        zero = zero | known.zeros_along(scale, 0)
    if shift is not None:
        zero = zero & known.zeros_along(shift, 0)
    lost = known.known_zeros(x, 1) & ~zero
    known.lose(channels[lost], "a later BatchNorm makes something else of zero")
    for tensor in out[1:3]:  # mean and variance, unless they are running ones
        has_own = tensor.shape == (len(channels),)
        known.label(tensor, [channels] if has_own else [pinned(n) for n in tensor.shape])
    if id(scale) in known.scattered:
        # What is written into the wider tensor is read there: only zeros may be left out.
        known.read(channels, zero)
        labels[1] = pinned(len(channels))
    known.label(out[0], labels, (1, zero))
    return True


def _weight_norm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A matrix whose indices along one dimension are each divided by their norm, and scaled."""
    matrix, scale = args[:2]
    dim = args[2] if len(args) > 2 else 0
    labels, of_scale = known.labels_of(matrix), known.labels_of(scale)
    known.join(labels[dim], of_scale[dim])
    for d in set(range(matrix.dim())) - {dim}:
        known.pin(labels[d][~known.zeros_along(matrix, d)], "weight norm sums over them")
    known.label(out[0], labels)
    known.label(out[1], of_scale)
    return True


def _mv(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A matrix times a vector, as the norm of a whole matrix is made."""
    matrix, vector = args
    if any(known.info(each).constant_of is None for each in args):
        return False
    (rows, columns), [inner] = known.labels_of(matrix), known.labels_of(vector)
    known.join(columns, inner)
    # The vector of a spectral norm is zero where the matrix is, but not for good.
    known.pin(columns[~known.zeros_along(matrix, 1)], "spectral norm is over the whole matrix")
    known.label(out, [rows], (0, known.zeros_along(matrix, 0)))
    return True


def _dot(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Two vectors multiplied, and summed up."""
    a, b = args
    if any(known.info(each).constant_of is None for each in args):
        return False
    [of_a], [of_b] = known.labels_of(a), known.labels_of(b)
    known.join(of_a, of_b)
    zero = known.known_zeros(a, 0) | known.known_zeros(b, 0)
    known.pin(of_a[~zero], "spectral norm is over the whole matrix")
    known.label(out, [])
    return True


def _mixed(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Indices of some dimensions depend on one another, those of the others do not."""
    x, results, given = args[0], tensors_in(out), _given(func, args, kwargs)
    reason, mixing = _MIXING[func.overloadpacket]
    reason = f"{reason}, in `{known.operator}`"
    dims, keeps_zeros = mixing(func, given)
    mixed = {d % x.dim() for d in (range(x.dim()) if dims is None else dims)}
    labels, zeros = known.labels_of(x), known.info(x).zeros
    # A maximum sees zeros, and a mean counts them. Of a norm of negative order they are a minimum.
    sums = func.overloadpacket in _SUMMING and given.get("ord", 0) >= 0
    for d in mixed:
        if sums and zeros is not None and d == zeros[0]:
            known.read(labels[d], zeros[1])
        else:
            known.pin(labels[d], reason)
    for tensor in tensors_in((args[1:], kwargs)):  # scales and shifts
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
        if "mean" not in str(func):  # of a second result, as indices of maxima, none are known
            zeros = None
    return True


def _reduced(given: Any) -> Any:
    """The dimensions that an operator is given; None where it takes all."""
    return [d for d in tree_leaves(given.get("dim")) if d is not None] or None


def _alike(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A new tensor of the shape of another."""
    known.label(out, known.labels_of(args[0]))
    known.info(out).is_zero = func.overloadpacket is _aten.zeros_like
    return True


def _filled(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Numbers written over what was there."""
    if tensors_in((args[1:], kwargs)):
        return False
    known.label(out, known.labels_of(args[0]))
    known.invalidate(out, depends_on_input=func.overloadpacket in _FILLING)
    known.info(out).is_zero = func.overloadpacket is _aten.zero_
    return True


def _gather(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Picked along one dimension, at each index of all others."""
    given = _given(func, args, kwargs)
    x, index, dim = given["self"], given["index"], given["dim"] % max(out.dim(), 1)
    labels, zeros = [], known.info(x).zeros
    for d, size in enumerate(out.shape):
        labels.append(_together(known, [x, index], d) if d != dim else pinned(size))
    if dim < out.dim():
        for tensor in (x, index):
            known.pin(known.labels_of(tensor)[dim], "picked by index")
    if zeros is not None and (zeros[0] == dim or len(zeros[1]) != out.shape[zeros[0]]):
        zeros = None
    known.label(out, labels, zeros)
    return True


def _of_pixels(known: LabelMap, x: Tensor, n: int) -> list[Labels]:
    """The first labels of a tensor, whose other dimensions are space and stay."""
    for labels in known.labels_of(x)[n:]:
        known.pin(labels, "spatial")
    return known.labels_of(x)[:n]


def _together(known: LabelMap, tensors: Iterable[Tensor], d: int) -> Labels:
    """Join a dimension of tensors that are used index by index; of other sizes it stays."""
    places = [(tensor, d) for tensor in tensors]
    sizes = {tensor.shape[d] for tensor, _ in places}
    if len(sizes) > 1:
        for tensor, _ in places:
            known.pin(known.labels_of(tensor)[d], "picked by index")
    return known.broadcast_join(min(sizes), places) if len(sizes) == 1 else pinned(min(sizes))


def _scattered(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written or added at picked indices of one dimension, at each index of all others."""
    given = _given(func, args, kwargs)
    x, index, dim = given["self"], given["index"], given["dim"] % max(out.dim(), 1)
    source = next(given[name] for name in ("src", "source", "value") if name in given)
    base = known.info(x)
    if tensors_in(source) and source.dim() != x.dim():
        return False
    # The index of some picks along its only dimension, that of others for each entry.
    tensors = [x, *tensors_in(source)]
    known.pin(known.labels_of(index)[dim if index.dim() == x.dim() else 0], "picks by index")
    zeros = base.zeros
    if tensors[1:] and (zeros is None or base.is_zero):
        zeros = known.info(source).zeros
    for d in range(x.dim()):
        if d == dim:
            for tensor in tensors:
                known.pin(known.labels_of(tensor)[d], "picked by index")
        else:
            _together(known, [*tensors, index] if "scatter" in str(func) else tensors, d)
    if zeros is not None:
        d = zeros[0]
        zero = known.known_zeros(x, d) | base.is_zero
        zero = zero & (known.known_zeros(source, d) if tensors[1:] else source == 0)
        zeros = (d, zero) if d != dim else None
    known.label(out, known.labels_of(x), zeros)
    return True


def _written_at(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written or added where indices or a mask pick."""
    x, indices, values = args[:3]
    base, picked = known.info(x), _aten.index(x, indices)
    rearrange(known, _aten.index.Tensor, (x, indices), {}, picked)
    _pointwise(known, _aten.copy_.default, (picked, values), {}, picked)
    labels, written, zeros = known.labels_of(x), known.info(picked), None
    if written.zeros is not None:
        d, zero = written.zeros
        of_zeros = np.setdiff1d(written.labels[d][zero], [PINNED, *written.labels[d][~zero]])
        d = max(range(x.dim()), key=lambda each: np.isin(labels[each], of_zeros).sum())
        zeros = d, (known.known_zeros(x, d) | base.is_zero) & np.isin(labels[d], of_zeros)
    known.label(out, labels, zeros)
    return True


def _unpooled(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written where the maxima of a pooling were, among zeros."""
    x, indices, zeros = args[0], args[1], known.info(args[0]).zeros
    n = out.dim() - (2 if "2d" in str(func) else 3)
    for tensor in (x, indices):
        _of_pixels(known, tensor, n)
    labels = [_together(known, [x, indices], d) for d in range(n)]
    spatial = [pinned(size) for size in out.shape[n:]]
    known.label(out, [*labels, *spatial], zeros if zeros and zeros[0] < n else None)
    return True


def _padded(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The same number before and behind, so many times as the forward says."""
    x, pad = args[:2]
    is_zero = not _given(func, args, kwargs)["value"]
    labels, zeros = list(known.labels_of(x)), known.info(x).zeros
    dims = [x.dim() - 1 - i for i in range(len(pad) // 2) if any(pad[2 * i : 2 * i + 2])]
    if zeros is not None and not is_zero and set(dims) - {zeros[0]}:
        zeros = None
    for d in dims:
        before, after = pad[2 * (x.dim() - 1 - d) :][:2]
        if min(before, after) < 0:
            known.pin(labels[d], "padded")
            labels[d] = pinned(out.shape[d])
            zeros = None if zeros is not None and zeros[0] == d else zeros
            continue
        labels[d] = np.concatenate([pinned(before), labels[d], pinned(after)])
        if zeros is not None and zeros[0] == d:
            zeros = d, np.pad(zeros[1], (before, after), constant_values=is_zero)
    known.label(out, labels, zeros)
    return True


def _blocks(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Channels made space: as many of them as make one go together."""
    d = args[0].dim() - (2 if func.overloadpacket is _aten.col2im else 3)
    *batch, channels = _of_pixels(known, args[0], d + 1)
    blocks = channels.reshape(out.shape[d], -1)
    zero = known.zeros_along(args[0], d).reshape(blocks.shape)
    known.join(blocks[:, :1], blocks[:, 1:])
    spatial = [pinned(size) for size in out.shape[d + 1 :]]
    known.label(out, [*batch, blocks[:, 0], *spatial], (d, np.logical_and.reduce(zero, 1)))
    return True


def _repeated(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Space made channels: so many of each."""
    d = args[0].dim() - 3
    *batch, channels = _of_pixels(known, args[0], d + 1)
    n = out.shape[d] // len(channels)
    spatial = [pinned(size) for size in out.shape[d + 1 :]]
    zero = np.repeat(known.zeros_along(args[0], d), n)
    known.label(out, [*batch, np.repeat(channels, n), *spatial], (d, zero))
    return True


def _channel_shuffle(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The first of each group, the second of each, and so on: those go together."""
    x, groups = args[:2]
    labels = list(known.labels_of(x))
    in_groups = labels[1].reshape(groups, -1)
    known.join(in_groups[:1], in_groups[1:])
    labels[1] = in_groups.T.ravel()
    known.label(out, labels, (1, known.zeros_along(x, 1).reshape(groups, -1).T.ravel()))
    return True


def _sampled(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Values at places between pixels, of each channel alike."""
    x, grid = args[:2]
    known.pin_all(grid, "places")
    spatial = [pinned(size) for size in out.shape[2:]]
    known.label(out, [*_of_pixels(known, x, 2), *spatial], (1, known.zeros_along(x, 1)))
    return True


def _deformed(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A convolution whose places are moved, of all channels alike."""
    x, weight, offset, mask, bias = args[:5]
    if args[11:13] != (1, 1):  # groups
        return False
    for tensor in (offset, mask):
        known.pin_all(tensor, "places")
    bias = None if known.info(bias).is_zero else bias  # of a layer that has none
    return _convolution(known, func, (x, weight, bias, *[None] * 3, False, None, 1), {}, out)


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


# What zeros add nothing to. It is not told how many there are.
_SUMMING = _operators("sum nansum linalg_vector_norm any count_nonzero")
# Why operators mix dimensions, which those are, given the operator and its arguments, and whether
# zeros along others stay zeros. None stands for all dimensions.
_MIXING: dict[Any, tuple[str, Callable[[Any, Any], tuple[Iterable[int] | None, bool]]]] = {
    **dict.fromkeys(
        _SPATIAL,
        ("spatial", lambda func, _: (range(-int(re.findall(r"(\d)d", str(func))[0]), 0), True)),
    ),
    **dict.fromkeys(
        _operators("mean amax amin max min median std var std_mean var_mean") | _SUMMING,
        ("reduced", lambda _, given: (_reduced(given), True)),
    ),
    **dict.fromkeys(
        _operators("sort topk kthvalue cummax cummin cumsum"),
        ("sorted or accumulated", lambda _, given: (_reduced(given), True)),
    ),
    **dict.fromkeys(
        _operators("argmax argmin"), ("reduced", lambda _, given: (_reduced(given), False))
    ),
    **dict.fromkeys(
        _operators("_softmax _safe_softmax _log_softmax"),
        ("softmax", lambda _, given: (_reduced(given), False)),
    ),
    **dict.fromkeys(
        _operators("_fft_r2c _fft_c2r _fft_c2c"),
        ("transformed", lambda _, given: (_reduced(given), True)),
    ),
    **dict.fromkeys(
        _operators("native_layer_norm _fused_rms_norm"),
        ("normalised over", lambda _, given: (range(-len(given["normalized_shape"]), 0), False)),
    ),
    **dict.fromkeys(_operators("tril triu"), ("a triangle", lambda *_: ((-2, -1), True))),
    _aten.native_dropout: ("dropped", lambda *_: ((), True)),
}
_BATCH_NORM = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_no_update cudnn_batch_norm miopen_batch_norm
"""
_SCATTERING = """
    scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_
    index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_
"""
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_operators(_BATCH_NORM), _batch_norm),
    **dict.fromkeys(_MIXING, _mixed),
    **dict.fromkeys(_REARRANGING | VIEWS, rearrange),
    **dict.fromkeys((_aten.addmm, _aten.mm), _linear),
    **dict.fromkeys((_aten.cat, _aten.stack), _cat),
    **dict.fromkeys((_aten.view_as_complex, _aten.view_as_real), _complex),
    **dict.fromkeys((_aten.convolution, _aten._convolution), _convolution),
    **dict.fromkeys(_operators("dot vdot"), _dot),
    **dict.fromkeys((_aten.bmm, _aten.baddbmm, *_operators("_sparse_addmm")), _product),
    **dict.fromkeys(_LIKE, _alike),
    **dict.fromkeys((*_FILLING, _aten.zero_), _filled),
    **dict.fromkeys(_operators(_SCATTERING), _scattered),
    **dict.fromkeys((_aten.index_put, _aten.index_put_), _written_at),
    **dict.fromkeys((_aten.max_unpool2d, _aten.max_unpool3d), _unpooled),
    **dict.fromkeys((_aten.pixel_shuffle, _aten.col2im), _blocks),
    **dict.fromkeys((_aten.pixel_unshuffle, _aten.im2col), _repeated),
    **dict.fromkeys(_operators("channel_shuffle native_channel_shuffle"), _channel_shuffle),
    **dict.fromkeys((_aten.grid_sampler_2d, _aten.grid_sampler_3d), _sampled),
    _aten.mv: _mv,
    _aten._weight_norm_interface: _weight_norm,
    _aten.gather: _gather,
    _aten.constant_pad_nd: _padded,
    _aten.glu: _glu,
    _aten.as_strided_: _as_strided,
}


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator as `TorchDispatchMode` sees it, such as `aten.mm.default`."""
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    if str(func.overloadpacket) == "torchvision.deform_conv2d":  # which may be loaded later
        return _deformed
    return _RULES.get(func.overloadpacket)
