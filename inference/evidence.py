"""Which tiles a report, and each of its lines, rests on.

A report is read once more behind its slide, every token given those before it (teacher forcing), so that the
log-probability of a line is a differentiable function of the patch tokens. Maps of evidence are made of that:

``integrated_gradients``  gradient of the line's log-probability times input, averaged along the straight way from a
                          slide whose tiles all look like its mean tile (Sundararajan et al. 2017). The evidence of all
                          tiles adds up to what the slide's tiles say beyond their mean. Positive speaks for the line.
``gradient_x_input``      the same at the slide itself and from zero: one gradient times the patch token (Shrikumar et
                          al. 2016). A projector that ends in an RMSNorm hardly changes with the length of a patch
                          token, and so this is the weaker one (docs/evidence.md has figures).
``attention_rollout``     attention from the line's tokens back to the visual tokens, through all layers (Abnar and
                          Zuidema 2020); never negative, and blind to what the tokens say.

Gradients are taken at the patch tokens, so they pass through position codes, reducer and projector as they are: no map
from visual tokens back to tiles has to be assumed. Rollout ends at the visual tokens and is shared out among the patch
tokens that each of them was made of (:func:`share_out`).

Shapes: I slides of the case, N tiles of a slide that were read, E patch token width, K visual tokens, L tokens of the
whole sequence, S tokens of the report, R rows of a map: the report, then its lines.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slide_reports import Prompt, collate
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER, SlideVLM, position_arguments

INTEGRATED = "integrated_gradients"
GRADIENT = "gradient_x_input"
ROLLOUT = "attention_rollout"
METHODS = (INTEGRATED, GRADIENT, ROLLOUT)
PATH_STEPS = 8  # with 64 the demo model's top tiles are the same, and maps differ by 2 % of their strongest (median)
# A sentence ends behind a word or a bracket, not behind a number, which may count a list or hold a decimal point.
_SENTENCE_END = re.compile(r"(?<=[a-z)\]%][.!?])\s+(?=[A-Z])|\s*\n\s*")


@dataclass(frozen=True)
class ReportLine:
    """A part of a report: one line of it, or one sentence of a longer line.

    Attributes:
        text: without the space around it.
        start: first character in the report.
        end: one beyond the last.
        log_prob: natural logarithm of its probability behind the slide and the text before it.
        num_tokens: that it consists of.
    """

    text: str
    start: int
    end: int
    log_prob: float
    num_tokens: int


@dataclass(frozen=True)
class Evidence:
    """How much each tile speaks for a report and its lines.

    Attributes:
        report: the text that is explained.
        whole: the report as one line.
        lines: its lines in order.
        coords: (N, 2) int64 of each slide, level-0 pixels, the tiles that the model read, in raster order.
        maps: of each method, (R, N) float32 of each slide; row 0 is the report, row i its i-th line.
    """

    report: str
    whole: ReportLine
    lines: list[ReportLine]
    coords: list[np.ndarray]
    maps: dict[str, list[np.ndarray]]

    @property
    def rows(self) -> list[ReportLine]:
        """What the rows of the maps are of."""
        return [self.whole, *self.lines]


def split_lines(report: str) -> list[tuple[int, int]]:
    """Where the lines of a report lie, (start, end) characters; a line of several sentences is split into them."""
    spans, start = [], 0
    for gap in [*_SENTENCE_END.finditer(report), None]:
        end = gap.start() if gap else len(report)
        text = report[start:end]
        if text.strip():
            left = start + len(text) - len(text.lstrip())
            spans.append((left, left + len(text.strip())))
        start = gap.end() if gap else end
    return spans


def explain(
    model: SlideVLM, tokenizer: Any, sample: dict[str, Any], report: str, methods: tuple[str, ...] = METHODS
) -> Evidence:
    """Find what a report rests on.

    Args:
        model: in evaluation mode, of slides.
        tokenizer: of its language model.
        sample: a prompt without an answer, as :func:`inference.decoding.decode_samples` takes it.
        report: what the model wrote, or any other text whose grounds are asked for.
        methods: of :data:`METHODS`.

    Raises:
        ValueError: the report is empty or longer than the model's answers may be, or the model is of images.
    """
    if model.settings.input_kind != "features":
        raise ValueError("evidence is found for slides; this model was trained on images")
    batch, spans = batch_with_report(model, tokenizer, [sample], report)
    patches = batch["patch_tokens"].float()
    of_method = {}
    # Layers that --compile compiled give the gradient of a pass once; here it is asked for a line after the other.
    with _weights_frozen(model), torch.compiler.set_stance("force_eager"):
        log_probs, gradients = _gradients(model, batch, patches, spans)
        if GRADIENT in methods:
            of_method[GRADIENT] = (gradients * patches).sum(-1)
        if INTEGRATED in methods:
            of_method[INTEGRATED] = _integrated(model, batch, patches, spans)
        if ROLLOUT in methods:
            of_method[ROLLOUT] = _rollout_maps(model, batch, spans)
    rows = [
        ReportLine(
            report[span.start : span.end],
            span.start,
            span.end,
            log_prob=float(log_probs[span.tokens].sum()),
            num_tokens=int(span.tokens.sum()),
        )
        for span in spans
    ]
    maps = {name: _by_slide(of_method[name], batch["patch_mask"]) for name in METHODS if name in of_method}
    coords = [np.asarray(of_slide, dtype=np.int64) for of_slide in sample["coords"]]
    return Evidence(report, rows[0], rows[1:], coords, maps)


def mean_patches(patches: Tensor, patch_mask: Tensor) -> Tensor:
    """The mean patch token of each slide in the place of all its patch tokens, (I, N, E)."""
    weights = patch_mask.unsqueeze(-1).to(patches.dtype)
    mean = (patches * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(patches)


@dataclass(frozen=True)
class Span:
    """A part of a report: its characters, from start to end, and which of the answer's tokens, (S,) bool."""

    start: int
    end: int
    tokens: Tensor


