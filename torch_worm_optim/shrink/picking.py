"""Entries read or written where indices or a mask pick."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim.shrink.labels import (
    PINNED,
    LabelMap,
    Labels,
    arguments_of,
    pinned,
    tensors_in,
)
from torch_worm_optim.shrink.pointwise import pointwise
from torch_worm_optim.shrink.rearrange import rearrange


def gather(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Picked along one dimension, at each index of all others."""
    given = arguments_of(func, args, kwargs)
    x, index, dim = given["self"], given["index"], given["dim"] % max(out.dim(), 1)
    labels, zeros = [], known.info(x).zeros
    for d, size in enumerate(out.shape):
        labels.append(together(known, [x, index], d) if d != dim else pinned(size))
    if dim < out.dim():
        for tensor in (x, index):
            known.pin(known.labels_of(tensor)[dim], "picked by index")
    if zeros is not None and (zeros[0] == dim or len(zeros[1]) != out.shape[zeros[0]]):
        zeros = None
    known.label(out, labels, zeros)
    return True


def together(known: LabelMap, tensors: Iterable[Tensor], d: int) -> Labels:
    """Join a dimension of tensors that are used index by index; of other sizes it stays."""
    places = [(tensor, d) for tensor in tensors]
    sizes = {tensor.shape[d] for tensor, _ in places}
    if len(sizes) > 1:
        for tensor, _ in places:
            known.pin(known.labels_of(tensor)[d], "picked by index")
    return known.broadcast_join(min(sizes), places) if len(sizes) == 1 else pinned(min(sizes))


def scattered(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written or added at picked indices of one dimension, at each index of all others."""
    given = arguments_of(func, args, kwargs)
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
            together(known, [*tensors, index] if "scatter" in str(func) else tensors, d)
    if zeros is not None:
        d = zeros[0]
        zero = known.known_zeros(x, d) | base.is_zero
        zero = zero & (known.known_zeros(source, d) if tensors[1:] else source == 0)
        zeros = (d, zero) if d != dim else None
    known.label(out, known.labels_of(x), zeros)
    return True


def written_at(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written or added where indices or a mask pick."""
    x, indices, values = args[:3]
    base, picked = known.info(x), torch.ops.aten.index(x, indices)
    rearrange(known, torch.ops.aten.index.Tensor, (x, indices), {}, picked)
    pointwise(known, torch.ops.aten.copy_.default, (picked, values), {}, picked)
    labels, written, zeros = known.labels_of(x), known.info(picked), None
    if written.zeros is not None:
        d, zero = written.zeros
        of_zeros = np.setdiff1d(written.labels[d][zero], [PINNED, *written.labels[d][~zero]])
        d = max(range(x.dim()), key=lambda each: np.isin(labels[each], of_zeros).sum())
        zeros = d, (known.known_zeros(x, d) | base.is_zero) & np.isin(labels[d], of_zeros)
    known.label(out, labels, zeros)
    return True
