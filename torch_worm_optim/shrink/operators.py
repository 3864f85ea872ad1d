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

from torch_worm_optim.shrink.labels import LabelMap, arguments_of, pinned, tensors_in
from torch_worm_optim.shrink.layers import (
    batch_norm,
    convolution,
    deformed,
    dot,
    linear,
    matrix_times_vector,
    product,
    weight_norm,
)
from torch_worm_optim.shrink.picking import gather, scattered, written_at
from torch_worm_optim.shrink.pixels import (
    blocks,
    channel_shuffle,
    padded,
    repeated,
    sampled,
    unpooled,
)
from torch_worm_optim.shrink.pointwise import pointwise
from torch_worm_optim.shrink.rearrange import rearrange

Rule = Callable[[LabelMap, Any, Any, Any, Any], bool]

_aten = torch.ops.aten


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


def _mixed(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Indices of some dimensions depend on one another, those of the others do not."""
    x, results, given = args[0], tensors_in(out), arguments_of(func, args, kwargs)
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
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_operators(_BATCH_NORM), batch_norm),
    **dict.fromkeys(_MIXING, _mixed),
    **dict.fromkeys(_REARRANGING | VIEWS, rearrange),
    **dict.fromkeys((_aten.addmm, _aten.mm), linear),
    **dict.fromkeys((_aten.cat, _aten.stack), _cat),
    **dict.fromkeys((_aten.view_as_complex, _aten.view_as_real), _complex),
    **dict.fromkeys((_aten.convolution, _aten._convolution), convolution),
    **dict.fromkeys(_operators("dot vdot"), dot),
    **dict.fromkeys((_aten.bmm, _aten.baddbmm, *_operators("_sparse_addmm")), product),
    **dict.fromkeys(_LIKE, _alike),
    **dict.fromkeys((*_FILLING, _aten.zero_), _filled),
    **dict.fromkeys(_operators(_SCATTERING), scattered),
    **dict.fromkeys((_aten.index_put, _aten.index_put_), written_at),
    **dict.fromkeys((_aten.max_unpool2d, _aten.max_unpool3d), unpooled),
    **dict.fromkeys((_aten.pixel_shuffle, _aten.col2im), blocks),
    **dict.fromkeys((_aten.pixel_unshuffle, _aten.im2col), repeated),
    **dict.fromkeys(_operators("channel_shuffle native_channel_shuffle"), channel_shuffle),
    **dict.fromkeys((_aten.grid_sampler_2d, _aten.grid_sampler_3d), sampled),
    _aten.mv: matrix_times_vector,
    _aten._weight_norm_interface: weight_norm,
    _aten.gather: gather,
    _aten.constant_pad_nd: padded,
    _aten.glu: _glu,
    _aten.as_strided_: _as_strided,
}


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator as `TorchDispatchMode` sees it, such as `aten.mm.default`."""
    if torch.Tag.pointwise in func.tags:
        return pointwise
    if str(func.overloadpacket) == "torchvision.deform_conv2d":  # which may be loaded later
        return deformed
    return _RULES.get(func.overloadpacket)
