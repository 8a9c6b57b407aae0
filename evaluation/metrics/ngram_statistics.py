"""N-gram counts of each pair as sacrebleu counts them for BLEU and chrF, so that a corpus score can be resampled.

sacrebleu's own counting fills a dictionary for each text and order; here a slice of pairs is counted at once in sorted
arrays, several times as fast, and the tests hold both to be equal.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np

PAIRS_AT_A_TIME = 256  # small enough that the arrays stay in the processor's cache
LARGEST_ID = 2**62


def bleu_statistics(
    split: Callable[[str], list[str]], hypotheses: Sequence[str], references: Sequence[str], order: int = 4
) -> np.ndarray:
    """Lengths of hypothesis and reference, matched n-grams, n-grams of the hypothesis: (N, 2 + 2 order) float64.

    `split` cuts a text into words. The sum over pairs gives the corpus score.
    """
    rows = np.zeros((len(references), 2 + 2 * order))
    for part in _slices(len(references)):
        texts = [split(text) for side in (hypotheses, references) for text in side[part]]
        lengths = np.array([len(words) for words in texts]).reshape(2, -1)
        counts = _count(_codes_of_words(list(chain.from_iterable(texts))), lengths, order)
        rows[part] = np.concatenate([lengths.T, counts[..., 2], counts[..., 0]], axis=1)
    return rows


def chrf_statistics(hypotheses: Sequence[str], references: Sequence[str], order: int = 6) -> np.ndarray:
    """N-grams of characters of hypothesis, of reference, and matched, for each order: (N, 3 order) float64.

    Whitespace is left out. Where a reference has no n-gram of an order, those of its hypothesis do not count.
    """
    rows = np.zeros((len(references), 3 * order))
    for part in _slices(len(references)):
        texts = ["".join(text.split()) for side in (hypotheses, references) for text in side[part]]
        lengths = np.array([len(text) for text in texts]).reshape(2, -1)
        counts = _count(_codes_of_characters("".join(texts)), lengths, order)
        counts[..., 0] *= counts[..., 1] > 0
        rows[part] = counts.reshape(len(counts), -1)
    return rows


def _slices(number: int) -> Iterator[slice]:
    return (slice(start, start + PAIRS_AT_A_TIME) for start in range(0, number, PAIRS_AT_A_TIME))


def _codes_of_words(words: list[str]) -> np.ndarray:
    """Words as integers from 0 without gaps."""
    places = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return np.fromiter(map(places.__getitem__, words), dtype=np.int64, count=len(words))


def _codes_of_characters(text: str) -> np.ndarray:
    """Characters as integers from 0 without gaps."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    known = np.zeros(int(points.max(initial=0)) + 1, dtype=np.int64)
    known[points] = 1
    return (np.cumsum(known) - 1)[points]


def _count(codes: np.ndarray, lengths: np.ndarray, order: int) -> np.ndarray:
    """N-grams of hypothesis and of reference, and matched ones (clipped), (N, order, 3) int64.

    `codes` are the units of all hypotheses and then of all references, `lengths` (2, N) how many each text has.
    """
    num_pairs, num_codes = lengths.shape[1], int(codes.max(initial=0)) + 1
    texts = np.repeat(np.arange(2 * num_pairs), lengths.ravel())
    counts = np.zeros((num_pairs, order, 3), dtype=np.int64)
    counts[..., :2] = np.maximum(lengths.T[:, None] - np.arange(order)[:, None], 0)
    grams, num_grams = codes, num_codes  # the n-gram that begins at each place, as an integer below num_grams
    for n in range(1, order + 1):
        if n > 1:
            if num_grams * num_codes * num_pairs > LARGEST_ID:
                distinct, grams = np.unique(grams, return_inverse=True)
                num_grams = len(distinct)
            grams, num_grams = grams[:-1] * num_codes + codes[n - 1 :], num_grams * num_codes
        owners = texts[: len(grams)]
        whole = owners == texts[n - 1 :]
        keys = (owners % num_pairs) * num_grams + grams
        ours, our_counts = np.unique(keys[whole & (owners < num_pairs)], return_counts=True)
        theirs, their_counts = np.unique(keys[whole & (owners >= num_pairs)], return_counts=True)
        if not len(theirs):
            break  # no reference is so long, nor has longer n-grams
        places = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
        shared = theirs[places] == ours
        clipped = np.minimum(our_counts[shared], their_counts[places[shared]])
        matched = np.bincount(ours[shared] // num_grams, weights=clipped, minlength=num_pairs)
        counts[:, n - 1, 2] = matched.astype(np.int64)
    return counts
