"""How well embeddings find each other: recall of retrieval both ways, zero-shot classification, loss of validation.

Shapes: I items, U distinct texts, C classes, D width of an embedding.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from csv_separator import separator_of
from stage0_encoder.alignment_model import AlignmentModel
from stage0_encoder.contrastive_loss import contrastive_loss, gather_rows, positive_pairs
from stage0_encoder.encoder_run import share_statistics
from stage0_encoder.pairs import Items

RANKS = (1, 5, 10)
ROWS_AT_ONCE = 1024


class Embeddings(NamedTuple):
    """Embeddings of the items that could be read, in their order, on the CPU: (I, D), (I, D), and (I,) places."""

    images: Tensor
    texts: Tensor
    items: Tensor


@torch.no_grad()
def embed_all(accelerator: Accelerator, model: torch.nn.Module, loader: Any, *, quiet: bool = True) -> Embeddings:
    """Embed all items of a loader, shared by the processes, each gets all. Collective. Leaves evaluation mode."""
    model.eval()
    bare = accelerator.unwrap_model(model)
    share_statistics(accelerator, bare)
    parts = []
    for batch in tqdm(loader, desc="embedding", unit="batch", disable=quiet or not accelerator.is_main_process):
        embedded = bare(batch)
        valid = batch["is_valid"]
        parts.append((embedded.images[valid], embedded.texts[valid], batch["items"][valid]))
    images, texts, items = (gather_rows(torch.cat(column)).cpu() for column in zip(*parts, strict=True))
    order = items.argsort()
    return Embeddings(images[order].float(), texts[order].float(), items[order])


@torch.no_grad()
def loss_of_embeddings(model: AlignmentModel, found: Embeddings, items: Items, batch_size: int) -> float:
    """Mean loss over consecutive batches of items, whichever process embedded them."""
    cases, texts = (torch.from_numpy(column)[found.items] for column in (items.cases, items.texts))
    scalars = model.log_scale.detach().cpu(), model.bias.detach().cpu()
    total = 0.0
    for rows in torch.arange(len(found.items)).split(batch_size):
        positives = positive_pairs(cases[rows], texts[rows])
        embedded = found.images[rows], found.texts[rows], *scalars
        total += len(rows) * float(contrastive_loss(*embedded, positives, kind=model.settings.loss))
    return total / max(1, len(found.items))


def retrieval_scores(images: Tensor, texts: Tensor, cases: Tensor, text_numbers: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 from image to text and from text to image, and the mean of both.

    A text that several items share is one candidate and one query. A text is right for an image when an item of the
    same case has it, and an image for a text likewise; a query is answered at K when one right candidate is among the
    first K. A wrong candidate that scores the same comes first.

    Args:
        images: (I, D), of length 1.
        texts: (I, D), of length 1.
        cases: (I,) int64 numbers of cases.
        text_numbers: (I,) int64 numbers of texts.

    Returns:
        ``image_to_text_recall_at_<K>``, ``text_to_image_recall_at_<K>``, ``recall_at_<K>``, from 0 to 1, and
        how many images and texts there were to find, ``num_images`` and ``num_texts``.
    """
    if not len(images):
        return {}
    _, first_places, own_text = np.unique(text_numbers.numpy(), return_index=True, return_inverse=True)
    own_case = np.unique(cases.numpy(), return_inverse=True)[1]
    distinct = texts[torch.from_numpy(first_places)]
    texts_of: dict[int, set[int]] = {}
    for case, text in zip(own_case.tolist(), own_text.tolist(), strict=True):
        texts_of.setdefault(case, set()).add(text)
    right = [sorted(texts_of[case]) for case in own_case.tolist()]
    images_of: list[list[int]] = [[] for _ in range(len(distinct))]
    for image, of_image in enumerate(right):
        for text in of_image:
            images_of[text].append(image)
    scores = {"num_images": len(images), "num_texts": len(distinct)}
    for name, ranks in (
        ("image_to_text", best_ranks(images, distinct, right)),
        ("text_to_image", best_ranks(distinct, images, images_of)),
    ):
        scores |= {f"{name}_recall_at_{k}": float((ranks <= k).double().mean()) for k in RANKS}
    both = ("image_to_text", "text_to_image")
    return scores | {f"recall_at_{k}": sum(scores[f"{name}_recall_at_{k}"] for name in both) / 2 for k in RANKS}


def best_ranks(queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """Rank, from 1, of the best right candidate of each query; wrong ones of the same score are ahead of it."""
    ranks = []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        scores = queries[start : start + ROWS_AT_ONCE] @ candidates.T
        is_right = torch.zeros(scores.shape, dtype=torch.bool)
        for row in range(len(scores)):
            is_right[row, list(right[start + row])] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~is_right).sum(dim=1))
    return torch.cat(ranks)