def batch_with_report(
    model: SlideVLM, tokenizer: Any, samples: list[dict[str, Any]], report: str
) -> tuple[dict[str, Tensor], list[Span]]:
    """Prompts with the same answer as a batch on the model's device; where the report and its lines are in the answer.

    Raises:
        ValueError: the report is empty, or longer than the model's answers may be.
    """
    if not report.strip():
        raise ValueError("the report is empty, and rests on nothing")
    longest = model.settings.max_answer_tokens
    answer = Prompt(**model.settings.prompt).answer_ids(tokenizer, report, longest)
    offsets = tokenizer(report, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) > longest:
        raise ValueError(f"the report has {len(offsets)} tokens, the model's answers have {longest} at most")
    # A token is of the line that its last character is in: byte-pair tokens take the space before a word along.
    last = torch.full((len(answer),), -1)
    last[: len(offsets)] = torch.tensor([end - 1 for _, end in offsets])
    spans = [Span(0, len(report), torch.ones(len(answer), dtype=torch.bool))]
    spans += [Span(start, end, (last >= start) & (last < end)) for start, end in split_lines(report)]
    told = []
    for sample in samples:
        asked = sample["input_ids"]
        labels = [IGNORED_LABEL] * len(asked) + answer
        told.append(sample | {"input_ids": [*asked, *answer], "labels": labels})
    return {name: value.to(model.device) for name, value in collate(told).items()}, spans


