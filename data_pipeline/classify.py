"""`python -m data_pipeline.classify train|evaluate|predict`: classifiers of quality, toxicity and domain.

Owns labelled texts (JSONL with a text and a label), what is held out to measure on, and the training (scikit-learn's
logistic regression by stochastic gradient descent: a hundredth of the time of its exact solver, and as good). The
model and its use are in `filters.classifier`.
"""

import argparse
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_pipeline.engine.stage import Help, code_version, command
from data_pipeline.filters import classifier
from data_pipeline.filters.classifier import DESCRIPTION, LABELS, WEIGHTS, Classifier, Features
from data_pipeline.filters.resources import missing
from data_pipeline.sources.streams import read_blocks, split_rows
from data_pipeline.text.documents import BadText, encode_text, hash_fraction, text_digest
from nanollama.data.files import DataError, Lock, sha256_file, sha256_json, write_json
from nanollama.data.strict import nearest

STAGE_VERSION = 1  # raise it when the same inputs would give another model
ROW_LIMIT = 50_000_000
CHUNK = 2000  # texts scored at a time
FEATURES = Features()
THRESHOLD = 0.975  # of the filter `toxicity`


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts and their labels, aligned."""

    texts: list[str]
    labels: list[str]


def train(kind: classifier.Kind, inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *,
          text_field: str = "text", label_field: str = "label", names: dict[str, str] | None = None,
          skip_others: bool = False, features: Features = FEATURES, penalty: float = 1e-5,
          test_share: float = 0.2) -> dict[str, Any]:
    """Train on labelled files and measure on the `test_share` of them that is held out; returns the description.

    `names` renames labels of the files. Equal texts are taken once, so that none is on both sides; which side is
    decided by a hash of the text. `penalty` is that of the squared weights. Errors: DataError.
    """
    if not 0 < test_share < 1 or not penalty > 0:
        raise DataError(f"--test-share={test_share}, --penalty={penalty}: give a share between 0 and 1, and a penalty "
                        "above 0.")
    rows = read_labelled(inputs, kind, text_field, label_field, names or {}, skip_others)
    held = np.array([hash_fraction(text_digest(text.encode()), 0, "classifier") < test_share for text in rows.texts])
    labels = tuple(label for label in LABELS[kind] if label in set(rows.labels))
    target = np.array([labels.index(label) for label in rows.labels])
    for number, label in enumerate(labels):
        if not (target[~held] == number).any() or not (target[held] == number).any():
            raise DataError(f"too few texts with the label {label!r} ({int((target == number).sum())}) to train and to "
                            "measure on. Give more of them.")
    text = pl.Series("text", rows.texts, dtype=pl.String)
    fitted = _fit(kind, labels, features, text.filter(pl.Series(~held)), target[~held], penalty)
    output = Path(output)
    with Lock(output):
        (output / DESCRIPTION).unlink(missing_ok=True)
        classifier.save_arrays(output / WEIGHTS, fitted)
        made = {
            "schema_version": classifier.SCHEMA_VERSION, "kind": kind, "labels": list(labels),
            "features": dataclasses.asdict(features), "penalty": penalty, "test_share": test_share,
            "inputs": [{"name": Path(path).name, "sha256": sha256_file(path)} for path in inputs],
            "texts": dict(Counter(rows.labels)), "version": STAGE_VERSION, "code": code_version(),
            "measured": measure(fitted, text.filter(pl.Series(held)), target[held]),
            "files": [{"path": WEIGHTS, "sha256": sha256_file(output / WEIGHTS)}]
        }
        made["id"] = sha256_json(made)
        write_json(output / DESCRIPTION, made)
    return made


def _fit(kind: classifier.Kind, labels: tuple[str, ...], features: Features, text: pl.Series, target: np.ndarray,
         penalty: float) -> Classifier:
    if len(labels) < 2:
        raise DataError(f"only texts with the label {labels[0]!r}: a classifier needs two labels or more. "
                        f"Labels of {kind}: {', '.join(LABELS[kind])}.")
    try:
        from scipy.sparse import csr_matrix
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise missing("scikit-learn", "training a classifier") from error
    bounds, buckets, values = features.rows(text)
    matrix = csr_matrix((values, buckets, bounds), (len(text), 1 << features.bits))
    model = SGDClassifier(loss="log_loss", alpha=penalty, class_weight="balanced", average=True, max_iter=100,
                          random_state=0)
    model.fit(matrix, target)
    weights, bias = model.coef_.T, model.intercept_
    if len(labels) == 2:  # one column, for the second label against the first
        weights, bias = np.concatenate([-weights, weights], axis=1), np.concatenate([-bias, bias])
    return Classifier(kind, labels, features, weights.astype(np.float32), bias.astype(np.float64))


def measure(model: Classifier, text: pl.Series, target: np.ndarray) -> dict[str, Any]:
    """Accuracy, F1 per label and their mean, and the table of labels (rows) against predictions (columns)."""
    chance = probabilities(model, text)
    guess = chance.argmax(axis=1)
    size = len(model.labels)
    table = np.bincount(target * size + guess, minlength=size * size).reshape(size, size)
    right = np.diag(table)
    f1 = 2 * right / np.maximum(table.sum(axis=0) + table.sum(axis=1), 1)
    more = {}
    if model.kind == "toxicity":
        over, toxic = chance[:, 1] >= THRESHOLD, target == 1
        more = {"threshold": THRESHOLD, "precision": round(float(np.mean(toxic[over])) if over.any() else 1.0, 4),
                "recall": round(float(np.mean(over[toxic])) if toxic.any() else 1.0, 4)}
    return {
        **more, "texts": len(target), "accuracy": round(float(right.sum() / max(len(target), 1)), 4),
        "f1": {label: round(float(value), 4) for label, value in zip(model.labels, f1, strict=True)},
        "macro_f1": round(float(f1[table.sum(axis=1) > 0].mean()), 4) if len(target) else 0.0,
        "table": table.tolist()
    }


def probabilities(model: Classifier, text: pl.Series) -> np.ndarray:
    """[texts, labels], in pieces."""
    parts = [model.probabilities(text.slice(at, CHUNK)) for at in range(0, len(text), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, len(model.labels)))


def read_labelled(paths: Sequence[str | os.PathLike[str]], kind: classifier.Kind, text_field: str, label_field: str,
                  names: dict[str, str], skip_others: bool = False) -> Labelled:
    """The labelled rows of JSONL files, each text once. Errors: DataError names file and line.

    A field may be a path of names, `metadata.topic`. `skip_others` leaves out rows whose label is none of `kind`.
    """
    found: dict[str, str] = {}
    for path in paths:
        for place, row in read_rows(path):
            text, label = (_field(row, field, place) for field in (text_field, label_field))
            try:
                encode_text(text)
            except BadText as error:
                raise DataError(f"{place}: {error}. Remove the row.") from error
            label = names.get(str(label), str(label))
            if label not in LABELS[kind]:
                if skip_others:
                    continue
                raise DataError(f"{place}: {label!r} is no label of {kind}. {nearest(label, LABELS[kind])} Labels of "
                                f"another name are renamed with --name={label}=ONE_OF_THEM, or their rows left "
                                "out with --skip-others.")
            before = found.setdefault(text, label)
            if before != label:
                raise DataError(f"{place}: a text that was {before!r} before is {label!r} here. Remove one of them.")
    if not found:
        raise DataError(f"no labelled rows in {', '.join(map(str, paths))}.")
    return Labelled(list(found), list(found.values()))


def _field(row: dict[str, Any], field: str, place: str) -> Any:
    """What is at the path `field`. Errors: DataError names the nearest field."""
    value: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(f"{place}: no field {field!r}. "
                            f"{nearest(name, list(value)) if isinstance(value, dict) else ''}".strip())
        value = value[name]
    return value


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a JSONL file, .gz and .zst too. Errors: DataError."""
    for number, line in split_rows(read_blocks(path), b"\n", ROW_LIMIT):
        place = f"{path}:{number}"
        if not isinstance(line, bytes):
            raise DataError(f"{place}: {line if isinstance(line, Exception) else 'a row over 50 MB'}. Mend the file.")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON ({error}). Mend the row.") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a JSON object. Give one object a line.")
        yield place, row