@dataclass(frozen=True)
class ZeroShot:
    """Classes by their prompts, and the true class of some records.

    Attributes:
        prompts: of each class.
        labels: class of a record, by its id; empty where none is known.
    """

    prompts: dict[str, list[str]]
    labels: dict[str, str]


def read_zero_shot(class_prompts: str | Path, class_labels: str | Path | None) -> ZeroShot:
    """Read classes and labels.

    Args:
        class_prompts: JSON object, each class with a prompt or a list of them.
        class_labels: CSV with the columns `id` and `label`.

    Raises:
        ValueError: names the file and what is wrong in it.
    """
    try:
        said = json.loads(Path(class_prompts).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--class_prompts {class_prompts}: no JSON ({error})") from error
    if not isinstance(said, dict) or len(said) < 2:
        raise ValueError(f"--class_prompts {class_prompts}: expected an object with at least two classes")
    prompts = {name: [value] if isinstance(value, str) else value for name, value in said.items()}
    for name, values in prompts.items():
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
            raise ValueError(f"--class_prompts {class_prompts}: class {name!r} needs a prompt or a list of prompts")
    labels = {}
    if class_labels is not None:
        with Path(class_labels).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter=separator_of(file))
            if not {"id", "label"} <= set(rows.fieldnames or ()):
                raise ValueError(f"--class_labels {class_labels}: expected the columns id and label")
            labels = {row["id"]: row["label"] for row in rows if row["label"]}
        unknown = sorted(set(labels.values()) - set(prompts))
        if unknown:
            raise ValueError(f"--class_labels {class_labels}: label {unknown[0]!r} is no class of {class_prompts}")
    return ZeroShot(prompts, labels)


@torch.no_grad()
def class_embeddings(accelerator: Accelerator, model: AlignmentModel, prompts: dict[str, list[str]]) -> Tensor:
    """(C, D) on the CPU: of each class the mean of its prompts' embeddings, of length 1 again (Radford et al. 2021)."""
    tokens = model.text.tokens(model.settings.max_text_tokens)
    means = []
    for of_class in prompts.values():
        ids, mask = tokens.pad([tokens.ids_of(prompt) for prompt in of_class])
        with accelerator.autocast():
            batch = {"input_ids": ids.to(accelerator.device), "text_mask": mask.to(accelerator.device)}
            means.append(model.embed_texts(batch).float().mean(dim=0).cpu())
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_scores(predicted: Sequence[str], ids: Sequence[str], labels: dict[str, str]) -> dict[str, float]:
    """Accuracy and balanced accuracy (mean recall of the classes that occur) over items whose record has a label."""
    pairs = [(guess, labels[name]) for guess, name in zip(predicted, ids, strict=True) if name in labels]
    if not pairs:
        return {}
    recalls = []
    for label in sorted({label for _, label in pairs}):
        hits = [guess == label for guess, true in pairs if true == label]
        recalls.append(sum(hits) / len(hits))
    accuracy = sum(guess == true for guess, true in pairs) / len(pairs)
    return {"zero_shot_accuracy": accuracy, "zero_shot_balanced_accuracy": sum(recalls) / len(recalls)}


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Any,
    zero_shot: ZeroShot | None,
    loss_batch_size: int,
) -> dict[str, float]:
    """Loss, recalls and zero-shot accuracies of validation, named ``val_…``. Collective: call on every rank."""
    dataset = loader.dataset
    bare = accelerator.unwrap_model(model)
    found = embed_all(accelerator, model, loader)
    cases, texts = (torch.from_numpy(c)[found.items] for c in (dataset.items.cases, dataset.items.texts))
    scores = {"loss": loss_of_embeddings(bare, found, dataset.items, loss_batch_size)}
    scores |= retrieval_scores(found.images, found.texts, cases, texts)
    if zero_shot is not None and zero_shot.labels:
        guesses = classify(accelerator, bare, found, zero_shot.prompts)
        ids = [dataset.records[int(dataset.items.records[item])].id for item in found.items.tolist()]
        scores |= zero_shot_scores(guesses, ids, zero_shot.labels)
    return {f"val_{name}": value for name, value in scores.items()}


def classify(
    accelerator: Accelerator, model: AlignmentModel, found: Embeddings, prompts: dict[str, list[str]]
) -> list[str]:
    """The class of each item whose embedding is nearest."""
    names = list(prompts)
    nearest = (found.images @ class_embeddings(accelerator, model, prompts).T).argmax(dim=1)
    return [names[place] for place in nearest.tolist()]
