"""From a run's files to the facts its page shows: model, training, held-out text, samples, stages, commands.

Owns what each figure means and where it is taken from; what is absent stays None, never 0. Knows no HTML.
"""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanollama.charts import HALF, HALF_NARROW, Point, Series, line_chart, smooth
from nanollama.config import Config, ConfigError, resolve
from nanollama.experiments.environment import public, public_path
from nanollama.experiments.report_files import RunFiles
from nanollama.models.accounting import count_parameters

SAMPLE_CHARACTERS = 3000  # shown of one sample
SAMPLES_SHOWN = 12
_UNPRINTABLE = {**{code: 0x2400 + code for code in range(32) if code not in (9, 10)}, 127: 0x2421,
                **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)}


def resolved(files: RunFiles) -> Config | None:
    """The run's config, or None when this version of the code cannot read it."""
    try:
        return resolve(files.config) if files.config else None
    except ConfigError as error:
        files.problems.append(f"config.json is not one this version can read: {error}")
        return None


def figure(mapping: Any, *names: str) -> float | None:
    """The first finite number among the fields `names`."""
    for name in names:
        value = mapping.get(name) if isinstance(mapping, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return value
    return None


def part(mapping: Any, name: str) -> Mapping[str, Any]:
    """The mapping in the field `name`, empty when there is none."""
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def rows_of(mapping: Any, name: str) -> list[Mapping[str, Any]]:
    """The mappings in the list `name`."""
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def training(files: RunFiles, config: Config | None) -> dict[str, Any]:
    """How far training came, on how many tokens, how fast."""
    lines = files.lines("train")
    last = lines[-1] if lines else {}
    counted = [line for line in lines if figure(line, "tokens") is not None]
    epochs = counted[-1].get("epochs") if counted else None
    seen = epochs if isinstance(epochs, Mapping) else {"all": epochs}
    return {
        "step": last.get("step"), "steps": config.steps if config else None,
        "tokens": figure(counted[-1], "tokens") if counted else None,
        "epochs": [value for name in seen if (value := figure(seen, name)) is not None],
        "tokens_per_second": median([figure(line, "tokens_per_second") for line in lines]),
        "mfu": median([figure(line, "mfu") for line in lines]),
        "memory_bytes": max(filter(None, (figure(line, "memory_bytes") for line in lines)), default=None),
        "convention": next((line.get("text") for line in reversed(files.metrics)
                            if line.get("event") == "convention"), None),
        "complete": bool(config and last.get("step", 0) >= config.steps)}


def median(values: list[float | None]) -> float | None:
    """Middle value of those that were measured."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def held_out(files: RunFiles) -> dict[str, Any] | None:
    """Figures on text not trained on: of the evaluation, else of the last validation while training.

    The rows are the sources, the last one all of them together.
    """
    found, stage = files.evaluation(), "evaluation"
    if found is None:
        lines = files.lines("validation")
        found, stage = (lines[-1], "training") if lines else (None, "")
    if found is None:
        return None
    rows = [_held_out_row(str(name), row) for name, row in part(found, "sources").items()]
    rows.sort(key=lambda row: -(row["tokens"] or 0))
    prefixes = {row["name"].partition("/")[0] if "/" in row["name"] else None for row in rows}
    if len(prefixes) == 1 and None not in prefixes:  # sources of one packed set need not name it
        rows = [{**row, "name": row["name"].partition("/")[2]} for row in rows]
    checkpoint = part(found, "checkpoint")
    return {"stage": stage, "data": public(str(found.get("data") or "")), "split": found.get("split"),
            "window": figure(found, "window"), "stride": figure(found, "stride"),
            "step": figure(found if stage == "training" else checkpoint, "step"),
            "all": _held_out_row("all", found), "rows": rows}


def _held_out_row(name: str, row: Any) -> dict[str, Any]:
    nll = figure(row, "nll_per_token", "nll")
    perplexity = figure(row, "perplexity_token", "perplexity")
    return {"name": name, "tokens": figure(row, "tokens"), "nll": nll,
            "perplexity": perplexity if perplexity is not None or nll is None else math.exp(min(nll, 700.0)),
            "perplexity_word": figure(row, "perplexity_word"), "bits_per_byte": figure(row, "bits_per_byte")}


def charts(files: RunFiles) -> dict[str, Any]:
    """Loss, and the small charts beside it; None for what was not measured."""
    def points(kind: str, *names: str) -> list[Point]:
        pairs = ((line["step"], figure(line, *names)) for line in files.lines(kind))
        return [(step, value) for step, value in pairs if value is not None]

    train, validation = points("train", "loss", "nll"), points("validation", "nll", "loss")
    marks = [(line["step"], line.get("text", "")) for line in files.lines("event")
             if line.get("event") == "resumed"]
    lines = [Series("train, each step", train, "raw"), Series("train", smooth(train), "train"),
             Series("validation", validation, "validation", dots=True)]
    small = []
    for title, series in [("Learning rate", points("train", "learning_rate")),
                          ("Gradient norm", points("train", "grad_norm")),
                          ("Tokens per second", points("train", "tokens_per_second")),
                          ("Validation bits per byte", points("validation", "bits_per_byte"))]:
        line = Series(title.lower(), series, "plain", dots=len(series) <= 40)
        chart = line_chart(title, [line], (HALF, HALF_NARROW), zero="Validation" not in title)
        small += [chart] if chart and len(series) > 1 else []
    return {"loss": line_chart("Nats per token", lines, marks=marks), "small": small}


def samples(files: RunFiles) -> dict[str, Any] | None:
    """Prompts and what the model made of them, cut to a length that can be read."""
    found = files.samples()
    rows = [row for row in rows_of(found, "samples") if row.get("text") is not None]
    if not rows:
        return None
    shown = []
    for row in rows[:SAMPLES_SHOWN]:
        prompt, text = clean(str(row.get("prompt") or "")), clean(str(row["text"]))
        text = text.removeprefix(prompt) if prompt else text
        settings = [f"{name.replace('_', '-')} {row[name]:g}"
                    for name in ("temperature", "top_k", "top_p", "seed") if figure(row, name) is not None]
        tokens = row.get("tokens")
        count = len(tokens) if isinstance(tokens, list) else figure(row, "tokens")
        settings += [f"{count:,} tokens"] if count is not None else []
        shown.append({"prompt": prompt[:SAMPLE_CHARACTERS], "text": text[:SAMPLE_CHARACTERS],
                      "settings": settings, "cut": max(len(text) - SAMPLE_CHARACTERS, 0)})
    step = figure(found, "step")
    return {"shown": shown, "more": len(rows) - len(shown),
            "step": step if step is not None else figure(part(found, "checkpoint"), "step")}


def clean(text: str) -> str:
    """Text that any page can hold: control characters as their pictures, U+FFFD for halves of surrogate pairs
    and for the marks that would turn the rest of a line around."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\r\n", "\n")
    return text.translate(_UNPRINTABLE)


