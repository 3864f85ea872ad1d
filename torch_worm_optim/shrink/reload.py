"""A shrunk network's `state_dict` loaded into a fresh network, which takes its shapes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.shrink.cut import Cut
from torch_worm_optim.shrink.resize import is_conv1d, states_its_size
from torch_worm_optim.shrink.scatter import SCATTER, WIDTH

Shapes = Mapping[str, "tuple[torch.Size, torch.Size]"]  # of entries, before and after


class _Width(NamedTuple):
    """A size of a parameter that is another one in the state_dict."""

    position: int  # of the module, in the order in which they were built
    key: str
    before: int
    after: int
    is_row: bool  # what a layer gives
    is_column: bool  # what it reads
    is_matrix: bool  # of a linear layer, before or behind a flatten


def load_shrunk_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the ``state_dict`` of a shrunk network into a fresh one, which takes its shapes.

    What a network takes and returns is never cut, so one with another number of classes is refused
    where it can be told from the shapes: not where layers read several others side by side, as in a
    DenseNet. An InstanceNorm that has neither parameters nor statistics takes channels as they
    come. It goes on saying how many it was built for, and torch warns of that.

    Args:
        model: The network as it is built, of the dense size.
        state_dict: What ``state_dict()`` of the shrunk network returned, from any file format.

    Raises:
        TypeError: If ``state_dict`` is not a dict, or torch.jit compiled the model.
        ValueError: If it is of another network; the message names a parameter, and the model is
            left as it was. Also if a buffer that is not saved lost channels, and is not equal in
            all of them.

    Example:
        >>> small = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        >>> load_shrunk_(fresh, small.state_dict())
        >>> fresh[2].in_features
        3
    """
    named: Any = model.state_dict(keep_vars=True)
    own = {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}
    _refuse_what_is_around(state_dict, own)
    metadata = getattr(state_dict, "_metadata", named._metadata)
    # A file may hold a weight once that has several names, as an embedding that is read twice.
    saved_as = {id(tensor): key for key, tensor in own.items() if key in state_dict}
    aliases = {key: saved_as[id(own[key])] for key in own if id(own[key]) in saved_as}
    state_dict = OrderedDict(
        {**{key: state_dict[alias] for key, alias in aliases.items()}, **state_dict}
    )
    state_dict._metadata = metadata  # type: ignore[attr-defined]
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = {key for key in state_dict if not key.endswith("_extra_state")} ^ own.keys()
    scattered = []
    for path, module in modules.items():
        extra = {f"{path}.{SCATTER}", f"{path}.{WIDTH}"}
        if isinstance(module, _BatchNorm) and extra <= unknown - own.keys():
            scattered.append(path)
            unknown -= extra
    another = f"The state_dict is of another network than {type(model).__name__}: "
    built = "Build the network as it was built before it was shrunk."
    wrapped = next((key for key in state_dict if canonical_name(key) != key), "")
    if {canonical_name(key) for key in state_dict} == own.keys() != state_dict.keys():
        raise ValueError(
            f"The names of the state_dict have what a wrapper adds, such as {wrapped!r}. Save the "
            "state_dict() of the model inside it, or take the prefix off with "
            "torch.nn.modules.utils.consume_prefix_in_state_dict_if_present."
        )
    if unknown:
        raise ValueError(f"{another}only one of them has {min(unknown)!r}. {built}")
    for key in own:
        entry = state_dict[key]
        if not isinstance(entry, Tensor) or entry.is_meta:
            kind = "a tensor without data" if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(
                f"{key!r} must be a tensor with data, got {kind}. Load the whole file."
            )
    shapes = {key: (tensor.shape, state_dict[key].shape) for key, tensor in own.items()}
    written = {path: int(state_dict[f"{path}.{WIDTH}"]) for path in scattered}
    ends = set(_ends(model, shapes))
    for key, (before, after) in shapes.items():
        fits = _could_be_cut(modules[key.rpartition(".")[0]], before, after) and key not in ends
        if not fits or after != state_dict[aliases.get(key, key)].shape:
            raise ValueError(
                f"{another}{key!r} has shape {tuple(after)}, where the network has "
                f"{tuple(before)}. {built} What it takes and returns is never cut: for another "
                "number of classes, load into a network that has the saved one, and replace its "
                "last layer then."
            )
    buffers = _unsaved(model, own.keys(), shapes)
    cut = Cut(model)
    try:
        with torch.no_grad():
            for path, width in written.items():
                cut.scatter_(modules[path], state_dict[f"{path}.{SCATTER}"], width)
            for key, tensor in own.items():
                if tensor.shape != state_dict[key].shape:
                    tensor.set_(tensor.new_empty(state_dict[key].shape))  # type: ignore[call-overload]
            for buffer, smaller in buffers:
                buffer.set_(smaller)  # type: ignore[call-overload]
        cut.sizes.update()
        model.load_state_dict(state_dict)
    except BaseException:
        cut.undo()
        raise


