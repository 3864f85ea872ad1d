"""Judge the query/key selection of every architecture of transformers and timm by attention maps.

    python tests/audits/every_attention.py                     # all, some minutes
    python tests/audits/every_attention.py transformers bert llama
    python tests/audits/every_attention.py further cvt sam_vision_model
    python tests/audits/every_attention.py timm vit_tiny_patch16_224

Of transformers all model types that AutoModelForSequenceClassification and AutoModelForCausalLM
know, small, with random weights and eager attention, and further ones for images, sound and the
like; of timm the smallest model for every attention class that any of its models has. Prints a line
for each and how many of how many passed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from attention_maps import Verdict, judge, make_attentive_
from torch import nn

# What makes a config of any model type small, where it has such an attribute.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(
        ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 16,
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 96
    ),
    **dict.fromkeys(("n_inner", "hidden_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "vocab_size": 128,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "cross_attention_hidden_size": 64,
    "encoder_hash_byte_group_vocab": 64,
}
# The same for latent attention.
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "qk_head_dim": 24,
    "num_key_value_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 4,
}
_MIXED = ["linear_attention", "full_attention"] * 2
_DENSE = ["dense"] * 4
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "hidden_size": 64, "mamba_expand": 2}
_ZAMBA = {
    "num_hidden_layers": 6,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "use_mamba_kernels": False,
}
_RELATIVE = {
    "pooler_hidden_size": 64,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
}
_GEMMA = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "vocab_size": 128,
}
_GEMMA3N = {
    **_GEMMA,
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
}
_GEMMA4 = {**_GEMMA, "intermediate_size": 96, "global_head_dim": 16}
_LINEAR = {
    "layer_types": _MIXED,
    "mlp_layer_types": _DENSE,
    "num_hidden_layers": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
_DOTS = {
    **LATENT,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "indexed_attention"] * 2,
    "mlp_layer_types": _DENSE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "intermediate_size": 96,
}
_QWEN4 = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ple_embed_dim": 64,
    "vocab_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
# What single model types need beyond that, to be built at all or to have every kind of layer.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bros": {"dim_bbox_projection": 16},
    "codegen": {"rotary_dim": 16},
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE,
    # Short enough for a sentence to have compressed keys; and all of them are picked.
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 64,
        "index_head_dim": 16,
        "index_n_heads": 4,
        "q_lora_rank": 24,
        "o_lora_rank": 8,
        "o_groups": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}, "d_model": 64, "n_heads": 4},
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "esmc": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64},
    "funnel": {
        "block_sizes": [2, 2],
        "num_decoder_layers": 1,
        "d_head": 16,
        "n_head": 4,
        "d_model": 64,
        "d_inner": 96,
    },
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma3n": {"text_config": _GEMMA3N},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": _MIXED,
        "num_hidden_layers": 4,
        "shared_intermediate_size": 64,
        "position_embedding_type": "rope",
    },
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "unpadded_vocab_size": 128,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
    },
    "kimi_linear": _LINEAR,
    "layoutlmv3": {
        "coordinate_size": 8,
        "shape_size": 16,
        "input_size": 32,
        "visual_embed": False,
        "hidden_size": 64,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96, "num_attention_heads": 4},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 32},
    "mistral4": {"num_key_value_heads": 4, "num_attention_heads": 4, "hidden_size": 64},
    "mobilebert": {
        "embedding_size": 32,
        "hidden_size": 64,
        "true_hidden_size": 32,
        "intra_bottleneck_size": 32,
    },
    "mt5": {"decoder_start_token_id": 0, "d_kv": 16},
    "nemotron": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "num_attention_heads": 4,
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 48,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 32,
        "v_channels": 32,
        "image_size": 8,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "reformer": {
        "axial_pos_embds": False,
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "attention_head_size": 16,
        # Chunks longer than the sentence: nothing is hashed, which would pick other positions.
        "lsh_attn_chunk_length": 64,
        "local_attn_chunk_length": 64,
    },
    "t5": {"decoder_start_token_id": 0, "d_kv": 16},
    "umt5": {"decoder_start_token_id": 0, "d_kv": 16},
    "xlnet": {"d_model": 64, "n_head": 4, "d_inner": 96, "n_layer": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "zamba2": {
        **_ZAMBA,
        "kv_channels": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "hidden_size": 64,
        "adapter_rank": 8,
        "num_mem_blocks": 1,
    },
}
_MOST_PARAMETERS = 600e6

Inputs = dict[str, torch.Tensor]


class Further(NamedTuple):
    """A model type, or one layer, that neither mapping has.

    Attributes:
        inputs: Made from a seed.
        options: Of the config, or of the layer's class.
        class_name: Where the config does not tell which class is to be built.
    """

    inputs: Callable[[int], Inputs]
    options: Mapping[str, Any] = types.MappingProxyType({})
    class_name: str = ""


def _normal(**shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    return inputs


def _patches(width: int, name: str = "hidden_states") -> Callable[[int], Inputs]:
    """An image of four by four patches in a row."""
    grid = {"grid_thw": torch.tensor([(1, 4, 4)])}
    return lambda seed: {**_normal(**{name: (16, width)})(seed), **grid}


def _text(seed: int) -> Inputs:
    return {"input_ids": tokens(seed)}


def _two_texts(seed: int) -> Inputs:
    return {"input_ids": tokens(seed), "decoder_input_ids": tokens(seed + 7)}


def _text_in_boxes(seed: int) -> Inputs:
    return {"input_ids": tokens(seed), "bbox": _normal(bbox=(2, 11, 4))(0)["bbox"]}


_IMAGE = _normal(pixel_values=(2, 3, 32, 32))
_LARGE_IMAGE = _normal(pixel_values=(2, 3, 64, 64))
_LINE = _normal(pixel_values=(2, 3, 48, 64))
_VIT = {"image_size": 32, "patch_size": 8}
_WINDOWED = {
    **_VIT,
    "global_attn_indexes": [1],
    "window_size": 2,
    "mlp_dim": 96,
    "num_pos_feats": 32,
    "output_channels": 16,
}
_PATCHED = {
    "patch_size": 4,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "image_size": 16,
}
_IN_WINDOWS = {**_PATCHED, "fullatt_block_indexes": [1], "window_size": 16}
_STACKED = {**_PATCHED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_SPEECH = {
    "hidden_dim": 64,
    "input_dim": 24,
    "num_heads": 4,
    "dim_head": 16,
    "context_size": 6,
    "max_pos_emb": 16,
    "num_layers": 2,
    "output_dim": 8,
}
_FRAMES = _normal(hidden_states=(2, 11, 24))
_IN_PLACES = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
_STAGES: dict[str, Any] = {
    "num_heads": [1, 2],
    "patch_sizes": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [2, 1],
}
# By model type.
FURTHER = {
    "aimv2_vision_model": Further(_IMAGE, {**_VIT, "use_head": True}),
    "blip_2_vision_model": Further(_IMAGE, _VIT),
    "blip_vision_model": Further(_IMAGE, _VIT),
    "bros": Further(_text_in_boxes),
    "cohere_compass_vision": Further(_patches(96), _STACKED),
    "cvt": Further(
        _IMAGE,
        {
            **_STAGES,
            "embed_dim": [16, 32],
            "depth": [1, 2],
            "cls_token": [False, True],
            "mlp_ratio": [2.0, 2.0],
            "drop_rate": [0.0, 0.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "qkv_projection_method": ["dw_bn"] * 2,
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
            "stride_kv": [2, 2],
        },
    ),
    "decision_transformer": Further(
        lambda seed: {
            **_normal(states=(2, 5, 5), actions=(2, 5, 3), returns_to_go=(2, 5, 1))(seed),
            "timesteps": torch.arange(5).expand(2, 5),
            "attention_mask": torch.ones(2, 5),
        },
        {"state_dim": 5, "act_dim": 3, "hidden_size": 64, "n_positions": 64, "max_ep_len": 32},
    ),
    "deepseek_ocr2_sam_vision_model": Further(_IMAGE, _WINDOWED),
    "ernie4_5_vl_moe_vision": Further(_patches(48), {**_PATCHED, "hidden_size": 64}),
    "exaone4_5_vision": Further(_patches(96), {**_IN_WINDOWS, "num_key_value_heads": 2}),
    "florence_vision": Further(
        _normal(hidden_states=(2, 3, 32, 32)),
        {
            **_STAGES,
            "patch_size": [7, 3],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "depths": [1, 1],
            "num_groups": [2, 4],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 32,
        },
    ),
    "gemma4_audio": Further(
        lambda seed: {
            **_normal(input_features=(1, 64, 128))(seed),
            "attention_mask": torch.ones(1, 64).bool(),
        }
    ),
    "gemma4_vision": Further(
        lambda seed: {
            **_normal(pixel_values=(2, 16, 48))(seed),
            "pixel_position_ids": _IN_PLACES,
        },
        {"patch_size": 4, "num_key_value_heads": 4},
    ),
    "glm4v_moe_vision": Further(_patches(96), _PATCHED),
    "glm4v_vision": Further(_patches(96), _PATCHED),
    "glm5_next_vision": Further(_patches(96), _PATCHED),
    "glm_image_vision": Further(_patches(48, "pixel_values"), _PATCHED),
    "glm_ocr_vision": Further(_patches(96), _PATCHED),
    "got_ocr2_vision": Further(_IMAGE, _WINDOWED),
    "granite_speech_encoder": Further(_FRAMES, _SPEECH),
    "granite_speech_plus_encoder": Further(_FRAMES, _SPEECH),
    "hiera": Further(
        _IMAGE,
        {
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [4, 4],
            "patch_padding": [1, 1],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
            "num_query_pool": 1,
        },
    ),
    "imagegpt": Further(_text),
    "instructblip_vision_model": Further(_IMAGE, _VIT),
    "instructblipvideo_vision_model": Further(_IMAGE, _VIT),
    "levit": Further(
        _LARGE_IMAGE,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48],
            "num_attention_heads": [2, 3],
            "depths": [1, 1],
            "key_dim": [8, 8],
            "mlp_ratio": [2, 2],
            "attention_ratio": [2, 2],
            "down_ops": [["Subsample", 8, 4, 4, 2, 2], [""]],
        },
    ),
    "longt5": Further(_two_texts, {"local_radius": 3, "d_kv": 16, "decoder_start_token_id": 0}),
    "mgp-str": Further(
        _IMAGE,
        {
            "image_size": [32, 32],
            "patch_size": 8,
            **dict.fromkeys(("num_bpe_labels", "num_wordpiece_labels", "num_character_labels"), 40),
        },
    ),
    "mistral_large4_text": Further(_text),
    "pp_formulanet_vision": Further(_IMAGE, {**_WINDOWED, "output_channels": 256}),
    "pp_ocrv5_mobile_rec": Further(
        _normal(pixel_values=(2, 3, 72, 256)), {}, "PPOCRV5MobileRecForTextRecognition"
    ),
    "pp_ocrv5_server_rec": Further(_LINE, {}, "PPOCRV5ServerRecForTextRecognition"),
    "pp_ocrv6_small_rec": Further(_LINE, {}, "PPOCRV6SmallRecForTextRecognition"),
    "qwen2_5_vl_vision": Further(_patches(96), _IN_WINDOWS),
    "qwen2_vl_vision": Further(_patches(96), {**_PATCHED, "hidden_size": 64}),
    "qwen3_5_moe_vision": Further(_patches(96), _STACKED),
    "qwen3_5_vision": Further(_patches(96), _STACKED),
    "qwen3_omni_moe_vision_encoder": Further(_patches(96), _STACKED),
    "qwen3_vl_moe_vision": Further(_patches(96), _STACKED),
    "qwen3_vl_vision": Further(_patches(96), _STACKED),
    "qwen4_exp_vision": Further(_patches(96), _STACKED),
    "sam2_hiera_det_model": Further(
        _LARGE_IMAGE,
        {
            "image_size": [64, 64],
            "hidden_size": 16,
            "num_attention_heads": 1,
            "blocks_per_stage": [1, 2],
            "embed_dim_per_stage": [16, 32],
            "num_attention_heads_per_stage": [1, 2],
            "window_size_per_stage": [4, 4],
            "global_attention_blocks": [2],
            "num_query_pool_stages": 1,
            "window_positional_embedding_background_size": [4, 4],
        },
    ),
    "sam_hq_vision_model": Further(_IMAGE, _WINDOWED),
    "sam_vision_model": Further(_IMAGE, _WINDOWED),
    "seggpt": Further(
        _normal(
            **dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), (1, 3, 32, 32))
        ),
        {
            "image_size": [64, 32],
            "patch_size": 8,
            "pretrain_image_size": 32,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1],
        },
    ),
    "slanext_vision": Further(_IMAGE, _WINDOWED),
    "timesformer": Further(_normal(pixel_values=(1, 2, 3, 32, 32)), {**_VIT, "num_frames": 2}),
    "unlimited_ocr_sam_vision_model": Further(_IMAGE, _WINDOWED),
    "vitdet": Further(
        _IMAGE,
        {
            **_VIT,
            "pretrain_image_size": 32,
            "window_block_indices": [0],
            "window_size": 2,
            "use_relative_position_embeddings": True,
        },
    ),
}
_DETR = {"hidden_size": 32, "num_attention_heads": 4}
_QUERY_PLACES = _normal(query_position_embeddings=(2, 7, 32))(0)
_MAP_OF_AN_IMAGE = _normal(query_states=(2, 5, 32), key_states=(2, 32, 3, 4))
_FUSION = {
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 8,
    "fusion_dropout": 0.0,
}
# Single layers by model type and class, where the whole model is hard to build.
LAYERS = {
    "conditional_detr ConditionalDetrDecoderSelfAttention": Further(
        lambda seed: {**_normal(hidden_states=(2, 7, 32))(seed), **_QUERY_PLACES},
        {**_DETR, "config": {"_attn_implementation": "eager"}},
    ),
    "conditional_detr ConditionalDetrDecoderCrossAttention": Further(
        lambda seed: {
            **_normal(hidden_states=(2, 7, 32), encoder_hidden_states=(2, 7, 32))(seed),
            **_QUERY_PLACES,
            **_normal(query_sine_embed=(2, 7, 32), encoder_position_embeddings=(2, 7, 32))(0),
        },
        {**_DETR, "config": {"_attn_implementation": "eager"}},
    ),
    "bark BarkSelfAttention": Further(
        _normal(hidden_states=(2, 7, 32)),
        {"config": {"hidden_size": 32, "num_heads": 4, "bias": True, "dropout": 0.0}},
    ),
    "conditional_detr ConditionalDetrMHAttentionMap": Further(_MAP_OF_AN_IMAGE, _DETR),
    "dab_detr DabDetrMHAttentionMap": Further(
        _normal(q=(2, 5, 32), k=(2, 32, 3, 4)), {"query_dim": 32, "hidden_dim": 32, "num_heads": 4}
    ),
    "detr DetrMHAttentionMap": Further(_MAP_OF_AN_IMAGE, _DETR),
    "esm.modeling_esmfold EsmFoldSelfAttention": Further(
        _normal(x=(2, 7, 32)), {"embed_dim": 32, "num_heads": 4, "head_width": 8}
    ),
    "evolla EvollaSequenceCompressorAttention": Further(
        lambda seed: {
            **_normal(x=(2, 7, 32), latents=(2, 3, 32))(seed),
            "mask": torch.ones(2, 10),
        },
        {"dim": 32, "dim_head": 8, "heads": 4},
    ),
    "grounding_dino GroundingDinoBiMultiHeadAttention": Further(
        _normal(vision_features=(2, 7, 32), text_features=(2, 5, 32)),
        {"config": _FUSION},
    ),
    "maskformer MaskFormerDetrMHAttentionMap": Further(_MAP_OF_AN_IMAGE, _DETR),
    "mm_grounding_dino MMGroundingDinoBiMultiHeadAttention": Further(
        _normal(vision_features=(2, 7, 32), text_features=(2, 5, 32)),
        {"config": _FUSION},
    ),
}


def shrink(config: Any) -> Any:
    """Set what can be set; a config that refuses a value keeps its own."""
    from transformers import PretrainedConfig

    for name, value in SMALL.items():
        _try_set(config, name, value)
    if isinstance(_get(config, "kv_lora_rank"), int):
        for name, value in LATENT.items():
            _try_set(config, name, value)
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "attn_layers"):
        value = _get(config, name)
        if isinstance(value, list) and len(value) > 4:
            setattr(config, name, value[:4])
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
    return config


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # it differs from layer to layer
        return None


def _try_set(config: Any, name: str, value: Any) -> None:
    old = _get(config, name)
    if isinstance(old, (list, tuple, dict)) or (old is None and name in ("num_key_value_heads",)):
        return
    if old is None and name not in vars(config):
        return
    _set(config, name, value)


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(ValueError, TypeError, AttributeError, NotImplementedError):
        setattr(config, name, value)  # what is refused is derived from others that are set


def _small_config(model_type: str, special: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    config = shrink(CONFIG_MAPPING[model_type](**special))
    for name, value in special.items():
        if not isinstance(value, dict):
            _set(config, name, value)
    return config


def small_transformer(model_type: str, auto: Any) -> nn.Module:
    """A small model of this type, with eager attention."""
    config = _small_config(model_type, SPECIAL.get(model_type, {}))
    torch.manual_seed(0)
    if model_type in ("musicgen", "musicgen_melody"):  # their class wants a part of their config
        config.decoder._attn_implementation = "eager"
        return auto._model_mapping[type(config)](config.decoder).float().eval()
    return auto.from_config(config, attn_implementation="eager").float().eval()


def small_further(model_type: str) -> nn.Module:
    """A small model of one of the types of ``FURTHER``, with eager attention."""
    from transformers import AutoModel

    further = FURTHER[model_type]
    config = _small_config(model_type, {**SPECIAL.get(model_type, {}), **further.options})
    torch.manual_seed(0)
    if type(config) in AutoModel._model_mapping and not further.class_name:
        return AutoModel.from_config(config, attn_implementation="eager").float().eval()
    config._attn_implementation = "eager"
    modeling = type(config).__module__.replace("configuration_", "modeling_")
    kind = next(
        kind
        for name, kind in vars(importlib.import_module(modeling)).items()
        if getattr(kind, "config_class", None) is type(config)
        and (name == further.class_name or not (further.class_name or "PreTrained" in name[-15:]))
    )
    return kind(config).float().eval()


def one_layer(name: str) -> nn.Module:
    """One of ``LAYERS``."""
    folder, class_name = name.split()
    folder, _, file = folder.partition(".")
    file = file or f"modeling_{folder}"
    module = importlib.import_module(f"transformers.models.{folder}.{file}")
    options = dict(LAYERS[name].options)
    if "config" in options:
        options["config"] = types.SimpleNamespace(**options["config"])
    torch.manual_seed(0)
    return getattr(module, class_name)(**options).eval()


def tokens(seed: int, length: int = 11) -> torch.Tensor:
    """Two sentences that end with the end-of-sentence token."""
    ids = torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 2
    return ids


def judge_model(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> Verdict:
    """With weights as large as they can be without maps that see one position only."""
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMETERS:
        return Verdict(False, False, "it cannot be made small", 0, 0)
    verdict = Verdict(False, False, "", 0, 0)
    for gain in (2, 1, 0.5, 0.2, 0.05):
        make_attentive_(model, gain)
        verdict = judge(model, *(lambda kwargs=kwargs: model(**kwargs) for kwargs in inputs))
        if "from the start" not in verdict.reason:
            break
    return verdict


def model_types(only: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Every model type of both mappings: what to call it, its name, and its auto class."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto

    for auto, known in (
        (
            AutoModelForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        for model_type in known:
            if not only or model_type in only:
                yield f"{auto.__name__.removeprefix('AutoModelFor')} {model_type}", model_type, auto


def smallest_with_attention(only: list[str]) -> list[tuple[str, str]]:
    """Every class of attention layer in timm, and the smallest model that has it."""
    import timm

    from torch_worm_optim.selectors import attention_blocks

    smallest: dict[str, tuple[int, str]] = {}
    for name in only or timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        for path, module in model.named_modules():
            if attention_blocks(path, module, {}):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                smallest[kind] = min(smallest.get(kind, (size, name)), (size, name))
    return [(kind, name) for kind, (_, name) in sorted(smallest.items())]


def of_transformers(only: list[str]) -> Iterator[tuple[str, Verdict]]:
    """Every model type of both mappings."""
    for what, model_type, auto in model_types(only):

        def build(model_type: str = model_type, auto: Any = auto) -> Verdict:
            model = small_transformer(model_type, auto)
            return judge_model(model, [{"input_ids": tokens(seed)} for seed in (1, 2)])

        yield what, _guarded(build, bool(only))


def of_further(only: list[str]) -> Iterator[tuple[str, Verdict]]:
    """Every model type of ``FURTHER`` and every layer of ``LAYERS``."""
    for build, table in ((small_further, FURTHER), (one_layer, LAYERS)):
        for name, further in table.items():
            if not only or not {name, *name.split()}.isdisjoint(only):
                yield (
                    name,
                    _guarded(
                        lambda name=name, build=build, further=further: judge_model(
                            build(name), [further.inputs(seed) for seed in (1, 2)]
                        ),
                        bool(only),
                    ),
                )


def of_timm(only: list[str]) -> Iterator[tuple[str, Verdict]]:
    """The smallest timm model for every class of attention layer that any has."""
    import timm

    timm.layers.set_fused_attn(False)
    for kind, name in smallest_with_attention(only):

        def build(name: str = name) -> Verdict:
            torch.manual_seed(0)
            model = timm.create_model(name).eval().double()
            shape = (1, *model.default_cfg["input_size"])
            images = [
                torch.randn(shape, generator=torch.Generator().manual_seed(s)).double()
                for s in (1, 2)
            ]
            return judge_model(model, [{"x": image} for image in images])

        yield f"{kind} in {name}", _guarded(build, bool(only))


def _guarded(work: Any, loud: bool) -> Verdict:
    try:
        return work()
    except Exception as error:  # a model that cannot be built must not hide the others
        if loud:
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}".replace("\n", " ")
        return Verdict(False, False, message[:200], 0, 0)


def main() -> None:
    """Judge all, or those that are named."""
    warnings.filterwarnings("ignore")
    torch.backends.mha.set_fastpath_enabled(False)
    library, only = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    for name, judged in (
        ("transformers", of_transformers),
        ("further", of_further),
        ("timm", of_timm),
    ):
        if library not in ("", name):
            continue
        verdicts = []
        for what, verdict in judged(only):
            verdicts.append(verdict)
            word = ("uniform" if verdict.uniform else "by position") if verdict.passed else "FAILED"
            counts = f"{verdict.n_layers} layers, {verdict.n_fused} fused"
            print(f"{word:12}{what}: {counts}. {verdict.reason}", flush=True)
        passed = sum(verdict.passed for verdict in verdicts)
        print(f"== {name}: {passed} of {len(verdicts)} passed", flush=True)


if __name__ == "__main__":
    main()
