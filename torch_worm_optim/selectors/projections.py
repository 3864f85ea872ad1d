"""What the weights of attention layers hold: the language of layouts, and one table of them.

A layout says what the output features of a weight are, block after block:

``"q"``
    All are queries.
``"q k v"``
    Three equal blocks: timm's and GPT-2's way.
``"num_heads * (q k v)"``
    That for every head in turn: GPT-NeoX's way.
``"q=embed_dim k v"``
    As many queries as the module's ``embed_dim``; blocks without a size share the rest equally.
``"num_heads * (k=qk_nope_head_dim v=v_head_dim)"``
    Sizes are integers, attributes of the module or of its ``config``, or products ``a*b`` of them.
``"_ * (q=dim k=dim v=dim)"``
    As many times as it takes.

Blocks named ``q``, ``k`` and ``qk`` (one projection for both) make queries and keys, and so does
``kv`` where the same tensor is read as key and as value. ``v`` makes values. Any other name makes
neither: ``gate``, or the ``latent`` from which both keys and values are made, or the ``q_latent``
from which both queries and gates are. ``q_rank`` is the way down of low-rank queries: queries, but
of no head.

In feed-forward blocks ``up`` and ``gate`` make the hidden units, ``between`` does something to each
of them alone on the way to ``down``, and any other name is nothing to the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

# A weight (or the module that has it) by its path in the attention module, and its layout; or what
# tells the layout from the attention module, where one class has several.
Layouts = Mapping[str, str | Callable[[Any], str]]


def parse_layout(
    layout: str, n_features: int, module: nn.Module
) -> Iterator[tuple[str, int, int, int]]:
    """The label, repetitions, start and stop of each block that a layout describes."""
    match = re.fullmatch(r"\s*(?:(\S+)\s*\*\s*\((.+)\)|([^()]+))\s*", layout)
    if match is None:
        raise ValueError(
            f'a layout reads "q k v", "q=size k v" or "repeat * (q k v)", got {layout!r}.'
        )
    times, inner, plain = match.groups()
    blocks = [block.partition("=") for block in (inner or plain).split()]
    known = [_number(size, module) if size else None for _, _, size in blocks]
    stated = sum(size for size in known if size is not None)
    if times == "_":
        repeat = n_features // stated if stated and None not in known else 0
    else:
        repeat = _number(times, module) if times else 1
    period = n_features // repeat if repeat else 0
    n_open = known.count(None)
    share = (period - stated) // n_open if n_open else 0
    widths = [share if size is None else size for size in known]
    if not repeat or repeat * sum(widths) != n_features or min(widths) < 1:
        raise ValueError(f"{n_features} output features cannot be cut that way.")
    start = 0
    for (label, *_), width in zip(blocks, widths, strict=True):
        yield label, repeat, start, start + width
        start += width


def _number(text: str, module: nn.Module) -> int:
    """A product of integers and of the module's, or its config's, integer attributes."""
    value = 1
    for factor in text.split("*"):
        number = int(factor) if factor.isdecimal() else int_attribute(module, factor)
        if number is None:
            raise AttributeError(f"neither it nor its config has an integer {factor!r}.")
        value *= number
    return value


def int_attribute(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that the module, or else its config, has as an integer."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:  # a config whose layers differ refuses to tell for all of them
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def labelled(labels: Iterable[str], names: str) -> Layouts:
    """The layouts of weights that hold one thing each."""
    return dict(zip(names.split(), labels, strict=True))


def same_names(labels: Iterable[str], names: str) -> Iterator[Layouts]:
    """Such layouts for each set of names between commas."""
    return (labelled(labels, each) for each in names.split(","))


def by_class(**packages: Mapping[str, Layouts]) -> dict[str, Layouts]:
    """Layouts by package and class, from tables in which classes that are alike share a key."""
    return {
        f"{package}.{name}": layouts
        for package, table in packages.items()
        for names, layouts in table.items()
        for name in names.split()
    }


def in_split(module: Any) -> str:
    """The layout of timm's blocks that project for attention and feed-forward at once."""
    return f"up={module.in_split[0]} q k v"


def _falcon(module: Any) -> str:
    if module.new_decoder_architecture:
        return "num_kv_heads * (q k=head_dim v=head_dim)"
    return "q k=head_dim v=head_dim" if module.multi_query else _BY_HEAD


