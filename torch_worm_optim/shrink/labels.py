"""Labels of the indices of all tensors of a forward pass, and what is known of them.

Every index of every dimension of every tensor gets a label, an integer. Indices that can only be
removed together, such as a convolution's output channel and the scale of the BatchNorm behind it,
have labels that are joined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The label of all that must stay: spatial dimensions, inputs, outputs.
PINNED = 0


class Book:
    """Labels of all tensors of a pass, and what joins, reads and pins them.

    Args:
        model: The model whose parameters and buffers get labels of their own.
        cut_splits: See :func:`~torch_worm_optim.shrink.trace.trace_channels`, as all that follow.
        cut_heads: The same.
        scattered: The same.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> Book(layer).of(layer.weight)
        [array([1, 2]), array([3, 4, 5])]
    """

    def __init__(
        self,
        model: nn.Module,
        cut_splits: bool = True,
        cut_heads: bool = True,
        scattered: Collection[str] = (),
    ) -> None:
        self.cut_splits, self.cut_heads, self.scattered = cut_splits, cut_heads, scattered
        self.n_labels = PINNED + 1
        self.joined: list[tuple[Labels, Labels]] = []
        self.pinned: list[tuple[Labels, str]] = []
        self.read_alive: list[Labels] = []
        self.fixed = {PINNED}  # labels of which it is known already that they stay
        self.balanced: list[list[Labels]] = []
        # The operators that compute, in order, with the labels of what they return.
        self.steps: list[tuple[str, list[list[Labels] | None]]] = []
        self.labels: dict[int, list[Labels]] = {}
        self.zeros: dict[int, tuple[int, Flags]] = {}
        self.strides: dict[int, tuple[int, ...]] = {}
        self.alive: list[Tensor] = []  # an id belongs to another tensor once its own is gone
        self.in_storage: dict[int, set[int]] = {}  # ids of tensors that share memory
        # Tensors that do not depend on the input, with the parameters that they are made of.
        self.made_of: dict[int, set[str]] = {}
        self.seen: set[int] = set()
        self.inputs_of_grouped: dict[int, Labels] = {}  # by the id of a convolution's weight
        self.named: dict[str, Tensor] = {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }
        self.name_of = {id(tensor): name for name, tensor in self.named.items()}
        for name, tensor in self.named.items():
            self.label(tensor, [self.new(size) for size in tensor.shape])
            self.made_of[id(tensor)] = {name}
        self.convolutions = {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, _ConvNd)
        }

    def new(self, size: int) -> Labels:
        """Labels that no index has yet."""
        self.n_labels += size
        return np.arange(self.n_labels - size, self.n_labels)

    def label(self, tensor: Tensor, labels: Sequence[Labels], zeros: Any = None) -> None:
        """Give a tensor its labels, and the dimension and flags of channels that are zero."""
        self.alive.append(tensor)
        self.in_storage.setdefault(_storage(tensor), set()).add(id(tensor))
        self.labels[id(tensor)] = list(labels)
        self.strides[id(tensor)] = tensor.stride()
        self.zeros.pop(id(tensor), None)
        if zeros is not None:
            self.zeros[id(tensor)] = zeros

    def of(self, tensor: Tensor) -> list[Labels]:
        """The labels of a tensor. One that nothing is known of is pinned."""
        if id(tensor) not in self.labels:
            self.label(tensor, [fixed(size) for size in tensor.shape])
        self.seen.add(id(tensor))
        return self.labels[id(tensor)]

    def zeros_along(self, tensor: Tensor, dim: int) -> Flags:
        """Which indices of a dimension are zero whatever the input is."""
        known = self.zeros.get(id(tensor))
        if known is not None and known[0] == dim:
            return known[1]
        if id(tensor) in self.made_of:
            rows = tensor.detach().movedim(dim, 0).unsqueeze(-1)
            return all_zero(rows, np.arange(rows.shape[1]))
        return np.zeros(tensor.shape[dim], dtype=bool)

    def join(self, a: Labels, b: Labels) -> None:
        """Have indices go together, one by one."""
        if a is not b:
            self.joined.append((a, b))
            a, b = np.broadcast_arrays(a, b)
            self.fixed.update(a[b == PINNED].tolist(), b[a == PINNED].tolist())

    def shared(self, size: int, places: Sequence[tuple[Tensor, int]]) -> Labels:
        """Join a dimension of some size of several tensors, and return labels for it.

        Along a dimension that a tensor was expanded in, as a mask is for all heads, it is the same
        at all indices: any of them may go, and a forward that asks for another size gets it.
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
        return labels[0] if labels and all(each.any() for each in labels) else fixed(size)

    def written(self, tensor: Tensor, depends_on_input: bool) -> None:
        """Forget what is known of the values of all tensors that share memory with this one."""
        for each in self.in_storage.get(_storage(tensor), set()):
            if each != id(tensor):
                self.zeros.pop(each, None)
            if depends_on_input:
                self.made_of.pop(each, None)

    def pin(self, tensor: Tensor, why: str) -> None:
        """Have all indices of a tensor stay."""
        for labels in self.of(tensor):
            self.pinned.append((labels, why))

    def read(self, labels: Labels, sees_zero: Flags) -> None:
        """Take note of a sum over a dimension that sees zero at some indices."""
        self.read_alive.append(labels[~sees_zero])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def fixed(size: int) -> Labels:
    """Labels of a dimension that stays as it is."""
    return np.zeros(size, dtype=np.int64)


def all_zero(rows: Tensor, columns: Labels) -> Flags:
    """Which rows of a tensor hold only zeros in some columns."""
    zero = (rows[:, columns[:1]].flatten(1) == 0).all(1)
    # Few rows are zero in their first column, so that hardly any is read to its end.
    rest = zero.nonzero()[:, 0]
    zero[rest] = (rows[rest][:, columns].flatten(1) == 0).all(1)
    return np.asarray(zero.cpu().numpy())
