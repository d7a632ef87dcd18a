"""What a run was trained on, and what a reader should be warned of.

Owns the chain corpus -> tokenizer -> packed set -> run as the page shows it, the check that its links fit,
and the list of findings. Reads manifests only; knows nothing of HTML.
"""

from collections.abc import Mapping
from typing import Any

from nanollama.experiments.environment import public, public_path
from nanollama.experiments.report_facts import figure, part, rows_of
from nanollama.experiments.report_files import RunFiles

QUIET_EVENTS = ("resumed", "stopped", "finished")  # nothing to worry about
USEFUL_EPOCHS = 4  # past it repeated text teaches little (arXiv:2305.16264)


def sources(files: RunFiles) -> list[dict[str, Any]]:
    """One row per source: what its corpus held, what was packed for training, how often that was seen."""
    rows: dict[str, dict[str, Any]] = {}
    for _, manifest in files.corpora():
        settings = rows_of(part(part(manifest, "mixture"), "config"), "datasets")
        licences = {item.get("name"): item.get("licence") for item in settings}
        for item in rows_of(manifest, "datasets"):
            rows[str(item.get("name"))] = {
                "documents": figure(item, "kept", "documents"), "characters": figure(item, "characters"),
                "bytes": figure(item, "bytes"), "licence": licences.get(item.get("name")), "tokens": None}
    for _, manifest in files.packed_sets():
        for name, item in part(part(manifest, "source_counts"), "train").items():
            counts = {key: figure(item, key) for key in ("documents", "characters", "bytes", "tokens")}
            row = rows.setdefault(str(name), {**counts, "licence": None, "tokens": None})
            row["tokens"] = (row["tokens"] or 0) + (counts["tokens"] or 0)
    for name, row in rows.items():
        row["name"] = name
        row["seen"], row["epochs"] = (_of_last_line(files, key, name) for key in ("source_tokens", "epochs"))
    # What was seen, where it was counted; else what there was to see.
    measures = [key for key in ("seen", "tokens", "bytes") if all(row.get(key) for row in rows.values())]
    total = sum(row[measures[0]] for row in rows.values()) if measures else 0
    for row in rows.values():
        row["share"] = row[measures[0]] / total if total else None
    return sorted(rows.values(), key=lambda row: -(row["share"] or 0))


def _of_last_line(files: RunFiles, field: str, source: str) -> float | None:
    """A source's figure in the last train line that has any, where names are "set/source"."""
    named = next((part(line, field) for line in reversed(files.lines("train")) if part(line, field)), {})
    found = [figure(named, name) for name in named if name == source or str(name).endswith(f"/{source}")]
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def tokenizer(files: RunFiles) -> dict[str, Any] | None:
    """Identity of the tokenizer, and characters per token where the packed set measured it."""
    place, manifest = files.tokenizer()
    if place is None:
        return None
    counts = [item for _, packed in files.packed_sets() for split in part(packed, "source_counts").values()
              for item in (split.values() if isinstance(split, Mapping) else ())]
    characters = sum(figure(item, "characters") or 0 for item in counts)
    tokens = sum(figure(item, "tokens") or 0 for item in counts)
    return {"path": public_path(place), "sha256": manifest.get("sha256"),
            "algorithm": manifest.get("algorithm"), "vocab_size": figure(manifest, "vocab_size"),
            "characters_per_token": characters / tokens if characters and tokens else None}


def packed(files: RunFiles) -> list[dict[str, Any]]:
    """Identity and splits of every packed set."""
    rows = []
    for place, manifest in files.packed_sets():
        splits = []
        for name, split in part(manifest, "splits").items():
            tokens, padding = figure(split, "tokens"), figure(split, "padding")
            slots = (tokens or 0) + (padding or 0)
            splits.append({"name": name, "documents": figure(split, "documents"), "tokens": tokens,
                           "padding": padding / slots if padding is not None and slots else None})
        rows.append({"path": public_path(place), "dataset_id": manifest.get("dataset_id"), "splits": splits,
                     "record_length": figure(manifest, "record_length")})
    return rows


