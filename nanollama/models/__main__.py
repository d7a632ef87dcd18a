"""`python -m nanollama.models`: every preset with its parameters, FLOPs and bytes."""

from nanollama.config import ModelConfig
from nanollama.models.accounting import count_parameters, flops_per_token, kv_cache_bytes
from nanollama.models.families import PRESETS


def main() -> None:
    """Print the table."""
    context = 4096
    print(
        f"{'preset':<18} {'layers':>6} {'width':>6} {'heads':>7} {'vocab':>7} {'parameters':>15} {'active':>15} "
        f"{'embedding':>13} {'GFLOP fwd':>10} {'bwd':>8} {'attention':>9} {'GiB':>8} {'KV MiB':>8}"
    )
    for name, fields in PRESETS.items():
        model = ModelConfig(**fields)
        count, flops = count_parameters(model), flops_per_token(model, context)
        print(
            f"{name:<18} {model.num_layers:>6} {model.hidden_size:>6} {model.num_heads:>3}/{model.num_kv_heads:<3} "
            f"{model.vocab_size:>7} {count.total:>15,} {count.active:>15,} {count.embedding:>13,} "
            f"{flops.forward / 1e9:>10.3f} {flops.backward / 1e9:>8.3f} {flops.attention / 1e9:>9.3f} "
            f"{4 * count.total / 2**30:>8.2f} {kv_cache_bytes(model, context) / 2**20:>8.1f}"
        )
    print(
        f"active: values that one token uses. FLOPs per token at context {context}, causal; attention: the part of "
        f"both that is scores and values. GiB: parameters in float32. KV: cache of one row of {context} in bfloat16."
    )


if __name__ == "__main__":
    main()
