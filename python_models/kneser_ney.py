"""The baseline that a neural language model must beat: interpolated Kneser-Ney with modified discounts.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998. An n-gram is one int64, its
characters the digits to the base of the vocabulary's size, so counting is sorting and a look-up is a binary search.
"""

from __future__ import annotations

import numpy as np


class _Level:
    """Counts of the n-grams of one length: raw ones for the longest, elsewhere in how many contexts each was seen."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocabulary: int) -> None:
        self.grams = grams  # sorted
        few = [np.count_nonzero(counts == i) for i in range(1, 5)]
        y = few[0] / max(few[0] + 2 * few[1], 1)
        # what is taken from a count of 1, 2 and 3 or more
        self.discounts = np.array(
            [0.0] + [np.clip(i - (i + 1) * y * few[i] / max(few[i - 1], 1), 0.0, i) for i in (1, 2, 3)]
        )
        discount = self.discounts[counts.clip(max=3)]
        self.kept = counts - discount
        self.contexts, first = np.unique(grams // vocabulary, return_index=True)
        self.totals = np.add.reduceat(counts.astype(np.float64), first)
        self.backoff = np.add.reduceat(discount, first) / self.totals  # the mass that goes to the shorter context


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[where keys == wanted], 0 where the key is not there."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)


class KneserNey:
    """`KneserNey(text, vocabulary)`: text is int64 `[characters]`, each below `vocabulary`."""

    def __init__(self, text: np.ndarray, vocabulary: int, order: int = 5) -> None:
        if vocabulary**order >= 2**63:
            raise ValueError(f"KneserNey: expected vocabulary ** order below 2 ** 63, got {vocabulary} ** {order}")
        self.vocabulary, self.order = vocabulary, order
        grams, counts = np.unique(self._grams(text), return_counts=True)
        self.levels = [_Level(grams, counts, vocabulary)]  # longest first
        for n in range(order - 1, 0, -1):
            # each distinct longer n-gram is one context that its ending was seen in
            grams, counts = np.unique(grams % vocabulary**n, return_counts=True)
            self.levels.append(_Level(grams, counts, vocabulary))

    def _grams(self, text: np.ndarray) -> np.ndarray:
        """The n-gram that ends at each character; what stands before the text counts as character 0."""
        padded = np.concatenate([np.zeros(self.order - 1, dtype=np.int64), text])
        gram = np.zeros(len(text), dtype=np.int64)
        for i in range(self.order):
            gram = gram * self.vocabulary + padded[i : i + len(text)]
        return gram

    def probabilities(self, text: np.ndarray) -> np.ndarray:
        """Of each character given those before it, float64 `[characters]`."""
        return self._of_grams(self._grams(text))

    def _of_grams(self, grams: np.ndarray) -> np.ndarray:
        # one look-up for each distinct n-gram, in sorted order: far faster than one for each place
        distinct, where = np.unique(grams, return_inverse=True)
        p = np.full(len(distinct), 1.0 / self.vocabulary)
        for n, level in zip(range(1, self.order + 1), reversed(self.levels), strict=True):
            gram = distinct % self.vocabulary**n
            context = gram // self.vocabulary
            total = _look_up(level.contexts, level.totals, context)
            backoff = np.where(total > 0, _look_up(level.contexts, level.backoff, context), 1.0)
            p = _look_up(level.grams, level.kept, gram) / np.maximum(total, 1.0) + backoff * p
        return p[where]

    def distribution(self, context: np.ndarray) -> np.ndarray:
        """Of the next character: `[vocabulary]`. Only the last `order - 1` characters of the context count."""
        start = self._grams(context)[-1] % self.vocabulary ** (self.order - 1) if len(context) else 0
        return self._of_grams(start * self.vocabulary + np.arange(self.vocabulary))

    def bits_per_character(self, text: np.ndarray) -> float:
        return float(-np.log2(self.probabilities(text)).mean())
