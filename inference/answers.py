"""From cases and questions to answers, the same for one slide and for many: decoding, limits, confidence."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inference.arguments import MEASURES, decoding_flags
from inference.choice import Constraint
from inference.constraints import AllowedReports, Grammar, nearest, texts_of
from inference.decoding import Decoded, Decoding, decode_samples, text_of
from inference.memory import decoding_mend, is_out_of_memory, memory_line
from slide_reports import Prompt, making_of, patch_budget, read_case, read_images
from slide_vlm import IGNORED_LABEL, SlideVLM
from vlm_settings import VLMSettings


@dataclass(frozen=True)
class Answering:
    """How a model answers.

    Attributes:
        decoding: how answers are searched or drawn.
        constraint: what they may be.
        snap_texts: of which the nearest takes the place of an answer; none to leave answers as they are.
        uncertain: what calibrate.py wrote of when an answer is uncertain; empty where it did not.
    """

    decoding: Decoding
    constraint: Constraint | None = None
    snap_texts: list[str] = field(default_factory=list)
    uncertain: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args, settings: VLMSettings, tokenizer) -> "Answering":
        """As the flags say, and for what they do not say, the model's settings.

        Raises:
            ValueError: flags that do not go together.
        """
        constraint: Constraint | None = None
        if args.allowed_reports:
            texts = texts_of(args.allowed_reports, "--allowed_reports")
            constraint = AllowedReports(tokenizer, texts, Prompt(**settings.prompt).after_answer)
        if args.grammar:
            constraint = Grammar(tokenizer, args.grammar)
        decoding = Decoding(**decoding_flags(args, settings.decoding))
        snap_texts = texts_of(args.snap_to, "--snap_to") if args.snap_to else []
        if snap_texts:
            nearest("", snap_texts)  # says at once if its package is missing
        uncertain = settings.decoding.get("uncertain") or {}
        for name, value in (uncertain.get("decoding") or {}).items():
            if getattr(decoding, name, getattr(args, name, value)) != value:
                print(
                    f"the threshold of uncertainty was chosen with --{name} {value}; choose it anew for other decoding",
                    file=sys.stderr,
                )
        return cls(decoding, constraint, snap_texts, uncertain)

    def answer(
        self,
        model: SlideVLM,
        tokenizer,
        samples: list[dict[str, Any]],
        numbers: Sequence[int] | None = None,
        rows_at_once: int | None = None,
    ) -> list[dict[str, Any]]:
        """What is to be said of the answer to each sample, see :meth:`describe`; ``numbers`` as for ``decode``."""
        found = decode_samples(
            model,
            tokenizer,
            samples,
            decoding=self.decoding,
            constraint=self.constraint,
            numbers=numbers,
            rows_at_once=rows_at_once,
        )
        return [self.describe(tokenizer, answers) for answers in found]

    def answer_or_say_why(
        self,
        model: SlideVLM,
        tokenizer,
        samples: list[dict[str, Any]],
        numbers: Sequence[int] | None = None,
        rows_at_once: int | None = None,
    ) -> list[dict[str, Any] | str]:
        """The same, or in one line what is wrong with a sample that the model fails at.

        Samples that fail together, for want of memory as a rule, are tried again in halves. An error that leaves the
        device itself useless is raised.
        """
        if not samples:
            return []
        numbers = list(range(len(samples)) if numbers is None else numbers)
        try:
            return list(self.answer(model, tokenizer, samples, numbers, rows_at_once))
        except torch.AcceleratorError:
            raise
        except (RuntimeError, MemoryError, IndexError) as error:
            mend = decoding_mend(self.decoding.num_beams)
            reason = memory_line(error, mend) if is_out_of_memory(error) else one_line(error)
        # Outside the handler, where the error would keep the tensors of the pass that failed.
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(samples) == 1:
            return [reason]
        half = len(samples) // 2
        parts = (slice(half), slice(half, None))
        return [
            found
            for part in parts
            for found in self.answer_or_say_why(model, tokenizer, samples[part], numbers[part], rows_at_once)
        ]

    def describe(self, tokenizer, answers: list[Decoded]) -> dict[str, Any]:
        """The best answer: ``report``, ``beam_score``, its probabilities, ``num_tokens``, and where they apply
        ``cut_off`` (at ``max_new_tokens``), ``generated`` (what stood in the place of a snapped report), ``n_best`` and
        ``uncertain``.
        """
        best, text = answers[0], text_of(tokenizer, answers[0])
        described: dict[str, Any] = {"report": text, "beam_score": best.score, **probabilities(best.log_probs)}
        described["num_tokens"] = len(best.token_ids)
        if best.token_ids and len(best.log_probs) == len(best.token_ids):  # no end among them
            described["cut_off"] = True
        if self.snap_texts:
            described["generated"] = text
            described["report"], described["similarity"] = nearest(text, self.snap_texts)
        if self.decoding.num_return > 1:
            described["n_best"] = self._n_best(tokenizer, answers)
        if self.uncertain:
            described["uncertain"] = described[self.uncertain["measure"]] < self.uncertain["threshold"]
        return described

    def _n_best(self, tokenizer, answers: list[Decoded]) -> list[dict[str, Any]]:
        """Answers with their scores; of beams that spell one text in several ways only the best."""
        listed = [
            {"report": text_of(tokenizer, one), "beam_score": one.score, **probabilities(one.log_probs)}
            for one in answers
        ]
        if self.decoding.do_sample:
            return listed  # a text that is drawn twice is the likelier
        different: dict[str, dict[str, Any]] = {}
        for one in listed:
            different.setdefault(one["report"], one)
        return list(different.values())


def one_line(error: BaseException) -> str:
    """What an error of a library says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def probabilities(log_probs: Sequence[float]) -> dict[str, float]:
    """Measures of confidence in an answer: the geometric mean of its tokens' probabilities, the least, the product."""
    if not log_probs:
        return dict.fromkeys(MEASURES, 0.0)
    logs = (sum(log_probs) / len(log_probs), min(log_probs), sum(log_probs))
    return {name: math.exp(value) for name, value in zip(MEASURES, logs, strict=True)}


