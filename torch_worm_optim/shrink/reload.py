"""A shrunk network's `state_dict` loaded into a fresh network, which takes its shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torch_worm_optim.shrink.cut import Cut
from torch_worm_optim.shrink.resize import is_conv1d, states_its_size
from torch_worm_optim.shrink.scatter import SCATTER, WIDTH

Shapes = Mapping[str, "tuple[torch.Size, torch.Size]"]  # of entries, before and after


class _Width(NamedTuple):
    """A number of channels that layers give or read, and what it has become."""

    position: int
    key: str
    before: int
    after: int
    is_layer: bool


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
    ends = {each.key for each in _ends(model, shapes, written)}
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


def _ends(model: nn.Module, shapes: Shapes, written: Mapping[str, int]) -> Iterator[_Width]:
    """Layers that give fewer channels that nothing reads, or read fewer that nothing gives."""
    given, read = [], []
    for position, (path, module) in enumerate(model.named_modules()):
        is_layer = isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            before, after = shapes.get(name, (parameter.shape, parameter.shape))
            widths = [
                _Width(position, name, *sizes, is_layer)
                for sizes in zip(before, after, strict=False)
            ]
            if path in written:  # A BatchNorm that writes by index what it is given.
                read += widths[:1]
                given.append(_Width(position, name, before[0], written[path], False))
            elif isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels:
                continue
            elif len(widths) > 1:
                is_transposed = isinstance(module, _ConvTransposeNd) or is_conv1d(module)
                is_transposed |= isinstance(module, nn.Embedding)
                dims = (1, 0) if is_transposed else (0, 1)
                given += [widths[dims[0]]] if is_layer else widths
                read += [widths[dims[1]]] if is_layer else widths
    given, read = ([each for each in side if each.before != each.after] for side in (given, read))
    for own, others, sign in ((given, read, 1), (read, given, -1)):
        for each in own:
            # Most networks build a layer before those that read it. Where they do not, its width
            # may be a part of theirs, unless all of theirs are those of other layers.
            if (
                each.is_layer
                and all(sign * (each.position - other.position) >= 0 for other in others)
                and not any(_in_step(each, other) for other in others if other.key != each.key)
                and all(
                    any(_in_step(one, other, whole=True) for one in own if one is not each)
                    for other in others
                )
            ):
                yield each


def _in_step(a: _Width, b: _Width, whole: bool = False) -> bool:
    """Whether the same share of two widths is left; and whether one holds the other n times."""
    is_multiple = a.before % b.before == 0 or b.before % a.before == 0
    return a.before * b.after == b.before * a.after and (is_multiple or not whole)


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
