"""An n-gram model with interpolated modified Kneser-Ney smoothing, in NumPy, written as ARPA text.

Chen and Goodman 1998, section 3, in the form of KenLM's lmplz (Heafield et al. 2013): unigrams are interpolated with
the uniform distribution over vocabulary, </s> and <unk>, so that an unknown word has a probability. No pruning: the
model has every n-gram of the text (about 60 bytes each in the file).
"""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

BEGIN, END, UNKNOWN = 0, 1, 2  # ids of <s>, </s>, <unk>; words follow
SPECIAL = ("<s>", "</s>", "<unk>")
FALLBACK = (0.5, 1.0, 1.5)  # discounts where counts are too few to estimate them


@dataclasses.dataclass(frozen=True)
class Order:
    """All n-grams of one length."""

    words: np.ndarray  # [ngrams, n] ids
    log_probability: np.ndarray  # base 10, of the last word after the others
    log_backoff: np.ndarray  # base 10


def train(tokens: np.ndarray, vocabulary: int, order: int) -> list[Order]:
    """The model of `tokens`: ids, each document as BEGIN, its words, END. `vocabulary` counts the special ones too."""
    document = np.cumsum(tokens == BEGIN)
    previous = np.where(tokens == UNKNOWN, -1, tokens).astype(np.int64)  # at each place, the number of its n-gram
    first: list[np.ndarray] = []
    prefix: list[np.ndarray] = []
    suffix: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for n in range(1, order + 1):
        last = len(tokens) - n + 1
        if n == 1:
            starts, key = np.arange(last), previous
        else:
            starts = np.flatnonzero(document[:last] == document[n - 1:]) if last > 0 else np.zeros(0, np.int64)
            key = previous[starts] * vocabulary + tokens[starts + n - 1]
        unique, at, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        first.append(starts[at])
        counts.append(count)
        prefix.append(unique // vocabulary if n > 1 else np.zeros(len(unique), np.int64))
        suffix.append(numbers[-1][starts[at] + 1] if n > 1 else np.zeros(len(unique), np.int64))
        place = np.full(len(tokens), -1, np.int64)
        place[starts] = inverse
        numbers.append(place)
        previous = place
    result: list[Order] = []
    below = np.zeros(0)
    gammas: list[np.ndarray] = []
    for n in range(1, order + 1):
        words = tokens[first[n - 1][:, None] + np.arange(n)]
        adjusted = counts[n - 1]
        if n < order:  # how many different words stand before it; nothing stands before <s>
            left = np.bincount(suffix[n], minlength=len(adjusted))
            adjusted = np.where(words[:, 0] == BEGIN, adjusted, left)
        counted = (words[:, -1] != BEGIN) & (adjusted > 0)
        discount = discounts(adjusted[counted])[np.minimum(adjusted, 3)]
        contexts = len(counts[n - 2]) if n > 1 else 1
        total = np.bincount(prefix[n - 1], np.where(counted, adjusted, 0), minlength=contexts)
        removed = np.bincount(prefix[n - 1], np.where(counted, discount, 0), minlength=contexts)
        gamma = np.divide(removed, total, out=np.ones(contexts), where=total > 0)
        own = np.where(counted, adjusted - discount, 0) / np.maximum(total, 1)[prefix[n - 1]]
        lower = below[suffix[n - 1]] if n > 1 else np.full(len(own), 1 / (vocabulary - 1))
        below = own + gamma[prefix[n - 1]] * lower
        gammas.append(gamma)
        result.append(Order(words, below, np.zeros(0)))
    unknown = gammas[0][0] / (vocabulary - 1)
    return [_finished(n, item, gammas[n] if n < order else None, unknown) for n, item in enumerate(result, 1)]


def discounts(adjusted: np.ndarray) -> np.ndarray:
    """What is taken off counts of 0 (nothing), 1, 2, and 3 or more (Chen and Goodman 1998, equation 26)."""
    t = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(float)
    if np.all(t[1:4] > 0):  # as lmplz; nothing counted four times is a number like any other
        y = t[1] / (t[1] + 2 * t[2])
        found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
        if all(0 <= value <= k for k, value in enumerate(found, 1)):
            return np.array([0, *found])
    return np.array([0, *FALLBACK])


def _finished(n: int, item: Order, gamma: np.ndarray | None, unknown: float) -> Order:
    probability, words = item.log_probability, item.words
    if n == 1:
        words = np.concatenate([words, [[UNKNOWN]]])
        probability = np.concatenate([probability, [unknown]])
        gamma = None if gamma is None else np.concatenate([gamma, [1.0]])
    starts = words[:, -1] == BEGIN  # <s> is given, never predicted
    log_probability = np.where(starts, -99.0, np.minimum(0, np.log10(np.where(starts, 1, probability))))
    backoff = np.zeros(0) if gamma is None else np.log10(gamma)
    return Order(words, log_probability, backoff)


def write_arpa(path: Path, orders: list[Order], names: list[str]) -> None:
    """The model as ARPA text; `names[id]` is a word."""
    spelled = pl.Series("word", names, dtype=pl.String)
    with open(path, "wb") as file:
        head = [f"ngram {n}={len(item.words)}" for n, item in enumerate(orders, 1)]
        file.write(("\\data\\\n" + "\n".join(head) + "\n").encode())
        for n, item in enumerate(orders, 1):
            columns = {"p": pl.Series(item.log_probability)}
            gram = spelled.gather(item.words[:, 0])
            for k in range(1, n):
                gram = gram + " " + spelled.gather(item.words[:, k])
            columns["gram"] = gram
            if len(item.log_backoff):
                columns["b"] = pl.Series(item.log_backoff)
            file.write(f"\n\\{n}-grams:\n".encode())
            pl.DataFrame(columns).write_csv(file, include_header=False, separator="\t", quote_style="never",
                                            float_precision=7)
        file.write(b"\n\\end\\\n")
