"""Channels that become space, space that becomes channels, and what lies between pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim.shrink.labels import LabelMap, Labels, arguments_of, pinned
from torch_worm_optim.shrink.picking import together


def _of_pixels(known: LabelMap, x: Tensor, n: int) -> list[Labels]:
    """The first labels of a tensor, whose other dimensions are space and stay."""
    for labels in known.labels_of(x)[n:]:
        known.pin(labels, "spatial")
    return known.labels_of(x)[:n]


def unpooled(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Written where the maxima of a pooling were, among zeros."""
    x, indices, zeros = args[0], args[1], known.info(args[0]).zeros
    n = out.dim() - (2 if "2d" in str(func) else 3)
    for tensor in (x, indices):
        _of_pixels(known, tensor, n)
    labels = [together(known, [x, indices], d) for d in range(n)]
    spatial = [pinned(size) for size in out.shape[n:]]
    known.label(out, [*labels, *spatial], zeros if zeros and zeros[0] < n else None)
    return True


def padded(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The same number before and behind, so many times as the forward says."""
    x, pad = args[:2]
    is_zero = not arguments_of(func, args, kwargs)["value"]
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


def blocks(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Channels made space: as many of them as make one go together."""
    d = args[0].dim() - (2 if func.overloadpacket is torch.ops.aten.col2im else 3)
    *batch, channels = _of_pixels(known, args[0], d + 1)
    blocks = channels.reshape(out.shape[d], -1)
    zero = known.zeros_along(args[0], d).reshape(blocks.shape)
    known.join(blocks[:, :1], blocks[:, 1:])
    spatial = [pinned(size) for size in out.shape[d + 1 :]]
    known.label(out, [*batch, blocks[:, 0], *spatial], (d, np.logical_and.reduce(zero, 1)))
    return True


def repeated(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Space made channels: so many of each."""
    d = args[0].dim() - 3
    *batch, channels = _of_pixels(known, args[0], d + 1)
    n = out.shape[d] // len(channels)
    spatial = [pinned(size) for size in out.shape[d + 1 :]]
    zero = np.repeat(known.zeros_along(args[0], d), n)
    known.label(out, [*batch, np.repeat(channels, n), *spatial], (d, zero))
    return True


def channel_shuffle(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The first of each group, the second of each, and so on: those go together."""
    x, groups = args[:2]
    labels = list(known.labels_of(x))
    in_groups = labels[1].reshape(groups, -1)
    known.join(in_groups[:1], in_groups[1:])
    labels[1] = in_groups.T.ravel()
    known.label(out, labels, (1, known.zeros_along(x, 1).reshape(groups, -1).T.ravel()))
    return True


def sampled(known: LabelMap, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Values at places between pixels, of each channel alike."""
    x, grid = args[:2]
    known.pin_all(grid, "places")
    spatial = [pinned(size) for size in out.shape[2:]]
    known.label(out, [*_of_pixels(known, x, 2), *spatial], (1, known.zeros_along(x, 1)))
    return True
