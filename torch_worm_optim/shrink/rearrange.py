"""Operators that move entries and never compute with them: one rule for all.

Where the indices of a dimension go is not written down for each operator, but seen: the operator is
run on their numbers. Those are views that take no memory, as long as the operator makes views.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_worm_optim.shrink.labels import Flags, LabelMap, Labels, Zeros, pinned, tensors_in


def rearrange(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Entries moved, repeated, dropped: the numbers of indices, moved alike, tell where they go."""
    x, *rest = args
    name = func.overloadpacket.__name__
    results, picks = tensors_in(out), tensors_in((rest, kwargs))
    for each in picks:
        for d in (d for d in range(each.dim()) if each.stride(d)):
            known.pin(known.labels_of(each)[d], "picks by index")
    if name == "index":
        rest = [[first for each in rest[0] for first in _first(each)]]
    elif picks:
        rest, kwargs = tree_map(
            lambda leaf: _first(leaf)[0] if isinstance(leaf, Tensor) else leaf, (rest, kwargs)
        )
    is_view = name in ("view", "_unsafe_view", "reshape")
    move = torch.ops.aten.reshape if is_view else func  # a view of numbers has other strides
    labels = [_unmoved(known.labels_of(x), each) for each in results]
    zeros: list[Zeros | None] = [None] * len(results)
    for d, own in enumerate(known.labels_of(x)):
        is_zero, numbers = known.known_zeros(x, d), np.arange(len(own))
        if known.all_stay(own) and (is_view or not is_zero.any()):
            continue
        if is_view:  # which drops nothing; indices that have one label need not be told apart
            alive = own[~is_zero]
            own, numbers = np.unique(own, return_inverse=True)
            is_zero = ~np.isin(own, alive)
        if len(own) == 1:
            known.pin(own, "the last one of its layer")
            continue
        shape = [-1 if e == d else 1 for e in range(x.dim())]
        grid = torch.as_tensor(numbers, dtype=torch.int32, device=x.device).view(shape)
        grids = [_varying(each) for each in tensors_in(move(grid.expand(x.shape), *rest, **kwargs))]
        if any(a.ndim != b.dim() for a, b in zip(grids, results, strict=True) if a.size):
            return False
        for i, numbers in enumerate(grids):
            n_axes = sum(size > 1 for size in numbers.shape)
            if n_axes > 1 and not (is_view and known.limits.cut_heads):
                known.pin(own, f"split by a {name}")
            elif n_axes:
                usual = _usual_axis(numbers, list(rest[0]) if is_view else [], x.dim())
                found = _label_along(known, labels[i], own, is_zero, numbers, usual)
                zeros[i] = found if is_zero.any() else zeros[i]
        orders = [each.ravel() for each in grids if each.size]
        if is_view or all(_is_whole(order, len(own)) for order in orders):
            continue
        is_split = known.limits.cut_splits and name in ("split", "split_with_sizes")
        if is_split and len({len(order) for order in orders}) == 1:
            known.balanced.append([own[order] for order in orders])
        else:
            known.pin(own, f"rearranged by {name}")
    for of_result in zip(results, labels, zeros, strict=True):
        known.label(*of_result)
    return True


def _first(picks: Tensor | None) -> list[Tensor | None]:
    """Indices that pick the first, whatever and however many this batch picks."""
    if picks is None:
        return [None]
    if picks.dtype in (torch.bool, torch.uint8):  # a mask is as many indices as it has dimensions
        return [torch.zeros(1, dtype=torch.long, device=picks.device)] * picks.dim()
    return [torch.zeros_like(picks) if picks.numel() else picks.new_zeros([1] * picks.dim())]


def _unmoved(labels: list[Labels], result: Tensor) -> list[Labels]:
    """Labels to begin with: of a result that is empty, where nothing can be seen, those it had."""
    if not result.numel() and result.dim() == len(labels):
        sizes = zip(labels, result.shape, strict=True)
        return [own if len(own) == size else pinned(size) for own, size in sizes]
    return [pinned(size) for size in result.shape]


def _varying(numbers: Tensor) -> Labels:
    """Numbers with one index left of each dimension along which they are all the same."""
    if not numbers.numel():
        return np.empty(0, dtype=np.int64)
    for axis in range(numbers.dim()):
        first = numbers.narrow(axis, 0, 1)
        if numbers.stride(axis) == 0 or bool((numbers == first).all()):
            numbers = first
    return np.asarray(numbers.cpu().numpy())


def _usual_axis(numbers: Labels, sizes: list[int], n_dims: int) -> int:
    """The dimension that follows where channels go, of those that a view makes of one."""
    axes = [axis for axis, size in enumerate(numbers.shape) if size > 1]
    # Features of tokens become heads and their channels, and any other features a part whose size
    # is left open beside those that are stated, or the channels of an image.
    if n_dims != 3 and -1 in sizes[1:] and sizes.index(-1) in axes:
        return sizes.index(-1)
    return axes[0] if n_dims == 2 else axes[-2:][0]


def _label_along(
    known: LabelMap,
    labels: list[Labels],
    own: Labels,
    is_zero: Flags,
    numbers: Labels,
    usual: int,
) -> Zeros:
    """Label the dimension along which numbers of labels lie, and say what is zero there."""
    axes = [axis for axis, size in enumerate(numbers.shape) if size > 1]
    lines = {axis: np.moveaxis(numbers, axis, 0).reshape(numbers.shape[axis], -1) for axis in axes}
    # Where a view makes several dimensions of one, indices of one of them stay apart: of the one
    # that has most zeros, such as heads, or of the one where channels usually are.
    axis = max(axes, key=lambda each: (is_zero[lines[each]].all(1).mean(), each == usual))
    if not known.all_stay(own):
        known.join(own[lines[axis][:, :1]], own[lines[axis][:, 1:]])
        if not known.all_stay(labels[axis]):
            for merged in (labels[axis], own):
                known.pin(merged, "merged by a view")
        labels[axis] = own[lines[axis][:, 0]]
    return axis, np.asarray(is_zero[lines[axis]].all(1))


def _is_whole(order: Labels, n: int) -> bool:
    """Whether all of n numbers are there, in order, each so many times, and perhaps over again."""
    whole = np.repeat(np.arange(n), int((order != 0).argmax()))
    return np.array_equal(order, np.tile(whole, len(order) // max(len(whole), 1)))
