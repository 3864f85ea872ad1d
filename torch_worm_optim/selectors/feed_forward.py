"""Hidden units of feed-forward blocks: what a transformer holds most of."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_worm_optim.selectors.attention import (
    Block,
    parameters_at,
    parse_layout,
    refuse_computed,
)
from torch_worm_optim.selectors.projections import Layouts, layouts_by_class
from torch_worm_optim.selectors.representative import (
    LEAVE_IT_OUT,
    JoinableSelector,
    Part,
    Representative,
)

# A layout says what the output features of each weight are, in the notation of `layouts.py`: ``up``
# and ``gate`` make the hidden units, ``between`` does something to each of them alone on the way to
# ``down``, and any other name is nothing to the block.

# Names that mean the same in every class that has all of them, if their sizes fit.
_BY_NAMES: tuple[Layouts, ...] = (
    *(
        {gate: "gate", up: "up", down: "down"}
        for gate, up, down in (
            ("gate_proj", "up_proj", "down_proj"),
            ("proj_up_gate", "proj_up", "proj_down"),
            ("wi_0", "wi_1", "wo"),
            ("w1", "w3", "w2"),
            ("w0", "w1", "w2"),
            ("w_in.w_0", "w_in.w_1", "w_out"),
            ("fc1_g", "fc1_x", "fc2"),
            ("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
        )
    ),
    *(
        {both: "gate up", down: "down"}
        for both, down in (
            ("gate_up_proj", "down_proj"),
            ("input_linear", "output_linear"),
            ("w12", "w3"),
        )
    ),
    *(
        {up: "up", down: "down"}
        for up, down in (
            ("intermediate.dense", "output.dense"),
            ("layout_intermediate.dense", "layout_output.dense"),  # LiLT has both
            ("intermediate.conv1d", "output.conv1d"),
            ("dense.dense", "output.dense"),
            ("intermediate", "output"),
            ("intermediate_dense", "output_dense"),
            ("dense_h_to_4h", "dense_4h_to_h"),
            ("up_proj", "down_proj"),
            ("gate_proj", "down_proj"),
            ("fc1", "fc2"),
            ("fc_in", "fc_out"),
            ("ff_in", "ff_out"),
            ("c_fc", "c_proj"),
            ("lin1", "lin2"),
            ("linear1", "linear2"),
            ("linear_1", "linear_2"),
            ("linear_fc1", "linear_fc2"),
            ("layer_1", "layer_2"),
            ("ffw_layer_1", "ffw_layer_2"),
            ("ffn", "ffn_output"),
            ("dense1", "dense2"),
            ("wi", "wo"),
            ("w_1", "w_2"),
            ("w1", "w2"),
        )
    ),
)


def _in_split(module: Any) -> str:
    return f"up={module.in_split[0]} q k v"


_FUSED: Layouts = {"fc1": "gate up", "fc2": "down"}

# Everything else, by class: the package (for timm, the file too) and the name of the class.
_BY_CLASS: dict[str, Layouts] = {
    "transformers.AXK2GateMLP": {},  # a gate of a norm
    "transformers.JetMoeMoA": {},  # heads of attention
    "transformers.KyutaiSpeechToTextGatingMLP": _FUSED,
    "transformers.MoshiGatingMLP": _FUSED,
    "transformers.ModernBertMLP": {"Wi": "up gate", "Wo": "down"},
    "transformers.ModernBertDecoderMLP": {"Wi": "up gate", "Wo": "down"},
    # Each use of the shared block adds something of its own to the up projection and the gate.
    "transformers.Zamba2MLP": {
        "gate_up_proj": "gate up",
        "gate_up_proj_adapter_list.*.1": "gate up",
        "down_proj": "down",
    },
    "transformers.RwkvFeedForward": {"key": "up", "value": "down"},
    "timm.efficientformer_v2.ConvMlpWithNorm": {"fc1.conv": "up", "fc2.conv": "down"},
    "timm.efficientvim.FFN": {"fc1.conv": "up", "fc2.conv": "down"},
    "timm.efficientvit_msra.ConvMlp": {"pw1.conv": "up", "pw2.conv": "down"},
    "timm.iformer.FFN": {"mixer.module.0.c": "up", "mixer.module.2.c": "down"},
    "timm.levit.LevitMlp": {"ln1.linear": "up", "ln2.linear": "down"},
    "timm.mlp.GluMlp": _FUSED,
    "timm.mlp.GatedMlp": {"fc1": "up gate", "fc2": "down"},
    "timm.repvit.RepVitMlp": {"conv1.c": "up", "conv2.c": "down"},
    "timm.shvit.FFN": {"pw1.c": "up", "pw2.c": "down"},
    "timm.vision_transformer.ParallelScalingBlock": {"in_proj": _in_split, "mlp_bias": "up"},
    "timm.vision_transformer.DiffParallelScalingBlock": {"in_proj": _in_split, "mlp_bias": "up"},
    "timm.vgg.ConvMlp": {},  # a head
    "timm.visformer.SpatialMlp": {
        "conv1": lambda module: "read" if module.spatial_conv else "up",
        "conv2": "up",
        "conv3": "down",
    },
    "diffusers.FeedForward": {
        "net.0.proj": lambda module: "up gate" if "GLU" in type(module.net[0]).__name__ else "up",
        "net.2": "down",
    },
}

_LIKE = re.compile(r"mlp|feed_?forward|ffn|ffwd", re.IGNORECASE)  # names of classes and modules
# Pairs of matrices that are no part of a residual stream, though their names may be alike; and what
# makes weights of channels or positions, with all that is in it.
_OTHERWISE = re.compile(
    r"Router|(Head|Classifier|Pooler|Merger|Projector|Adapter|Embed(der|dings?)?)$"
)
_WEIGHTS = re.compile(
    r"Attn$|RelPosMlp|^SE[A-Z]|Excit|ChannelAtt|GlobalContext|^(cpb|meta|pos\w*)_mlp$"
)
_ACTIVATION = re.compile(r"(^|_)(act|activation|non_?linearity)(_|\d|$)")
_MAKE_UNITS = ("up", "gate", "between")
# What makes nothing of one unit out of another.
_ONE_BY_ONE = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd, nn.PReLU)


@dataclass(frozen=True)
class FeedForwardSelector(JoinableSelector):
    """Select the hidden units of every feed-forward block, which stay or go whole.

    A unit is a row of the up projection and, in gated blocks, the same row of the gate; its biases
    follow. Once they are zero the unit is zero for every input, and the column of the down
    projection that reads it does nothing. Together with the heads of
    :class:`~torch_worm_optim.QueryKeySelector` these are the units of EarlyBERT [1]. Blocks of
    torch, transformers and timm are recognised by the names and sizes of their matrices, in any
    class; a class that is called like a feed-forward block and is not understood raises. State it
    with ``layouts``, in one line.

    Args:
        layouts (Mapping, optional): Layouts of further classes by the name of the class, each a
            mapping from the path of a weight in it to what its output features are:
            ``{"MyMLP": {"expand": "up", "contract": "down"}}``, with a ``"gate"`` of its own, or
            ``"gate up"`` and ``"up gate"`` for two halves of one matrix. ``"between"`` is what
            works on every unit alone: a scale, a depthwise convolution. ``{"MyMLP": {}}`` leaves
            the class out.

    Raises:
        ValueError: When the model has no block that is known, or one that is not understood; when a
            unit of zeros would still have a say (its activation does not map 0 to 0, a norm mixes
            it with others); when experts share one tensor.

    Example:
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=32)
        >>> FeedForwardSelector()(layer)
        [Representative(Part('linear1.weight', units=(32,)), followers=('linear1.bias',))]

        With the heads of attention, as in EarlyBERT:

        >>> from torch_worm_optim import QueryKeySelector
        >>> heads = QueryKeySelector(value=True, granularity="head")
        >>> [each.name for each in (heads | FeedForwardSelector())(layer)]
        ['self_attn.in_proj_weight', 'linear1.weight']

    References:
        [1] Chen et al., "EarlyBERT", ACL 2021, https://arxiv.org/abs/2101.00063.
    """

    layouts: Mapping[str, Layouts] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The hidden units of ``model``, block by block."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, Representative] = {}  # a block that two layers share is selected once
        for path, module, layout in self._understood(model):
            blocks = feed_forward_blocks(path, module, layout)
            refuse_computed(path, module, blocks, names)
            parts = [(block, _as_units(block, names[id(block.parameter)])) for block in blocks]
            ranked = [part for b, part in parts if b.label != "between" and not b.is_bias]
            others = [part for b, part in parts if b.label == "between" or b.is_bias]
            found.setdefault(ranked[0].name + str(ranked[0].index), Representative(ranked, others))
        if not found:
            raise ValueError(
                f"FeedForwardSelector found no feed-forward block in {type(model).__name__}. "
                f"{LEAVE_IT_OUT}"
            )
        return list(found.values())

    def _understood(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Layouts]]:
        """The blocks and their layouts, once nothing that looks like one is left."""
        modules = dict(model.named_modules())
        layouts = {
            path: _layouts_of(module, path, modules, self.layouts)
            for path, module in modules.items()
        }
        for path, module in modules.items():
            own = layouts[path]
            if own is not None:
                yield from ((path, module, layout) for layout in own if layout)
            elif not any(
                layouts[inner] is not None
                for inner in layouts
                if inner != path and inner.startswith(f"{path}." if path else "")
            ):
                _refuse_if_alike(path, module)


def feed_forward_blocks(path: str, module: nn.Module, layout: Layouts) -> list[Block]:
    """What makes the hidden units of one block, weights and biases.

    Args:
        path: The block's path in its model, for messages.
        module: The block, or a layer that has its matrices.
        layout: What the output features of its weights are.

    Returns:
        What is labelled ``up``, ``gate`` or ``between``, and what stands between without a label.

    Raises:
        ValueError: If the layout does not fit, or a unit of zeros would not be without influence.
    """
    kind = type(module).__name__
    where = f"{path or 'the model'!r} ({kind})"
    leave_it_out = f'FeedForwardSelector(layouts={{"{kind}": {{}}}})'
    blocks = []
    for name, parameter, text, runs in _read(module, layout):
        if _is_of_experts(module, name, parameter):
            _refuse_experts(where, leave_it_out, name, parameter)
        try:
            blocks += list(runs)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"The layout {text!r} does not fit {name!r} of {where}, which has shape "
                f"{tuple(parameter.shape)}: {error} State what it is with "
                "FeedForwardSelector(layouts=...)."
            ) from error
    sizes = _hidden_sizes(module, blocks)
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"The layout {dict(layout)} does not fit {where}: it needs an `up`, and as many hidden "
            f"units wherever they are made or read, got {sizes or 'none'}. State what it is with "
            "FeedForwardSelector(layouts=...)."
        )
    blocks = [block for block in blocks if block.label in _MAKE_UNITS]
    up = next(block for block in blocks if block.label == "up" and not block.is_bias)
    units = (
        f"The {up.n_features} hidden units of {where}, made by {up.path!r} of shape "
        f"{tuple(up.parameter.shape)},"
    )
    for name, inner in _between(module, blocks, up):
        if not isinstance(inner, _ONE_BY_ONE):
            raise ValueError(
                f"{units} pass through {name!r} ({type(inner).__name__}), where a unit of zeros "
                f"has a say in what becomes of the others. Leave it out: {leave_it_out}."
            )
        for own, parameter in inner.named_parameters(name):
            n_after = parameter.ndim - 1
            blocks.append(Block("between", own, parameter, 0, n_after, 1, 0, up.n_features))
    if not any(block.label == "gate" for block in blocks):
        for name, activation in _activations(module, up):
            if not _keeps_zero(activation):
                raise ValueError(
                    f"{units} pass through {name!r} ({_name_of(activation)}), which does not map 0 "
                    f"to 0. Leave it out: {leave_it_out}."
                )
    return blocks


def _read(module: nn.Module, layout: Layouts) -> Iterator[tuple[str, Tensor, str, Iterator[Block]]]:
    """Each parameter with its layout, and the blocks that the layout cuts it into."""
    for pattern, label in layout.items():
        text = label if isinstance(label, str) else label(module)
        for name, parameter, n_before, n_after in parameters_at(module, pattern):
            n_features = math.prod(parameter.shape[n_before : parameter.ndim - n_after])
            runs = (
                Block(run[0], name, parameter, n_before, n_after, *run[1:])
                for run in parse_layout(text, n_features, module)
            )
            yield name, parameter, text, runs


def _n_inputs(module: nn.Module, block: Block) -> int:
    """Input features of a weight."""
    groups = getattr(_at(module, block.path.rpartition(".")[0]), "groups", 1)
    return int(block.parameter.shape[0 if block.n_before else 1] * groups)


def _hidden_sizes(module: nn.Module, blocks: list[Block]) -> dict[str, int]:
    """How many hidden units each parameter makes or reads; none where no weight makes any."""
    if not any(block.label == "up" and not block.is_bias for block in blocks):
        return {}
    sizes = {f"{b.label} {b.path}": b.n_features for b in blocks if b.label in _MAKE_UNITS}
    read = {
        f"down {b.path}": _n_inputs(module, b)
        for b in blocks
        if b.label == "down" and not b.is_bias
    }
    return {**sizes, **read}


def _layouts_of(
    module: nn.Module, path: str, modules: Mapping[str, nn.Module], layouts: Mapping[str, Layouts]
) -> list[Layouts] | None:
    """Layouts of a module: the user's, the table's by class, or those that names and sizes tell.

    None where nothing is known of it, and no layouts where it is known to be no block.
    """
    known = layouts_by_class(module, layouts, _BY_CLASS)
    if known is not None:
        return [known]
    holder, _, name = path.rpartition(".")
    kinds = [type(module).__name__, *([type(modules[holder]).__name__] if path else [])]
    if _OTHERWISE.search(kinds[0]) or any(_WEIGHTS.search(text) for text in (*kinds, name)):
        return []
    candidates, narrow = _BY_NAMES, not _LIKE.search(kinds[0])
    if isinstance(module, nn.Sequential):
        if not any(_LIKE.search(text) for text in (*kinds, *path.split(".")[-2:])):
            return None
        matrices, narrow = list(_matrices(module)), True
        if len(matrices) != 2:
            return None
        candidates = ({matrices[0]: "up", matrices[1]: "down"},)
    found: list[Layouts] = []
    for layout in candidates:
        if _fits(module, layout, narrow) and all(layout.keys().isdisjoint(each) for each in found):
            found.append(layout)
    return found or None


def _fits(module: nn.Module, layout: Layouts, narrow: bool) -> bool:
    """Whether a module has all these weights, in sizes that make them a block.

    With ``narrow`` the block must end as wide as it began, as in a residual stream it does.
    """
    if not all(_has_weight(_at(module, path)) for path in layout):
        return False
    try:
        blocks = [block for *_, runs in _read(module, layout) for block in runs]
    except ValueError:
        return False
    if any(_is_of_experts(module, block.path, block.parameter) for block in blocks):
        return True
    weights = [block for block in blocks if not block.is_bias]
    up = next(block for block in weights if block.label == "up")
    down = next(block for block in weights if block.label == "down")
    if narrow and _n_inputs(module, up) != down.n_features:
        return False
    # A third matrix of its shape may be a gate that is called otherwise.
    alike = [
        name
        for name, child in module._modules.items()
        if _has_weight(child) and _at(child, "weight").shape == up.parameter.shape
    ]
    return len(set(_hidden_sizes(module, blocks).values())) == 1 and (
        narrow or layout.keys() >= {*alike}
    )


def _at(owner: Any, path: str) -> Any:
    """What is at a path, or nothing."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _has_weight(owner: Any) -> bool:
    """Whether it is a matrix or has one."""
    weight = owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _matrices(module: nn.Module) -> Iterator[str]:
    """Paths of what has a weight that is neither a table nor a depthwise convolution."""
    for path, inner in module.named_modules():
        is_depthwise = isinstance(inner, nn.modules.conv._ConvNd) and inner.weight.shape[1] == 1
        if path and _has_weight(inner) and not is_depthwise and not isinstance(inner, nn.Embedding):
            yield path


