"""METEOR by nltk, with the synonyms of a WordNet that is already on the machine, or without synonyms."""

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from evaluation.metrics.pairs import check_pairs

DEBIAN_WORDNET = Path("/usr/share/wordnet")
NUM_LEXNAMES = 45  # lexicographer files of WordNet 3
WITH_SYNONYMS = "exact, stem and WordNet synonyms"
WITHOUT_SYNONYMS = "METEOR without synonyms (exact and stem)"


class NoSynonyms:
    """Stands in for WordNet where there is none: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


def open_wordnet(folder: Path = DEBIAN_WORDNET) -> Any | None:
    """Return an nltk reader of WordNet from nltk's data folders, else from `folder`, else None. Downloads nothing."""
    import nltk

    try:
        nltk.corpus.wordnet.ensure_loaded()
        return nltk.corpus.wordnet
    except LookupError:
        pass
    if not (folder / "data.noun").is_file():
        return None

    class BareWordNet(nltk.corpus.WordNetCorpusReader):
        """Debian leaves out `lexnames` and `index.sense`, which no synonym needs and nltk's reader asks for."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{number:02d} unnamed 0\n" for number in range(NUM_LEXNAMES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    nltk.data.path.append(str(folder))  # nltk refuses to read outside its data folders
    try:
        with warnings.catch_warnings():  # nltk warns that other languages are missing; reports are English
            warnings.simplefilter("ignore")
            return BareWordNet(str(folder), None)
    except (OSError, LookupError, ValueError):  # a dictionary that is there but damaged is as good as none
        return None


def meteor(hypotheses: Sequence[str], references: Sequence[str], wordnet: Any | None = None) -> float:
    """Mean METEOR over pairs, between 0 and 1; text is lower-cased and split at whitespace.

    `wordnet` is what `open_wordnet` returned; None leaves the synonym step out. An empty corpus raises ValueError.

    Definition: Lavie and Agarwal 2007 with nltk's parameters (alpha 0.9, beta 3, gamma 0.5), `single_meteor_score`.
    """
    check_pairs("METEOR", hypotheses, references)
    return sum(meteor_pairs(hypotheses, references, wordnet)) / len(references)


def meteor_pairs(hypotheses: Sequence[str], references: Sequence[str], wordnet: Any | None = None) -> list[float]:
    """METEOR of each pair."""
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score

    # Reports repeat their words and often whole texts, and nltk stems and looks up each word anew.
    class CachedStemmer:
        stem = staticmethod(lru_cache(maxsize=100_000)(PorterStemmer().stem))

    class CachedSynonyms:
        synsets = staticmethod(lru_cache(maxsize=100_000)((wordnet or NoSynonyms()).synsets))

    @lru_cache(maxsize=4096)
    def pair_score(hypothesis: str, reference: str) -> float:
        return single_meteor_score(reference.split(), hypothesis.split(), stemmer=CachedStemmer, wordnet=CachedSynonyms)

    return [pair_score(*pair) for pair in zip(hypotheses, references, strict=True)]
