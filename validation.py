"""Evaluation at the end of each epoch: the loss, and where asked a metric of reports written for a sample of records.

Shapes: B batch of cases, H language model width.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from accelerator_setup import add_early_stopping_argument
from command_line import flags_of_resumed, refuse_idle
from deepspeed_zero import autocast, whole_to_generate
from projector_average import averaged
from report_loss import evaluation_loss
from run_checkpoints import RunState
from run_log import RunLog
from sharded_weights import save_result
from slide_reports import Prompt, Record, ReportDataset, SampleKey, collate
from slide_vlm import SlideVLM, position_arguments

Metric = Callable[[Sequence[str], Sequence[str]], float]


def add_validation_arguments(parser, metrics: Sequence[str]) -> None:
    """Flags about validation, the same in every training stage."""
    group = parser.add_argument_group("Validation")
    group.add_argument(
        "--best_metric",
        choices=["loss", *metrics],
        default="loss",
        help="what best_model and --early_stopping_patience go by: the validation loss, or a metric of reports "
        "that are written for --metric_records after each epoch",
    )
    group.add_argument(
        "--metric_records", type=PositiveInt, default=64, help="validation records to write reports for, evenly spaced"
    )
    add_early_stopping_argument(group)
    group.add_argument(
        "--image_ablation_records",
        type=NonNegativeInt,
        default=256,
        help="validation records, at most, on which the end of training checks that the model uses the image; 0: none",
    )


METRIC_FLAGS = ("best_metric", "metric_records", "batch_size")
STOPPING_FLAGS = ("best_metric", "early_stopping_patience")


def refuse_idle_validation(args, defaults: dict[str, Any]) -> None:
    """Refuse flags about validation that would do nothing beside the others.

    Raises:
        ValueError: names them, and what they need.
    """
    refuse_idle(args, defaults, {"metric_records": (args.best_metric != "loss", "--best_metric other than loss")})
    refuse_two_validations(args, defaults)


def refuse_two_validations(args, defaults: dict[str, Any]) -> None:
    """Refuse a share to split off for validation beside something else that says what validation is, in a new run.

    Raises:
        ValueError: names both.
    """
    if flags_of_resumed(args).get("val_fraction") == args.val_fraction:
        return
    for flag in ("val_json", "splits"):
        given = getattr(args, flag)
        if given and args.val_fraction not in (0, defaults["val_fraction"]):
            raise ValueError(
                f"--val_fraction {args.val_fraction} and --{flag} {given} both say what validation is: give one of them"
            )


@dataclass(frozen=True)
class WrittenReports:
    """A metric of reports that are written for a sample of validation records.

    Attributes:
        name: of the metric.
        metric: of written and reference reports; higher is better.
        records: to write reports for.
        tokenizer: of the language model.
        batch_size: records at a time.
    """

    name: str
    metric: Metric
    records: Sequence[Record]
    tokenizer: Any
    batch_size: int


def refuse_unmeasurable(
    accelerator: Accelerator, val_records: Sequence[Record], *, best_metric: str, early_stopping_patience: int
) -> None:
    """Refuse to go by what will not be known, before a language model is loaded.

    Raises:
        ValueError: there are no validation records, or the model's weights are sharded, which cannot generate.
    """
    if early_stopping_patience and not len(val_records):
        raise ValueError("--early_stopping_patience needs validation records; give --val_json or --val_fraction")
    if best_metric == "loss":
        return
    if not len(val_records):
        raise ValueError(f"--best_metric {best_metric} needs validation records; give --val_json or --val_fraction")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"--best_metric {best_metric} writes reports, which sharded weights cannot; use loss")


def written_reports(
    val_records: Sequence[Record],
    tokenizer: Any,
    metrics: dict[str, Metric],
    *,
    best_metric: str,
    metric_records: int,
    batch_size: int,
) -> WrittenReports | None:
    """What :func:`validate` needs for ``--best_metric``; None for the loss."""
    if best_metric == "loss":
        return None
    places = torch.linspace(0, len(val_records) - 1, min(metric_records, len(val_records)), dtype=torch.float64)
    sample = [val_records[int(place)] for place in places]
    return WrittenReports(best_metric, metrics[best_metric], sample, tokenizer, batch_size)


def evaluate_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    val_loader: Any,
    reports: WrittenReports | None,
    epoch: int,
    state: RunState,
    log: RunLog,
    tokenizer: Any,
) -> None:
    """Log the scores after so many epochs, and write ``best_model`` where they are the best. Collective: every rank.

    The projector is the averaged one, where there is an average.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    with averaged(accelerator.unwrap_model(model)):
        scores = validate(accelerator, model, val_loader, reports)
        if not math.isfinite(scores["val_loss"]):
            raise FloatingPointError(
                f"step {state.step}: the validation loss is {scores['val_loss']}; lower --learning_rate and begin anew"
            )
        log.evaluation(state.step, epoch, **scores)
        if state.note(score_to_go_by(scores, reports.name if reports else "loss")):
            save_result(accelerator, model, log.run_dir / "best_model", tokenizer)


