"""Tiny random models of the model types that the installed transformers knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

# In the order in which a model class is looked for.
MAPPINGS = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)

# Value -> fields that get it in every configuration class, nested ones too, that has them.
_COMMON_SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd emb_dim intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner "
    "ffn_hidden_size shared_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts mamba_d_state mamba_d_conv conv_kernel linear_num_value_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups",
    8: "sliding_window mamba_n_heads mamba_chunk_size chunk_size qk_rope_head_dim qk_nope_head_dim linear_key_head_dim "
    "linear_value_head_dim",
    12: "v_head_dim",
    16: "head_dim d_kv mamba_d_head kv_lora_rank",
    24: "q_lora_rank",
    128: "max_position_embeddings n_positions max_source_positions max_target_positions mamba_d_ssm",
}
COMMON: dict[str, Any] = {
    **{name: value for value, names in _COMMON_SIZES.items() for name in names.split()},
    "vocab_size": 99,
    # Attention has something to look at only when weights are not near zero; the factor is T5's.
    "initializer_range": 0.2,
    "init_std": 0.1,
    "initializer_factor": 2.0,
    "use_cache": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}

_INKLING = {
    "unpadded_vocab_size": 99,
    "num_hidden_layers": 3,
    "sliding_window_size": 8,
    "rel_extent": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}
_MLA = {"num_key_value_heads": 4}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBAS_AND_HYBRID = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
    "num_key_value_heads": 4,
}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
}
_DECODER = {"is_decoder": True}
_VISION = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}

# Model type -> what its configuration needs beside COMMON.
FAMILIES: dict[str, dict[str, Any]] = {
    # Decoders.
    "bamba": {"attn_layer_indices": [1]},
    "bert": _DECODER,
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8, "n_ctx": 128},
    "cohere": {},
    "cohere2": _SLIDING_AND_FULL,
    "cohere2_moe": _SLIDING_AND_FULL,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "diffllama": {},
    "doge": {},
    "exaone4": _SLIDING_AND_FULL,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {},
    "gemma2": _SLIDING_AND_FULL | {"attn_logit_softcapping": 2.0},
    "gemma3_text": _SLIDING_AND_FULL,
    "gemma3n_text": _SHARED_KV | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED_KV | {"global_head_dim": 32},
    "git": {"vision_config": {"image_size": 8, "patch_size": 4}},
    "glm4": {},
    "glm4_moe_lite": _MLA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": _SLIDING_AND_FULL,
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoehybrid": _LINEAR_AND_FULL,
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MLA | _LINEAR_AND_FULL | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama": {},
    "llama4_text": {
        "num_hidden_layers": 3,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 64,
    },
    "longcat_flash": _MLA | {"head_dim": 8, "zero_expert_num": 1, "expert_ffn_hidden_size": 32},
    "mamba": {"state_size": 4},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {"attn_config": {"alibi": True}, "max_seq_len": 128},
    "nanochat": {},
    "nemotron_h": {},
    "olmo3": _SLIDING_AND_FULL,
    "olmo_hybrid": _LINEAR_AND_FULL,
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2": _SLIDING_AND_FULL | {"use_sliding_window": True},
    "qwen3": {},
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_AND_FULL,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "stablelm": {},
    "whisper": {"num_mel_bins": 8, "suppress_tokens": None, "begin_suppress_tokens": None},
    "xglm": {"attention_heads": 4, "ffn_dim": 64},
    "zamba": _MAMBAS_AND_HYBRID | {"attention_head_dim": 32},
    "zamba2": _MAMBAS_AND_HYBRID,
    # Image and text, given text only.
    "gemma3": {"text_config": _SLIDING_AND_FULL, "vision_config": _VISION},
    "mllama": {"vision_config": _VISION},
    "qwen2_vl": {
        "text_config": _MROPE,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4},
    },
    "qwen3_vl": {
        "text_config": _MROPE,
        "vision_config": {"depth": 1, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    # Encoders and decoders.
    "bart": {},
    "led": {"attention_window": 8},
    "m2m_100": {},
    "marian": {},
    "mbart": {},
    "pegasus": {},
    "switch_transformers": {},
    "t5": {},
    "t5gemma": {},
}

# The same for types that share most of their code with one above, or are rare.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    # Decoders.
    "afmoe": _SLIDING_AND_FULL,
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA | _LINEAR_AND_FULL,
    "beam": {},
    "bert-generation": _DECODER,
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "biogpt": {},
    "camembert": _DECODER,
    "cohere_compass_text": _SLIDING_AND_FULL
    | {"rope_parameters": dict.fromkeys(_SLIDING_AND_FULL["layer_types"], _MROPE["rope_parameters"])},
    "cpmant": {"dim_head": 16, "dim_ff": 64},
    "ctrl": {"dff": 64},
    "cwm": _SLIDING_AND_FULL,
    "data2vec-text": _DECODER,
    "deepseek_v4": {},
    "dots1": _SLIDING_AND_FULL,
    "electra": _DECODER | {"embedding_size": 64},
    "ernie": _DECODER,
    "apertus1p5_text": {},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone": {},
    "exaone_moe": _SLIDING_AND_FULL,
    "falcon_mamba": {"state_size": 4},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma4_unified_text": _SLIDING_AND_FULL,
    "glm": {},
    "glm4_moe": {},
    "glm_moe_dsa": _MLA,
    "gpt-sw3": {},
    "gpt_neox_japanese": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "hyperclovax": {},
    "inkling2_loop_text": _INKLING
    | {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "n_layers_per_attn_res_block": 1,
    },  # fmt: skip
    "inkling2_text": _INKLING,
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {"kv_channels": 16},
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "num_heads": 8, "state_size": 4, "n_groups": 1},
    "megatron-bert": _DECODER,
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _MLA,
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "moshi": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "persimmon": {},
    "phi4_multimodal": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER | {"pronunciation_vocab_size": 99, "shape_vocab_size": 99},
    "roformer": _DECODER,
    "sarvam_mla": _MLA,
    "sarvam_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "starcoder2": {},
    "trocr": {},
    "vaultgemma": _SLIDING_AND_FULL,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": _DECODER | {"default_language": "en_XX"},
    "youtu": _MLA,
    "zaya": {"num_experts_per_tok": 1},
    # Image and text, given text only.
    "gemma4": {
        "text_config": {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8},
        "vision_config": {"position_embedding_size": 64},
        "audio_config": None,
    },
    "idefics3": {"text_config": {"model_type": "llama"}, "vision_config": _VISION},
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": _VISION | {"model_type": "clip_vision_model"}},
    "llava_onevision": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    },
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": _VISION | {"model_type": "pixtral"}},
    "paligemma": {
        "text_config": {"model_type": "gemma"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    },
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": {"depth": 1, "out_hidden_size": 64}},
    "smolvlm": {"text_config": {"model_type": "llama"}, "vision_config": _VISION},
    # Encoders and decoders.
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "fsmt": {},
    "longt5": {},
    "mt5": {},
    "mvp": {},
    "nllb-moe": {},
    "pegasus_x": {},
    "plbart": {},
    "prophetnet": {},
    "seamless_m4t": {},
    "seamless_m4t_v2": {},
    "t5gemma2": {},
    "umt5": {},
}

# Attention classes of these are looked up by the name of the attention, so they cannot be loaded with this package's;
# `set_attn_implementation` leaves them as they are, or, where a vision tower follows it, changes the name only.
ATTENTION_BY_NAME = {"falcon", "git", "gpt_neo", "gptj"}

TAKES_NO_OTHER = "does not take another attention"
OWN_CODE = "computes its attention itself"
_LATENT = "expands K and V from what is stored"
# Model type -> why its layers are read as dense tensors although the attention could read pages.
EXPECTED_DENSE: dict[str, str] = {
    **dict.fromkeys(ATTENTION_BY_NAME, TAKES_NO_OTHER),
    **dict.fromkeys(
        [
            "big_bird",
            "bloom",
            "codegen",
            "cpmant",
            "fsmt",
            "gpt_neox_japanese",
            "led",
            "megatron-bert",
            "mpt",
            "mvp",
            "prophetnet",
            "rembert",
            "roformer",
            "trocr",
            "xglm",
        ],
        OWN_CODE,
    ),
    **dict.fromkeys(
        [
            "axk1",
            "bailing_hybrid",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe_lite",
            "kimi_linear",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ],
        _LATENT,
    ),
    "diffllama": "splits V in two",
    "doge": "computes a mask from V",
    **dict.fromkeys(["inkling2_text", "inkling2_loop_text"], "has a sink for every token"),
    "jetmoe": "repeats K and V for its experts",
    "t5gemma2": "joins K and V of both attentions",
}

# No layer of these is in pages: what they cache is no K and V, or is chosen by an index over the keys.
KEPT_BY_HOST = {"axk2", "deepseek_v32", "deepseek_v4", "falcon_mamba", "glm_moe_dsa", "hy_v4", "mamba", "mamba2"}

_INDEXED = "chooses keys by an index like deepseek_v32; its configuration cannot be made small in a few lines"
# Some versions choose sdpa by default, which leaves the softcap out.
SOFTCAP = {"gemma2", "t5gemma", "vaultgemma"}

_TEXT_PART = "its text model is a type of its own"
_AUDIO = "needs audio"
_OWN_CACHE = "transformers gives it a cache of another kind"
_DRAFT = "drafts from the cache of another model"
# Model type -> why it is not tried.
NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(
        ["dots3_note", "emu3", "gemma3n", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"], _TEXT_PART
    ),
    **dict.fromkeys(
        [
            "audioflamingo3",
            "glmasr",
            "granite_speech",
            "granite_speech_plus",
            "moss_transcribe_diarize",
            "musicflamingo",
            "musicgen",
            "musicgen_melody",
            "nemo_speechlm",
            "omniasr",
            "qwen2_audio",
            "qwen3_asr",
            "vibevoice_asr",
            "voxtral",
            "voxtral_realtime",
        ],
        _AUDIO,
    ),
    **dict.fromkeys(["minimax", "reformer", "rwkv", "xlnet", "xlstm"], _OWN_CACHE),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], _DRAFT),
    "blt": "its parts cannot be made small",
    "dots3_note_text": _INDEXED,
    "encoder-decoder": "joins two models of other types",
    "fuyu": "needs images",
    "got_ocr2": "needs images",
    "qwen4_exp_text": _INDEXED,
    "openai-gpt": "has no cache",
    "xlm": "is not causal, and its logits are zero without training",
}


def available(families: Iterable[str]) -> list[str]:
    """Those that the installed transformers has."""
    return [model_type for model_type in families if model_type in CONFIG_MAPPING]


def config_of(model_type: str, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A tiny configuration of this type; `overrides` beside COMMON, by default those above."""
    overrides = (FAMILIES | MORE_FAMILIES)[model_type] if overrides is None else overrides
    return _tiny(CONFIG_MAPPING[model_type], overrides)


def _tiny(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in COMMON.items() if name in names} | overrides
    for name, nested in cls.sub_configs.items():
        given = dict(overrides.get(name) or {})
        nested = CONFIG_MAPPING[given.pop("model_type")] if "model_type" in given else nested
        if dataclasses.is_dataclass(nested) and overrides.get(name, {}) is not None:
            values[name] = _tiny(nested, given)
    return cls(**values)


def build(model_type: str, overrides: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A seeded model of this type; `overrides` as in `config_of`."""
    config = config_of(model_type, overrides)
    cls = next(mapping[type(config)] for mapping in MAPPINGS if type(config) in mapping)
    if not isinstance(config, cls.config_class):
        config = config.get_text_config(decoder=True)
    if model_type in SOFTCAP:
        kwargs = {"attn_implementation": "eager"} | kwargs
    torch.manual_seed(0)
    model = cls._from_config(config, **kwargs).eval()
    generation = model.generation_config
    generation.eos_token_id = None  # texts of known length
    generation.pad_token_id = 0
    if config.is_encoder_decoder:
        generation.decoder_start_token_id = 3
    return model
