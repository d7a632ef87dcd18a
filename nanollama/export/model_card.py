"""The README.md of an exported model: what it is, what it learned from, what was measured. Text only."""

from collections.abc import Mapping
from typing import Any

from nanollama.config import ModelConfig
from nanollama.data.tokenizer import Tokenizer
from nanollama.models.accounting import count_parameters


def model_card(
    model: ModelConfig,
    metadata: Mapping[str, Any],
    results: Mapping[str, Any],
    dtype: str,
    tokenizer: Tokenizer | None,
) -> str:
    """Markdown with the front matter that model hubs read; nothing is said that the run does not know."""
    config, lineage = metadata["config"], metadata.get("lineage", {})
    count = count_parameters(model)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- nanollama",
        "---",
        f"# {config.get('name', 'model')}",
        "",
        f"A {model.family} language model with {count.total:,} parameters, exported by nanollama as {dtype}.",
        "",
        "| | |",
        "|---|---|",
        f"| layers | {model.num_layers} |",
        f"| width, ffn | {model.hidden_size}, {model.intermediate_size} |",
        f"| heads, KV heads, head dim | {model.num_heads}, {model.num_kv_heads}, {model.head_dim} |",
        f"| vocabulary | {model.vocab_size} |",
        f"| context | {model.max_position_embeddings} |",
    ]
    if tokenizer is not None:
        lines.append(f"| tokenizer SHA-256 | `{tokenizer.sha256}` |")
    if lineage.get("format") not in ("huggingface", "gguf"):  # trained here
        batch, data = config.get("batch", {}), config.get("data", {})
        lines += [
            "",
            "## Training",
            "",
            f"{config.get('steps')} steps of {batch.get('global_rows')} rows of {data.get('sequence_length')} tokens, "
            f"seed {config.get('seed')}.",
        ]
    lines += _beginning(metadata)
    if lineage:
        lines += ["", "## Where it is from", ""]
        lines += [f"- {name}: {value}" for name, value in lineage.items() if isinstance(value, (str, int, float))]
    figures = _figures(results)
    if figures:
        lines += ["", "## Measured", "", "| what | value |", "|---|---|", *figures]
    return "\n".join(lines) + "\n"


def _beginning(metadata: Mapping[str, Any]) -> list[str]:
    """What the run started from, and what of it was trained."""
    parent, lora = metadata.get("parent"), metadata["config"].get("lora")
    if not parent:
        return []
    lines = ["", f"Started from step {parent['step']} of another run (SHA-256 `{parent['hash']}`)."]
    if lora:
        targets = ", ".join(lora["targets"])
        lines.append(f"Trained were low-rank adapters (rank {lora['rank']}, alpha {lora['alpha']:g}) of {targets}.")
    return lines


def _figures(results: Mapping[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            rows += _figures(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            rows.append(f"| {prefix}{name} | {value:.6g} |")
    return rows
