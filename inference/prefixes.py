"""Reading the beginning of prompts, up to the last visual token, once for all questions about a slide.

Shapes: B rows, T tokens of the prompts, L columns with visual tokens, W last columns of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from inference.prefix_cache import Prefix, SharedPrefixCache, Sharing, can_share_prefix, shared_attention
from inference.room import answer_limits
from projectors import PROMPT_TOPK
from slide_reports import collate
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER, SlideVLM, position_arguments


def last_markers(input_ids: Tensor) -> list[int]:
    """Number of ids up to and with the last image marker of each row (B, T)."""
    places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return ((input_ids == IMAGE_MARKER) * places).amax(1).tolist()


@torch.inference_mode()
def read_batch(model: SlideVLM, batch: dict[str, Tensor]) -> list[Prefix]:
    """Read each row of a batch up to its last visual token, in one forward pass.

    Raises:
        PromptTooLong: the language model reads no more behind one of them, or not even as much.
    """
    cut = torch.tensor(last_markers(batch["input_ids"]), device=batch["input_ids"].device)
    longest = int(cut.max())
    columns = torch.arange(longest, device=cut.device)
    beginning = batch | {
        "input_ids": batch["input_ids"][:, :longest],
        "attention_mask": (columns < cut[:, None]).long(),
        "labels": torch.full_like(batch["input_ids"][:, :longest], IGNORED_LABEL),
    }
    inputs = model.embed(beginning)
    lengths = inputs["attention_mask"].sum(1).tolist()
    answer_limits(model, lengths, 1)
    stores = None
    if can_share_prefix(model.base_llm):
        cache = SharedPrefixCache(model.base_llm.config, max(lengths))
        read_columns(model, inputs["conditioning"], inputs["attention_mask"], cache)
        stores = cache.stores
    return [_prefix_of_row(inputs, stores, row, length) for row, length in enumerate(lengths)]


def _prefix_of_row(inputs: dict[str, Any], stores: list | None, row: int, length: int) -> Prefix:
    """Cloned, so that a prefix that is kept does not keep the tensors of its whole batch."""
    layers = stores and [(s.keys[row, :, :length].clone(), s.values[row, :, :length].clone()) for s in stores]
    conditioning = {name: value[row, :length].clone() for name, value in inputs["conditioning"].items()}
    return Prefix(inputs["input_ids"][row, :length].clone(), conditioning, layers)


def read_prefixes(model: SlideVLM, samples: Sequence[dict[str, Any]]) -> list[Prefix]:
    """The prefix of each of a list of dataset samples, read once for samples about the very same inputs.

    They are the same when their patch tokens or pixels are one object in memory and their prompts begin alike. A
    reducer that heeds the question makes other visual tokens for another question, which are then not shared.
    """
    heeds_question = model.settings.token_reducer == PROMPT_TOPK
    numbers, distinct = {}, []
    for sample in samples:
        ids = sample["input_ids"][: end_of_markers(sample)]
        inputs = sample["pixel_values"] if "pixel_values" in sample else sample["patch_tokens"]
        same = (id(inputs), tuple(ids), tuple(sample["question_ids"]) if heeds_question else None)
        if same not in numbers:
            distinct.append(sample | {"input_ids": ids, "labels": [IGNORED_LABEL] * len(ids)})
        numbers[same] = numbers.get(same, len(numbers))
        sample["prefix_number"] = numbers[same]
    prefixes = read_batch(model, {name: value.to(model.device) for name, value in collate(distinct).items()})
    return [prefixes[sample.pop("prefix_number")] for sample in samples]


def end_of_markers(sample: dict[str, Any]) -> int:
    """Number of ids of a sample up to and with its last image marker."""
    return len(sample["input_ids"]) - sample["input_ids"][::-1].index(IMAGE_MARKER)


@torch.inference_mode()
def extend_prefix(model: SlideVLM, prefix: Prefix, token_ids: list[int]) -> Prefix:
    """A prefix with more text behind it, such as a question and its answer."""
    more = torch.tensor(token_ids, dtype=torch.long, device=prefix.input_ids.device)
    new = {name: value[0] for name, value in model.embed_text(more[None]).items()}
    conditioning = {name: torch.cat([value, new[name].to(value)]) for name, value in prefix.conditioning.items()}
    longer = Prefix(torch.cat([prefix.input_ids, more]), conditioning, None)
    if prefix.layers is None:
        return longer
    sharing = Sharing([1], torch.zeros(1, dtype=torch.long, device=more.device), len(prefix))
    cache = SharedPrefixCache(model.base_llm.config, len(more), [prefix], sharing)
    with shared_attention(model.base_llm):
        read_columns(
            model, {name: value[None] for name, value in new.items()}, torch.ones_like(longer.input_ids)[None], cache
        )
    read = zip(prefix.layers, cache.stores, strict=True)
    layers = [(torch.cat([k, s.keys[0]], dim=1), torch.cat([v, s.values[0]], dim=1)) for (k, v), s in read]
    return replace(longer, layers=layers)


def read_columns(model: SlideVLM, conditioning: dict[str, Tensor], attention_mask: Tensor, cache: Cache) -> Tensor:
    """Hidden states (B, W, H) of the last columns of a mask (B, L), read into a cache of all before."""
    width = conditioning["inputs_embeds"].shape[1]
    positions = position_arguments(attention_mask)["position_ids"][:, -width:]
    decoder = model.base_llm.get_decoder()
    return decoder(
        **conditioning,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
