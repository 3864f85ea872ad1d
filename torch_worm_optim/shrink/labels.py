"""What is known of the tensors of a watched forward pass: labels of their indices, and zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Zeros = tuple[int, Flags]  # a dimension, and which of its indices are zero whatever the input is

# The label of all that must stay: spatial dimensions, inputs, outputs.
PINNED = 0


class Limits(NamedTuple):
    """What may be cut, and how."""

    cut_splits: bool = True  # lose channels that are split into parts, as many from each
    cut_heads: bool = True  # lose runs of channels that a view makes an index of
    multiple_of: int = 1
    scattered: Sequence[str] = ()  # scales of BatchNorms that write into a wider tensor by index
    stay: Mapping[
        Any, str
    ] = {}  # places of operators of which all stays that they touch, see trace


@dataclass
class Info:
    """What is known of one tensor; `constant_of` names the parameters that alone it is made of."""

    labels: list[Labels]
    storage: int
    strides: tuple[int, ...] = ()
    zeros: Zeros | None = None
    constant_of: frozenset[str] | None = None
    is_zero: bool = False  # made of zeros by the forward, and nothing was written there since
    is_used: bool = False
    group_inputs: Labels | None = None  # of a grouped convolution's weight: its input channels


class LabelMap:
    """The labels of all tensors of a pass, and what joins, reads and pins them."""

    def __init__(self, model: nn.Module, limits: Limits) -> None:
        self.limits = limits
        self.n_labels = PINNED + 1
        self.joined: list[tuple[Labels, Labels]] = []
        self.pins: list[tuple[Labels, str]] = []
        self.joined_to_pinned: list[tuple[Labels, str]] = []
        self.live_reads: list[tuple[Labels, str]] = []
        self.losses: list[tuple[Labels, str]] = []  # where zeros end, and why
        self.dead_reads: list[Labels] = []
        self.balanced: list[list[Labels]] = []
        self.operator = ""  # the one that is being labelled
        self._joined_to_pinned = {PINNED}
        # Activations are known as long as the forward itself keeps them.
        self._infos: Any = WeakIdKeyDictionary()
        self.named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.saved = set(model.state_dict(keep_vars=True))
        self.scattered = {id(self.named[name]) for name in limits.scattered}
        self.convolutions = {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, _ConvNd)
        }
        filters = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
        for name, tensor in self.named.items():
            n_free = 2 if id(tensor) in filters else tensor.dim()  # all others are spatial
            labels = [self.new(size) for size in tensor.shape[:n_free]]
            self.label(tensor, labels + [pinned(size) for size in tensor.shape[n_free:]])
            self._infos[tensor].constant_of = frozenset({name})

    def new(self, size: int) -> Labels:
        """Labels that no index has yet."""
        self.n_labels += size
        return np.arange(self.n_labels - size, self.n_labels)

    def label(self, tensor: Tensor, labels: Sequence[Labels], zeros: Zeros | None = None) -> None:
        """Give a tensor its labels, and the indices of a dimension that are zero."""
        info = self._infos.get(tensor)
        if info is None:
            info = self._infos[tensor] = Info([], memory_of(tensor))
        info.labels = list(labels)
        info.strides = tensor.stride() if tensor.layout == torch.strided else ()
        info.zeros = zeros if zeros is not None and zeros[1].any() else None
        info.is_zero = False

    def info(self, tensor: Tensor) -> Info:
        """What is known of a tensor. One that nothing is known of is pinned."""
        if tensor not in self._infos:
            self.label(tensor, [pinned(size) for size in tensor.shape])
        info: Info = self._infos[tensor]
        return info

    def labels_of(self, tensor: Tensor) -> list[Labels]:
        """The labels of a tensor."""
        return self.info(tensor).labels

    def known_labels(self, tensor: Tensor) -> list[Labels] | None:
        """The labels of a tensor, if anything is known of it."""
        info = self._infos.get(tensor)
        return None if info is None else info.labels

    def told_labels(self, tensor: Tensor) -> list[Labels | None] | None:
        """The same, but of a dimension that was expanded, of which any index may go."""
        labels = self.known_labels(tensor)
        if labels is None or tensor.layout != torch.strided:
            return None
        strides = zip(labels, tensor.stride(), strict=True)
        return [own if stride or own.any() else None for own, stride in strides]

    def zeros_along(self, tensor: Tensor, dim: int) -> Flags:
        """Which indices of a dimension are zero whatever the input is."""
        known = self.known_zeros(tensor, dim)
        is_constant = self.info(tensor).constant_of is not None
        if is_constant and tensor.layout == torch.strided and not known.any():
            rows = tensor.detach().movedim(dim, 0).unsqueeze(-1)
            return all_zero(rows, np.arange(rows.shape[1]))
        return known

    def known_zeros(self, tensor: Tensor, dim: int) -> Flags:
        """The same, of one that depends on the input."""
        zeros = self.info(tensor).zeros
        if zeros is not None and zeros[0] == dim:
            return zeros[1]
        return np.zeros(tensor.shape[dim], dtype=bool)

    def join(self, a: Labels, b: Labels) -> None:
        """Have indices go together, one by one."""
        if a is not b:
            a, b = (each.ravel() for each in np.broadcast_arrays(a, b))
            fixed = (a == PINNED) | (b == PINNED)
            if fixed.any():
                staying = (a + b)[fixed]
                why = f"goes with something that stays, in `{self.operator}`"
                self.joined_to_pinned.append((staying, why))
                self._joined_to_pinned.update(staying.tolist())
                a, b = a[~fixed], b[~fixed]
            self.joined.append((a, b))

    def broadcast_join(self, size: int, places: Sequence[tuple[Tensor, int]]) -> Labels:
        """Join a dimension of some size of several tensors, and return labels for it."""
        # A mask that was expanded for all heads is the same for each: any of them may go.
        of_places = [(self.labels_of(tensor)[d], tensor.stride(d)) for tensor, d in places]
        labels = [each for each, stride in of_places if stride != 0 or each.any()]
        for each in labels[1:]:
            self.join(labels[0], each)
        # Where indices of one are known to stay, they do in all.
        return labels[0] if labels and all(each.any() for each in labels) else pinned(size)

    def invalidate(self, tensor: Tensor, depends_on_input: bool) -> None:
        """Forget what is known of the values of tensors that share memory with a written one."""
        own = self.info(tensor)
        for info in self._infos.values():
            if info.storage == own.storage:
                if info is not own:
                    info.zeros, info.is_zero = None, False
                if depends_on_input:
                    info.constant_of = None

    def pin(self, labels: Labels, why: str) -> None:
        """Have indices stay."""
        self.pins.append((labels, why))

    def pin_all(self, tensor: Tensor, why: str) -> None:
        """Have all indices of a tensor stay."""
        self.pins += [(labels, why) for labels in self.labels_of(tensor)]

    def all_stay(self, labels: Labels) -> bool:
        """Whether it is known already that these stay."""
        return self._joined_to_pinned.issuperset(labels.tolist())

    def read(self, labels: Labels, sees_zero: Flags) -> None:
        """Take note of a sum over a dimension that sees zero at some indices."""
        why = f"`{self.operator}` reads more than zeros of it"
        self.live_reads.append((labels[~sees_zero], why))
        self.dead_reads.append(labels[sees_zero])

    def lose(self, labels: Labels, why: str) -> None:
        """Take note of why indices that were zero are so no longer."""
        if len(labels):
            self.losses.append((labels, why))


def memory_of(tensor: Tensor) -> int:
    """What tells tensors that share memory; a sparse one shares none that is known."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of what a model returns, those that its objects hold included."""
    found: list[Tensor] = []
    seen: set[int] = set()
    trees = [outputs]
    for tree in trees:  # which grows
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, np.ndarray):
                found.append(torch.as_tensor(leaf))
            # What a decoder remembers of keys and values gets smaller with its heads.
            elif hasattr(leaf, "__dict__") and not type(leaf).__name__.endswith("Cache"):
                if id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
                    trees.append(list(vars(leaf).values()))
                seen.add(id(leaf))
    return found


def pinned(size: int) -> Labels:
    """Labels of a dimension that stays as it is."""
    return np.zeros(size, dtype=np.int64)


def all_zero(rows: Tensor, columns: Labels) -> Flags:
    """Which rows of a tensor hold only zeros in some columns."""
    zero = (rows[:, columns[:1]].flatten(1) == 0).all(1)
    # Few rows are zero in their first column, so that hardly any is read to its end.
    rest = zero.nonzero()[:, 0]
    zero[rest] = (rows[rest][:, columns].flatten(1) == 0).all(1)
    return np.asarray(zero.cpu().numpy())


def arguments_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by name, with the defaults of those that were not given."""
    arguments = func._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**defaults, **dict(zip((e.name for e in arguments), args, strict=False)), **kwargs}