def stages(files: RunFiles) -> dict[str, Any] | None:
    """Seconds and command of every stage of the pipeline."""
    rows = [{"name": marker["name"], "seconds": figure(marker, "seconds"),
             "attempts": figure(marker, "attempts") or 1, "command": command(marker["command"]),
             "state": marker.get("state", "done")}
            for marker in files.stages() if not marker["this"]]  # still running while its page is written
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {"rows": rows, "total": sum(known), "longest": max(known, default=0.0)} if rows else None


def command(words: Any) -> str:
    """A shell line that a reader can paste: `python` instead of an interpreter's path, no home directory."""
    words = [str(word) for word in words]
    if words and Path(words[0]).name.startswith("python"):
        words[0] = "python"
    return public(" ".join(word if word.startswith("~/") else shlex.quote(word) for word in words))


def commands(files: RunFiles) -> list[tuple[str, str]]:
    """How to talk to the model, and what makes this run again: (title, shell line)."""
    rows = [(marker["name"], command(marker["command"])) for marker in files.stages()]
    run = public_path(files.run)
    if not rows:
        arguments = [line[2:] for line in files.config_as_given.splitlines() if line.startswith("# --config")]
        words = ["python", "-m", "nanollama.train", *(arguments or [f"--config={run}/config.json"])]
        rows = [("train", command([*words, f"--workdir={run}"]))] if arguments else []
    return [("Talk to the model", command(["python", "-m", "nanollama.chat", f"--checkpoint={run}"])), *rows]


def model(config: Config | None) -> dict[str, Any] | None:
    """Parameter counts and the architecture as label, value pairs."""
    if config is None:
        return None
    shape, compute = config.model, config.compute
    heads = f"{shape.num_heads}, each {shape.head_dim} wide"
    if shape.num_kv_heads != shape.num_heads:
        heads += f"; {shape.num_kv_heads} for keys and values"
    return {"parameters": count_parameters(shape), "rows": [
        ("Family", shape.family),
        ("Layers", f"{shape.num_layers}"),
        ("Hidden size", f"{shape.hidden_size:,}"),
        ("Attention heads", heads),
        ("Feed-forward size", f"{shape.intermediate_size:,}"),
        ("Vocabulary", f"{shape.vocab_size:,}"),
        ("Output matrix", "tied to the embedding" if shape.tie_embeddings else "its own"),
        ("Context", f"{config.data.sequence_length:,} tokens"),
        ("RoPE base", f"{shape.rope_theta:,g}"),
        ("Arithmetic", f"{compute.dtype}, parameters float32")]}


def recipe(config: Config | None) -> list[tuple[str, str]]:
    """How it was trained, as label, value pairs."""
    if config is None:
        return []
    optimizer, schedule, batch = config.optimizer, config.schedule, config.batch
    name = "AdamW" if optimizer.name == "adamw" else "Muon with AdamW"
    tokens = batch.global_rows * config.data.sequence_length
    rate = [schedule.name.upper() if schedule.name == "wsd" else schedule.name]
    rate += [f"{schedule.warmup_steps:,} steps of warm-up"] if schedule.warmup_steps else []
    if schedule.name == "wsd":
        rate += [f"decay over the last {schedule.decay_steps:,} ({schedule.decay_shape.replace('_', ' ')})"]
    return [
        ("Optimizer", f"{name}, betas {optimizer.b1:g} and {optimizer.b2:g}, weight decay "
                      f"{optimizer.weight_decay:g}"),
        ("Learning rate", f"{optimizer.learning_rate:g} at its peak"),
        ("Schedule", ", ".join(rate)),
        ("Batch", f"{batch.global_rows:,} rows of {config.data.sequence_length:,} = {tokens:,} tokens"
                  + (f", in {batch.micro_batches} parts" if batch.micro_batches > 1 else "")),
        ("Steps", f"{config.steps:,}"),
        ("Clipping", f"gradient norm {optimizer.clip_norm:g}" if optimizer.clip_norm else "none"),
        ("z-loss", f"{config.loss.z_loss:g}"),
        ("Documents", "never see each other" if config.data.mask_documents else "attend across boundaries"),
        ("Seed", f"{config.seed}"),
        ("Same bits", "on any device count" if config.determinism == "elastic" else "on the same mesh")]
