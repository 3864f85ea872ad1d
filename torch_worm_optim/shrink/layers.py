"""Layers: sums over channels, and normalisations of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim.shrink.labels import LabelMap, all_zero, pinned
from torch_worm_optim.shrink.pointwise import pointwise


def convolution(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
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


def linear(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A product of matrices: a sum over the columns of the first."""
    bias, (x, weight) = (args[0], args[1:]) if len(args) == 3 else (None, args)
    if kwargs:
        return False
    if known.info(weight).constant_of is None or x.layout != torch.strided:
        return product(known, func, args, kwargs, out)
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


def product(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
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
    return not added or pointwise(known, torch.ops.aten.add.Tensor, (added[0], out), {}, out)


def batch_norm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
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


def weight_norm(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
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


def matrix_times_vector(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
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


def dot(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
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


def deformed(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A convolution whose places are moved, of all channels alike."""
    x, weight, offset, mask, bias = args[:5]
    if args[11:13] != (1, 1):  # groups
        return False
    for tensor in (offset, mask):
        known.pin_all(tensor, "places")
    bias = None if known.info(bias).is_zero else bias  # of a layer that has none
    return convolution(known, func, (x, weight, bias, *[None] * 3, False, None, 1), {}, out)
