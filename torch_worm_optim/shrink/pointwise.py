"""Functions of entries, of any number of tensors that broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim.shrink.labels import Flags, LabelMap, tensors_in

# Values that stand for any value when it is asked whether a function of several is zero.
_PROBES = (-2.3, -0.6, 0.0, 0.4, 1.7)


def pointwise(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
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
