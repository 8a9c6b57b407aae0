"""Whether a merged language model is the one that it was merged from.

Two things can differ, and each is measured by itself. The weights: those that were written and read again must be the
sums of base and adapter, rounded to the dtype of the file. What rounding does: bfloat16 keeps 8 bits of a weight, which
moves single logits by some hundredths of the largest however well it is done, and less than bfloat16 arithmetic does.
So predictions are compared, by the divergence of Kullback and Leibler.

Shapes: P positions of prompts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slide_reports import Prompt, collate
from slide_vlm import SlideVLM, position_arguments

# Of the logits, as a share of the largest; of predictions, in nats.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
SHARE_OF_ADAPTER = 0.01  # rounding may change predictions by so much of what the adapter does, or by float32's noise
NOISE_NATS = 1e-6
POSITIONS = 64  # of each prompt whose logits are compared; one of a large vocabulary takes 1 MB
ROWS_AT_ONCE = 32  # of logits in float64


@dataclass(frozen=True)
class MergeCheck:
    """How far a merged model is from adapter and base apart.

    Attributes:
        logits: largest difference to a model with the weights that the file should hold, over the largest logit.
        rounded: the same to adapter and base apart: what rounding moves single logits by; told, not limited.
        nats: mean divergence of its predictions from those of adapter and base apart.
        adapter_nats: mean divergence of the predictions of the base alone from the same.
        dtype: of the merged weights.
    """

    logits: float
    rounded: float
    nats: float
    adapter_nats: float
    dtype: torch.dtype

    @property
    def agrees(self) -> bool:
        """Whether both differences are within their limits."""
        limit = LIMITS[self.dtype]
        return self.logits <= limit and self.nats <= min(limit, max(NOISE_NATS, SHARE_OF_ADAPTER * self.adapter_nats))

    def __str__(self) -> str:
        """One line for the user."""
        return (
            f"logits differ by {self.logits:.1e} of the largest from those of the weights meant; from adapter and base "
            f"apart single logits do by {self.rounded:.1e}, predictions by {self.nats:.1e} nats, where the adapter "
            f"makes {self.adapter_nats:.1e}"
        )


def round_as_merged(llm: nn.Module, dtype: torch.dtype) -> None:
    """Give every layer of ``llm`` the weight that a merged file of ``dtype`` should hold, in the dtype that it has.

    Its adapters are left without effect.
    """
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for layer in llm.modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.active_adapters:
                    layer.get_base_layer().weight += layer.get_delta_weight(adapter)
                    layer.lora_B[adapter].weight.zero_()
        for weight in llm.parameters():
            weight.copy_(weight.to(dtype))


def mean_divergence(logits: Tensor, from_logits: Tensor) -> float:
    """Mean over positions of KL(softmax(from_logits) || softmax(logits)), both (P, V), in nats."""
    total = 0.0
    for ours, theirs in zip(logits.split(ROWS_AT_ONCE), from_logits.split(ROWS_AT_ONCE), strict=True):
        log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(logits)


def largest_difference(logits: Tensor, from_logits: Tensor) -> float:
    """Largest difference between logits (P, V), over the largest of them."""
    return float((logits - from_logits).abs().max() / from_logits.abs().max())


def example_prompts(model: SlideVLM, tokenizer, num_prompts: int) -> dict[str, torch.Tensor]:
    """A batch of prompts of different length with features, or images, of random numbers."""
    settings, prompt = model.settings, Prompt(**model.settings.prompt)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(num_prompts):
        question = " ".join([settings.question] * (number + 1))
        ids = prompt.question_ids(tokenizer, question, settings.max_question_tokens)
        bare = prompt.bare_question_ids(tokenizer, question, settings.max_question_tokens)
        sample = {"input_ids": ids, "labels": [-100] * len(ids), "question_ids": bare}
        sample["visual_budgets"] = torch.tensor([settings.num_visual_tokens])
        if settings.input_kind == "images":
            side = model.encoder.image_size
            sample["pixel_values"] = torch.randn(1, 3, side, side, generator=generator)
        else:
            num_patches = 2 + settings.num_visual_tokens * (number + 1) // num_prompts
            places = torch.arange(num_patches)
            sample["patch_tokens"] = [torch.randn(num_patches, settings.patch_width, generator=generator)]
            sample["coords"] = [torch.stack([places % 16, places // 16], dim=-1) * 256]
        samples.append(sample)
    return {name: value.to(model.device) for name, value in collate(samples).items()}


@torch.no_grad()
def logits_of(model: SlideVLM, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (positions, V) at positions spread evenly over all prompts, visual ones among them, float32 on the CPU."""
    inputs = model.embed(prompts)
    mask = inputs["attention_mask"]
    hidden = model.base_llm.get_decoder()(**inputs["conditioning"], **position_arguments(mask), use_cache=False)
    real = hidden.last_hidden_state[mask.bool()]
    places = torch.linspace(0, len(real) - 1, min(len(real), POSITIONS * len(mask))).long()
    return model.logits(real[places.to(real.device)]).float().cpu()
