"""Shrinks the configuration of any causal architecture of transformers until its model runs in milliseconds."""

import re
from dataclasses import fields
from typing import Any

VOCAB = 99
WINDOW = 6
"""tokens of every sliding window and attention chunk: shorter than the sequences that are tried"""

SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|unpadded_vocab_size|decoder_vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"(pad|bos|eos|sep|cls|mask|decoder_start|forced_eos)_token_id|mask_index|unk_index", 0),
    (r"eos_token_id", 1),
    (r"(num_hidden|n|num|decoder|encoder|num_decoder|num_encoder)_layers?|num_blocks", 2),
    (r"hidden_size|d_model|n_embd|emb_dim|dim|embedding_dim|(input_|output_)?embedding_size|word_embed_proj_dim|backbone_hidden_size|attention_hidden_size|lru_width", 32),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|n_inner|d_inner|dff|dim_ff|feed_forward_size|.*ffn_hidden_size|router_hidden_size", 48),
    (r"(decoder_|encoder_|num_decoder_|num_encoder_|num_|swa_num_|n_)?(attention_)?heads?|attention_heads|linear_num_heads|mamba_n_heads|linear_num_(key|value)_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|indexer_kv_heads|index_n_heads|indexer_n_heads", 2),
    (r"(swa_|global_|linear_|linear_key_|linear_value_|index_|indexer_|attention_)?head_dim|v_head_dim|attention_head_size|dim_head|d_head|kv_channels|mamba_d_head|mamba_head_dim", 8),
    (r"qk_(nope|rope)_head_dim|rotary_dim|d_rel", 4),
    (r"qk_head_dim", 8),
    (r".*_lora_rank|laurel_rank|hidden_size_per_layer_input|gated_norm_rank|adapter_rank|hc_lowrank|ple_embed_dim", 8),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts|n_group|topk_group", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions|context_length", 128),
    (r"sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size|local_attention|keep_window_size|local_attention_window_len", WINDOW),
    (r"(mamba_|state_|ssm_state_)(size|d_state)|state_size", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"initializer_range|init_std|embed_init_std", 0.15),
    (r"(mamba_)?chunk_size|block_size|lsh_attn_chunk_length|local_attn_chunk_length", 8),
    (r"index_topk|index_topk_blocks|indexer_budget", 64),
    (r"is_decoder", True),
)  # fmt: skip
"""(names of fields, their tiny value); the first that matches counts"""


DROPS = re.compile(r".*(drop|jitter).*")
"""every rate is on, so that one which cannot be switched off shows"""

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere": {"logit_scale": 0.25},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"attn_pdrop": 0.1, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_jitter_eps": 0.1}},
    "diffllama": {"attention_dropout": 0.0},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_qk_rope_head_dim": 4, "swa_v_head_dim": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 32, "lm_head_multiplier": 0.5},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 1},
    "hyperclovax": {"logits_scaling": 3.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_compress_ratio": 2, "indexer_kv_heads": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "xlstm": {"chunk_size": 64, "hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""by model type: what the rules get wrong"""


def tiny_value(name: str) -> Any:
    """Returns the tiny value of a field of a config, or None where its own is kept."""
    return next((value for names, value in SIZES if re.fullmatch(names, name)), None)


def tiny_config(cls: Any, **changes: Any) -> Any:
    """Returns a small config of class `cls` with one layer of each kind, two at least.

    `changes` go before what the rules say.
    """
    settings = {f.name: v for f in fields(cls) if (v := tiny_value(f.name)) is not None}
    settings |= {f.name: 0.1 for f in fields(cls) if isinstance(f.default, float) and DROPS.fullmatch(f.name)}
    settings |= CHANGES.get(cls.model_type, {})
    if "kv_lora_rank" in {f.name for f in fields(cls)}:
        settings["num_key_value_heads"] = 4  # latent attention has a key per head
    stock = cls()
    kinds = list(dict.fromkeys(getattr(stock, "layer_types", None) or []))
    if any(f.name == "layer_types" for f in fields(cls)) and kinds and "layer_types" not in settings:
        settings["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        settings["num_hidden_layers"] = len(settings["layer_types"])
    for name in cls.sub_configs:
        if name not in settings and (part := getattr(stock, name, None)) is not None:
            settings[name] = tiny_config(type(part))
    return cls(**{**settings, **changes})