def _gpt_big_code(module: Any) -> str:
    if module.is_cross_attention:
        return "k v"
    return "q=embed_dim k v" if module.multi_query else _BY_HEAD


_LATENT: Layouts = {
    "kv_a_proj_with_mqa": "latent=kv_lora_rank k=qk_rope_head_dim",
    "kv_b_proj": "num_heads * (k=qk_nope_head_dim v=v_head_dim)",
}

# Names that mean the same in every class that has all of them. Values may be None: then the keys
# are read as values too.
_BY_NAMES: tuple[Layouts, ...] = (
    {"q_a_proj": "q_rank", "q_b_proj": "q", **_LATENT},  # DeepSeek's latent attention
    {"q_proj": "q", **_LATENT},
    *same_names(
        "qkv",
        """query key value, q_proj k_proj v_proj, query_proj key_proj value_proj, q_lin k_lin v_lin,
        to_q to_k to_v, add_q_proj add_k_proj add_v_proj, linear_q linear_k linear_v,
        q_head k_head v_head, project_q project_k project_v, query_global key_global value_global,
        layout_query layout_key layout_value, wq wk wv, Wq Wk Wv, q k v,
        projection_query projection_key projection_value, q_content_proj k_content_proj v_proj""",
    ),
)

_BIASES = labelled("qv", "q_bias v_bias")
_BY_HEAD = "num_heads * (q k v)"
_BY_ATTENTION_HEAD = "num_attention_heads * (q k v)"
_QKV: Layouts = {"qkv": "q k v"}
_RELATIVE = labelled("qqq", "r_w_bias r_r_bias r_s_bias")
_SEPARATE = labelled("qkv", "q_proj k_proj v_proj")
_TO_QUERY = labelled("qk", "to_query to_key")
_WRAPPED = labelled("qkv", "q_proj.linear k_proj.linear v_proj.linear")