def chain(files: RunFiles) -> list[dict[str, Any]]:
    """The links from text to model, each with the hash that `lineage.json` pins it by."""
    sets = rows_of(files.lineage, "sets")
    links = [("Corpus", item.get("corpus_manifest_sha256")) for item in sets]
    links.append(("Tokenizer", part(files.lineage, "tokenizer").get("sha256")))
    links += [("Packed set", item.get("dataset_id")) for item in sets]
    links.append(("Code", part(files.lineage, "code").get("git_commit")))
    return [{"name": name, "hash": digest} for name, digest in dict.fromkeys(links) if digest]


def findings(files: RunFiles, facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a reader must know: {"warnings", "missing" (not measured), "notes"}."""
    warnings, notes = [public(text) for text in files.problems], list[str]()
    for line in files.lines("event"):
        if line.get("event") != "convention":
            text = f"Step {line['step']:,}: {line.get('text', '')}"
            (notes if line.get("event") in QUIET_EVENTS else warnings).append(text)
            notes += [f"Said by the part that was computed again: {item}"
                      for item in line.get("earlier_events") or []]
    warnings += _about_training(files, facts) + _about_validation(files, facts) + mismatches(files)
    if part(files.lineage, "code").get("git_dirty"):
        notes.append("The code had changes that were not committed: the commit alone does not give it back.")
    parts = {"training metrics": facts["training"]["step"], "held-out figures": facts["held_out"],
             "samples": facts["samples"], "time per stage": facts["stages"],
             "corpus and packed set": facts["sources"] or None, "tokenizer": facts["tokenizer"],
             "environment": files.environment or None, "lineage": files.lineage or None}
    return {"warnings": warnings, "notes": notes,
            "missing": [name for name, value in parts.items() if value is None]}


def _about_training(files: RunFiles, facts: Mapping[str, Any]) -> list[str]:
    found, done = [], facts["training"]
    bad = [line["step"] for line in files.lines("train") if any(
        isinstance(line.get(name), float) and figure(line, name) is None for name in ("loss", "grad_norm"))]
    if bad:
        found.append(f"Loss or gradient norm was not finite in {len(bad):,} of the logged steps, first at "
                     f"step {bad[0]:,}.")
    if done["step"] is not None and done["steps"] and not done["complete"]:
        found.append(f"The run is not finished: the last step logged is {done['step']:,} of "
                     f"{done['steps']:,}.")
    return found + [
        f"Source {row['name']} was seen {row['epochs']:.1f} times: past about {USEFUL_EPOCHS} epochs, "
        "repeated text teaches little (arXiv:2305.16264)."
        for row in facts["sources"] if (row["epochs"] or 0) > USEFUL_EPOCHS]


def _about_validation(files: RunFiles, facts: Mapping[str, Any]) -> list[str]:
    found = []
    curve = [(line["step"], value) for line in files.lines("validation")
             if (value := figure(line, "nll", "loss")) is not None]
    step, best = min(curve, key=lambda point: point[1], default=(0, 0.0))
    if curve and curve[-1][1] > best * 1.01:
        found.append(f"Validation was best at step {step:,} ({best:.4f} nats per token) and ended at "
                     f"{curve[-1][1]:.4f}: the model overfits, or the learning rate was too high.")
    scored, last = (facts["held_out"] or {}).get("step"), facts["training"]["step"]
    if scored is not None and last is not None and scored != last:
        found.append(f"The held-out figures are of step {scored:,.0f}, training went on to step {last:,}.")
    return found


def mismatches(files: RunFiles) -> list[str]:
    """Links of the chain that do not fit together today, e.g. a packed set made again after the run."""
    found = []
    for before, (place, now) in zip(rows_of(files.lineage, "sets"), files.packed_sets(), strict=False):
        then, today = before.get("dataset_id"), now.get("dataset_id")
        if then and today and then != today:
            found.append(f"The packed set now in {public_path(place)} ({today[:12]}) is not the one this run "
                         f"was trained on ({then[:12]}).")
    trained = part(files.lineage, "tokenizer").get("sha256")
    named = {f"packed set {public_path(place)}": part(manifest, "tokenizer").get("sha256")
             for place, manifest in files.packed_sets()}
    named["tokenizer directory"] = files.tokenizer()[1].get("sha256")
    return found + [f"The {what} belongs to tokenizer {sha[:12]}, but the run used {trained[:12]}."
                    for what, sha in named.items() if trained and sha and sha != trained]
