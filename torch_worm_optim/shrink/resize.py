"""Modules that say what sizes their parameters have, when those become others.

A layer such as ``nn.Linear`` states its sizes in attributes that nothing but its ``repr`` may read;
a grouped convolution, a PReLU and an attention layer compute with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torch_worm_optim.selectors import HEAD_COUNTS, Block, attention_blocks, unknown_fused

# How attention modules call the number of their heads, and how the channels of all heads together.
_HEADS = (*HEAD_COUNTS, "num_key_value_heads", "num_kv_heads", "num_attn_heads", "no_heads")
_CHANNELS = (
    *("all_head_size", "attn_dim", "inner_dim", "inner_size", "embed_dim", "hidden_size"),
    *("hidden_dim", "d_model", "dim", "split_size", "val_attn_dim"),
)
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_parameters", "embedding_dim", "nx", "nf"),
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D``, a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _is_resizable(module: nn.Module) -> bool:
    """Whether a module works with parameters of other sizes once :meth:`Sizes.fit` has run."""
    kinds = (_ConvNd, nn.Linear, _BatchNorm, nn.PReLU, nn.Embedding)
    return isinstance(module, kinds) or is_conv1d(module)


def states_its_size(module: nn.Module) -> bool:
    """Whether it is a layer of torch that computes with sizes that are not set here.

    Args:
        module: Any module.

    Returns:
        Whether its parameters must keep their shapes.

    Example:
        >>> states_its_size(nn.LayerNorm(3)), states_its_size(nn.Linear(3, 2))
        (True, False)
    """
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return kinds[0] is not nn.Module and not _is_resizable(module)


class _Attention(NamedTuple):
    """An attention layer: what makes its heads, and what it says of them.

    Attributes:
        module: The layer.
        projections: What makes queries, keys and values, and how many output features the weight of
            each has.
        widths: How many channels all queries together may have, all keys, all values.
    """

    module: nn.Module
    projections: list[tuple[Block, int]]
    widths: set[int]


class Sizes:
    """What the modules of a model say of the sizes that they have now.

    Args:
        model: Any model.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> sizes = Sizes(layer)
        >>> _ = layer.weight.requires_grad_(False).set_(layer.weight[:, :2].clone())
        >>> sizes.fit()
        >>> layer.in_features
        2
        >>> sizes.restore()
        >>> layer.in_features
        3
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attention = [each for m in model.modules() if (each := _attention(m)).projections]
        attention = {id(each.module) for each in self._attention}
        self._attributes: list[tuple[nn.Module, Mapping[str, int]]] = [
            (module, {key: vars(module)[key] for key in names if _is_size(vars(module).get(key))})
            for module in model.modules()
            for names in [(*_HEADS, *_CHANNELS) if id(module) in attention else _SIZES]
            if id(module) in attention or _is_resizable(module)
        ]

    def fit(self) -> None:
        """Have modules say of their sizes what their parameters are."""
        _tell_compiler(self._model)
        for module in self._model.modules():
            _fit(module)
        said = {id(module): sizes for module, sizes in self._attributes}
        for each in self._attention:
            _fit_heads(each, said[id(each.module)])

    def restore(self) -> None:
        """Have modules say what they said at first."""
        for module, sizes in self._attributes:
            for key, value in sizes.items():
                setattr(module, key, value)
        _tell_compiler(self._model)


def _tell_compiler(model: nn.Module) -> None:
    """Have torch.compile look at the shapes of parameters and buffers again.

    It does so, in torch 2.11 at least, only for modules whose dicts of them have changed.
    """
    for module in model.modules():
        dicts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in dicts:
            for name in list(tensors):
                tensors[name] = tensors.pop(name)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _attention(module: nn.Module) -> _Attention:
    """What is known of a module if it is an attention layer."""
    try:
        blocks = [block for block in attention_blocks("", module, {}) if not block.is_bias]
        # What all heads share, on the way down to few dimensions, belongs to none of them.
        latent = {id(b.parameter) for b in blocks if b.label.endswith(("_rank", "latent"))}
        blocks = [block for block in blocks if id(block.parameter) not in latent]
        widths = {block.n_features for block in blocks}
    except ValueError:  # a fused matrix whose layout only the user knows
        name = unknown_fused(module)
        weight = module.get_parameter(name)
        n = len(weight)
        blocks = [Block("", name, weight, 0, weight.ndim - 1, repeat=1, start=0, stop=n)]
        widths = {n, n // 2, n // 3}
    return _Attention(module, [(block, block.split_shape[1]) for block in blocks], widths)


def _fit(module: nn.Module) -> None:
    """Have a layer say of its sizes what its parameters are."""
    if isinstance(module, _ConvNd):
        shape = module.weight.shape
        if module.groups == module.in_channels and module.groups > 1:
            multiplier = module.out_channels // module.in_channels
            module.groups = module.in_channels = shape[0] // multiplier
            module.out_channels = shape[0]
        elif isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
        else:
            module.in_channels, module.out_channels = shape[1] * module.groups, shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm):
        statistics = module.weight if module.weight is not None else module.running_mean
        if statistics is not None:
            module.num_features = len(statistics)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif is_conv1d(module):
        sizes: Any = module
        sizes.nx, sizes.nf = sizes.weight.shape


def _fit_heads(attention: _Attention, said: Mapping[str, int]) -> None:
    """Set numbers of heads and channels, if all projections have lost the same share of rows."""
    shares = {Fraction(block.split_shape[1], before) for block, before in attention.projections}
    if len(shares) != 1:
        return
    [share] = shares
    for key, value in said.items():
        # A number of channels is that of the heads where it equals it: `hidden_size` of a layer may
        # be the width of its input, too, and then the forward that reads it fails, and heads stay.
        if (key in _HEADS or value in attention.widths) and (value * share).denominator == 1:
            setattr(attention.module, key, int(value * share))
