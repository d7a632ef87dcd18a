"""The report's sentences, headline and number formats: what a figure is called and the convention beside it.

Owns wording. Takes the facts as they are; knows nothing of files (but the texts it quotes) or HTML.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nanollama import quantities
from nanollama.experiments.environment import public, public_path
from nanollama.experiments.report_facts import part
from nanollama.experiments.report_files import RunFiles
from nanollama.models.accounting import MFU_CONVENTION
from nanollama.quantities import duration, percent


def wording(files: RunFiles, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every text of the page that is made from facts, by its name in the template."""
    held, done = facts["held_out"], facts["training"]
    rows = [held["all"], *held["rows"]] if held else []
    return {
        "headline": [_bits_per_byte(held), _perplexity(held, facts["tokenizer"]), _parameters(facts["model"]),
                     _tokens(done), _rate(done)],
        "summary": summary(files, facts), "model_parts": model_parts(facts["model"]),
        "held_out_about": held_out_about(held) if held else "", "speed": speed(done),
        "has_words": any(row["perplexity_word"] is not None for row in rows),
        "has_licences": any(row.get("licence") for row in facts["sources"]),
        "resumed": any(line.get("event") == "resumed" for line in files.lines("event"))}


def _bits_per_byte(held: Mapping[str, Any] | None) -> dict[str, Any]:
    if held is None:
        return _figure("Bits per byte", None, "three", "No held-out figures yet.")
    by_stage = {"evaluation": "Held-out text", "training": f"Validation at step {integer(held['step'] or 0)}"}
    return _figure("Bits per byte", held["all"]["bits_per_byte"], "three",
                   f"{by_stage[held['stage']]}. Does not depend on the tokenizer; lower is better.")