def _gradients(model: SlideVLM, batch: dict[str, Tensor], patches: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (S,) and the gradient of each span's sum of them at the patch tokens, (R, I, N, E)."""
    patches = patches.detach().requires_grad_()
    log_probs = -model(batch | {"patch_tokens": patches})
    gradients = [
        torch.autograd.grad(log_probs[span.tokens].sum(), patches, retain_graph=span is not spans[-1])[0]
        for span in spans
    ]
    return log_probs.detach(), torch.stack(gradients)


def _integrated(model: SlideVLM, batch: dict[str, Tensor], patches: Tensor, spans: list[Span]) -> Tensor:
    """Integrated gradients from the slide's mean, by the midpoint rule, (R, I, N)."""
    start = mean_patches(patches, batch["patch_mask"])
    evidence = 0
    for step in range(PATH_STEPS):
        between = start + (step + 0.5) / PATH_STEPS * (patches - start)
        _, gradients = _gradients(model, batch, between, spans)
        evidence = evidence + (gradients * (patches - start)).sum(-1) / PATH_STEPS
    return evidence


def _rollout_maps(model: SlideVLM, batch: dict[str, Tensor], spans: list[Span]) -> Tensor:
    """Attention rollout from the tokens of each span, shared out among the patch tokens, (R, I, N)."""
    with torch.no_grad():
        inputs = model.embed(batch)
        rolled = _rollout(model, inputs)
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)[0] != IGNORED_LABEL
    _, visual_mask = _reduce(model, batch, batch["patch_tokens"])
    places = _visual_places(batch, visual_mask)
    to_visual = rolled[targets][:, places]  # (S, all visual tokens)
    maps = []
    for span in spans:
        weights = torch.zeros_like(visual_mask, dtype=torch.float32)
        weights[visual_mask] = to_visual[span.tokens].mean(0)
        maps.append(share_out(model, batch, weights))
    return torch.stack(maps)


def _rollout(model: SlideVLM, inputs: dict[str, Any]) -> Tensor:
    """What each position draws from each, (L, L) float32, rows of sum 1: half of it from itself, layer by layer."""
    with _plain_attention(model):
        output = model.base_llm.get_decoder()(
            **inputs["conditioning"],
            **position_arguments(inputs["attention_mask"]),
            use_cache=False,
            output_attentions=True,
        )
    rolled = None
    for attention in output.attentions:
        heads_mean = attention[0].float().mean(0)
        layer = (
            heads_mean / heads_mean.sum(-1, keepdim=True) + torch.eye(len(heads_mean), device=attention.device)
        ) / 2
        rolled = layer if rolled is None else layer @ rolled
    return rolled


def share_out(model: SlideVLM, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Share out a weight of each visual token (I, K) among the patch tokens that it was made of, (I, N).

    The share of patch n in token r is its part of ``r . r``, by gradient times input: of a reducer that takes patch
    tokens as they are, all or nothing; of one that takes (weighted) means, parts of sum 1 that follow how much each
    patch makes the mean what it is.
    """
    patches = batch["patch_tokens"].float().detach().requires_grad_()
    with torch.enable_grad():
        tokens, _ = _reduce(model, batch, patches)
        fixed = tokens.detach()
        parts = (tokens * fixed).sum(-1) / fixed.pow(2).sum(-1).clamp(min=1e-12)
        (gradient,) = torch.autograd.grad((parts * weights.to(parts.dtype)).sum(), patches)
    return (gradient * patches.detach()).sum(-1)


def _reduce(model: SlideVLM, batch: dict[str, Tensor], patches: Tensor) -> tuple[Tensor, Tensor]:
    """What the reducer makes of patch tokens, (I, K, R) and its mask."""
    taken = {}

    def take(_, __, output):
        taken["tokens"], taken["mask"] = output

    handle = model.reducer.register_forward_hook(take)
    try:
        model.visual_tokens(batch | {"patch_tokens": patches})
    finally:
        handle.remove()
    return taken["tokens"], taken["mask"]


def _visual_places(batch: dict[str, Tensor], visual_mask: Tensor) -> Tensor:
    """Positions of the visual tokens in the whole sequence of the one case of a batch, slide after slide."""
    counts = iter(visual_mask.sum(1).tolist())
    places, at = [], 0
    for token in batch["input_ids"][0].tolist():
        width = next(counts) if token == IMAGE_MARKER else 1
        if token == IMAGE_MARKER:
            places += range(at, at + width)
        at += width
    return torch.tensor(places, device=visual_mask.device)


def _by_slide(values: Tensor, patch_mask: Tensor) -> list[np.ndarray]:
    """(R, I, N) to (R, N) of each slide without padding."""
    return [values[:, i, mask].float().cpu().numpy() for i, mask in enumerate(patch_mask)]


@contextmanager
def _weights_frozen(model: SlideVLM) -> Iterator[None]:
    """Ask for no gradients of weights, whose activations would be kept for nothing."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _plain_attention(model: SlideVLM) -> Iterator[None]:
    """Attention that can say what it attends to; fused kernels cannot."""
    llm = model.base_llm
    own = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(own)