def _is_of_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether one tensor has a matrix for each of several experts."""
    holder = name.rpartition(".")[0]
    is_filter = isinstance(_at(module, holder) if holder else module, nn.modules.conv._ConvNd)
    return parameter.ndim == 3 and not is_filter


def _refuse_experts(where: str, leave_it_out: str, name: str, parameter: Tensor) -> None:
    raise ValueError(
        f"{name!r} of {where}, of shape {tuple(parameter.shape)}, holds the matrices of several "
        "experts in one tensor: one expert cannot lose a row that the others keep. Leave it out: "
        f"{leave_it_out}."
    )


def _refuse_if_alike(path: str, module: nn.Module) -> None:
    """Raise for a module that is called like a feed-forward block and has matrices like one."""
    kind = type(module).__name__
    where = f"{path or 'the model'!r} ({kind})"
    leave_it_out = f'FeedForwardSelector(layouts={{"{kind}": {{}}}})'
    own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim >= 2}
    if "Expert" in kind and len(own) > 1:
        _refuse_experts(where, leave_it_out, *next(iter(own.items())))
    if not _LIKE.search(kind):
        return
    weights = [
        block
        for name in (*own, *_matrices(module))
        for *_, runs in _read(module, {name: name})
        for block in runs
        if not block.is_bias
    ]
    for up in weights:
        for down in weights:
            times = up.n_features / _n_inputs(module, down)
            if up is down or times not in (1, 2) or _n_inputs(module, up) != down.n_features:
                continue
            label, fused = ("gate up", "a fused matrix ") if times == 2 else ("up", "")
            raise ValueError(
                f"FeedForwardSelector does not know what {up.path!r} makes in {where}, {fused}of "
                f"shape {tuple(up.parameter.shape)}. State it, for instance FeedForwardSelector("
                f'layouts={{"{kind}": {{"{up.label}": "{label}", "{down.label}": "down"}}}}), or '
                f'leave the block out: layouts={{"{kind}": {{}}}}.'
            )


def _between(module: nn.Module, blocks: list[Block], up: Block) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have parameters of their own for every hidden unit and belong to no layout."""
    n_units, known = up.n_features, {id(block.parameter) for block in blocks}
    if n_units == _n_inputs(module, up):  # they would look like those of the residual stream
        return
    for name, inner in module.named_modules():
        own = list(inner.parameters(recurse=False))
        per_unit = all(p.numel() == n_units or tuple(p.shape[:2]) == (n_units, 1) for p in own)
        if not own:  # a norm need not have any to mix the units
            n_mixed = getattr(inner, "num_channels", getattr(inner, "normalized_shape", 0))
            per_unit = n_mixed in (n_units, (n_units,))
        if name and per_unit and known.isdisjoint(map(id, own)):
            yield name, inner