def token_probabilities(tokenizer, answer: Decoded) -> list[tuple[str, float]]:
    """Text and probability of each token of an answer, without its end."""
    texts = [tokenizer.decode([token]) for token in answer.token_ids]
    return list(zip(texts, map(math.exp, answer.log_probs), strict=False))


def make_sample(model: SlideVLM, tokenizer, question: str, case: dict[str, Any], num_inputs: int) -> dict[str, Any]:
    """What the model takes for a question about a case; samples of one case share what was read of it."""
    settings = model.settings
    prompt, longest = Prompt(**settings.prompt), settings.max_question_tokens
    ids = prompt.question_ids(tokenizer, question, longest, num_images=num_inputs)
    bare_ids = prompt.bare_question_ids(tokenizer, question, longest)
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * len(ids), "question_ids": bare_ids, **case}


def unread_tokens(settings: VLMSettings, tokenizer, question: str) -> int:
    """How many tokens at the end of a question the model is not given: it reads as many as in training at most."""
    return max(0, len(tokenizer(question, add_special_tokens=False)["input_ids"]) - settings.max_question_tokens)


def read_inputs(model: SlideVLM, paths: Sequence[Path]) -> dict[str, Any]:
    """Patch tokens with coordinates of a case's feature files, or pixels of its images.

    Raises:
        ValueError, OSError: one cannot be read.
    """
    settings = model.settings
    if settings.input_kind == "features":
        return read_case(list(paths), **budgets_of(settings), expected=making_of(settings))
    grid = model.encoder.patch_grid
    per_image = math.prod(grid) if grid else None
    return read_images(list(paths), model.encoder.transform, **budgets_of(settings), patches_per_image=per_image)


def budgets_of(settings: VLMSettings) -> dict[str, int]:
    """How many patch tokens and visual tokens a case has at most."""
    return {"num_patches": patch_budget(settings), "num_visual_tokens": settings.num_visual_tokens}
