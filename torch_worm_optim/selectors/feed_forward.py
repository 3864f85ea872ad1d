"""Hidden units of feed-forward blocks: what a transformer holds most of."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_worm_optim.selectors.attention import Block, describe, read_layouts, refuse_computed
from torch_worm_optim.selectors.projections import (
    Layouts,
    at,
    by_class,
    has_weight,
    in_split,
    known_layouts,
    parameters_at,
    same_names,
    stated_layouts,
)
from torch_worm_optim.selectors.representative import (
    JoinableSelector,
    Representative,
    log_left_out,
    nothing_found,
)

# Names that mean the same in every class that has all of them, if their sizes fit.
_BY_NAMES: tuple[Layouts, ...] = (
    *same_names(
        ("gate", "up", "down"),
        """gate_proj up_proj down_proj, proj_up_gate proj_up proj_down, wi_0 wi_1 wo, w1 w3 w2,
        w0 w1 w2, w_in.w_0 w_in.w_1 w_out, fc1_g fc1_x fc2,
        gate_proj.linear up_proj.linear down_proj.linear""",
    ),
    *same_names(("gate up", "down"), "gate_up_proj down_proj, input_linear output_linear, w12 w3"),
    *same_names(
        ("up", "down"),
        """intermediate.dense output.dense, layout_intermediate.dense layout_output.dense,
        intermediate.conv1d output.conv1d, dense.dense output.dense, intermediate output,
        intermediate_dense output_dense, dense_h_to_4h dense_4h_to_h, up_proj down_proj,
        gate_proj down_proj, fc1 fc2, fc_in fc_out, ff_in ff_out, c_fc c_proj, lin1 lin2,
        linear1 linear2, linear_1 linear_2, linear_fc1 linear_fc2, layer_1 layer_2,
        ffw_layer_1 ffw_layer_2, ffn ffn_output, dense1 dense2, wi wo, w_1 w_2, w1 w2""",
    ),
)


_FUSED: Layouts = {"fc1": "gate up", "fc2": "down"}

# Everything else, by class: the package (for timm, the file too) and the name of the class.
_BY_CLASS = by_class(
    transformers={
        "AXK2GateMLP": {},  # a gate of a norm
        "JetMoeMoA": {},  # heads of attention
        "KyutaiSpeechToTextGatingMLP MoshiGatingMLP": _FUSED,
        "ModernBertMLP ModernBertDecoderMLP": {"Wi": "up gate", "Wo": "down"},
        # Each use of the shared block adds something of its own to the up projection and the gate.
        "Zamba2MLP": {
            "gate_up_proj": "gate up",
            "gate_up_proj_adapter_list.*.1": "gate up",
            "down_proj": "down",
        },
        "RwkvFeedForward": {"key": "up", "value": "down"},
    },
    timm={
        "efficientformer_v2.ConvMlpWithNorm": {"fc1.conv": "up", "fc2.conv": "down"},
        "efficientvim.FFN": {"fc1.conv": "up", "fc2.conv": "down"},
        "efficientvit_msra.ConvMlp": {"pw1.conv": "up", "pw2.conv": "down"},
        "iformer.FFN": {"mixer.module.0.c": "up", "mixer.module.2.c": "down"},
        "levit.LevitMlp": {"ln1.linear": "up", "ln2.linear": "down"},
        "mlp.GluMlp": _FUSED,
        "mlp.GatedMlp": {"fc1": "up gate", "fc2": "down"},
        "repvit.RepVitMlp": {"conv1.c": "up", "conv2.c": "down"},
        "shvit.FFN": {"pw1.c": "up", "pw2.c": "down"},
        "vision_transformer.ParallelScalingBlock vision_transformer.DiffParallelScalingBlock": {
            "in_proj": in_split,
            "mlp_bias": "up",
        },
        "vgg.ConvMlp": {},  # a head
        "visformer.SpatialMlp": {
            "conv1": lambda module: "read" if module.spatial_conv else "up",
            "conv2": "up",
            "conv3": "down",
        },
    },
    diffusers={
        "FeedForward": {
            "net.0.proj": lambda m: "up gate" if "GLU" in type(m.net[0]).__name__ else "up",
            "net.2": "down",
        },
    },
)

_LIKE = re.compile(r"mlp|feed_?forward|ffn|ffwd", re.IGNORECASE)  # names of classes and modules
# Pairs of matrices that are no part of a residual stream, though their names may be alike.
_NOT_A_BLOCK = re.compile(
    r"Router|(Head|Classifier|Pooler|Merger|Projector|Adapter|Embed(der|dings?)?)$"
)
# Small nets whose output is the weights of channels or positions, and what holds such nets.
_GATING_NETS = re.compile(
    r"Attn$|RelPosMlp|^SE[A-Z]|Excit|ChannelAtt|GlobalContext|^(cpb|meta|pos\w*)_mlp$"
)
_GATING_HOLDERS = frozenset({"GatherExcite", "GlobalContext", "RelPosMlp"})
_ACTIVATION = re.compile(r"(^|_)(act|activation|non_?linearity)(_|\d|$)")
_HIDDEN = ("up", "gate", "between")
# Layers that treat each unit by itself.
_ELEMENTWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd, nn.PReLU)


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
            parts = [(b, b.part(names[id(b.parameter)], by_feature=True)) for b in blocks]
            ranked = [part for b, part in parts if b.label != "between" and not b.is_bias]
            others = [part for b, part in parts if b.label == "between" or b.is_bias]
            found.setdefault(repr(ranked[0]), Representative(ranked, others))
        if not found:
            raise nothing_found("FeedForwardSelector found no feed-forward block", model)
        return list(found.values())

    def _understood(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Layouts]]:
        """The blocks and their layouts, once nothing that looks like one is left."""
        modules = {
            path: module
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # whose class tells nothing
        }
        layouts: dict[str, list[Layouts] | None] = {}
        left_out: dict[str, str] = {}
        understood_inside: set[str] = set()  # paths of modules
        for path, module in modules.items():
            holder, _, name = path.rpartition(".")
            kind, holding = type(module).__name__, type(modules[holder]).__name__ if path else ""
            known = stated_layouts(module, self.layouts)
            known = known_layouts(module, _BY_CLASS) if known is None else known
            own = _by_names(module, path, holding) if known is None else [known]
            if known is None and _is_no_block(kind, name, holding):
                if own:
                    left_out.setdefault(kind, path)
                own = []
            layouts[path] = own
            above = path
            while own is not None and above:
                above = above.rpartition(".")[0]
                if above in understood_inside:
                    break
                understood_inside.add(above)
        log_left_out(
            self, left_out, "is named like a gate or a head, not a block of a residual stream"
        )
        for path, module in modules.items():
            own = layouts[path]
            if own is not None:
                yield from ((path, module, layout) for layout in own if layout)
            elif path not in understood_inside:
                _refuse_if_alike(path, module)


def feed_forward_blocks(path: str, module: nn.Module, layout: Layouts) -> list[Block]:
    """What makes the hidden units of one block, elementwise layers and biases included."""
    where = describe(path, module)
    for name, parameter, *_ in (each for key in layout for each in parameters_at(module, key)):
        if _is_of_experts(module, name, parameter):
            _refuse_experts(where, module, name, parameter)
    blocks = read_layouts(path, module, layout, "FeedForwardSelector")
    sizes = _hidden_sizes(module, blocks)
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"The layout {dict(layout)} does not fit {where}: it needs an `up`, and as many hidden "
            f"units wherever they are made or read, got {sizes or 'none'}. State what it is with "
            "FeedForwardSelector(layouts=...)."
        )
    blocks = [block for block in blocks if block.label in _HIDDEN]
    up = next(block for block in blocks if block.label == "up" and not block.is_bias)
    between = dict(_layers_between(module, blocks, up))
    for name, layer, why in _what_mixes(module, blocks, up, between):
        kind = getattr(layer, "__name__", type(layer).__name__)
        raise ValueError(
            f"The {up.n_features} hidden units of {where}, made by {up.path!r} of shape "
            f"{tuple(up.parameter.shape)}, pass through {name!r} ({kind}), {why}. Leave it out: "
            f"{_leave_out(module)}."
        )
    own = (each for name, inner in between.items() for each in inner.named_parameters(name))
    return blocks + [
        Block("between", name, p, 0, p.ndim - 1, 1, 0, up.n_features) for name, p in own
    ]


def _what_mixes(
    module: nn.Module, blocks: list[Block], up: Block, between: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Callable[..., object], str]]:
    """What gives a unit of zeros a say on its way through the block, and how."""
    for name, inner in between.items():
        if not isinstance(inner, _ELEMENTWISE):
            yield name, inner, "where a unit of zeros has a say in what becomes of the others"
    if not any(block.label == "gate" for block in blocks):
        for name, activation in _activations(module, up):
            if name not in between and (why := _why_not_zero(activation, up.n_features)):
                yield name, activation, f"which {why}"


def _leave_out(module: nn.Module) -> str:
    """What to type to leave all of a class out."""
    return f'FeedForwardSelector(layouts={{"{type(module).__name__}": {{}}}})'


def _n_inputs(module: nn.Module, block: Block) -> int:
    """Input features of a weight."""
    holder = block.path.rpartition(".")[0]
    groups = getattr(at(module, holder), "groups", 1) if holder else 1
    return int(block.parameter.shape[0 if block.leading_dims else 1] * groups)


def _hidden_sizes(module: nn.Module, blocks: list[Block]) -> dict[str, int]:
    """How many hidden units each parameter makes or reads; none where no weight makes any."""
    weights = [block for block in blocks if not block.is_bias]
    if all(block.label != "up" for block in weights):
        return {}
    made = {f"{b.label} {b.path}": b.n_features for b in blocks if b.label in _HIDDEN}
    read = {f"down {b.path}": _n_inputs(module, b) for b in weights if b.label == "down"}
    return {**made, **read}


def _is_no_block(kind: str, name: str, holding: str) -> bool:
    """Whether a module is called like none, by its class, its name and the class that holds it."""
    is_gate = holding in _GATING_HOLDERS or any(map(_GATING_NETS.search, (kind, name)))
    return is_gate or _NOT_A_BLOCK.search(kind) is not None


def _by_names(module: nn.Module, path: str, holding: str) -> list[Layouts] | None:
    """Layouts of a module that names and sizes tell; None where they tell nothing."""
    kind = type(module).__name__
    candidates, narrow = _BY_NAMES, not _LIKE.search(kind)
    if isinstance(module, nn.Sequential):
        if not any(_LIKE.search(text) for text in (kind, holding, *path.split(".")[-2:])):
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
    """Whether a module has these in sizes of a block; if ``narrow``, one as wide at both ends."""
    if not all(has_weight(at(module, path)) for path in layout):
        return False
    try:
        blocks = read_layouts("", module, layout, "FeedForwardSelector")
    except ValueError:
        return False
    if any(_is_of_experts(module, block.path, block.parameter) for block in blocks):
        return True
    made = {block.label: block for block in blocks if not block.is_bias}
    if narrow and _n_inputs(module, made["up"]) != made["down"].n_features:
        return False
    # A third matrix of its shape may be a gate that is called otherwise.
    shape = made["up"].parameter.shape
    alike = {
        n for n, m in module._modules.items() if has_weight(m) and at(m, "weight").shape == shape
    }
    fits = len(set(_hidden_sizes(module, blocks).values())) == 1
    return fits and (narrow or layout.keys() >= alike)


def _matrices(module: nn.Module) -> Iterator[str]:
    """Paths of what has a weight that is neither a table nor a depthwise convolution."""
    for path, inner in module.named_modules():
        is_depthwise = isinstance(inner, nn.modules.conv._ConvNd) and inner.weight.shape[1] == 1
        if path and has_weight(inner) and not is_depthwise and not isinstance(inner, nn.Embedding):
            yield path


def _is_of_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether one tensor has a matrix for each of several experts."""
    is_filter = isinstance(at(module, name.rpartition(".")[0]), nn.modules.conv._ConvNd)
    return parameter.ndim == 3 and not is_filter