# What these names do not tell, by class: the package (for timm, the file too) and the name of the
# class. A class that is no attention has no layouts.
_TRANSFORMERS: dict[str, Layouts] = {
    """Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention
    Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention
    Florence2VisionWindowAttention Glm4vMoeVisionAttention Glm4vVisionAttention
    Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention
    HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention
    modeling_qwen2_vl.VisionAttention PPFormulaNetVisionAttention PPOCRV5MobileRecAttention
    PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention
    Qwen3_5MoeVisionAttention Qwen3_5VisionAttention Qwen3OmniMoeVisionAttention
    Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen4ExpVisionAttention Sam2MultiScaleAttention
    SamHQVisionAttention SamVisionAttention SegGptAttention SLANeXtVisionAttention
    TimesformerSelfAttention UnlimitedOcrSamVisionAttention VitDetAttention""": _QKV,
    """Gemma4AudioAttention Gemma4VisionAttention Inkling2FullAttention Inkling2SlidingAttention
    Inkling2LoopFullAttention Inkling2LoopSlidingAttention MoshiAttention""": _WRAPPED,
    # Layers that reuse the keys of another have none of their own.
    "Gemma3nTextAttention Gemma4TextAttention Gemma4UnifiedTextAttention": _SEPARATE,
    "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention": {
        "q_proj": "num_attention_heads * (q gate)"
    },
    """ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap
    ZayaCCAProjection""": {"q_proj": "q", "k_proj": "k"},
    """EvollaSequenceCompressorAttention GraniteSpeechConformerAttention
    GraniteSpeechPlusConformerAttention""": {"to_q": "q", "to_kv": "k v"},
    "DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention": {
        "c_attn": lambda module: "k v" if module.is_cross_attention else "q k v",
        "q_attn": "q",
    },
    "GroundingDinoBiMultiHeadAttention MMGroundingDinoBiMultiHeadAttention": labelled(
        "qkvv", "vision_proj text_proj values_vision_proj values_text_proj"
    ),
    "BloomAttention PersimmonAttention": {"query_key_value": _BY_HEAD},
    "GPTNeoXAttention GPTNeoXJapaneseAttention": {"query_key_value": _BY_ATTENTION_HEAD},
    "Phi3Attention Phi4MultimodalAttention": {"qkv_proj": "q=num_attention_heads*head_dim k v"},
    "ModernBertAttention MptAttention": {"Wqkv": "q k v"},
    "DeepseekV4CSACompressor DeepseekV4HCACompressor": {"kv_proj": "kv"},
    "DeepseekV4Indexer Glm5NextTextLinearAttention": {},
    # Its only query is a token that is learned: a bias.
    "Aimv2AttentionPoolingHead": {"cls_token": "q", "k_proj": "k", "v_proj": "v"},
    "AXK2Attention": {
        "q_a_proj": "q_latent",
        "q_gate_proj": "num_heads * (q=qk_head_dim gate=v_head_dim)",
        **_LATENT,
    },
    "BarkSelfAttention": {"att_proj": "q k v"},
    "CodeGenAttention": {"qkv_proj": "4 * (q v k)"},
    "DabDetrMHAttentionMap": {"q_linear": "q", "k_linear": "k"},
    "DbrxAttention": {"Wqkv": "q=hidden_size k v"},
    "DeepseekV4Attention": {"q_a_proj": "q_rank", "q_b_proj": "q", "kv_proj": "kv"},
    "DisentangledSelfAttention": {"in_proj": _BY_ATTENTION_HEAD, **_BIASES},
    "EsmFoldSelfAttention": {"proj": _BY_HEAD},
    "EvollaSequenceAlignerCrossAttention": labelled(
        "qkvkvkv", "query key_protein value_protein key_structure value_structure key_msa value_msa"
    ),
    "Exaone4_5_VisionAttention": {"qkv": "q=q_dim k=kv_dim v=kv_dim"},
    "FalconAttention": {"query_key_value": _falcon},
    "FunnelRelMultiheadAttention": _RELATIVE,
    "GPTBigCodeAttention": {"c_attn": _gpt_big_code, "q_attn": "q"},
    "JetMoeAttention": {"experts.input_linear": "q", "kv_proj": "k v"},
    "LayoutLMv2SelfAttention": {"qkv_linear": "q k v", **_BIASES},
    "LevitAttention": {
        "queries_keys_values.linear": "num_attention_heads * (q=key_dim k=key_dim v)"
    },
    "LevitAttentionSubsample": {
        "queries.linear": "q",
        "keys_values.linear": "num_attention_heads * (k=key_dim v)",
    },
    "LSHSelfAttention": {"query_key": "qk", "value": "v"},
    "LukeSelfAttention": {"w2e_query": "q", "e2w_query": "q", "e2e_query": "q"},
    # Layers that share another's latent have none of their own, and some have no rotary keys.
    "MistralLarge4TextAttention": {
        "q_proj": "q",
        **_LATENT,
        "kv_a_proj_with_mqa": lambda module: (
            "latent=kv_lora_rank k" if module.qk_rope_head_dim else "latent"
        ),
    },
    "MobileViTV2LinearSelfAttention": {"qkv_proj.convolution": "q=1 k v"},
    "modeling_openai.Attention": {"c_attn": "q k v"},
    "SwiftFormerEfficientAdditiveAttention": _TO_QUERY,
    "XLNetRelativeAttention": {"q": "q", "k": "k", "v": "v", **_RELATIVE},
}
_TIMM: dict[str, Layouts] = {
    """attention.Attention attention.AttentionRope attention2d.Attention2d
    attention_pool2d.AttentionPool2d attention_pool2d.RotAttentionPool2d cait.TalkingHeadAttn
    coat.FactorAttnConvRelPosEnc convit.MHSA csatv2.SpatialTransformerBlock davit.ChannelAttentionV2
    davit.WindowAttention diff_attention.DiffAttention edgenext.CrossCovarianceAttn
    fastvit.Attention hiera.MaskUnitAttention hieradet_sam2.MultiScaleAttention metaformer.Attention
    mvitv2.MultiScaleAttention nest.Attention swin_transformer.WindowAttention
    swin_transformer_v2_cr.WindowMultiHeadAttention twins.LocallyGroupedAttn visformer.Attention
    vision_transformer_relpos.RelPosAttention vision_transformer_sam.Attention volo.Attention
    xcit.XCA""": _QKV,
    "beit.Attention eva.EvaAttention swin_transformer_v2.WindowAttention": {**_QKV, **_BIASES},
    """attention_pool.AttentionPoolLatent pvt_v2.Attention twins.GlobalSubSampleAttn
    volo.ClassAttention""": {"q": "q", "kv": "k v"},
    "efficientformer.Attention tiny_vit.Attention": {
        "qkv": "num_heads * (q=key_dim k=key_dim v=val_dim)"
    },
    "maxxvit.Attention2d maxxvit.AttentionCl": {
        "qkv": lambda module: _BY_HEAD if module.head_first else "q k v"
    },
    "convit.GPSA tnt.Attention": {"qk": "q k", "v": "v"},
    "cpubone.ConvAttention lowformer.ConvAttention": {"pwise": _BY_HEAD},
    "attention2d.MultiQueryAttention2d": labelled("qkv", "query.proj key.proj value.proj"),
    "bottleneck_attn.BottleneckAttn": {"qkv": "q=dim_out_qk k=dim_out_qk v=dim_out_v"},
    # Its map is made of what the code calls keys and values, and attends to its queries.
    "davit.ChannelAttention": {"qkv": "v q k"},
    "efficientformer_v2.Attention2d": {"q.conv": "q", "k.conv": "k", "v.conv": "v"},
    "efficientformer_v2.Attention2dDownsample": labelled("qkv", "q.proj.conv k.conv v.conv"),
    "efficientvit_mit.LiteMLA": {"qkv.conv": "_ * (q=dim k=dim v=dim)"},
    "efficientvit_msra.CascadedGroupAttention": {"qkvs.*.conv": "q=key_dim k=key_dim v"},
    "gcvit.WindowAttentionGlobal": {"qkv": lambda module: "k v" if module.use_global else "q k v"},
    "gemma4_vit.Gemma4Attention": _WRAPPED,
    "halo_attn.HaloAttn": {"q": "q", "kv": "num_heads * (k=dim_head_qk v=dim_head_v)"},
    "iformer.SHMA": {"q.c": "q", "k.c": "k", "v_gate.c": "v gate"},
    "lambda_layer.LambdaLayer": {"qkv": "q=num_heads*dim_qk k=dim_qk v=dim_v"},
    "levit.Attention": {"qkv.linear": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    "levit.AttentionDownsample": {
        "q.ln.linear": "q",
        "kv.linear": "num_heads * (k=key_dim v=val_dim)",
    },
    "mobilevit.LinearSelfAttention": {"qkv_proj": "q=1 k v"},
    "shvit.SHSA": {"qkv.c": "q=qk_dim k=qk_dim v=pdim"},
    "swiftformer.EfficientAdditiveAttention": _TO_QUERY,
    "vision_transformer.DiffParallelScalingBlock vision_transformer.ParallelScalingBlock": {
        "in_proj": in_split
    },
}
_BY_CLASS = by_class(
    transformers=_TRANSFORMERS,
    timm=_TIMM,
    torch={
        "MultiheadAttention": {
            "in_proj_weight": "q k v",
            "in_proj_bias": "q k v",
            **labelled("qkv", "q_proj_weight k_proj_weight v_proj_weight"),
        },
    },
    # Its attention may be fused later.
    diffusers={"Attention": {"to_qkv": "q k v", "to_kv": "k v", "to_added_qkv": "q k v"}},
)

# Layers that have queries and keys by name, and no attention map: linear attention in its forms.
_WITHOUT_MAP = re.compile(r"DeltaNet|DeltaAttention|LightningAttention|LSTM|Mamba|Rwkv")

# How a projection that holds several others is called. In a class that the table does not have, its
# layout differs from author to author (blocks, heads interleaved, groups), so it is never guessed.
_FUSED_NAME = re.compile(
    r"(to_|in_proj_|added_|W)?(qkvs?|qk|kv)(_proj|_linear|_lin)?"
    r"|query_key(_value)?|key_value|c_attn"
)
_FUSED_WEIGHT = re.compile(r"(in_proj|qkv)_weight")

# Where the output features lie: how many dimensions stand before them and after them. For all other
# weights the first dimension is theirs.
_OUTPUT_DIM = {
    "Conv1D": (1, 0),  # GPT-2's
    "Aimv2AttentionPoolingHead": (2, 0),
    "JetMoeParallelExperts": (1, 1),
    "MoshiFlexibleLinear": (1, 1),
    "XLNetRelativeAttention": (1, 0),
}


def has_inputs_first(module: nn.Module) -> bool:
    """Whether the first dimension of its weight is another than that of output features."""
    return any(kind.__name__ in _OUTPUT_DIM for kind in type(module).__mro__)


def stated_layouts(module: Any, stated: Mapping[str, Layouts]) -> Layouts | None:
    """What the user states for a module's class, or one above it, by the name of the class."""
    return next((stated[c.__name__] for c in type(module).__mro__ if c.__name__ in stated), None)


def known_layouts(module: Any, table: Mapping[str, Layouts]) -> Layouts | None:
    """What a table has for a module's class, or one above it."""
    for kind in type(module).__mro__:
        package, file = kind.__module__.partition(".")[0], kind.__module__.rpartition(".")[2]
        for key in (f"{package}.{file}.{kind.__name__}", f"{package}.{kind.__name__}"):
            if key in table:
                return table[key]
    return None


def attention_layouts(module: nn.Module, layouts: Mapping[str, Layouts]) -> Layouts | None:
    """The layouts of a module: the user's, or those that its names and its class tell."""
    if isinstance(module, torch.jit.ScriptModule):  # which has no class that tells anything
        return {}
    stated, known = stated_layouts(module, layouts), known_layouts(module, _BY_CLASS)
    if stated is not None or known == {}:
        return stated or {}
    if known is None and _WITHOUT_MAP.search(type(module).__name__):
        return {}
    return {**_by_names(module), **(known or {})} or known


def is_passed_over(module: nn.Module, layouts: Mapping[str, Layouts]) -> bool:
    """Whether only the name of its class keeps a module from being attention."""
    kind = type(module).__name__
    is_meant = _WITHOUT_MAP.search(kind) is not None and kind not in layouts
    return is_meant and bool(_by_names(module) or unknown_fused(module))


def _by_names(module: nn.Module) -> Layouts:
    """The layouts that the names of a module's projections tell."""
    found: dict[str, Any] = {}
    for names in _BY_NAMES:
        has_all = all(
            has_weight(module._modules.get(name))
            or (layout == "v" and getattr(module, name, module) is None)
            for name, layout in names.items()
        )
        if has_all and found.keys().isdisjoint(names):
            found.update(names)
    return found


def unknown_fused(module: nn.Module) -> str:
    """The weight of a module that holds several projections in one, going by its name."""
    is_attention = "attention" in type(module).__name__.lower()
    for name, child in module._modules.items():
        is_fused = _FUSED_NAME.fullmatch(name) or (is_attention and name == "in_proj")
        if is_fused and has_weight(child):
            return f"{name}.weight"
    return next((name for name in module._parameters if _FUSED_WEIGHT.fullmatch(name)), "")


def at(owner: Any, path: str) -> Any:
    """What is at a path, or nothing."""
    for name in filter(None, path.split(".")):
        owner = getattr(owner, name, None)
    return owner


def has_weight(owner: Any) -> bool:
    """Whether it is a matrix or has one."""
    weight = owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def parameters_at(module: nn.Module, pattern: str) -> Iterator[tuple[str, Tensor, int, int]]:
    """Weights and biases at a path, with how many dimensions stand around the output features."""
    paths = [pattern]
    if "*" in pattern:
        paths = [path for path, _ in module.named_modules() if fnmatchcase(path, pattern)]
    for path in paths:
        owner = at(module, path)
        if isinstance(owner, Tensor):  # a parameter of the attention module itself
            kind, rows_first = type(module).__name__, (0, owner.ndim - 1)
            yield path, owner, *((0, 0) if "bias" in path else _OUTPUT_DIM.get(kind, rows_first))
        elif owner is not None and has_weight(owner):
            kind = type(owner).__name__ if not isinstance(owner, nn.modules.conv._ConvNd) else ""
            around = _OUTPUT_DIM.get(kind, (0, owner.weight.ndim - 1))
            yield f"{path}.weight", owner.weight, *around
            if isinstance(getattr(owner, "bias", None), Tensor):
                yield f"{path}.bias", owner.bias, 0, 0