def _perplexity(held: Mapping[str, Any] | None, tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    if held is None:
        return _figure("Perplexity", None, "significant", "No held-out figures yet.")
    vocabulary, word = (tokenizer or {}).get("vocab_size"), held["all"]["perplexity_word"]
    note = "Per token of this tokenizer" + (f" ({integer(vocabulary)} pieces)" if vocabulary else "")
    note += f"; {significant(word)} per word." if word is not None else "."
    return _figure("Perplexity", held["all"]["perplexity"], "significant", note)


def _parameters(model: Mapping[str, Any] | None) -> dict[str, Any]:
    if model is None:
        return _figure("Parameters", None, "si", "No config to count them from.")
    count = model["parameters"]
    return _figure("Parameters", count.total, "si", f"{si(count.non_embedding)} without the embedding.")


def _tokens(done: Mapping[str, Any]) -> dict[str, Any]:
    if done["tokens"] is None:
        return _figure("Training tokens", None, "si", "No step has logged them yet.")
    low, high = min(done["epochs"], default=None), max(done["epochs"], default=None)
    if low is None:
        note = "Tokens that carry loss."
    elif f"{low:.2f}" == f"{high:.2f}":
        note = f"Each source seen {low:.2f} times."
    else:
        note = f"Sources seen {low:.2f} to {high:.2f} times."
    return _figure("Training tokens", done["tokens"], "si", note)


def _rate(done: Mapping[str, Any]) -> dict[str, Any]:
    if done["tokens_per_second"] is None:
        return _figure("Tokens per second", None, "si", "Speed was not logged.")
    note = "Median over the run" + (f"; MFU {percent(done['mfu'])}." if done["mfu"] is not None else ".")
    return _figure("Tokens per second", done["tokens_per_second"], "si", note)


def _figure(label: str, value: float | None, format_name: str, note: str) -> dict[str, Any]:
    return {"label": label, "value": value, "format": format_name, "note": note}


def summary(files: RunFiles, facts: Mapping[str, Any]) -> Markup:
    """The run in one sentence."""
    model, done, stages = facts["model"], facts["training"], facts["stages"]
    text = Markup("A language model")
    if model:
        text = Markup("A <strong>{}</strong> language model of <strong>{} parameters</strong>").format(
            dict(model["rows"])["Family"].capitalize(), si(model["parameters"].total))
    if done["tokens"] is not None:
        text += Markup(", trained on <strong>{} tokens</strong>").format(si(done["tokens"]))
        count = len(facts["sources"])
        text += f" of {count} source{'s' * (count > 1)}" if count else ""
    if not done["step"]:
        return text + ". Its training has not logged a step yet."
    text += f" in {integer(done['step'])} steps"
    rows = stages["rows"] if stages else []
    spent = [row["seconds"] for row in rows if row["name"] in ("train", "pretrain") and row["seconds"]]
    if spent:
        text += Markup(" and <strong>{}</strong>").format(duration(sum(spent)).replace(" ", "\u00a0"))
    devices, processor = part(files.environment, "devices"), part(files.environment, "processor")
    if devices.get("platform") == "cpu":
        text += f", on {processor.get('cores')} CPU cores ({processor.get('model')})"
    elif devices.get("kind"):
        text += f", on {devices.get('count', 1)}\u00a0×\u00a0{devices['kind']}"
    return text + "."


def model_parts(model: Mapping[str, Any] | None) -> str:
    """Where the parameters are."""
    if model is None:
        return ""
    count = model["parameters"]
    head = f"{count.head:,} in the output matrix" if count.head else "the output matrix is the embedding"
    return f"{count.layers:,} in the layers, {count.embedding:,} in the embedding; {head}"


def held_out_about(held: Mapping[str, Any]) -> str:
    """What was scored, and how: a perplexity without its convention says nothing."""
    if held["stage"] == "training":
        return (f"From the validation at step {integer(held['step'])}, while training: documents that are in "
                "no training row. No evaluation has been run, so there is no figure with a sliding window.")
    text = "Documents that are in no training row" + (f", split {held['split']}" if held["split"] else "")
    text += f" of {held['data']}" if held["data"] else ""
    if held["window"] is not None:
        text += f", scored in windows of {integer(held['window'])} tokens"
        text += f" that move by {integer(held['stride'])}" if held["stride"] is not None else ""
    step = f" Checkpoint of step {integer(held['step'])}." if held["step"] is not None else ""
    return f"{text}.{step} Bits per byte count UTF-8 bytes of the text, so they compare across tokenizers."


def speed(done: Mapping[str, Any]) -> str:
    """Speed and memory while training, with the convention of MFU."""
    parts = []
    if done["tokens_per_second"] is not None:
        parts.append(f"Training ran at {integer(done['tokens_per_second'])} tokens per second (median).")
    if done["mfu"] is not None:
        convention = done["convention"] or f"{MFU_CONVENTION}."
        parts.append(f"MFU {percent(done['mfu'])}: {convention.removeprefix('MFU = ')}")
    if done["memory_bytes"] is not None:
        parts.append(f"Peak memory {done['memory_bytes'] / 2**30:.2f} GiB.")
    return " ".join(parts)


def documents(files: RunFiles) -> list[dict[str, str]]:
    """The collapsible texts: what ran where, from what, as which config."""
    packages, code = part(files.environment, "packages"), part(files.lineage, "code")
    commit = str(code.get("git_commit") or "")[:12]
    rows = [("Environment", f"Python {files.environment.get('python')}, jax {packages.get('jax')}",
             files.environment),
            ("Lineage", f"commit {commit}" if commit else f"nanollama {code.get('nanollama')}",
             files.lineage),
            ("Config as resolved", public_path(files.run / "config.json"), files.config)]
    texts = [{"title": title, "about": about, "text": json.dumps(value, indent=2, ensure_ascii=False)}
             for title, about, value in rows if value]
    if files.config_as_given:
        texts.append({"title": "Config as given", "about": "the command line and the file",
                      "text": files.config_as_given})
    return [{**item, "text": public(item["text"])} for item in texts]


def cut(text: Any, most: int) -> str:
    """At most `most` characters of `text`, with an ellipsis where it was longer."""
    text = str(text)
    return text if len(text) <= most else text[:most].rstrip() + "…"


def total(rows: Sequence[Mapping[str, Any]], field: str) -> float | None:
    """Sum of a column, None when a row lacks it."""
    values = [row.get(field) for row in rows]
    return None if any(value is None for value in values) else sum(value for value in values if value)


def si(value: float) -> str:
    """`quantities.si` that no line breaks."""
    return quantities.si(value).replace(" ", "\u00a0")


def integer(value: float) -> str:
    """12,345."""
    return f"{value:,.0f}"


def significant(value: float) -> str:
    """Four digits, an exponent only for the very large and the very small: 242.0, 21.34, 12,345, 1.2e+10."""
    size = abs(value)
    if not 1e-3 <= size < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(3 - math.floor(math.log10(size)), 0)}f}"


FORMATS = {"si": si, "integer": integer, "significant": significant, "percent": percent, "duration": duration,
           "short": lambda value: f"{value:.4g}" if abs(value) < 1000 else significant(value),
           "times": lambda value: f"{value:.2f}×", "three": lambda value: f"{value:.3f}"}
