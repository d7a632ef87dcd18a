"""`python -m evals.perplexity --checkpoint=RUN --data=FILE|PACKED_SET`: how well a model predicts held-out text.

Owns which tokens are scored with what context, and the conventions of the figures. Per token, word and byte, so
that models with other tokenizers can be compared; bits per byte is the figure to compare by.
"""

import argparse
import collections
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evals.documents import Document, packed_rows, read_documents, windows
from nanollama.config import ConfigError, MeshConfig
from nanollama.data.files import DataError, write_json
from nanollama.data.packed import MANIFEST_FILE
from nanollama.generation.loading import LoadedModel, load_model
from nanollama.models.decoder import Decoder
from nanollama.parallel import backend
from nanollama.parallel.mesh import batch_sharding, make_mesh
from nanollama.training.validation import make_token_nll

TOKENS_AT_ONCE = 8192  # rows x window of one batch


class Scored(NamedTuple):
    """One document's sums."""

    source: str
    nll: float  # nats
    tokens: int
    words: int
    utf8_bytes: int


def score(model: LoadedModel, rows: Iterable[Any], documents: dict[int, Document], window: int) -> list[Scored]:
    """Sum the nll of `rows` per document; prints progress to stderr where it is a terminal."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    token_nll = make_token_nll(Decoder(model.config.model, model.config.compute), mesh)
    nll: dict[int, float] = collections.defaultdict(float)
    tokens: dict[int, int] = collections.defaultdict(int)
    batch_rows = max(1, TOKENS_AT_ONCE // window)
    done, started = 0, time.monotonic()
    for batch, owners_BT in _batches(rows, batch_rows, window):
        nll_BT = jax.device_get(token_nll(model.params, jax.device_put(batch, batch_sharding(mesh))))
        if not np.isfinite(nll_BT).all():
            raise DataError(f"{model.folder}: the model's predictions are not finite. Use an earlier checkpoint.")
        scored = batch["weights"] > 0
        for document in np.unique(owners_BT[scored]):
            mine = scored & (owners_BT == document)
            nll[int(document)] += float(nll_BT[mine].astype(np.float64).sum())
            tokens[int(document)] += int(mine.sum())
        done += int(scored.sum())
        if sys.stderr.isatty():
            print(f"\r{done:,} tokens, {done / (time.monotonic() - started):,.0f} a second", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return [Scored(d.source, nll[key], tokens[key], d.words, d.utf8_bytes)
            for key, d in documents.items() if tokens[key]]


def figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """The figures of some documents together, with a 95 % interval of bits per byte over documents."""
    nll, tokens = math.fsum(s.nll for s in scored), sum(s.tokens for s in scored)
    words, size = sum(s.words for s in scored), sum(s.utf8_bytes for s in scored)
    return {
        "documents": len(scored), "tokens": tokens, "words": words, "bytes": size,
        "nll_per_token": nll / tokens,
        "perplexity_token": _perplexity(nll, tokens), "perplexity_word": _perplexity(nll, words),
        "perplexity_byte": _perplexity(nll, size),
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "bits_per_byte_interval_95": _interval(scored, nll, size),
    }


def evaluate(model: LoadedModel, data: Path, split: str, window: int, stride: int, max_tokens: int) -> dict[str, Any]:
    """Score `data`; returns what results.json holds. Errors: DataError, ConfigError, before anything is scored."""
    documents: dict[int, Document] = {}
    if (data / MANIFEST_FILE).is_file():
        rows = packed_rows(data, split, model.tokenizer, window, max_tokens, documents)
        how = (f"rows of {window} tokens as packed for training: documents never see each other, each document is "
               "bos + text + eos, bos is not predicted, eos is; nor is the first token of a later row of a document "
               "longer than a row, though its bytes count")
        stride = window
    else:
        rows = windows(read_documents(data, documents), model.tokenizer, window, stride, max_tokens, documents)
        how = (f"each document apart as bos + text, every token of the text predicted once; windows of {window} "
               f"tokens move by {stride}, so tokens after the first {window} see {window - stride} or more")
        split = ""
    scored = score(model, rows, documents, window)
    if not scored:
        raise DataError(f"{data}: no token to score. Give a file or a packed set that holds text.")
    sources = sorted({s.source for s in scored})
    return {
        "kind": "perplexity", "data": data.name, "split": split, "window": window, "stride": stride, **figures(scored),
        "sources": {name: figures([s for s in scored if s.source == name]) for name in sources},
        "conventions": f"{how}; perplexity = exp(nll / count); words are runs of non-space; bytes are UTF-8; bits per "
                       "byte = nll / ln 2 / bytes; the interval treats documents as the sample",
        "checkpoint": model.describe(),
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [f"{'source':<28} {'documents':>9} {'tokens':>10} {'nll/token':>10} {'perplexity':>11} {'per word':>12} "
             f"{'bits/byte':>10}  95 % interval"]
    parts = results["sources"] if len(results["sources"]) > 1 else {}
    for name, part in [*parts.items(), ("all", results)]:
        interval = part["bits_per_byte_interval_95"]
        shown = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-"
        lines.append(f"{name[:28]:<28} {part['documents']:>9,} {part['tokens']:>10,} {part['nll_per_token']:>10.4f} "
                     f"{part['perplexity_token']:>11.5g} {part['perplexity_word'] or math.nan:>12.5g} "
                     f"{part['bits_per_byte'] or math.nan:>10.4f}  {shown}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 when the data or the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m evals.perplexity", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoints folder or one step's folder")
    parser.add_argument("--data", required=True, type=Path, help=".txt, .jsonl (field text), or a packed set's folder")
    parser.add_argument("--split", default="validation", help="of a packed set; default validation")
    parser.add_argument("--window", type=int, help="tokens of context; default: the sequence length of training")
    parser.add_argument("--stride", type=int, help="tokens a window moves by on text; default: half the window")
    parser.add_argument("--max-tokens", type=int, default=0, help="stop after about this many tokens; 0 = all")
    parser.add_argument("--tokenizer", help="its folder; default: the one in the run folder")
    parser.add_argument("--output", type=Path, help="folder for results.json")
    options = parser.parse_args(arguments)
    try:
        backend.start()
        model = load_model(options.checkpoint, options.tokenizer)
        window = options.window or model.config.data.sequence_length
        stride = options.stride or max(1, window // 2)
        if window < 1 or not 1 <= stride <= window:
            raise ConfigError("--stride", f"{stride} is not in 1 .. window={window}", "Choose a smaller stride.")
        results = evaluate(model, options.data, options.split, window, stride, options.max_tokens)
    except (DataError, ConfigError, backend.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    print(results["conventions"])
    if options.output:
        write_json(options.output / "results.json", results)
    print(json.dumps({key: results[key] for key in ("data", "split", "tokens", "nll_per_token", "bits_per_byte")}))
    return 0


def _batches(rows: Iterable[Any], batch_rows: int, window: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Rows stacked to [batch_rows, window]; the last batch is filled with rows of weight 0."""
    waiting: list[Any] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == batch_rows:
            yield _stack(waiting)
            waiting = []
    if waiting:
        empty = {name: np.zeros_like(values) for name, values in waiting[0].items()}
        empty["first_key"] = np.arange(window, dtype=np.int32)
        yield _stack(waiting + [empty] * (batch_rows - len(waiting)))


def _stack(rows: list[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch, batch.pop("owners")


def _perplexity(nll: float, count: int) -> float | None:
    return math.exp(min(nll / count, 700.0)) if count else None


def _interval(scored: Sequence[Scored], nll: float, size: int) -> list[float] | None:
    """95 % interval of the ratio nll / bytes, in bits: linearised over documents (Cochran 1977, section 6.4)."""
    if len(scored) < 2 or not size:
        return None
    count, ratio = len(scored), nll / size
    squares = math.fsum((s.nll - ratio * s.utf8_bytes) ** 2 for s in scored)
    error = math.sqrt(count / (count - 1) * squares) / size
    return [(ratio + sign * 1.96 * error) / math.log(2) for sign in (-1, 1)]


if __name__ == "__main__":
    sys.exit(main())
