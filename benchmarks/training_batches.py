"""What `train_step.py` and `train_step_gpu.py` train on: a Gemma-3n of random weights, REG reports, mixed questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from demo.train_llm import train_tokenizer
from language_model import choose_placeholder, text_embedding_rms
from slide_reports import Prompt, collate
from slide_vlm import IGNORED_LABEL, SlideVLM
from vlm_settings import VLMSettings

REG_REPORTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "reports" / "reg2025_train.json"
# Words of a REG 2025 report at every tenth of its distribution, for where the file is absent.
WORDS_AT_TENTHS = (2, 5, 6, 8, 9, 10, 11, 12, 17, 22, 37)
QUESTIONS = (
    "Write the pathology report of this slide.",
    "Which organ is it?",
    "How was the specimen taken?",
    "What is the diagnosis?",
)


@dataclass(frozen=True)
class Asked:
    """One record: the case it is about, its token ids, and which of them are the answer."""

    case: int
    input_ids: list[int]
    labels: list[int]
    question_ids: list[int]

    def length(self, num_visual_tokens: int) -> int:
        """Tokens to the language model."""
        return len(self.input_ids) - 1 + num_visual_tokens


def read_reports(num: int, seed: int = 0) -> tuple[list[str], str]:
    """Some reports in random order, and where they are from."""
    rng = np.random.default_rng(seed)
    if REG_REPORTS.is_file():
        reports = [row["report"] for row in json.loads(REG_REPORTS.read_text())]
        return [reports[i] for i in rng.permutation(len(reports))[:num]], "REG 2025"
    counts = np.interp(rng.random(num), np.linspace(0, 1, 11), WORDS_AT_TENTHS).round().astype(int)
    words = ["Breast", "biopsy", "carcinoma", "grade", "adenoma", "chronic", "no", "evidence", "of", "malignancy"]
    made = [" ".join(rng.choice(words, size=count)) for count in counts]
    return [f"{text.replace(' ', ', ', 1)};\n  {text}" for text in made], "made up, with the lengths of REG 2025"


def ask(reports: Sequence[str], *, mixed: bool) -> tuple[list[Asked], Any]:
    """Records that ask for each report, or ``mixed``: for the report, organ, procedure and diagnosis of each case."""
    tokenizer = train_tokenizer(list(reports), 1024)
    prompt = Prompt.for_tokenizer(tokenizer)
    records = []
    for case, report in enumerate(reports):
        site, _, rest = report.partition(",")
        procedure, _, diagnosis = rest.partition(";")
        answers = (report, site, procedure.strip() or site, diagnosis.strip() or report)
        for question, answer in list(zip(QUESTIONS, answers, strict=True))[: len(QUESTIONS) if mixed else 1]:
            asked = prompt.question_ids(tokenizer, question, 128)
            told = prompt.answer_ids(tokenizer, answer, 512)
            labels = [IGNORED_LABEL] * len(asked) + told
            bare = prompt.bare_question_ids(tokenizer, question, 128)
            records.append(Asked(case, asked + told, labels, bare))
    return records, tokenizer


def make_batch(
    records: Sequence[Asked], num_visual_tokens: int, patch_width: int, *, packed: bool = False
) -> dict[str, torch.Tensor]:
    """A batch as training makes it; the patch tokens of a case are random and always the same."""
    samples = []
    for record in records:
        generator = torch.Generator().manual_seed(record.case)
        patches = torch.randn(num_visual_tokens, patch_width, generator=generator)
        sample = {
            "input_ids": record.input_ids,
            "labels": record.labels,
            "question_ids": record.question_ids,
            "patch_tokens": [patches],
            "coords": [torch.zeros(num_visual_tokens, 2, dtype=torch.long)],
            "visual_budgets": torch.tensor([num_visual_tokens]),
        }
        samples.append(sample | ({"case_id": record.case} if packed else {}))
    return collate(samples)


def cpu_config(vocab_size: int) -> Gemma3nTextConfig:
    """A small Gemma-3n in the shape of the published ones: 8 layers, 2 with shared keys and values, 4 AltUp streams."""
    return Gemma3nTextConfig(
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size - 256,
        hidden_size=256,
        intermediate_size=[1024] * 8,
        num_hidden_layers=8,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.95, 0.95, 0.95] + [0.0] * 5,
        max_position_embeddings=4096,
    )


def make_model(llm: Gemma3nForCausalLM, tokenizer: Any, num_visual_tokens: int, patch_width: int) -> SlideVLM:
    """The model of stage 1 around a frozen language model: the projector learns."""
    for name, parameter in llm.named_parameters():
        if name.endswith("correct_output_scale"):  # zero at initialisation, and then per-layer inputs count for nothing
            torch.nn.init.normal_(parameter)
    settings = VLMSettings(
        llm_name="random",
        patch_width=patch_width,
        num_visual_tokens=num_visual_tokens,
        output_rms=text_embedding_rms(llm),
        placeholder_id=choose_placeholder(llm),
        prompt=vars(Prompt.for_tokenizer(tokenizer)),
        question=QUESTIONS[0],
    )
    model = SlideVLM(llm, settings)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    return model
