"""`python -m nanollama.models`: every preset with its parameters, FLOPs and bytes."""

from nanollama.config import ModelConfig
from nanollama.models.accounting import count_parameters, flops_per_token, kv_cache_bytes
from nanollama.models.families import PRESETS


def main() -> None:
    """Print the table."""
    context = 4096
    print(
        f"{'preset':<14} {'layers':>6} {'width':>6} {'heads':>7} {'vocab':>7} {'parameters':>13} {'non-emb.':>13} "
        f"{'GFLOP/token':>12} {'KV MiB/row':>11}"
    )
    for name, fields in PRESETS.items():
        model = ModelConfig(**fields)
        count = count_parameters(model)
        print(
            f"{name:<14} {model.num_layers:>6} {model.hidden_size:>6} {model.num_heads:>3}/{model.num_kv_heads:<3} "
            f"{model.vocab_size:>7} {count.total:>13,} {count.non_embedding:>13,} "
            f"{flops_per_token(model, context).train / 1e9:>12.3f} {kv_cache_bytes(model, context) / 2**20:>11.1f}"
        )
    print(
        f"FLOPs: training, per token, context {context}, causal attention. KV cache: bfloat16, context {context}."
    )


if __name__ == "__main__":
    main()