def _activations(module: nn.Module, up: Block) -> Iterator[tuple[str, Callable[..., object]]]:
    """What the block, or the part of it that has its up projection, calls its activation.

    In a sequence it is what follows the up projection, up to the next matrix.
    """
    path = up.path.removesuffix(".weight")
    if isinstance(module, nn.Sequential):
        inner = list(module.named_modules())
        for name, value in inner[[name for name, _ in inner].index(path) + 1 :]:
            if _has_weight(value):
                return
            if not value._modules:
                yield name, value
        return
    for holder in dict.fromkeys(("", path.rpartition(".")[0])):
        owner = module.get_submodule(holder)
        for name in (*vars(owner), *owner._modules):
            value = getattr(owner, name)
            is_known = type(value).__module__ == "torch.nn.modules.activation"
            is_known = is_known and not isinstance(value, nn.MultiheadAttention)
            if is_known or (callable(value) and _ACTIVATION.search(name)):
                yield f"{holder}.{name}".lstrip("."), value


def _keeps_zero(activation: Callable[..., object]) -> bool:
    """Whether 0 becomes 0 whatever is learned: with parameters of 1, in their stead."""
    try:
        if isinstance(activation, nn.Module):
            activation = copy.deepcopy(activation)
            for owner in activation.modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        one = torch.ones_like(parameter, device="cpu", requires_grad=False)
                        owner._parameters[name] = nn.Parameter(one, requires_grad=False)
            activation = activation.forward
        result = activation(torch.zeros(2, device="cpu"))
    except Exception:  # it wants something else, and so tells nothing
        return True
    return not (isinstance(result, Tensor) and bool(result.any()))


def _name_of(activation: Callable[..., object]) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def _as_units(block: Block, name: str) -> Part:
    """A block's output features, each a unit."""
    before, n_features, after = block.surroundings
    period, width = n_features // block.repeat, block.stop - block.start
    ones, everything = (1,) * len(before), (slice(None),) * len(before)
    if block.repeat > 1:
        return Part(
            name,
            view=(*before, block.repeat, period, *after),
            index=(*everything, slice(None), slice(block.start, block.stop)),
            units=(*ones, block.repeat, width),
        )
    index = (*everything, slice(block.start, block.stop)) if width < period else ()
    return Part(name, index=index, units=(*ones, width))
