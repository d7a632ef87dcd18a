"""Choosing documents by chance that is fixed: the same document, seed and weight give the same choice anywhere.

Owns the draws. Chance comes from a hash of the document's id, so neither order nor workers nor what else is in the
corpus changes it. Knows no source of weights.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.text.documents import hash_fraction, text_digest

Floats = npt.NDArray[np.float64]


def draws(ids: Sequence[str], seed: int, purpose: str) -> Floats:
    """A number in (0, 1) for each id: even over ids, fixed by id, seed and purpose."""
    made = [hash_fraction(text_digest(name.encode()), seed, purpose) for name in ids]
    return np.clip(np.array(made, np.float64), 1e-16, 1 - 1e-16)


def gumbel_keys(log_weights: Floats, uniform: Floats) -> Floats:
    """log w_d - log(-log u_d): the k documents with the largest keys are a draw of k without replacement, each
    in proportion to the weights of what is left (Gumbel top-k; Vieira 2014, Kool et al. 2019)."""
    return log_weights - np.log(-np.log(uniform))


def top(keys: Floats, count: int) -> npt.NDArray[np.bool_]:
    """The `count` largest keys; of equal ones the first."""
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[np.lexsort((np.arange(len(keys)), -keys))[:count]] = True
    return chosen


def keep_by_rate(rates: Floats, uniform: Floats) -> npt.NDArray[np.bool_]:
    """Each document by itself with its own rate: keep d when u_d < rate_d."""
    return uniform < rates
