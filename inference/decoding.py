"""Decoding behind a visual prefix: the prompt is read once, and Hugging Face's ``generate`` goes on from its cache.

``generate(inputs_embeds=…)`` cannot pass Gemma-3n's per-layer inputs, and stock beam search reads the prompt once per
beam. So all but the last prompt token are read here once, through :meth:`SlideVLM.embed`, and the cache is repeated for
the beams.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from slide_reports import Prompt, collate
from slide_vlm import SlideVLM, load_vlm, position_arguments


@dataclass(frozen=True)
class Decoded:
    """One generated answer: its token ids without prompt and end, and its beam score (None for greedy decoding)."""

    token_ids: list[int]
    score: float | None


@torch.inference_mode()
def generate_answers(
    model: SlideVLM,
    batch: dict[str, Tensor],
    *,
    stop_ids: list[int],
    num_beams: int = 3,
    max_new_tokens: int = 256,
    length_penalty: float = 1.0,
) -> list[Decoded]:
    """Answer a batch of prompts by beam search (greedy with one beam).

    Args:
        model: in evaluation mode.
        batch: as :class:`SlideVLM` takes it; ``labels`` are not used.
        stop_ids: token ids that end an answer.
        num_beams: beams a sample.
        max_new_tokens: longest answer in tokens.
        length_penalty: exponent of the length by which a beam's log-likelihood is divided.

    Returns:
        One :class:`Decoded` a sample, in order.
    """
    inputs = model.embed(batch, padding_side="left")
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    cache = _read_prompt(model, inputs["conditioning"], attention_mask)
    cache.batch_repeat_interleave(num_beams)
    with _own_settings_aside(model.base_llm):
        output = model.base_llm.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            return_dict_in_generate=True,
            output_scores=num_beams > 1,
        )
    answers = output.sequences[:, input_ids.shape[1] :].tolist()
    scores = output.sequences_scores.tolist() if num_beams > 1 else [None] * len(answers)
    return [Decoded(_until(answer, stop_ids), score) for answer, score in zip(answers, scores, strict=True)]


@contextmanager
def _own_settings_aside(llm: PreTrainedModel) -> Iterator[None]:
    """Set aside what a checkpoint ships as its generation settings: a repetition penalty, say, sees the prompt too."""
    own, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = own


def _read_prompt(model: SlideVLM, conditioning: dict[str, Tensor], attention_mask: Tensor) -> DynamicCache:
    """Cache of all prompt positions but the last, which ``generate`` reads itself to predict the first token."""
    cache = DynamicCache(config=model.base_llm.config.get_text_config())
    length = attention_mask.shape[1] - 1
    positions = position_arguments(attention_mask)
    model.base_llm.get_decoder()(
        **{name: value[:, :length] for name, value in conditioning.items()},
        **{name: value[:, :length] for name, value in positions.items()},
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def _until(token_ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:end]


def answer_samples(model: SlideVLM, tokenizer, samples: list[dict], **decoding) -> list[tuple[str, float | None]]:
    """Text and beam score for each of a list of dataset samples; ``decoding`` as for :func:`generate_answers`."""
    batch = {name: value.to(model.device) for name, value in collate(samples).items()}
    stop_ids = Prompt(**model.settings.prompt).stop_ids(tokenizer, model.base_llm)
    decoded = generate_answers(model, batch, stop_ids=stop_ids, **decoding)
    return [(tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip(), answer.score) for answer in decoded]


def open_model(args, device: str | torch.device | None = None):
    """Model and tokenizer as the flags say, in evaluation mode on its device."""
    try:
        device = torch.device(device or args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device or args.device}: {str(error).splitlines()[0]}; use cuda or cpu") from error
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return load_vlm(
        args.model,
        device=device,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        llm_name=args.llm_name,
        encoder_name=args.vision_model_name,
        ple_device=args.ple_device,
    )
