"""What answers may be: the texts of an annotation file, or a grammar; and the nearest text of a file.

The grammar is llguidance's (https://github.com/guidance-ai/llguidance), an optional package.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation import PrefixConstrainedLogitsProcessor

from slide_reports import read_records

MATCHERS_KEPT = 4096


def texts_of(path: str, flag: str) -> list[str]:
    """The different answers of an annotation file, in order.

    Raises:
        ValueError, OSError: it cannot be read, or has none.
    """
    try:
        records = read_records(path, locate_inputs=False)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{flag} {error}") from error
    texts = list(dict.fromkeys(answer.strip() for record in records for _, answer in record.turns if answer.strip()))
    if not texts:
        raise ValueError(f"{flag} {path}: holds no texts; give a file with reports")
    return texts


class AllowedReports:
    """A trie of the token ids of texts: an answer is one of them, word for word, and ends as answers were taught to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], after_answer: str = ""):
        self.trie: dict = {}
        self.end = tokenizer(after_answer, add_special_tokens=False)["input_ids"][:1]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            node = self.trie
            for token in ids:
                node = node.setdefault(token, {})
            node[None] = True  # a text ends here

    def processor(self, *, num_beams: int, prompt_length: int, stop_ids: list[int]) -> LogitsProcessor:
        def allowed(_: int, ids: Tensor) -> list[int]:
            node = self._node(ids[prompt_length:].tolist())
            if node is None:  # an answer that ended, or a beam that nothing was left for
                return stop_ids
            return [token for token in node if token is not None] + ((self.end or stop_ids) if None in node else [])

        return PrefixConstrainedLogitsProcessor(allowed, num_beams)

    def allows(self, token_ids: list[int]) -> bool:
        return self._node(token_ids) is not None

    def _node(self, token_ids: list[int]) -> dict | None:
        node = self.trie
        for token in token_ids:
            node = node.get(token)
            if node is None:
                return None
        return node


class Grammar:
    """A grammar that answers follow.

    Raises:
        ValueError: llguidance is missing, or refuses the grammar.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str):
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ValueError("--grammar needs llguidance: pip install 'slidescribe[constraints]'") from error
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--grammar {path}: is not UTF-8 ({error}); save it as that") from error
        if not text.strip():
            raise ValueError(f"--grammar {path}: is empty, so that every answer would be")
        # Free to put blanks where JSON allows them, a model may put nothing else until it is cut off.
        from_json = partial(LLMatcher.grammar_from_json_schema, overrides={"whitespace_flexible": False})
        kinds = {".lark": LLMatcher.grammar_from_lark, ".json": from_json}
        make = kinds.get(Path(path).suffix.lower(), LLMatcher.grammar_from_regex)
        tokens = from_tokenizer(tokenizer)
        try:
            grammar = make(text.strip("\n"))
            fault = LLMatcher.validate_grammar(grammar, tokens)
        except ValueError as error:
            fault = str(error)
        if fault:
            raise ValueError(f"--grammar {path}: {' '.join(fault.split())}")
        self._matchers = {(): LLMatcher(tokens, grammar)}

    def processor(self, *, num_beams: int, prompt_length: int, stop_ids: list[int]) -> LogitsProcessor:
        return _GrammarProcessor(self, prompt_length, stop_ids)

    def allows(self, token_ids: list[int]) -> bool:
        return self.matcher(tuple(token_ids)) is not None

    def matcher(self, token_ids: tuple[int, ...]):
        """The state after an answer's first tokens; None where they do not follow the grammar."""
        if token_ids not in self._matchers:
            before = self.matcher(token_ids[:-1])
            after = before and before.deep_copy()
            follows = after is not None and after.try_consume_tokens([token_ids[-1]]) == 1
            while len(self._matchers) >= MATCHERS_KEPT:
                self._matchers.pop(next(key for key in self._matchers if key))
            self._matchers[token_ids] = after if follows else None
        return self._matchers[token_ids]


class _GrammarProcessor(LogitsProcessor):
    def __init__(self, grammar: Grammar, prompt_length: int, stop_ids: list[int]):
        self.grammar, self.prompt_length, self.stop_ids = grammar, prompt_length, stop_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masks = [self._mask(tuple(row), scores.shape[1]) for row in input_ids[:, self.prompt_length :].tolist()]
        mask = torch.from_numpy(np.stack(masks)).to(scores.device)
        return scores.masked_fill(~mask, -math.inf)

    def _mask(self, answer: tuple[int, ...], width: int) -> np.ndarray:
        mask = np.zeros(width, dtype=bool)
        matcher = self.grammar.matcher(answer)
        if matcher is not None:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            mask[: len(bits)] = bits[:width]
        mask[self.stop_ids] = matcher is None or matcher.is_accepting()
        if not mask.any():  # a dead end
            mask[self.stop_ids] = True
        return mask


def nearest(text: str, texts: list[str]) -> tuple[str, float]:
    """The text with the fewest edits (rapidfuzz's normalised Indel similarity), and the similarity, 0 to 1."""
    from rapidfuzz import fuzz, process

    found, similarity, _ = process.extractOne(text, texts, scorer=fuzz.ratio)
    return found, similarity / 100
