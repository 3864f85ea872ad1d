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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

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
    labels, sizes = zip(
        *((label, size) for label, _, size in (b.partition("=") for b in (inner or plain).split())),
        strict=True,
    )
    known = [_number(size, module) if size else None for size in sizes]
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
    for label, width in zip(labels, widths, strict=True):
        yield label, repeat, start, start + width
        start += width


def _number(text: str, module: nn.Module) -> int:
    """A product of integers and of the module's, or its config's, integer attributes."""
    value = 1
    for factor in text.split("*"):
        if factor.isdecimal():
            value *= int(factor)
            continue
        number = int_attribute(module, factor)
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


def _separate(q: str, k: str, v: str) -> Layouts:
    return {q: "q", k: "k", v: "v"}


_LATENT: Layouts = {
    "kv_a_proj_with_mqa": "latent=kv_lora_rank k=qk_rope_head_dim",
    "kv_b_proj": "num_heads * (k=qk_nope_head_dim v=v_head_dim)",
}

# Names that mean the same in every class that has all of them. Values may be None: then the keys
# are read as values too.
BY_NAMES: tuple[Layouts, ...] = (
    {"q_a_proj": "q_rank", "q_b_proj": "q", **_LATENT},  # DeepSeek's latent attention
    {"q_proj": "q", **_LATENT},
    _separate("query", "key", "value"),
    _separate("q_proj", "k_proj", "v_proj"),
    _separate("query_proj", "key_proj", "value_proj"),
    _separate("q_lin", "k_lin", "v_lin"),
    _separate("to_q", "to_k", "to_v"),
    _separate("add_q_proj", "add_k_proj", "add_v_proj"),  # the text half of diffusers' attention
    _separate("linear_q", "linear_k", "linear_v"),
    _separate("q_head", "k_head", "v_head"),
    _separate("project_q", "project_k", "project_v"),
    _separate("query_global", "key_global", "value_global"),
    _separate("layout_query", "layout_key", "layout_value"),
    _separate("wq", "wk", "wv"),
    _separate("Wq", "Wk", "Wv"),
    _separate("q", "k", "v"),
)


def _classes(package: str, names: str, layouts: Layouts) -> dict[str, Layouts]:
    """The same layouts for several classes of a package."""
    return {f"{package}.{name}": layouts for name in names.split()}


def _falcon(module: Any) -> str:
    if module.new_decoder_architecture:
        return "num_kv_heads * (q k=head_dim v=head_dim)"
    return "q k=head_dim v=head_dim" if module.multi_query else _BY_HEAD


def _gpt_big_code(module: Any) -> str:
    if module.is_cross_attention:
        return "k v"
    return "q=embed_dim k v" if module.multi_query else _BY_HEAD


_QKV: Layouts = {"qkv": "q k v"}
_BY_HEAD = "num_heads * (q k v)"
_WRAPPED = _separate("q_proj.linear", "k_proj.linear", "v_proj.linear")
_RELATIVE: Layouts = {"r_w_bias": "q", "r_r_bias": "q", "r_s_bias": "q"}
_MLP_QKV = "mlp q={0} k={0} v={0}"

