"""`python -m data_pipeline.language_model train --corpus=DIR --output=DIR`: the n-gram model behind `perplexity`.

Owns which documents train it, which trainer does it (KenLM's lmplz where that is on the PATH, else `kneser_ney`), and
what is measured of the result. How it is used is in `filters.ngram`.
"""

import argparse
import itertools
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_pipeline.curation.corpus_format import read_manifest, read_shard
from data_pipeline.engine.stage import WORK, Help, code_version, command, disk_full_explained, finished, work_directory
from data_pipeline.filters.kneser_ney import BEGIN, END, SPECIAL, train, write_arpa
from data_pipeline.filters.ngram import ARPA, DESCRIPTION, NOISE_WORDS, load_arpa, noise_lines, spelled
from data_pipeline.filters.words import word_table
from data_pipeline.text.documents import hash_fraction, text_digest
from nanollama.data.files import DataError, Lock, sha256_file, sha256_json, write_json

STAGE_VERSION = 2  # raise it when the same inputs would give another model
HELD_OUT = 0.02  # of the documents, to measure on
MOST_HELD_OUT = 500
_CHUNK = 4_000_000  # characters whose words are found at a time


def build(corpus: str | os.PathLike[str], output: str | os.PathLike[str], *, order: int = 3,
          trainer: str = "auto", limit_mb: float | None = None) -> dict[str, Any]:
    """Train on a finished corpus directory; returns the description. What the same inputs made is returned as is.

    `limit_mb` takes an even sample of about so many megabytes. Errors: DataError.
    """
    if not 2 <= order <= 6:
        raise DataError(f"--order={order}: KenLM reads models of order 2 to 6.")
    if limit_mb is not None and not 0 < limit_mb < math.inf:
        raise DataError(f"--limit-mb={limit_mb}: give a number above 0.")
    lmplz = shutil.which("lmplz")
    if trainer == "lmplz" and lmplz is None:
        raise DataError("--trainer=lmplz: no program lmplz on the PATH. Build it from KenLM's sources, or use "
                        "--trainer=python.")
    trainer = trainer if trainer != "auto" else "lmplz" if lmplz else "python"
    manifest, corpus_sha256 = read_manifest(corpus)
    head: dict[str, Any] = {"kind": "language_model", "words": "pieces, lower case", "order": order, "trainer": trainer,
            "limit_mb": limit_mb, "corpus": {"sha256": corpus_sha256, "mixture": manifest["mixture"]["file"]}}
    head["fingerprint"] = sha256_json({**head, "stage": "language_model", "version": STAGE_VERSION})
    output = Path(output)
    with Lock(output), disk_full_explained(output):
        if (done := finished(output, DESCRIPTION, head["fingerprint"], lambda made: made["files"])) is not None:
            print(f"{output}: up to date, nothing to do", file=sys.stderr)
            return done
        work = work_directory(output, head["fingerprint"])
        held_out: list[str] = []
        documents = _training_texts(corpus, manifest, limit_mb, held_out)
        counts = (_train_lmplz if trainer == "lmplz" else _train_python)(documents, work, order)
        made = {**head, "code": code_version(), **counts, **_measure(work / ARPA, held_out)}
        (output / DESCRIPTION).unlink(missing_ok=True)
        os.replace(work / ARPA, output / ARPA)
        made["files"] = [{"path": ARPA, "sha256": sha256_file(output / ARPA),
                          "bytes": (output / ARPA).stat().st_size}]
        write_json(output / DESCRIPTION, made)
        shutil.rmtree(output / WORK, ignore_errors=True)
        return made


def _training_texts(corpus: str | os.PathLike[str], manifest: dict[str, Any], limit_mb: float | None,
                    held_out: list[str]) -> Iterator[str]:
    """The texts to train on; some others are added to `held_out`."""
    total = sum(shard["bytes"] for shard in manifest["shards"])
    rate = min(1.0, limit_mb * 1e6 / max(total, 1)) if limit_mb else 1.0
    for shard in manifest["shards"]:
        for row in read_shard(corpus, shard):
            place = hash_fraction(text_digest(row["text"].encode()), 0, "language model")
            if place >= rate:
                continue
            if place < rate * HELD_OUT and len(held_out) < MOST_HELD_OUT:
                held_out.append(row["text"])
            else:
                yield row["text"]


def _chunks(texts: Iterable[str]) -> Iterator[pl.Series]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size > _CHUNK:
            yield pl.Series("text", held, dtype=pl.String)
            held, size = [], 0
    if held:
        yield pl.Series("text", held, dtype=pl.String)


