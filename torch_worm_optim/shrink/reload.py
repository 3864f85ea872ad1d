"""A shrunk network's `state_dict` loaded into a fresh network, which takes its shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_worm_optim.shrink.cut import Cut
from torch_worm_optim.shrink.resize import states_its_size
from torch_worm_optim.shrink.scatter import SCATTER, WIDTH


def load_shrunk_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the ``state_dict`` of a shrunk network into a fresh one, which takes its shapes.

    An InstanceNorm that has neither parameters nor statistics takes channels as they come. It goes
    on saying how many it was built for, and torch warns of that.

    Args:
        model: The network as it is built, of the dense size.
        state_dict: What ``state_dict()`` of the shrunk network returned, from any file format.

    Raises:
        TypeError: If torch.jit compiled the model.
        ValueError: If it is of another network; the message names a parameter, and the model is
            left as it was.

    Example:
        >>> small = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        >>> load_shrunk_(fresh, small.state_dict())
        >>> fresh[2].in_features
        3
    """
    named = model.state_dict(keep_vars=True).items()
    own = {key: tensor for key, tensor in named if isinstance(tensor, Tensor)}
    # A file may hold a weight once that has several names, as an embedding that is read twice.
    saved_as = {id(tensor): key for key, tensor in own.items() if key in state_dict}
    aliases = {key: saved_as[id(own[key])] for key in own if id(own[key]) in saved_as}
    state_dict = {**{key: state_dict[alias] for key, alias in aliases.items()}, **state_dict}
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
    for key, tensor in own.items():
        entry = state_dict[key]
        if not isinstance(entry, Tensor) or entry.is_meta:
            kind = "a tensor without data" if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(
                f"{key!r} must be a tensor with data, got {kind}. Load the whole file."
            )
        fits = _could_be_cut(modules[key.rpartition(".")[0]], tensor.shape, entry.shape)
        if not fits or entry.shape != state_dict[aliases.get(key, key)].shape:
            raise ValueError(
                f"{another}{key!r} has shape {tuple(entry.shape)}, where the network has "
                f"{tuple(tensor.shape)}. {built}"
            )
    cut = Cut(model)
    try:
        with torch.no_grad():
            for path in scattered:
                width = int(state_dict[f"{path}.{WIDTH}"])
                cut.scatter_(modules[path], state_dict[f"{path}.{SCATTER}"], width)
            for key, tensor in own.items():
                if tensor.shape != state_dict[key].shape:
                    tensor.set_(tensor.new_empty(state_dict[key].shape))  # type: ignore[call-overload]
        cut.sizes.update()
        model.load_state_dict(state_dict)
    except BaseException:
        cut.undo()
        raise


def _could_be_cut(module: nn.Module, before: torch.Size, after: torch.Size) -> bool:
    """Whether shrinking could have made a parameter of a module that small."""
    if before == after or len(before) != len(after) or states_its_size(module):
        return before == after
    n_rows = before[0] if isinstance(module, nn.Embedding) else after[0]
    return after[0] == n_rows and all(a <= b for a, b in zip(after, before, strict=True))
