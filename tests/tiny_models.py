"""Tiny random models and records that take the code paths of the real ones."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from language_model import choose_placeholder, text_embedding_rms
from slide_reports import Prompt, collate
from slide_vlm import SlideVLM
from vlm_settings import VLMSettings

REPORTS = [
    "Breast, core-needle biopsy;\n  Invasive carcinoma of no special type, grade II",
    "Prostate, biopsy;\n  Acinar adenocarcinoma, Gleason's score 7 (3+4), grade group 2",
    "Stomach, endoscopic biopsy;\n  Chronic gastritis",
    "Lung, biopsy;\n  No evidence of malignancy in the tissue examined",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PATCH_WIDTH = 12


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(REPORTS * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def gemma3n_config(**changes) -> Gemma3nTextConfig:
    settings = {
        "vocab_size": 328,
        "vocab_size_per_layer_input": 324,
        "hidden_size": 32,
        "intermediate_size": [64] * 4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return Gemma3nTextConfig(**(settings | changes))


def show_per_layer_inputs(llm: torch.nn.Module) -> None:
    """Make the per-layer inputs matter: their path through AltUp is scaled by zero at initialisation."""
    for name, parameter in llm.named_parameters():
        if name.endswith("correct_output_scale"):
            torch.nn.init.normal_(parameter)


def make_llm(family: str = "gemma3n", seed: int = 0):
    torch.manual_seed(seed)
    small = {
        "vocab_size": 328,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family == "gemma3n":
        llm = Gemma3nForCausalLM(gemma3n_config())
        show_per_layer_inputs(llm)
    elif family == "gemma3":
        llm = Gemma3ForCausalLM(Gemma3TextConfig(**small, sliding_window=16))
    elif family == "llama":
        llm = LlamaForCausalLM(LlamaConfig(**small))
    elif family == "qwen3":
        llm = Qwen3ForCausalLM(Qwen3Config(**small))
    elif family == "biogpt":
        from transformers import BioGptConfig, BioGptForCausalLM

        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        llm = BioGptForCausalLM(BioGptConfig(**{name: small[name] for name in names}, max_position_embeddings=512))
    # Larger than the usual initialisation, so that tokens and positions visibly matter.
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return llm.eval()


def make_text_model(folder: Path, dropout: float = 0.0) -> None:
    """Save a BERT of two layers and its tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    config = BertConfig(**sizes, **dropouts, vocab_size=328, max_position_embeddings=128, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    make_tokenizer(chat=False).save_pretrained(folder)


def make_model(
    family: str = "gemma3n",
    token_reducer: str = "none",
    num_visual_tokens: int = 8,
    seed: int = 0,
    encoder=None,
    **more_settings,
) -> tuple[SlideVLM, PreTrainedTokenizerFast]:
    tokenizer = make_tokenizer()
    llm = make_llm(family, seed)
    settings = VLMSettings(
        llm_name="tiny",
        patch_width=encoder.patch_width if encoder else PATCH_WIDTH,
        token_reducer=token_reducer,
        num_visual_tokens=num_visual_tokens,
        output_rms=text_embedding_rms(llm),
        placeholder_id=choose_placeholder(llm),
        prompt=vars(Prompt.for_tokenizer(tokenizer)),
        question="Write the report.",
        input_kind="images" if encoder else "features",
        **more_settings,
    )
    return SlideVLM(llm, settings, encoder).eval(), tokenizer


def make_sample(tokenizer, answer: str, num_patches: int, seed: int = 0, question: str = "Write the report.") -> dict:
    generator = torch.Generator().manual_seed(seed)
    prompt = Prompt.for_tokenizer(tokenizer)
    asked = prompt.question_ids(tokenizer, question, 64)
    told = prompt.answer_ids(tokenizer, answer, 64) if answer else []
    side = 4
    index = torch.arange(num_patches)
    return {
        "input_ids": asked + told,
        "labels": [-100] * len(asked) + told,
        "question_ids": prompt.bare_question_ids(tokenizer, question, 64),
        "patch_tokens": [torch.randn(num_patches, PATCH_WIDTH, generator=generator)],
        "coords": [torch.stack([index % side, index // side], dim=-1) * 256],
        "visual_budgets": torch.tensor([512]),  # all that the model has
    }


def make_batch(tokenizer, sizes=(5, 8, 3), answers=None) -> dict[str, torch.Tensor]:
    answers = answers or REPORTS
    return collate([make_sample(tokenizer, answers[i % len(answers)], n, seed=i) for i, n in enumerate(sizes)])


def generate_answers(model: SlideVLM, batch: dict[str, torch.Tensor], *, stop_ids: list[int], **decoding: Any) -> list:
    """The best answer to each prompt of a batch as :class:`SlideVLM` takes it; ``decoding`` as of ``Decoding``."""
    from inference.decoding import Decoding, decode
    from inference.prefixes import last_markers, read_batch

    real, cut = batch["attention_mask"].bool(), last_markers(batch["input_ids"])
    questions = [ids[row][end:].tolist() for ids, row, end in zip(batch["input_ids"], real, cut, strict=True)]
    answers = decode(model, read_batch(model, batch), questions, stop_ids=stop_ids, decoding=Decoding(**decoding))
    return [best for best, *_ in answers]