def _refuse_experts(where: str, module: nn.Module, name: str, parameter: Tensor) -> None:
    raise ValueError(
        f"{name!r} of {where}, of shape {tuple(parameter.shape)}, holds the matrices of several "
        "experts in one tensor: one expert cannot lose a row that the others keep. Leave it out: "
        f"{_leave_out(module)}."
    )


def _refuse_if_alike(path: str, module: nn.Module) -> None:
    """Raise for a module that is called like a feed-forward block and has matrices like one."""
    kind = type(module).__name__
    where = describe(path, module)
    own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim >= 2}
    if "Expert" in kind and len(own) > 1:
        _refuse_experts(where, module, *next(iter(own.items())))
    if not _LIKE.search(kind):
        return
    layouts = {name: name for name in (*own, *_matrices(module))}
    blocks = read_layouts(path, module, layouts, "FeedForwardSelector")
    weights = [block for block in blocks if not block.is_bias]
    for up, down in itertools.permutations(weights, 2):
        times = up.n_features / _n_inputs(module, down)
        if times in (1, 2) and _n_inputs(module, up) == down.n_features:
            label, fused = ("gate up", "a fused matrix ") if times == 2 else ("up", "")
            raise ValueError(
                f"FeedForwardSelector does not know what {up.path!r} makes in {where}, {fused}of "
                f"shape {tuple(up.parameter.shape)}. State it, for instance FeedForwardSelector("
                f'layouts={{"{kind}": {{"{up.label}": "{label}", "{down.label}": "down"}}}}), or '
                f'leave the block out: layouts={{"{kind}": {{}}}}.'
            )