def _refuse_what_is_around(state_dict: Any, own: Mapping[str, Tensor]) -> None:
    """Raise for the path of a file, and for a checkpoint that the model is a part of."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "`state_dict` must be the dict that `state_dict()` of the shrunk network returned, got "
            f"{type(state_dict).__name__}. Read a file first: "
            "load_shrunk_(model, torch.load(path, weights_only=True))."
        )
    for key, value in state_dict.items():
        if isinstance(value, Mapping) and not own.keys().isdisjoint(value):
            raise ValueError(
                f"`state_dict` is a checkpoint with {sorted(map(str, state_dict))} in it. Pass the "
                f"model's part: load_shrunk_(model, checkpoint[{key!r}])."
            )


def _could_be_cut(module: nn.Module, before: torch.Size, after: torch.Size) -> bool:
    """Whether shrinking could have made a parameter of a module that small."""
    if before == after or len(before) != len(after) or states_its_size(module):
        return before == after
    n_rows = before[0] if isinstance(module, nn.Embedding) else after[0]
    return after[0] == n_rows and all(a <= b for a, b in zip(after, before, strict=True))


def _ends(model: nn.Module, shapes: Shapes) -> Iterator[str]:
    """Layers that give fewer channels that nothing reads, or read fewer that nothing gives."""
    # Each size that is another one: how many modules were built before, and its matrix, if any.
    changed: list[_Width] = []
    for position, (path, module) in enumerate(model.named_modules()):
        is_layer = isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)
        is_transposed = isinstance(module, _ConvTransposeNd) or is_conv1d(module)
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            sizes = zip(*shapes.get(name, (parameter.shape, parameter.shape)), strict=True)
            for dim, (before, after) in enumerate(sizes):
                if before != after:
                    is_row = is_layer and parameter.dim() > 1 and dim == is_transposed
                    is_column = is_layer and parameter.dim() > 1 and dim == 1 - is_transposed
                    is_matrix = isinstance(module, nn.Linear)
                    changed.append(
                        _Width(position, name, before, after, is_row, is_column, is_matrix)
                    )
    for each in changed:
        others = [other for other in changed if other.position != each.position]
        # Most networks build a layer before those that read it, which may read several at once.
        is_end = (each.is_row and all(other.position < each.position for other in others)) or (
            each.is_column and all(other.position > each.position for other in others)
        )
        if is_end and not _is_explained(each, others):
            yield each.key


def _is_explained(width: _Width, others: Sequence[_Width]) -> bool:
    """Whether another layer has that width, a matrix one that a view makes, or two have it."""
    return any(
        (a.before, a.after) == (width.before, width.after)
        or (a.is_matrix and _is_multiple(a, width))
        or (width.is_matrix and _is_multiple(width, a))
        for a in others
    ) or any(
        (a.before + b.before, a.after + b.after) == (width.before, width.after)
        for a, b in itertools.combinations(others, 2)
    )


def _is_multiple(larger: _Width, smaller: _Width) -> bool:
    """Whether one width holds the other a whole number of times, before and after."""
    n = larger.before // smaller.before
    return n > 1 and (larger.before, larger.after) == (n * smaller.before, n * smaller.after)


def _unsaved(model: nn.Module, saved: Any, shapes: Shapes) -> list[tuple[Tensor, Tensor]]:
    """Values for each channel that are not saved and have lost some, and what is left of them."""
    found = []
    for name, buffer in model.named_buffers():
        size = buffer.numel()
        if name in saved or not buffer.is_floating_point() or size not in buffer.shape:
            continue
        after = _became(name, size, shapes)
        if after == size:
            continue
        if (buffer != buffer.flatten()[0]).any():
            raise ValueError(
                f"The buffer {name!r} is not in the state_dict, so nobody knows which {after} of "
                f"its {size} channels are left. Register it with `persistent=True`, shrink, and "
                "save."
            )
        found.append((buffer, buffer.narrow(buffer.shape.index(size), 0, after).clone()))
    return found


def _became(name: str, size: int, shapes: Shapes) -> int:
    """What became of a size in the innermost module around a buffer that has vectors of it."""
    while name:
        name = name.rpartition(".")[0]
        found = {
            (a, b, len(before) == 1)
            for key, (before, after) in shapes.items()
            if key.startswith(f"{name}." if name else "")
            for a, b in zip(before, after, strict=False)
            if a == size
        }
        if any(is_vector for _, _, is_vector in found):
            results = {b for _, b, _ in found}
            return results.pop() if len(results) == 1 else size
    return size