def predict(model: Classifier, path: str | os.PathLike[str], output: str | os.PathLike[str], text_field: str) -> int:
    """Write the rows of a JSONL file with `label` and `scores` added; returns how many."""
    rows = [row for _, row in read_rows(path)]
    texts = pl.Series("text", [str(row.get(text_field, "")) for row in rows], dtype=pl.String)
    with open(output, "w", encoding="utf-8") as file:
        for row, chances in zip(rows, probabilities(model, texts).tolist(), strict=True):
            scores = {label: round(chance, 6) for label, chance in zip(model.labels, chances, strict=True)}
            row |= {"label": max(scores, key=scores.__getitem__), "scores": scores}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(rows)


def _print(measured: dict[str, Any], labels: Sequence[str]) -> None:
    print(f"accuracy {measured['accuracy']:.3f}, mean F1 {measured['macro_f1']:.3f} on {measured['texts']:,} texts")
    for label, row in zip(labels, measured["table"], strict=True):
        print(f"  {label:26} F1 {measured['f1'][label]:.3f}  of {sum(row):6,} texts")
    if "threshold" in measured:
        print(f"  dropped at {measured['threshold']}: precision {measured['precision']:.3f}, recall "
              f"{measured['recall']:.3f}")


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.classify",
                                     formatter_class=Help, description="Classifiers of quality, toxicity and domain.")
    parser.add_argument("action", choices=["train", "evaluate", "predict"])
    parser.add_argument("--kind", choices=list(LABELS), help="train: what the labels say")
    parser.add_argument("--input", action="append", required=True, help="JSONL file, .gz or .zst; may be given again")
    parser.add_argument("--output", help="train: directory of the model; predict: JSONL file")
    parser.add_argument("--model", help="evaluate, predict: directory of a model")
    parser.add_argument("--text-field", default="text", help="name, or path of names such as meta.text")
    parser.add_argument("--label-field", default="label", help="name, or path of names")
    parser.add_argument("--skip-others", action="store_true", help="leave out rows with a label of another name")
    parser.add_argument("--name", action="append", default=[], metavar="OLD=NEW", help="rename a label of the file")
    parser.add_argument("--penalty", type=float, default=1e-5, help="train: of the squared weights")
    parser.add_argument("--test-share", type=float, default=0.2, help="train: share held out to measure on")
    arguments = parser.parse_args()
    needed = {"train": ("kind", "output"), "evaluate": ("model",), "predict": ("model", "output")}[arguments.action]
    for option in needed:
        if getattr(arguments, option) is None:
            parser.error(f"{arguments.action} needs --{option}")
    names = dict(item.partition("=")[::2] for item in arguments.name)
    fields: dict[str, Any] = {"text_field": arguments.text_field, "label_field": arguments.label_field,
              "skip_others": arguments.skip_others}
    start = time.monotonic()
    if arguments.action == "train":
        made = train(arguments.kind, arguments.input, arguments.output, names=names, penalty=arguments.penalty,
                     test_share=arguments.test_share, **fields)
        _print(made["measured"], made["labels"])
        print(f"classifier: {arguments.output}, {made['kind']} from {sum(made['texts'].values()):,} texts, "
              f"{time.monotonic() - start:.1f} s")
        return
    if not (Path(arguments.model) / DESCRIPTION).is_file():
        raise DataError(f"--model={arguments.model}: no classifier there ({DESCRIPTION} is missing). Make one with: "
                        "python -m data_pipeline.classify train")
    model = classifier.load(Path(arguments.model))
    if arguments.action == "evaluate":
        rows = read_labelled(arguments.input, model.kind, names=names, **fields)
        strangers = set(rows.labels) - set(model.labels)
        if strangers:
            raise DataError(f"the model was not trained for {', '.join(sorted(strangers))}, which the files have.")
        _print(measure(model, pl.Series(rows.texts), np.array([model.labels.index(label) for label in rows.labels])),
               model.labels)
    elif len(arguments.input) > 1:
        raise DataError("predict reads one --input.")
    else:
        number = predict(model, arguments.input[0], arguments.output, arguments.text_field)
        print(f"{number:,} rows: {arguments.output}")


if __name__ == "__main__":
    command(_main)
