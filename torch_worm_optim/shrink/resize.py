"""Modules that say what sizes their parameters have, when those become others.

A layer such as ``nn.Linear`` states its sizes in attributes that nothing but its ``repr`` may read;
a grouped convolution, a PReLU and an attention layer compute with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

# How attention modules call the number of their heads, and how the channels of all heads together.
_HEADS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"),
    *("num_key_value_heads", "num_kv_heads", "num_attn_heads", "no_heads"),
)
_CHANNELS = (
    *("all_head_size", "attn_dim", "inner_dim", "inner_size", "embed_dim", "hidden_size"),
    *("hidden_dim", "d_model", "dim", "split_size", "val_attn_dim"),
)
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_parameters", "embedding_dim", "nx", "nf"),
)
# How blocks call sizes of their convolutions that they fuse those with, and what those call them.
_FUSED = {
    **dict.fromkeys(("in_channels", "in_chs", "dim"), "in_channels"),
    **dict.fromkeys(("out_channels", "out_chs", "dim_out"), "out_channels"),
    "groups": "groups",
}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D``, a linear layer whose weight is transposed."""
    is_called_so = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return is_called_so and isinstance(getattr(module, "nf", None), int)


def states_its_size(module: nn.Module) -> bool:
    """Whether it is a layer of torch that computes with sizes that are not set here."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, ParametrizationList):
        return not all(isinstance(each, (_SpectralNorm, _WeightNorm)) for each in module)
    kinds = (k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules."))
    resizable = (_ConvNd, nn.Linear, _NormBase, nn.PReLU, nn.Embedding)
    return next(kinds) is not nn.Module and not isinstance(module, resizable)


def _weight_of(module: Any) -> Any:
    """A layer's weight, or what it is computed from that has its shape; None if it stays."""
    if is_parametrized(module, "weight"):
        makers = module.parametrizations.weight
        return None if states_its_size(makers) else list(makers.parameters(recurse=False))[-1]
    own = {**module._parameters, **module._buffers}
    found = (own.get(key) for key in ("weight", "weight_orig", "weight_v"))
    return next((each for each in found if each is not None), None)


def rows_of(module: Any) -> Any:
    """What tells which rows of a layer's weight are zero: the weight, or a norm's scale of them."""
    if is_parametrized(module, "weight"):
        makers = module.parametrizations.weight
        return None if states_its_size(makers) else next(makers.parameters(recurse=False))
    found = (module._parameters.get(key) for key in ("weight", "weight_orig", "weight_g"))
    return next((each for each in found if each is not None), None)


class Sizes:
    """What the modules of a model say of the sizes that their parameters have now."""

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "The layers of a model that torch.jit compiled cannot be given other sizes, got a "
                f"{type(model).__name__}. Shrink the Python module that it was made of, and script "
                "or trace that afterwards."
            )
        python = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        keys = {*_HEADS, *_CHANNELS, *_SIZES, *_FUSED}
        self._said = {
            module: {k: v for k, v in vars(module).items() if k in keys and type(v) is int}
            for module in python
        }
        # The matrices of each attention layer, with how many features those give and read.
        self._matrices: dict[nn.Module, list[tuple[nn.Module, str, int, int]]] = {}
        owners: dict[str, nn.Module | None] = {}  # the innermost that says how many heads it has
        for path, module in model.named_modules():
            if module not in self._said:
                continue
            has_heads = not self._said[module].keys().isdisjoint(_HEADS)
            owner = owners[path] = module if has_heads else owners.get(path.rpartition(".")[0])
            for name, weight in module.named_parameters(recurse=False):
                if owner is not None and weight.dim() > 1:
                    matrix = (module, name, *_features(module, name))
                    self._matrices.setdefault(owner, []).append(matrix)

    def update(self) -> None:
        """Have modules say of their sizes what their parameters are."""
        _tell_compiler(self._said)
        for module in self._said:
            _update(module)
        for module in self._said:
            if hasattr(module, "fuse") or hasattr(module, "reparameterize"):
                self._update_fused(module)
        for attention, matrices in self._matrices.items():
            # The last of several reads what the heads give, or is one of several values.
            makers = matrices[:-1] or matrices
            rows = [(n, _features(module, name)[0]) for module, name, n, _ in makers]
            changed = [(before, after) for before, after in rows if after != before]
            shares = {Fraction(after, before) for before, after in changed}
            if len(shares) != 1:
                continue
            [share] = shares
            # Queries, keys and values may lie in one matrix.
            widths = {before // n for before, _ in changed for n in (1, 2, 3)} | {matrices[-1][3]}
            for key, value in self._said[attention].items():
                is_width = key in _CHANNELS and value in widths
                if (key in _HEADS or is_width) and (value * share).denominator == 1:
                    setattr(attention, key, int(value * share))

    def _update_fused(self, block: nn.Module) -> None:
        """Have a block say of its convolutions what they do; of depthwise ones, if it has some."""
        said = {m: self._said[m] for m in block.modules() if isinstance(m, _ConvNd)}
        for key, value in self._said[block].items():
            named = _FUSED.get(key)
            for name in ("groups", named) if named and value > 1 else ():
                now = {getattr(m, name) for m, sizes in said.items() if sizes[name] == value}
                if now:
                    setattr(block, key, now.pop() if len(now) == 1 else value)
                    break

    def restore(self) -> None:
        """Have modules say what they said at first."""
        for module, sizes in self._said.items():
            for key, value in sizes.items():
                setattr(module, key, value)
        _tell_compiler(self._said)


def _features(module: nn.Module, name: str) -> tuple[int, int]:
    """How many features a matrix gives, and how many it reads."""
    a, b, *_ = getattr(module, name).shape
    return (b, a) if is_conv1d(module) else (a, b)


def _tell_compiler(modules: Iterable[nn.Module]) -> None:
    """Have torch.compile look at shapes again, as it does where dicts of parameters change."""
    for module in modules:
        dicts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in dicts:
            for name in list(tensors):
                tensors[name] = tensors.pop(name)


def _update(module: Any) -> None:
    """Have a layer say of its sizes what its parameters are."""
    weight = _weight_of(module)
    if isinstance(module, _NormBase):
        statistics = weight if weight is not None else module.running_mean
        if statistics is not None:
            module.num_features = len(statistics)
    elif weight is None:
        return
    elif isinstance(module, _ConvNd):
        shape = weight.shape
        if isinstance(module, _ConvTransposeNd):
            if module.groups == module.in_channels > 1:
                module.groups = shape[0]
            module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
        elif module.groups == module.in_channels and module.groups > 1:
            multiplier = module.out_channels // module.in_channels
            module.groups = module.in_channels = shape[0] // multiplier
            module.out_channels = shape[0]
        else:
            module.in_channels, module.out_channels = shape[1] * module.groups, shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif is_conv1d(module):
        module.nx, module.nf = weight.shape


@contextlib.contextmanager
def widths_of_inputs(model: nn.Module) -> Iterator[None]:
    """While it runs, have InstanceNorms without parameters say how many channels they are given."""
    widths: dict[Any, int] = {}

    def take(module: Any, args: Any) -> None:
        for x in args:
            widths[module] = module.num_features = x.shape[x.dim() - module._get_no_batch_dim()]

    norms = [each for each in model.modules() if isinstance(each, _InstanceNorm)]
    hooks = [each.register_forward_pre_hook(take) for each in norms if not each.state_dict()]
    try:
        yield
    finally:
        for module, width in widths.items():  # a pass puts back what it was
            module.num_features = width
        for hook in hooks:
            hook.remove()