def _layers_between(
    module: nn.Module, blocks: list[Block], up: Block
) -> Iterator[tuple[str, nn.Module]]:
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
    """What a block calls its activation; in a sequence, all between up and the next matrix."""
    path = up.path.removesuffix(".weight")
    if isinstance(module, nn.Sequential):
        inner = list(module.named_modules())
        for name, value in inner[[name for name, _ in inner].index(path) + 1 :]:
            if has_weight(value):
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


def _why_not_zero(activation: Callable[..., object], n_units: int) -> str:
    """Why 0 may become something else, whatever is learned: tried with parameters of 1."""
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).eval()
        for owner in activation.modules():
            for name, weight in owner.named_parameters(recurse=False, remove_duplicate=False):
                one = torch.ones_like(weight, device="cpu")
                owner._parameters[name] = nn.Parameter(one, requires_grad=False)
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
                one = torch.ones_like(buffer, device="cpu")
                owner._buffers[name] = one if buffer.is_meta else buffer.cpu()
        activation = activation.forward
    shapes = ((2,), (1, n_units), (1, 1, n_units), (1, n_units, 1, 1))
    for shape in shapes:
        with suppress(Exception):  # it wants another shape
            result = activation(torch.zeros(shape, device="cpu"))
            is_zero = not (isinstance(result, Tensor) and bool(result.any()))
            return "" if is_zero else "does not map 0 to 0"
    tried = " or ".join(map(str, shapes))
    return f"cannot be called with zeros of shape {tried}, to see what it does"