# What these names do not tell, by class: the package (for timm, the file too) and the name of the
# class. A class that is no attention has no layouts.
BY_CLASS: dict[str, Layouts] = {
    "torch.MultiheadAttention": {
        "in_proj_weight": "q k v",
        "in_proj_bias": "q k v",
        "q_proj_weight": "q",
        "k_proj_weight": "k",
        "v_proj_weight": "v",
    },
    **_classes(
        "transformers",
        """Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention
        Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention
        Florence2VisionWindowAttention Glm4vMoeVisionAttention Glm4vVisionAttention
        Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention
        HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention
        modeling_qwen2_vl.VisionAttention PPFormulaNetVisionAttention PPOCRV5MobileRecAttention
        PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention
        Qwen3_5MoeVisionAttention Qwen3_5VisionAttention Qwen3OmniMoeVisionAttention
        Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen4ExpVisionAttention
        Sam2MultiScaleAttention SamHQVisionAttention SamVisionAttention SegGptAttention
        SLANeXtVisionAttention TimesformerSelfAttention UnlimitedOcrSamVisionAttention
        VitDetAttention""",
        _QKV,
    ),
    **_classes(
        "transformers",
        """Gemma4AudioAttention Gemma4VisionAttention Inkling2FullAttention
        Inkling2SlidingAttention Inkling2LoopFullAttention Inkling2LoopSlidingAttention
        MoshiAttention""",
        _WRAPPED,
    ),
    # Layers that reuse the keys of another have none of their own.
    **_classes(
        "transformers",
        "Gemma3nTextAttention Gemma4TextAttention Gemma4UnifiedTextAttention",
        _separate("q_proj", "k_proj", "v_proj"),
    ),
    **_classes(
        "transformers",
        "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention",
        {"q_proj": "num_attention_heads * (q gate)"},
    ),
    **_classes(
        "transformers",
        """ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap
        ZayaCCAProjection""",
        {"q_proj": "q", "k_proj": "k"},
    ),
    **_classes(
        "transformers",
        "ConditionalDetrDecoderCrossAttention ConditionalDetrDecoderSelfAttention",
        _separate("q_content_proj", "k_content_proj", "v_proj"),
    ),
    **_classes(
        "transformers",
        """EvollaSequenceCompressorAttention GraniteSpeechConformerAttention
        GraniteSpeechPlusConformerAttention""",
        {"to_q": "q", "to_kv": "k v"},
    ),
    **_classes(
        "transformers",
        "DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention",
        {
            "c_attn": lambda module: "k v" if module.is_cross_attention else "q k v",
            "q_attn": "q",
        },
    ),
    **_classes(
        "transformers",
        "GroundingDinoBiMultiHeadAttention MMGroundingDinoBiMultiHeadAttention",
        {
            "vision_proj": "q",
            "text_proj": "k",
            "values_vision_proj": "v",
            "values_text_proj": "v",
        },
    ),
    **_classes("transformers", "BloomAttention PersimmonAttention", {"query_key_value": _BY_HEAD}),
    **_classes(
        "transformers",
        "GPTNeoXAttention GPTNeoXJapaneseAttention",
        {"query_key_value": "num_attention_heads * (q k v)"},
    ),
    **_classes(
        "transformers",
        "Phi3Attention Phi4MultimodalAttention",
        {"qkv_proj": "q=num_attention_heads*head_dim k v"},
    ),
    **_classes("transformers", "ModernBertAttention MptAttention", {"Wqkv": "q k v"}),
    **_classes(
        "transformers", "DeepseekV4CSACompressor DeepseekV4HCACompressor", {"kv_proj": "kv"}
    ),
    **_classes("transformers", "DeepseekV4Indexer Glm5NextTextLinearAttention", {}),
    # Its only query is a token that is learned: a bias.
    "transformers.Aimv2AttentionPoolingHead": {"cls_token": "q", "k_proj": "k", "v_proj": "v"},
    "transformers.AXK2Attention": {
        "q_a_proj": "q_latent",
        "q_gate_proj": "num_heads * (q=qk_head_dim gate=v_head_dim)",
        **_LATENT,
    },
    "transformers.BarkSelfAttention": {"att_proj": "q k v"},
    "transformers.CodeGenAttention": {"qkv_proj": "4 * (q v k)"},
    "transformers.CvtSelfAttention": _separate(
        "projection_query", "projection_key", "projection_value"
    ),
    "transformers.DabDetrMHAttentionMap": {"q_linear": "q", "k_linear": "k"},
    "transformers.DbrxAttention": {"Wqkv": "q=hidden_size k v"},
    "transformers.DeepseekV4Attention": {"q_a_proj": "q_rank", "q_b_proj": "q", "kv_proj": "kv"},
    "transformers.DisentangledSelfAttention": {
        "in_proj": "num_attention_heads * (q k v)",
        "q_bias": "q",
        "v_bias": "v",
    },
    "transformers.EsmFoldSelfAttention": {"proj": _BY_HEAD},
    "transformers.EvollaSequenceAlignerCrossAttention": {
        **_separate("query", "key_protein", "value_protein"),
        **_separate("query", "key_structure", "value_structure"),
        **_separate("query", "key_msa", "value_msa"),
    },
    "transformers.Exaone4_5_VisionAttention": {"qkv": "q=q_dim k=kv_dim v=kv_dim"},
    "transformers.FalconAttention": {"query_key_value": _falcon},
    "transformers.FunnelRelMultiheadAttention": _RELATIVE,
    "transformers.GPTBigCodeAttention": {"c_attn": _gpt_big_code, "q_attn": "q"},
    "transformers.JetMoeAttention": {"experts.input_linear": "q", "kv_proj": "k v"},
    "transformers.LayoutLMv2SelfAttention": {"qkv_linear": "q k v", "q_bias": "q", "v_bias": "v"},
    "transformers.LevitAttention": {
        "queries_keys_values.linear": "num_attention_heads * (q=key_dim k=key_dim v)"
    },
    "transformers.LevitAttentionSubsample": {
        "queries.linear": "q",
        "keys_values.linear": "num_attention_heads * (k=key_dim v)",
    },
    "transformers.LSHSelfAttention": {"query_key": "qk", "value": "v"},
    "transformers.LukeSelfAttention": {"w2e_query": "q", "e2w_query": "q", "e2e_query": "q"},
    # Layers that share another's latent have none of their own, and some have no rotary keys.
    "transformers.MistralLarge4TextAttention": {
        "q_proj": "q",
        **_LATENT,
        "kv_a_proj_with_mqa": lambda module: (
            "latent=kv_lora_rank k" if module.qk_rope_head_dim else "latent"
        ),
    },
    "transformers.MobileViTV2LinearSelfAttention": {"qkv_proj.convolution": "q=1 k v"},
    "transformers.modeling_openai.Attention": {"c_attn": "q k v"},
    "transformers.SwiftFormerEfficientAdditiveAttention": {"to_query": "q", "to_key": "k"},
    "transformers.XLNetRelativeAttention": {**_separate("q", "k", "v"), **_RELATIVE},
    **_classes(
        "timm",
        """attention.Attention attention.AttentionRope attention2d.Attention2d
        attention_pool2d.AttentionPool2d attention_pool2d.RotAttentionPool2d cait.TalkingHeadAttn
        coat.FactorAttnConvRelPosEnc convit.MHSA csatv2.SpatialTransformerBlock
        davit.ChannelAttentionV2 davit.WindowAttention diff_attention.DiffAttention
        edgenext.CrossCovarianceAttn fastvit.Attention hiera.MaskUnitAttention
        hieradet_sam2.MultiScaleAttention metaformer.Attention mvitv2.MultiScaleAttention
        nest.Attention swin_transformer.WindowAttention
        swin_transformer_v2_cr.WindowMultiHeadAttention twins.LocallyGroupedAttn
        visformer.Attention vision_transformer_relpos.RelPosAttention
        vision_transformer_sam.Attention volo.Attention xcit.XCA""",
        _QKV,
    ),
    **_classes(
        "timm",
        "beit.Attention eva.EvaAttention swin_transformer_v2.WindowAttention",
        {**_QKV, "q_bias": "q", "v_bias": "v"},
    ),
    **_classes(
        "timm",
        """attention_pool.AttentionPoolLatent pvt_v2.Attention twins.GlobalSubSampleAttn
        volo.ClassAttention""",
        {"q": "q", "kv": "k v"},
    ),
    **_classes(
        "timm",
        "efficientformer.Attention tiny_vit.Attention",
        {"qkv": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    ),
    **_classes(
        "timm",
        "maxxvit.Attention2d maxxvit.AttentionCl",
        {"qkv": lambda module: _BY_HEAD if module.head_first else "q k v"},
    ),
    **_classes("timm", "convit.GPSA tnt.Attention", {"qk": "q k", "v": "v"}),
    **_classes("timm", "cpubone.ConvAttention lowformer.ConvAttention", {"pwise": _BY_HEAD}),
    "timm.attention2d.MultiQueryAttention2d": _separate("query.proj", "key.proj", "value.proj"),
    "timm.bottleneck_attn.BottleneckAttn": {"qkv": "q=dim_out_qk k=dim_out_qk v=dim_out_v"},
    # Its map is made of what the code calls keys and values, and attends to its queries.
    "timm.davit.ChannelAttention": {"qkv": "v q k"},
    "timm.efficientformer_v2.Attention2d": _separate("q.conv", "k.conv", "v.conv"),
    "timm.efficientformer_v2.Attention2dDownsample": _separate("q.proj.conv", "k.conv", "v.conv"),
    "timm.efficientvit_mit.LiteMLA": {"qkv.conv": "_ * (q=dim k=dim v=dim)"},
    "timm.efficientvit_msra.CascadedGroupAttention": {"qkvs.*.conv": "q=key_dim k=key_dim v"},
    "timm.gcvit.WindowAttentionGlobal": {
        "qkv": lambda module: "k v" if module.use_global else "q k v"
    },
    "timm.gemma4_vit.Gemma4Attention": _WRAPPED,
    "timm.halo_attn.HaloAttn": {"q": "q", "kv": "num_heads * (k=dim_head_qk v=dim_head_v)"},
    "timm.iformer.SHMA": {"q.c": "q", "k.c": "k", "v_gate.c": "v gate"},
    "timm.lambda_layer.LambdaLayer": {"qkv": "q=num_heads*dim_qk k=dim_qk v=dim_v"},
    "timm.levit.Attention": {"qkv.linear": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    "timm.levit.AttentionDownsample": {
        "q.ln.linear": "q",
        "kv.linear": "num_heads * (k=key_dim v=val_dim)",
    },
    "timm.mobilevit.LinearSelfAttention": {"qkv_proj": "q=1 k v"},
    "timm.shvit.SHSA": {"qkv.c": "q=qk_dim k=qk_dim v=pdim"},
    "timm.swiftformer.EfficientAdditiveAttention": {"to_query": "q", "to_key": "k"},
    "timm.vision_transformer.DiffParallelScalingBlock": {
        "in_proj": _MLP_QKV.format("2*num_heads*head_dim")
    },
    "timm.vision_transformer.ParallelScalingBlock": {
        "in_proj": _MLP_QKV.format("num_heads*head_dim")
    },
    # Its attention may be fused later.
    "diffusers.Attention": {"to_qkv": "q k v", "to_kv": "k v", "to_added_qkv": "q k v"},
}

# Layers that have queries and keys by name, and no attention map: linear attention in its forms.
WITHOUT_MAP = re.compile(r"DeltaNet|DeltaAttention|LightningAttention|LSTM|Mamba|Rwkv")

# How a projection that holds several others is called. In a class that the table does not have, its
# layout differs from author to author (blocks, heads interleaved, groups), so it is never guessed.
FUSED_NAME = re.compile(
    r"(to_|in_proj_|added_|W)?(qkvs?|qk|kv)(_proj|_linear|_lin)?|query_key(_value)?|key_value|c_attn"
)
FUSED_WEIGHT = re.compile(r"(in_proj|qkv)_weight")

# Where the output features lie: how many dimensions stand before them and after them. For all other
# weights the first dimension is theirs.
OUTPUT_DIM = {
    "Conv1D": (1, 0),  # GPT-2's
    "Aimv2AttentionPoolingHead": (2, 0),
    "JetMoeParallelExperts": (1, 1),
    "MoshiFlexibleLinear": (1, 1),
    "XLNetRelativeAttention": (1, 0),
}

# Parameters of an attention module that are added to what others make, or stand in their place.
BIAS_NAME = re.compile("bias|token")

# Differential attention: a head has two maps, of queries and keys of half its width.
TWO_MAPS = frozenset({"DiffAttention", "DiffParallelScalingBlock"})

# How attention modules, or their configs, call the rows of a head and the number of heads.
HEAD_WIDTHS = (
    *("qk_head_dim", "qk_channels_per_head", "dim_head_qk", "key_dim", "head_dim"),
    *("attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head"),
)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


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
