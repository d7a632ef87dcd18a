"""MiniMind2, dense (github.com/jingyaogong/minimind): a small Llama for Chinese and English.

Its own config.json (model_type "minimind") is read; what is written is the Llama format, which computes the same and
needs no code of the model's own. MiniMind3 is published as Qwen3, which is read as such.
"""

from typing import Any

from nanollama.models.families.published import DENSE_DEFAULTS, DENSE_FIELDS, Family, dense_tensors

FAMILIES = {
    "minimind": Family(
        model_type="minimind",
        architecture="MiniMindForCausalLM",
        fields=DENSE_FIELDS,
        tensors=dense_tensors,
        defaults={
            **DENSE_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "max_position_embeddings": 32_768,
        },
        required={"hidden_act": "silu", "dropout": 0.0, "use_moe": False, "inference_rope_scaling": False},
        becomes="llama",
        # of the mixture of experts, which use_moe turns off; and which attention kernel torch is to use
        ignored=frozenset(
            {
                "num_experts_per_tok",
                "n_routed_experts",
                "n_shared_experts",
                "scoring_func",
                "aux_loss_alpha",
                "seq_aux",
                "norm_topk_prob",
                "flash_attn",
            }
        ),
    )
}

_MINIMIND = dict(
    vocab_size=6400,
    num_heads=8,
    num_kv_heads=2,
    rope_theta=1e6,
    max_position_embeddings=32_768,
    tie_embeddings=True,
)

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-26m": dict(**_MINIMIND, hidden_size=512, intermediate_size=1408, num_layers=8, head_dim=64),
    "minimind-104m": dict(**_MINIMIND, hidden_size=768, intermediate_size=2048, num_layers=16, head_dim=96),
}