def validate(
    accelerator: Accelerator, model: nn.Module, val_loader: Any, reports: WrittenReports | None
) -> dict[str, float]:
    """``val_loss`` and, where asked, ``val_<metric>``. Collective: call on every rank. Leaves evaluation mode."""
    scores = {"val_loss": evaluation_loss(accelerator, model, val_loader)}
    if reports is not None:
        with whole_to_generate(accelerator, model):
            own_pairs = _write_reports(accelerator, accelerator.unwrap_model(model), reports)
        pairs = gather_object(own_pairs)
        if not pairs:
            raise ValueError("no validation record's input can be read; see the messages above")
        scores[f"val_{reports.name}"] = reports.metric(*zip(*pairs, strict=True))
    return scores


def score_to_go_by(scores: dict[str, float], best_metric: str) -> float:
    """The score that decides which model is the best; higher is better."""
    return -scores["val_loss"] if best_metric == "loss" else scores[f"val_{best_metric}"]


def epochs_to_go(state: RunState, steps_per_epoch: int, num_epochs: int, patience: int) -> Iterator[int]:
    """Epochs from the one that the run has reached, to the last; says so where they end for want of a better one."""
    for epoch in range(state.step // steps_per_epoch, num_epochs):
        if stops_early(state.evaluations_since_best, patience):
            if os.environ.get("RANK", "0") == "0":
                worse = state.evaluations_since_best
                tqdm.write(
                    f"stopped after {epoch} of {num_epochs} epochs: none of the last {worse} was better than epoch "
                    f"{epoch - worse}, whose model is best_model",
                    file=sys.stderr,
                )
            return
        yield epoch


def stops_early(evaluations_since_best: int, patience: int) -> bool:
    """Whether training is over for want of a better evaluation."""
    return 0 < patience <= evaluations_since_best


def _write_reports(accelerator: Accelerator, model: SlideVLM, reports: WrittenReports) -> list[tuple[str, str]]:
    """(written, reference) of this process's share of the records; one whose input cannot be read is left out."""
    own = reports.records[accelerator.process_index :: accelerator.num_processes]
    asked = [replace(record, answer="", later_turns=()) for record in own]
    dataset = ReportDataset.for_model(model, reports.tokenizer, asked)
    stop_ids = Prompt(**model.settings.prompt).stop_ids(reports.tokenizer, model.base_llm)
    pairs = []
    for start in range(0, len(own), reports.batch_size):
        samples, references = [], []
        for position in range(start, min(start + reports.batch_size, len(own))):
            try:
                samples.append(dataset[SampleKey(position, 0, False)])
                references.append(own[position].answer)
            except (ValueError, OSError) as error:
                print(f"left out of validation: {own[position].id}: {error}", file=sys.stderr)
        if samples:
            batch = {name: value.to(accelerator.device) for name, value in collate(samples).items()}
            with autocast(accelerator):
                answers = greedy_answers(model, batch, stop_ids, model.settings.max_answer_tokens)
            texts = [reports.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
            pairs += zip(texts, references, strict=True)
    return pairs


@torch.no_grad()
def greedy_answers(
    model: SlideVLM, batch: dict[str, Tensor], stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each answer, always the likeliest next token, without what ends it.

    The same answers as of ``inference`` with one beam; written for the middle of training, where the prompt's length
    is that of training batches and no beam search is wanted.
    """
    inputs = model.embed(batch, padding_side="left")
    mask, decoder = inputs["attention_mask"], model.base_llm.get_decoder()
    cache = {"past_key_values": DynamicCache(config=model.base_llm.config.get_text_config()), "use_cache": True}
    hidden_BH = decoder(**inputs["conditioning"], **position_arguments(mask), **cache).last_hidden_state[:, -1]
    stop = torch.tensor(stop_ids, device=mask.device)
    is_done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    answers: list[list[int]] = [[] for _ in range(len(mask))]
    for _ in range(max_new_tokens):
        tokens_B = model.logits(hidden_BH).argmax(-1)
        is_done |= torch.isin(tokens_B, stop)
        if is_done.all():
            break
        for answer, token, done in zip(answers, tokens_B.tolist(), is_done.tolist(), strict=True):
            if not done:
                answer.append(token)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        place = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        read = model.embed_text(tokens_B.unsqueeze(1))
        hidden_BH = decoder(**read, **place, **cache).last_hidden_state[:, -1]
    return answers
