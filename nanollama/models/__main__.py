"""`python -m nanollama.models`: every preset with its parameters, FLOPs and bytes."""

from nanollama.config import ModelConfig
from nanollama.models.accounting import count_parameters, flops_per_token, kv_cache_bytes
from nanollama.models.families import PRESETS
from nanollama.quantities import si

CONTEXT = 4096
COLUMNS = {
    "preset": 18, "layers": 6, "width": 6, "heads": 8, "vocab": 8, "parameters": 16, "active": 7, "embed": 7,
    "forward": 8, "backward": 9, "attention": 10, "GiB": 7, "KV MiB": 7,
}  # fmt: skip
NOTES = f"""\
active: parameters that one token uses. embed: those of the embedding.
forward, backward: GFLOP per token at context {CONTEXT}, causal. attention: the part of both that is scores and values.
GiB: parameters in float32. KV MiB: cache of one row of {CONTEXT} tokens in bfloat16."""


def main() -> None:
    """Print the table."""
    print(_line(list(COLUMNS)))
    for name, fields in PRESETS.items():
        model = ModelConfig(**fields)
        count, flops = count_parameters(model), flops_per_token(model, CONTEXT)
        sizes = [model.num_layers, model.hidden_size, f"{model.num_heads}/{model.num_kv_heads}", model.vocab_size]
        counts = [f"{count.total:,}", si(count.active), si(count.embedding)]
        giga = [_three(value / 1e9) for value in (flops.forward, flops.backward, flops.attention)]
        memory = [_three(4 * count.total / 2**30), _three(kv_cache_bytes(model, CONTEXT) / 2**20)]
        print(_line([name, *map(str, sizes), *counts, *giga, *memory]))
    print(NOTES)


def _line(cells: list[str]) -> str:
    first, *others = (
        f"{cell:<{width}}" if column == "preset" else f"{cell:>{width}}"
        for cell, (column, width) in zip(cells, COLUMNS.items(), strict=True)
    )
    return first + "".join(others)


def _three(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
