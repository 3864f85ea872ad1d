"""What each operator does to labels: one rule for each kind of operator.

A rule labels what an operator returns, and says of what it was given which indices go together,
which are summed over and which must stay. It returns False where it does not know, and all that the
operator touches is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim.shrink.labels import Book, Flags, Labels, all_zero, fixed

Rule = Callable[[Book, Any, Any, Any, Any], bool]

_aten = torch.ops.aten
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
_VIEWS = _operators("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")
_PERMUTATIONS = _operators("permute", "transpose", "t")
# Operators whose result depends on what is picked. What one input picks another may not.
PICKING = _operators("slice", "select", "index", "index_select", "gather", "embedding")
# Operators that make a new tensor of a shape and read no values.
FACTORIES = _operators(
    *("new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like"),
    *("empty_like", "full_like", "rand_like", "randn_like", "sym_size"),
)


def _pointwise(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
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
                book.pinned.append((book.of(each)[e], "broadcast"))
        same = [(each, e) for each, e in places if each.shape[e] == size]
        labels.append(book.shared(size, same))
    dim = next((book.zeros[id(t)][0] - t.dim() for t in tensors if id(t) in book.zeros), None)
    flags = [_zeros_from_end(book, each, dim, result) for each in tensors]
    zeros = None
    if dim is not None:
        zero = _zero_where(func, args, kwargs, flags, result.shape[dim])
        zeros = (n + dim, zero) if zero is not None and zero.any() else None
    book.label(result, labels, zeros)
    return True


def _zeros_from_end(book: Book, tensor: Tensor, dim: int | None, result: Tensor) -> Flags | None:
    """The zeros of an argument along a dimension that is counted from the end; None if none."""
    if dim is None or tensor.dim() < -dim:
        return None
    size, wanted = tensor.shape[dim], result.shape[dim]
    if size not in (1, wanted):
        return None
    zeros = book.zeros_along(tensor, tensor.dim() + dim)
    return np.broadcast_to(zeros, (wanted,)) if zeros.any() else None


def _zero_where(
    func: Any, args: Any, kwargs: Any, flags: list[Flags | None], size: int
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


def _spatial(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Pooling, resizing and padding within channels."""
    x, result = args[0], out if isinstance(out, Tensor) else out[0]
    labels = list(book.of(x))
    n_lead = {"1d": 1, "2d": 2, "3d": 3}[next(d for d in ("1d", "2d", "3d") if d in str(func))]
    for d in range(x.dim() - n_lead, x.dim()):
        book.pinned.append((labels[d], "spatial"))
        labels[d] = fixed(result.shape[d])
    book.label(result, labels, book.zeros.get(id(x)))
    return True