def _train_python(texts: Iterable[str], work: Path, order: int) -> dict[str, int]:
    ids: dict[str, int] = {name: number for number, name in enumerate(SPECIAL)}
    parts: list[np.ndarray] = []
    documents = words = 0
    for chunk in _chunks(texts):
        table = word_table(spelled(chunk), "whitespace")
        known = np.array([ids.setdefault(word, len(ids)) for word in table.distinct.to_list()], np.int32)
        for start, end in itertools.pairwise(table.offsets.tolist()):
            if end > start:
                inside = known[table.codes[start:end]]
                parts.append(np.concatenate([[BEGIN], inside, [END]]).astype(np.int32))
                documents, words = documents + 1, words + end - start
    if not words:
        raise DataError("the corpus has no words to train on. Give a corpus with text.")
    write_arpa(work / ARPA, train(np.concatenate(parts), len(ids), order), list(ids))
    return {"documents": documents, "tokens": words, "vocabulary": len(ids)}


def _train_lmplz(texts: Iterable[str], work: Path, order: int) -> dict[str, int]:
    documents = words = 0
    with open(work / "text", "w", encoding="utf-8") as file:
        for chunk in _chunks(texts):
            for line in spelled(chunk).to_list():
                if line:
                    file.write(line + "\n")
                    documents, words = documents + 1, words + line.count(" ") + 1
    if not words:
        raise DataError("the corpus has no words to train on. Give a corpus with text.")
    ran = subprocess.run(["lmplz", "-o", str(order), "--discount_fallback", "-T", str(work / "lmplz"), "-S", "50%",
                          "--text", str(work / "text"), "--arpa", str(work / ARPA)], capture_output=True, text=True)
    if ran.returncode:
        raise DataError(f"lmplz stopped with code {ran.returncode}: {ran.stderr.strip()[-500:]}\n"
                        "Use --trainer=python to train without it.")
    (work / "text").unlink()
    return {"documents": documents, "tokens": words, "vocabulary": sum(1 for _ in _unigrams(work / ARPA))}


def _unigrams(path: Path) -> Iterator[str]:
    """The words of an ARPA file."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line == "\\1-grams:\n":
                break
        for line in file:
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 2:
                return
            yield fields[1]


def _measure(arpa: Path, held_out: list[str]) -> dict[str, Any]:
    """Perplexities of held-out documents, of the same with their words shuffled, and of noise."""
    pick = random.Random(0)
    words = [word for word in _unigrams(arpa) if word not in SPECIAL]
    noise = pick.sample(words, min(NOISE_WORDS, len(words)))
    model = load_arpa(arpa)
    lines = [line for line in spelled(pl.Series("text", held_out, dtype=pl.String)).to_list() if line]
    measured: dict[str, Any] = {"held_out_documents": len(lines)}
    if lines:
        own = sorted(model.perplexity(line) for line in lines)
        shuffled = [model.perplexity(" ".join(pick.sample(line.split(), len(line.split())))) for line in lines]
        measured |= {"held_out": {str(q): round(own[min(len(own) - 1, len(own) * q // 100)], 1)
                                  for q in (5, 25, 50, 75, 95, 99)},
                     "shuffled_median": round(statistics.median(shuffled), 1)}
    measured |= {name: round(model.perplexity(line), 1) for name, line in noise_lines(noise).items()}
    return {"noise_words": noise, "measured": measured}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.language_model", formatter_class=Help,
                                     description="Train the n-gram model of the filter `perplexity`.")
    parser.add_argument("action", choices=["train"])
    parser.add_argument("--corpus", required=True, help="directory made by data_pipeline.corpus: text to be like")
    parser.add_argument("--output", required=True, help="directory of the model to make")
    parser.add_argument("--order", type=int, default=3, help="longest n-gram, 2 to 6")
    parser.add_argument("--trainer", choices=["auto", "lmplz", "python"], default="auto",
                        help="auto: lmplz where it is on the PATH, else python")
    parser.add_argument("--limit-mb", type=float, help="an even sample of about so much text; the Python trainer "
                        "holds about 600 bytes per word of it in memory")
    arguments = parser.parse_args()
    start = time.monotonic()
    made = build(arguments.corpus, arguments.output, order=arguments.order, trainer=arguments.trainer,
                 limit_mb=arguments.limit_mb)
    measured = made["measured"]
    if "held_out" in measured:
        print("perplexity of held-out documents: " +
              ", ".join(f"{q} %: {value:,.0f}" for q, value in measured["held_out"].items()))
        print(f"the same with their words shuffled: {measured['shuffled_median']:,.0f} (median)")
    print(", ".join(f"{name.replace('_', ' ')}: {measured[name]:,.0f}" for name in ("random_letters", "random_words")))
    print(f"language model: {arguments.output}, order {made['order']}, {made['vocabulary']:,} words from "
          f"{made['documents']:,} documents, by {made['trainer']}, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    command(_main)
