"""Where queries, keys and values lie in the weights of attention layers: one table.

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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# A weight (or the module that has it) by its path in the attention module, and its layout; or what
# tells the layout from the attention module, where one class has several.
Layouts = Mapping[str, str | Callable[[Any], str]]


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

_QKV: Layouts = {"qkv": "q k v"}
_Q_KV: Layouts = {"q": "q", "kv": "k v"}
_TO_Q_KV: Layouts = {"to_q": "q", "to_kv": "k v"}
_BY_HEAD = "num_heads * (q k v)"
_ATTEND: Layouts = {  # GPT-2's
    "c_attn": lambda module: "k v" if module.is_cross_attention else "q k v",
    "q_attn": "q",
}
_WRAPPED = _separate("q_proj.linear", "k_proj.linear", "v_proj.linear")
_MAP_ALONE: Layouts = {"q_proj": "q", "k_proj": "k"}
_TEXT_AND_IMAGE: Layouts = {
    "vision_proj": "q",
    "text_proj": "k",
    "values_vision_proj": "v",
    "values_text_proj": "v",
}
_CONTENT = _separate("q_content_proj", "k_content_proj", "v_proj")
_GATED: Layouts = {"q_proj": "num_attention_heads * (q gate)", "k_proj": "k", "v_proj": "v"}


def _falcon(module: Any) -> str:
    if module.new_decoder_architecture:
        return "num_kv_heads * (q k=head_dim v=head_dim)"
    return "q k=head_dim v=head_dim" if module.multi_query else _BY_HEAD


# Everything else, by class: the package (for timm, the file too) and the name of the class.
BY_CLASS: dict[str, Layouts] = {
    "torch.MultiheadAttention": {
        "in_proj_weight": "q k v",
        "in_proj_bias": "q k v",
        "q_proj_weight": "q",
        "k_proj_weight": "k",
        "v_proj_weight": "v",
    },
    # transformers
    **dict.fromkeys(
        (
            "transformers.Blip2Attention",
            "transformers.BlipAttention",
            "transformers.CohereCompassVisionAttention",
            "transformers.DeepseekOcr2SamVisionAttention",
            "transformers.Dots3NoteVisionAttention",
            "transformers.Ernie4_5_VLMoeVisionAttention",
            "transformers.Florence2VisionChannelAttention",
            "transformers.Florence2VisionWindowAttention",
            "transformers.Glm4vMoeVisionAttention",
            "transformers.Glm4vVisionAttention",
            "transformers.Glm5NextVisionAttention",
            "transformers.GlmImageVisionAttention",
            "transformers.GlmOcrVisionAttention",
            "transformers.GotOcr2VisionAttention",
            "transformers.HieraMaskUnitAttention",
            "transformers.InstructBlipAttention",
            "transformers.InstructBlipVideoAttention",
            "transformers.MgpstrAttention",
            "transformers.modeling_qwen2_vl.VisionAttention",
            "transformers.PPFormulaNetVisionAttention",
            "transformers.PPOCRV5MobileRecAttention",
            "transformers.PPOCRV5ServerRecAttention",
            "transformers.PPOCRV6SmallRecAttention",
            "transformers.Qwen2_5_VLVisionAttention",
            "transformers.Qwen3_5MoeVisionAttention",
            "transformers.Qwen3_5VisionAttention",
            "transformers.Qwen3OmniMoeVisionAttention",
            "transformers.Qwen3VLMoeVisionAttention",
            "transformers.Qwen3VLVisionAttention",
            "transformers.Qwen4ExpVisionAttention",
            "transformers.Sam2MultiScaleAttention",
            "transformers.SamHQVisionAttention",
            "transformers.SamVisionAttention",
            "transformers.SegGptAttention",
            "transformers.SLANeXtVisionAttention",
            "transformers.TimesformerSelfAttention",
            "transformers.UnlimitedOcrSamVisionAttention",
            "transformers.VitDetAttention",
        ),
        _QKV,
    ),
    # Its only query is a token that is learned: a bias.
    "transformers.Aimv2AttentionPoolingHead": {"cls_token": "q", "k_proj": "k", "v_proj": "v"},
    "transformers.AXK2Attention": {
        "q_a_proj": "q_latent",
        "q_gate_proj": "num_heads * (q=qk_head_dim gate=v_head_dim)",
        **_LATENT,
    },
    "transformers.BarkSelfAttention": {"att_proj": "q k v"},
    "transformers.BloomAttention": {"query_key_value": _BY_HEAD},
    "transformers.CodeGenAttention": {"qkv_proj": "4 * (q v k)"},
    "transformers.ConditionalDetrDecoderCrossAttention": _CONTENT,
    "transformers.ConditionalDetrDecoderSelfAttention": _CONTENT,
    "transformers.ConditionalDetrMHAttentionMap": _MAP_ALONE,
    "transformers.CvtSelfAttention": _separate(
        "projection_query", "projection_key", "projection_value"
    ),
    "transformers.DabDetrMHAttentionMap": {"q_linear": "q", "k_linear": "k"},
    "transformers.DbrxAttention": {"Wqkv": "q=hidden_size k v"},
    "transformers.DecisionTransformerGPT2Attention": _ATTEND,
    "transformers.DeepseekV4Attention": {"q_a_proj": "q_rank", "q_b_proj": "q", "kv_proj": "kv"},
    "transformers.DeepseekV4CSACompressor": {"kv_proj": "kv"},
    "transformers.DeepseekV4HCACompressor": {"kv_proj": "kv"},
    "transformers.DeepseekV4Indexer": {},  # picks positions, and has no attention map
    "transformers.DisentangledSelfAttention": {
        "in_proj": "num_attention_heads * (q k v)",
        "q_bias": "q",
        "v_bias": "v",
        "query_proj": "q",
        "key_proj": "k",
        "value_proj": "v",
    },
    "transformers.DetrMHAttentionMap": _MAP_ALONE,
    "transformers.EsmFoldSelfAttention": {"proj": _BY_HEAD},
    "transformers.EvollaSequenceAlignerCrossAttention": {
        **_separate("query", "key_protein", "value_protein"),
        **_separate("query", "key_structure", "value_structure"),
        **_separate("query", "key_msa", "value_msa"),
    },
    "transformers.EvollaSequenceCompressorAttention": _TO_Q_KV,
    "transformers.Exaone4_5_VisionAttention": {"qkv": "q=q_dim k=kv_dim v=kv_dim"},
    "transformers.FalconAttention": {"query_key_value": _falcon},
    "transformers.GPT2Attention": _ATTEND,
    "transformers.GPTBigCodeAttention": {
        "c_attn": lambda module: (
            "k v"
            if module.is_cross_attention
            else "q=embed_dim k v"
            if module.multi_query
            else _BY_HEAD
        ),
        "q_attn": "q",
    },
    "transformers.GPTNeoXAttention": {"query_key_value": "num_attention_heads * (q k v)"},
    "transformers.GPTNeoXJapaneseAttention": {"query_key_value": "num_attention_heads * (q k v)"},
    # Layers that reuse the keys of another have none of their own.
    "transformers.Gemma3nTextAttention": _separate("q_proj", "k_proj", "v_proj"),
    "transformers.Gemma4TextAttention": _separate("q_proj", "k_proj", "v_proj"),
    "transformers.Gemma4UnifiedTextAttention": _separate("q_proj", "k_proj", "v_proj"),
    "transformers.Gemma4AudioAttention": _WRAPPED,
    "transformers.Gemma4VisionAttention": _WRAPPED,
    "transformers.GraniteSpeechConformerAttention": _TO_Q_KV,
    "transformers.GraniteSpeechPlusConformerAttention": _TO_Q_KV,
    "transformers.GroundingDinoBiMultiHeadAttention": _TEXT_AND_IMAGE,
    "transformers.ImageGPTAttention": _ATTEND,
    "transformers.Inkling2FullAttention": _WRAPPED,
    "transformers.Inkling2SlidingAttention": _WRAPPED,
    "transformers.Inkling2LoopFullAttention": _WRAPPED,
    "transformers.Inkling2LoopSlidingAttention": _WRAPPED,
    "transformers.JetMoeAttention": {"experts.input_linear": "q", "kv_proj": "k v"},
    "transformers.Glm5NextTextLinearAttention": {},
    "transformers.LayoutLMv2SelfAttention": {
        "qkv_linear": "q k v",
        "q_bias": "q",
        "v_bias": "v",
        **_separate("query", "key", "value"),
    },
    "transformers.LevitAttention": {
        "queries_keys_values.linear": "num_attention_heads * (q=key_dim k=key_dim v)"
    },
    "transformers.LevitAttentionSubsample": {
        "queries.linear": "q",
        "keys_values.linear": "num_attention_heads * (k=key_dim v)",
    },
    "transformers.LSHSelfAttention": {"query_key": "qk", "value": "v"},
    "transformers.LukeSelfAttention": {
        **_separate("query", "key", "value"),
        "w2e_query": "q",
        "e2w_query": "q",
        "e2e_query": "q",
    },
    "transformers.FunnelRelMultiheadAttention": {
        **_separate("q_head", "k_head", "v_head"),
        "r_w_bias": "q",
        "r_r_bias": "q",
        "r_s_bias": "q",
    },
    "transformers.MaskFormerDetrMHAttentionMap": _MAP_ALONE,
    # Layers that share another's latent have none of their own, and some have no rotary keys.
    "transformers.MistralLarge4TextAttention": {
        "q_proj": "q",
        **_LATENT,
        "kv_a_proj_with_mqa": lambda module: (
            "latent=kv_lora_rank k" if module.qk_rope_head_dim else "latent"
        ),
    },
    "transformers.MMGroundingDinoBiMultiHeadAttention": _TEXT_AND_IMAGE,
    "transformers.MobileViTV2LinearSelfAttention": {"qkv_proj.convolution": "q=1 k v"},
    "transformers.ModernBertAttention": {"Wqkv": "q k v"},
    "transformers.MptAttention": {"Wqkv": "q k v"},
    "transformers.PersimmonAttention": {"query_key_value": _BY_HEAD},
    "transformers.Phi3Attention": {"qkv_proj": "q=num_attention_heads*head_dim k v"},
    "transformers.Phi4MultimodalAttention": {"qkv_proj": "q=num_attention_heads*head_dim k v"},
    "transformers.Qwen3NextAttention": _GATED,
    "transformers.Qwen3_5Attention": _GATED,
    "transformers.Qwen3_5MoeAttention": _GATED,
    "transformers.Qwen4ExpTextAttention": _GATED,
    "transformers.ZayaCCAProjection": {"q_proj": "q", "k_proj": "k"},
    "transformers.modeling_openai.Attention": {"c_attn": "q k v"},
    "transformers.MoshiAttention": _WRAPPED,
    "transformers.SwiftFormerEfficientAdditiveAttention": {"to_query": "q", "to_key": "k"},
    "transformers.XLNetRelativeAttention": {
        **_separate("q", "k", "v"),
        "r_w_bias": "q",
        "r_r_bias": "q",
        "r_s_bias": "q",
    },
    # timm
    "timm.attention.Attention": _QKV,
    "timm.attention.AttentionRope": {**_QKV, **_separate("q_proj", "k_proj", "v_proj")},
    "timm.attention2d.Attention2d": _QKV,
    "timm.attention2d.MultiQueryAttention2d": _separate("query.proj", "key.proj", "value.proj"),
    "timm.attention_pool.AttentionPoolLatent": _Q_KV,
    "timm.attention_pool2d.AttentionPool2d": {**_QKV, **_separate("q", "k", "v")},
    "timm.attention_pool2d.RotAttentionPool2d": {**_QKV, **_separate("q", "k", "v")},
    "timm.beit.Attention": {**_QKV, "q_bias": "q", "v_bias": "v"},
    "timm.bottleneck_attn.BottleneckAttn": {"qkv": "q=dim_out_qk k=dim_out_qk v=dim_out_v"},
    "timm.cait.TalkingHeadAttn": _QKV,
    "timm.coat.FactorAttnConvRelPosEnc": _QKV,
    "timm.convit.GPSA": {"qk": "q k", "v": "v"},
    "timm.convit.MHSA": _QKV,
    "timm.cpubone.ConvAttention": {"pwise": _BY_HEAD},
    "timm.csatv2.SpatialTransformerBlock": _QKV,
    # Its map is made of what the code calls keys and values, and attends to its queries.
    "timm.davit.ChannelAttention": {"qkv": "v q k"},
    "timm.davit.ChannelAttentionV2": _QKV,
    "timm.davit.WindowAttention": _QKV,
    "timm.diff_attention.DiffAttention": _QKV,
    "timm.edgenext.CrossCovarianceAttn": _QKV,
    "timm.efficientformer.Attention": {"qkv": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    "timm.efficientformer_v2.Attention2d": _separate("q.conv", "k.conv", "v.conv"),
    "timm.efficientformer_v2.Attention2dDownsample": _separate("q.proj.conv", "k.conv", "v.conv"),
    "timm.efficientvit_mit.LiteMLA": {"qkv.conv": "_ * (q=dim k=dim v=dim)"},
    "timm.efficientvit_msra.CascadedGroupAttention": {"qkvs.*.conv": "q=key_dim k=key_dim v"},
    "timm.eva.EvaAttention": {
        **_QKV,
        **_separate("q_proj", "k_proj", "v_proj"),
        "q_bias": "q",
        "v_bias": "v",
    },
    "timm.fastvit.Attention": _QKV,
    "timm.gcvit.WindowAttentionGlobal": {
        "qkv": lambda module: "k v" if module.use_global else "q k v"
    },
    "timm.gemma4_vit.Gemma4Attention": _WRAPPED,
    "timm.halo_attn.HaloAttn": {"q": "q", "kv": "num_heads * (k=dim_head_qk v=dim_head_v)"},
    "timm.hiera.MaskUnitAttention": _QKV,
    "timm.hieradet_sam2.MultiScaleAttention": _QKV,
    "timm.iformer.SHMA": {"q.c": "q", "k.c": "k", "v_gate.c": "v gate"},
    "timm.lambda_layer.LambdaLayer": {"qkv": "q=num_heads*dim_qk k=dim_qk v=dim_v"},
    "timm.levit.Attention": {"qkv.linear": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    "timm.levit.AttentionDownsample": {
        "q.ln.linear": "q",
        "kv.linear": "num_heads * (k=key_dim v=val_dim)",
    },
    "timm.lowformer.ConvAttention": {"pwise": _BY_HEAD},
    "timm.maxxvit.Attention2d": {"qkv": lambda m: _BY_HEAD if m.head_first else "q k v"},
    "timm.maxxvit.AttentionCl": {"qkv": lambda m: _BY_HEAD if m.head_first else "q k v"},
    "timm.metaformer.Attention": _QKV,
    "timm.mobilevit.LinearSelfAttention": {"qkv_proj": "q=1 k v"},
    "timm.mvitv2.MultiScaleAttention": _QKV,
    "timm.mvitv2.MultiScaleAttentionPoolFirst": _separate("q", "k", "v"),
    "timm.nest.Attention": _QKV,
    "timm.pvt_v2.Attention": _Q_KV,
    "timm.shvit.SHSA": {"qkv.c": "q=qk_dim k=qk_dim v=pdim"},
    "timm.swiftformer.EfficientAdditiveAttention": {"to_query": "q", "to_key": "k"},
    "timm.swin_transformer.WindowAttention": _QKV,
    "timm.swin_transformer_v2.WindowAttention": {**_QKV, "q_bias": "q", "v_bias": "v"},
    "timm.swin_transformer_v2_cr.WindowMultiHeadAttention": _QKV,
    "timm.tiny_vit.Attention": {"qkv": "num_heads * (q=key_dim k=key_dim v=val_dim)"},
    "timm.tnt.Attention": {"qk": "q k", "v": "v"},
    "timm.twins.GlobalSubSampleAttn": _Q_KV,
    "timm.twins.LocallyGroupedAttn": _QKV,
    "timm.visformer.Attention": _QKV,
    "timm.vision_transformer.DiffParallelScalingBlock": {
        "in_proj": "mlp q=2*num_heads*head_dim k=2*num_heads*head_dim v=2*num_heads*head_dim"
    },
    "timm.vision_transformer.ParallelScalingBlock": {
        "in_proj": "mlp q=num_heads*head_dim k=num_heads*head_dim v=num_heads*head_dim"
    },
    "timm.vision_transformer_relpos.RelPosAttention": _QKV,
    "timm.vision_transformer_sam.Attention": _QKV,
    "timm.volo.Attention": _QKV,
    "timm.volo.ClassAttention": _Q_KV,
    "timm.xcit.XCA": _QKV,
    # diffusers, whose attention may be fused later
    "diffusers.Attention": {
        **_separate("to_q", "to_k", "to_v"),
        **_separate("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_qkv": "q k v",
        "to_kv": "k v",
        "to_added_qkv": "q k v",
    },
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
    "qk_head_dim",
    "qk_channels_per_head",
    "dim_head_qk",
    "key_dim",
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "d_head",
    "dim_head",
)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


def layouts_by_class(
    module: Any, stated: Mapping[str, Layouts], table: Mapping[str, Layouts]
) -> Layouts | None:
    """The layouts that are stated for a module's class or one above it, or that a table has.

    Args:
        module: The module.
        stated: Layouts by the name of a class, which come first.
        table: Layouts by package and name of a class, for timm with the file between them.

    Returns:
        The layouts, or None if there are none for it.

    Example:
        >>> from torch import nn
        >>> layouts_by_class(nn.Linear(2, 6), {}, {"torch.Linear": {"weight": "q k v"}})
        {'weight': 'q k v'}
    """
    kinds = type(module).__mro__
    for kind in kinds:
        if kind.__name__ in stated:
            return stated[kind.__name__]
    for kind in kinds:
        package, file = kind.__module__.partition(".")[0], kind.__module__.rpartition(".")[2]
        for key in (f"{package}.{file}.{kind.__name__}", f"{package}.{kind.__name__}"):
            if key in table:
                return table[key]
    return None