def _pad(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Padding with a constant, of any dimensions."""
    x, value = args[0], args[2] if len(args) > 2 else 0
    padded = [d for d in range(x.dim()) if out.shape[d] != x.shape[d]]
    labels, zeros = list(book.of(x)), book.zeros.get(id(x))
    for d in padded:
        book.pinned.append((labels[d], "padded"))
        labels[d] = fixed(out.shape[d])
    if zeros is not None and (value != 0 or zeros[0] in padded):
        zeros = None
    book.label(out, labels, zeros)
    return True


def _convolution(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A convolution of any kind: a sum over input channels."""
    x, weight, bias, *_ = args
    transposed, groups = args[6], args[8]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    of_x, of_weight = book.of(x), book.of(weight)
    n_in, n_out = x.shape[1], out.shape[1]
    if x.dim() != weight.dim() or id(weight) not in book.made_of:
        return False
    # The number of groups has to be set anew, which only a convolution's own can.
    owned = not book.convolutions.isdisjoint(book.made_of[id(weight)])
    if groups > 1 and (transposed or not owned):
        return False
    for labels in (*of_x[2:], *of_weight[2:]):
        book.pinned.append((labels, "spatial"))
    zero_in = book.zeros_along(x, 1)
    if groups == 1:
        book.join(of_x[1], of_weight[in_dim])
        book.read(of_x[1], zero_in | book.zeros_along(weight, in_dim))
        zero_out = all_zero(weight.detach().movedim(out_dim, 0), np.flatnonzero(~zero_in))
    elif groups == n_in:
        book.pinned.append((of_weight[1], "depthwise"))
        # Several filters of one channel go with it, and so with each other.
        book.join(np.repeat(of_x[1], n_out // n_in), of_weight[0])
        zero_out = np.repeat(zero_in, n_out // n_in) | book.zeros_along(weight, 0)
    else:
        book.pinned.append((of_weight[1], "grouped"))
        book.read(of_x[1], zero_in)
        book.balanced += [np.split(of_x[1], groups), np.split(of_weight[0], groups)]
        book.inputs_of_grouped[id(weight)] = of_x[1]
        zero_out = book.zeros_along(weight, 0)
    if bias is not None:
        book.join(of_weight[out_dim], book.of(bias)[0])
        zero_out = zero_out & book.zeros_along(bias, 0)
    spatial = [fixed(size) for size in out.shape[2:]]
    book.label(out, [of_x[0], of_weight[out_dim], *spatial], (1, zero_out))
    return True


def _linear(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A product of matrices: a sum over the columns of the first."""
    bias, (x, weight) = (args[0], args[1:]) if len(args) == 3 else (None, args)
    if kwargs or id(weight) not in book.made_of:
        return False
    of_x, of_weight = book.of(x), book.of(weight)
    zero_in = book.zeros_along(x, 1)
    book.join(of_x[1], of_weight[0])
    book.read(of_x[1], zero_in | book.zeros_along(weight, 0))
    zero_out = all_zero(weight.detach().t(), np.flatnonzero(~zero_in))
    if bias is not None:
        book.join(book.of(bias)[-1], of_weight[1])
        zero_out = zero_out & book.zeros_along(bias, bias.dim() - 1)
    book.label(out, [of_x[0], of_weight[1]], (1, zero_out))
    return True


def _bmm(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Products of matrices, one for each index of the first dimension."""
    a, b = args
    (batch, rows, inner), (batch_b, inner_b, columns) = book.of(a), book.of(b)
    book.join(batch, batch_b)
    book.join(inner, inner_b)
    if id(a) in book.made_of or id(b) in book.made_of:
        book.read(inner, book.zeros_along(a, 2) | book.zeros_along(b, 1))
    else:
        # The scale of attention scores is made of the number of channels that they are summed over.
        book.pinned.append((inner, "summed over by a product of activations"))
    zeros = [
        (0, book.zeros_along(a, 0) | book.zeros_along(b, 0)),
        (1, book.zeros_along(a, 1)),
        (2, book.zeros_along(b, 2)),
    ]
    book.label(out, [batch, rows, columns], max(zeros, key=lambda each: each[1].mean()))
    return True


def _baddbmm(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Products of matrices, and something added to them."""
    _bmm(book, func, args[1:], kwargs, out)
    labels = book.of(out)
    for d, each in enumerate(book.of(args[0]), start=3 - args[0].dim()):
        if len(each) == out.shape[d]:
            book.join(each, labels[d])
        else:
            book.pinned.append((each, "broadcast"))
    book.label(out, labels)
    return True


def _softmax(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A softmax: indices of its dimension depend on one another, others do not."""
    labels = book.of(args[0])
    book.pinned.append((labels[args[1]], "softmax"))
    book.label(out, labels)
    return True


def _layer_norm(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A norm over the last dimensions: their indices depend on one another, others do not."""
    x, shape = args[:2]
    for tensor in args:
        if isinstance(tensor, Tensor):
            for labels in book.of(tensor)[-len(shape) :]:
                book.pinned.append((labels, "normalised over"))
    book.label(out[0], book.of(x))
    return True


def _embedding(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows of a matrix, picked by index."""
    rows, columns = book.of(args[0])
    book.pinned.append((rows, "picked by index"))
    book.label(out, [*(fixed(size) for size in out.shape[:-1]), columns])
    return True


def _index(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Indices of one dimension, picked by a tensor."""
    x, picks = args
    given = [d for d, pick in enumerate(picks) if pick is not None]
    if len(given) != 1 or picks[given[0]].dtype == torch.bool:
        return False
    [dim] = given
    labels = book.of(x)
    book.pinned.append((labels[dim], "picked by index"))
    picked = [fixed(size) for size in picks[dim].shape]
    book.label(out, [*labels[:dim], *picked, *labels[dim + 1 :]])
    return True


def _index_select(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Indices of one dimension, picked by a vector."""
    x, dim, picks = args
    return _index(book, func, (x, [*[None] * (dim % x.dim()), picks]), kwargs, out)


def _gather(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Indices of one dimension, others picked at each index of the other dimensions."""
    x, dim, picks = args
    dim %= x.dim()
    labels = list(book.of(x))
    for d, of_picks in enumerate(book.of(picks)):
        if d == dim or len(labels[d]) != len(of_picks):
            book.pinned.append((labels[d], "picked by index"))
            labels[d] = of_picks
        else:
            labels[d] = book.shared(len(of_picks), [(x, d), (picks, d)])
    book.label(out, labels)
    return True


def _view_as_complex(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Pairs of real numbers as complex ones."""
    *labels, pairs = book.of(args[0])
    book.pinned.append((pairs, "pairs"))
    book.label(out, labels)
    return True


def _view_as_real(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Complex numbers as pairs of real ones."""
    book.label(out, [*book.of(args[0]), fixed(2)])
    return True


def _batch_norm(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A BatchNorm: a scale, a shift and running statistics for each channel."""
    x, scale, shift, *statistics = args[:5]
    result = out[0]
    of_x = list(book.of(x))
    channels = of_x[1]
    zero = np.zeros(len(channels), dtype=bool)
    name = "" if scale is None else book.name_of.get(id(scale), "")
    for tensor in (scale, shift, *statistics):
        if isinstance(tensor, Tensor):
            book.join(channels, book.of(tensor)[0])
    if scale is not None and shift is not None:
        zero = book.zeros_along(scale, 0) & book.zeros_along(shift, 0)
    if name in book.scattered:
        # What is written into the wider tensor is read there: only zeros may be left out.
        book.read(channels, zero)
        of_x[1] = fixed(len(channels))
    book.label(result, of_x, (1, zero))
    return True


def _cat(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Tensors one after another along a dimension."""
    tensors = [each for each in args[0] if each.numel() or each.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    parts = [book.of(each) for each in tensors]
    labels = []
    for d in range(out.dim()):
        if d == dim:
            labels.append(np.concatenate([part[d] for part in parts]))
            continue
        labels.append(book.shared(out.shape[d], [(each, d) for each in tensors]))
    along = {book.zeros[id(each)][0] for each in tensors if id(each) in book.zeros}
    zeros = None
    if len(along) == 1:
        [d] = along
        flags = [book.zeros_along(each, d) for each in tensors]
        zeros = (d, np.concatenate(flags) if d == dim else np.logical_and.reduce(flags))
    book.label(out, labels, zeros)
    return True


def _view(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Another shape of the same entries, in the same order."""
    x = args[0]
    of_x, zeros = book.of(x), book.zeros.get(id(x))
    labels: list[Labels] = [fixed(size) for size in out.shape]
    new_zeros = None
    for source, target in _matching_dims(tuple(x.shape), tuple(out.shape)):
        free = [d for d in source if x.shape[d] > 1 and not book.fixed.issuperset(of_x[d].tolist())]
        if not free:
            continue
        large = [d for d in target if out.shape[d] > 1]
        if len(free) > 1:
            for d in free:
                book.pinned.append((of_x[d], "merged by a view"))
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
            np.moveaxis(zero_grid, axis, 0).reshape(n, -1).all(1) for axis, n in enumerate(sizes)
        ]
        alike = [axis for axis, line in enumerate(lines) if (line == line[:, :1]).all()]
        if alike:
            axis = alike[0]
        elif book.cut_heads:
            # Indices of one of the dimensions stay apart: of the one that has most zeros, such
            # as heads, and of the last but one, where heads usually are, if there are none.
            axis = max(range(len(sizes)), key=lambda i: (zero[i].mean(), i == len(sizes) - 2))
            book.join(
                lines[axis][:, :1].repeat(lines[axis].shape[1] - 1), lines[axis][:, 1:].ravel()
            )
        else:
            book.pinned.append((of_x[d], "split by a view"))
            continue
        labels[large[axis]] = lines[axis][:, 0]
        if zero[axis].any():
            new_zeros = (large[axis], zero[axis])
    book.label(out, labels, new_zeros)
    return True


def _permute(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
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
    zeros = book.zeros.get(id(x))
    of_x = book.of(x)
    book.label(out, [of_x[d] for d in order], zeros and (order.index(zeros[0]), zeros[1]))
    return True


def _expand(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Dimensions of size one repeated."""
    x = args[0]
    added = out.dim() - x.dim()
    labels = [fixed(size) for size in out.shape]
    for d, each in enumerate(book.of(x), start=added):
        if len(each) == out.shape[d]:
            labels[d] = each
    zeros = book.zeros.get(id(x))
    if zeros is not None:
        d = zeros[0] + added
        zeros = (d, np.broadcast_to(zeros[1], (out.shape[d],)))
    book.label(out, labels, zeros)
    return True


def _repeat(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Whole dimensions over and over."""
    x, times = args
    n_added = len(times) - x.dim()
    of_x = [*(fixed(1) for _ in range(n_added)), *book.of(x)]
    labels = [np.tile(each, n) for each, n in zip(of_x, times, strict=True)]
    zeros = book.zeros.get(id(x))
    if zeros is not None:
        d = zeros[0] + n_added
        zeros = (d, np.tile(zeros[1], times[d]))
    book.label(out, labels, zeros)
    return True


def _roll(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Entries moved along some dimensions, in a circle."""
    x, dims = args[0], args[2] if len(args) > 2 else ()
    labels, zeros = book.of(x), book.zeros.get(id(x))
    moved = {d % x.dim() for d in dims} or set(range(x.dim()))
    for d in moved:
        book.pinned.append((labels[d], "rolled"))
    labels = [fixed(len(each)) if d in moved else each for d, each in enumerate(labels)]
    book.label(out, labels, None if zeros is None or zeros[0] in moved else zeros)
    return True


def _as_strided(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Other strides, in place, as pooling in channels_last sets them where a size is one."""
    x = args[0]
    labels, strides = book.of(x), book.strides[id(x)]
    if [len(each) for each in labels] != list(out.shape) or out.storage_offset() != 0:
        return False
    same = zip(out.shape, strides, out.stride(), strict=True)
    if any(size > 1 and before != after for size, before, after in same):
        return False
    book.label(out, labels, book.zeros.get(id(x)))
    return True


def _reduction(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A sum, mean or extremum over some dimensions."""
    x = args[0]
    if len(args) < 2 or isinstance(args[1], (Tensor, type(None))):
        return False
    reduced = {d % x.dim() for d in ([args[1]] if isinstance(args[1], int) else args[1])}
    results = [out] if isinstance(out, Tensor) else out
    keeps = results[0].dim() == x.dim()
    labels, zeros, known = [], None, book.zeros.get(id(x))
    for d, each in enumerate(book.of(x)):
        if d in reduced:
            book.pinned.append((each, "reduced"))
            if keeps:
                labels.append(fixed(1))
            continue
        if known is not None and known[0] == d:
            zeros = (len(labels), known[1])
        labels.append(each)
    for position, result in enumerate(results):  # the indices of an extremum are the second
        book.label(result, labels, None if position else zeros)
    return True


def _vector_norm(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A norm over some dimensions, of a tensor and an order."""
    return len(args) > 2 and _reduction(book, func, (args[0], *args[2:]), kwargs, out)


def _split(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """A tensor cut into parts along a dimension."""
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
    of_x, zeros = book.of(x), book.zeros.get(id(x))
    parts, start = [], 0
    for each in out:
        part = slice(start, start + each.shape[dim])
        labels = list(of_x)
        labels[dim] = of_x[dim][part]
        flags = zeros
        if zeros is not None and zeros[0] == dim:
            flags = (dim, zeros[1][part])
        book.label(each, labels, flags)
        parts.append(labels[dim])
        start = part.stop
    if book.cut_splits and len({len(part) for part in parts}) == 1:
        book.balanced.append(parts)
    else:
        book.pinned.append((of_x[dim], "split"))
    return True


def _slice(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Some of the indices of a dimension."""
    x = args[0]
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, stop, step = given
    dim %= x.dim()
    labels, zeros = list(book.of(x)), book.zeros.get(id(x))
    if out.shape[dim] != x.shape[dim]:
        chosen = slice(start, stop, step)
        book.pinned.append((labels[dim], "sliced"))
        labels[dim] = labels[dim][chosen]
        if zeros is not None and zeros[0] == dim:
            zeros = (dim, zeros[1][chosen])
    book.label(out, labels, zeros)
    return True


def _select(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """One index of a dimension."""
    x, dim, index = args
    _without_dim(book, x, dim % x.dim(), [(index, out)])
    return True


def _unbind(book: Book, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Each index of a dimension."""
    x, dim = args[0], args[1] if len(args) > 1 else 0
    _without_dim(book, x, dim % x.dim(), list(enumerate(out)))
    return True


def _without_dim(book: Book, x: Tensor, dim: int, parts: Sequence[tuple[int, Tensor]]) -> None:
    """Label parts that have one index of a dimension each."""
    labels, zeros = book.of(x), book.zeros.get(id(x))
    book.pinned.append((labels[dim], "taken apart"))
    for _, part in parts:
        flags = None
        if zeros is not None and zeros[0] != dim:
            flags = (zeros[0] - (zeros[0] > dim), zeros[1])
        book.label(part, [*labels[:dim], *labels[dim + 1 :]], flags)


def _stack(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Tensors side by side along a dimension of their own."""
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = [
        book.shared(size, [(each, d) for each in tensors])
        for d, size in enumerate(tensors[0].shape)
    ]
    book.label(out, [*labels[:dim], fixed(len(tensors)), *labels[dim:]])
    return True


def _glu(book: Book, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The first half of a dimension times the sigmoid of the second."""
    x, dim = args[0], (args[1] if len(args) > 1 else -1) % out.dim()
    labels, n = list(book.of(x)), out.shape[dim]
    zero = book.zeros_along(x, dim)[:n]
    book.join(labels[dim][:n], labels[dim][n:])
    labels[dim] = labels[dim][:n]
    book.label(out, labels, (dim, zero))
    return True


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


def _probe(like: Tensor, is_zero: bool, shift: int) -> Tensor:
    """A few values of a tensor's dtype: zeros, or such as stand for any."""
    values = [0.0] * len(_PROBES) if is_zero else [*_PROBES[shift:], *_PROBES[:shift]]
    probe = torch.tensor(values, device=like.device)
    return probe > 0 if like.dtype == torch.bool else probe.to(like.dtype)


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_SPATIAL, _spatial),
    **dict.fromkeys(_BATCH_NORM, _batch_norm),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_SOFTMAX, _softmax),
    **dict.fromkeys(_LAYER_NORM, _layer_norm),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_PERMUTATIONS, _permute),
    _aten.convolution: _convolution,
    _aten.addmm: _linear,
    _aten.mm: _linear,
    _aten.bmm: _bmm,
    _aten.baddbmm: _baddbmm,
    _aten.embedding: _embedding,
    _aten.index: _index,
    _aten.index_select: _index_select,
    _aten.gather: _gather,
    _aten.linalg_vector_norm: _vector_norm,
    _aten.view_as_complex: _view_as_complex,
    _aten.view_as_real: _view_as_real,
    _aten.cat: _cat,
    _aten.stack: _stack,
    _aten.expand: _expand,
    _aten.repeat: _repeat,
    _aten.roll: _roll,
    _aten.as_strided_: _as_strided,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.unbind: _unbind,
    _aten.glu: _glu,
    _aten.constant_pad_nd: _pad,
}


def rule_of(func: Any) -> Rule | None:
    """The rule for an operator.

    Args:
        func: An operator as ``TorchDispatchMode`` sees it, such as ``torch.ops.aten.mm.default``.

    Returns:
        A function of the book, the operator, its arguments, its keyword arguments and its result;
        None if there is none.

    Example:
        >>> rule_of(torch.ops.aten.relu.default).__name__
        '_pointwise'
    """
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    return _RULES.get(func.overloadpacket)
