"""A trained linear classifier of texts: hashed words and pairs of words, one weight each per label.

Owns the features, the model's directory (weights as arrays, everything else as JSON; never a pickle) and scoring,
which needs only NumPy. Training is `data_pipeline.classify`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from data_pipeline.engine.variables import expand_variables
from data_pipeline.filters.resources import file_hash
from data_pipeline.text.words import VERSION as WORDS_VERSION
from data_pipeline.text.words import word_hashes
from nanollama.data.files import DataError, read_json, sha256_file

DESCRIPTION, WEIGHTS = "classifier.json", "weights.npz"
SCHEMA_VERSION = 1
Kind = Literal["quality", "toxicity", "domain"]
Quality = Literal["low", "medium", "high"]
Domain = Literal[
    "adult", "arts_and_entertainment", "autos_and_vehicles", "beauty_and_fitness", "books_and_literature",
    "business_and_industrial", "computers_and_electronics", "finance", "food_and_drink", "games", "health",
    "hobbies_and_leisure", "home_and_garden", "internet_and_telecom", "jobs_and_education", "law_and_government",
    "news", "online_communities", "people_and_society", "pets_and_animals", "real_estate", "reference", "science",
    "sensitive_subjects", "shopping", "sports", "travel"]
LABELS: dict[str, tuple[str, ...]] = {"quality": get_args(Quality), "toxicity": ("clean", "toxic"),
                                      "domain": get_args(Domain)}


@dataclasses.dataclass(frozen=True)
class Features:
    """What of a text the weights belong to: word n-grams of its first characters, hashed into buckets."""

    bits: int = 18  # 2^bits buckets
    longest: int = 2  # words in an n-gram
    characters: int = 10_000
    words: int = WORDS_VERSION

    def rows(self, text: pl.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bounds, buckets, values) of the sparse rows [texts, buckets]: row r has what is between bounds r and r + 1.

        Values are logarithms of counts, signed by hash so that collisions cancel; each row has length 1.
        """
        hashes = word_hashes(text.str.slice(0, self.characters))
        keys = []
        for size in range(1, self.longest + 1):
            offsets, grams = hashes.ngrams(size)
            row = np.repeat(np.arange(len(text), dtype=np.int64), np.diff(offsets))
            keys.append(row << self.bits | (grams >> np.uint64(64 - self.bits)).astype(np.int64))
        signs = np.concatenate([1 - 2 * (hashes.ngrams(size)[1] & np.uint64(1)).astype(np.int64)
                                for size in range(1, self.longest + 1)])
        key = np.concatenate(keys)
        cell, inverse = np.unique(key, return_inverse=True)
        counts = np.bincount(inverse, signs, minlength=len(cell))
        values = np.sign(counts) * np.log1p(np.abs(counts))
        rows = cell >> self.bits
        length = np.sqrt(np.bincount(rows, values * values, minlength=len(text)))
        values /= np.maximum(length, 1e-12)[rows]
        bounds = np.searchsorted(rows, np.arange(len(text) + 1))
        return bounds, cell & ((1 << self.bits) - 1), values


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Labels in a fixed order, weights [buckets, labels] and a bias per label: each label against all others."""

    kind: Kind
    labels: tuple[str, ...]
    features: Features
    weights: np.ndarray
    bias: np.ndarray

    def probabilities(self, text: pl.Series) -> np.ndarray:
        """[texts, labels]: each label's own probability, scaled so that rows sum to 1."""
        bounds, buckets, values = self.features.rows(text)
        logits = np.tile(self.bias, (len(text), 1))
        for label in range(len(self.labels)):
            products = np.append(values * self.weights[buckets, label], 0.0)  # a bound may be at the end
            some = np.diff(bounds) > 0
            logits[some, label] += np.add.reduceat(products, bounds[:-1][some]) if some.any() else 0.0
        own = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        return own / own.sum(axis=1, keepdims=True)


def directory_of(model: str, kind: Kind) -> Path:
    """The directory that a filter's `model` names. Errors: DataError says how to make one."""
    directory = Path(expand_variables(model, f"filter {kind}.model"))
    if not (directory / DESCRIPTION).is_file():
        raise DataError(f"filter {kind}: no classifier in {directory} ({DESCRIPTION} is missing). Make one from "
                        f"labelled texts: python -m data_pipeline.classify train --kind={kind} --input=LABELLED.jsonl "
                        f"--output={directory}")
    return directory


def load(directory: Path) -> Classifier:
    """The classifier in `directory`, its weights checked against their hash. Errors: DataError."""
    return _load(directory, file_hash(directory / DESCRIPTION))


@functools.lru_cache(maxsize=4)
def _load(directory: Path, sha256: str) -> Classifier:
    made: dict[str, Any] = read_json(directory / DESCRIPTION)
    again = f"Train it again with: python -m data_pipeline.classify train --output={directory} ..."
    if made.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{directory}: schema version {made.get('schema_version')}, not {SCHEMA_VERSION}. {again}")
    if made["features"]["words"] != WORDS_VERSION:
        raise DataError(f"{directory}: its words are of version {made['features']['words']}, this program has "
                        f"{WORDS_VERSION}. {again}")
    weights, wanted = directory / WEIGHTS, made["files"][0]["sha256"]
    if not weights.is_file() or sha256_file(weights) != wanted:
        raise DataError(f"{weights}: missing or changed since {DESCRIPTION} was written (SHA-256 {wanted}). {again}")
    with np.load(weights, allow_pickle=False) as arrays:
        cells, values = arrays["cells"], arrays["values"]
        dense = np.zeros((1 << made["features"]["bits"], len(made["labels"])), np.float32)
        dense[cells] = values
        return Classifier(made["kind"], tuple(made["labels"]), Features(**made["features"]), dense, arrays["bias"])


def save_arrays(path: Path, classifier: Classifier) -> None:
    """The weights of the buckets that have any, and the bias."""
    cells = np.flatnonzero(np.any(classifier.weights != 0, axis=1)).astype(np.int32)
    np.savez_compressed(path, cells=cells, values=classifier.weights[cells], bias=classifier.bias)
