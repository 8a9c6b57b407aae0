"""Train the demo's language model: a byte-pair tokenizer and a small Gemma-3n, on the training reports' text alone.

    python demo/train_llm.py --train_json demo/output/train.json --output_dir demo/output/llm

Most samples are a chat in which the user names the words of a report, shuffled, with gaps and noise, and the model
writes the report; some are bare reports. So the model learns what real language models can do already: to write what
its context calls for. A projector trained later, with this model frozen, steers it through that context.

Writes OUT as `save_pretrained` does, with the tokenizer (chat template included) beside the model.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from command_line import DONE, make_parser, run

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
# Ids beyond the per-layer embedding table, as the real model has for its images: a placeholder for visual tokens
# must lie there, where it carries no word's identity.
NUM_SOFT_IDS = 8
# Gemma's own layout, one turn after another.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INSTRUCTIONS = (
    "Write the report of this slide.",
    "Describe this slide in a pathology report.",
    "What is the diagnosis?",
    "Generate a pathology report.",
)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--train_json", type=Path, default=Path("demo/output/train.json"), help="training reports")
    data.add_argument("--output_dir", type=Path, default=Path("demo/output/llm"), help="folder of model and tokenizer")
    model = parser.add_argument_group("model")
    model.add_argument("--vocab_size", type=int, default=640, help="tokens of the byte-pair vocabulary at most")
    model.add_argument("--hidden_size", type=int, default=128, help="width of the model")
    training = parser.add_argument_group("training")
    training.add_argument("--num_steps", type=int, default=180, help="optimizer steps")
    training.add_argument("--batch_size", type=int, default=24, help="samples a step")
    training.add_argument("--learning_rate", type=float, default=4e-3, help="highest, after warm-up")
    training.add_argument("--seed", type=int, default=0, help="seed of weights and samples")
    return parser.parse_args(argv)


def read_reports(path: Path) -> list[str]:
    """Read the distinct report texts of a REG-style JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run demo/make_slides.py first")
    return list(dict.fromkeys(record["report"] for record in json.loads(path.read_text())))


def train_tokenizer(reports: list[str], vocab_size: int) -> Any:
    """Train a byte-level byte-pair tokenizer on reports and instructions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS, UNKNOWN, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*reports, *INSTRUCTIONS, "user\nmodel\n"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )


def build_model(tokenizer: Any, hidden_size: int) -> Any:
    """Build a small Gemma-3n with every part of the real one: per-layer embeddings, AltUp, Laurel, shared KV."""
    from torch import nn
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    num_layers = 4
    config = Gemma3nTextConfig(
        vocab_size=len(tokenizer) + NUM_SOFT_IDS,
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=[2 * hidden_size] * num_layers,
        num_hidden_layers=num_layers,
        layer_types=["sliding_attention", "full_attention"] * (num_layers // 2),
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * num_layers,
        sliding_window=512,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
    )
    model = Gemma3nForCausalLM(config)
    # It starts at zero, where per-layer embeddings have no effect; the real model's is far from zero.
    for layer in model.model.layers:
        nn.init.normal_(layer.altup.correct_output_scale, mean=0.5, std=0.2)
    return model


def hint(report: str, reports: list[str], rng: random.Random) -> str:
    """Name the words of a report in any order, now and then with some left out and a strange one between."""
    words = report.split()
    gaps = rng.choice((0.0, 0.0, 0.2))
    words = [word for word in words if rng.random() >= gaps] or words
    if rng.random() < 0.3:
        words.append(rng.choice(rng.choice(reports).split()))
    rng.shuffle(words)
    return " ".join(words)


def draw_sample(reports: list[str], tokenizer: Any, rng: random.Random) -> tuple[list[int], list[int]]:
    """Draw one sample: ids, and labels that are -100 where nothing is to be learned."""
    report = rng.choice(reports)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    answer = tokenizer(report, add_special_tokens=False)["input_ids"]
    if rng.random() < 0.15:  # a bare report
        ids = [tokenizer.bos_token_id, *answer, tokenizer.eos_token_id]
        return ids, [-100, *ids[1:]]
    turn = {"role": "user", "content": f"{hint(report, reports, rng)}\n{rng.choice(INSTRUCTIONS)}"}
    text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, end], [-100] * len(prompt) + [*answer, end]


def draw_batch(reports: list[str], tokenizer: Any, size: int, rng: random.Random) -> dict[str, Any]:
    """Draw a padded batch as the model's forward takes it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    samples = [draw_sample(reports, tokenizer, rng) for _ in range(size)]
    ids, labels = ([torch.tensor(sample[i]) for sample in samples] for i in range(2))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    reports = read_reports(args.train_json)

    import torch
    from tqdm import tqdm

    # Data
    start = time.monotonic()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(reports, args.vocab_size)

    # Model
    model = build_model(tokenizer, args.hidden_size)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tokenizer)} tokens, {len(reports)} distinct reports")

    # Optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.num_steps, pct_start=0.1
    )

    # Train
    model.train()
    progress = tqdm(range(args.num_steps), desc="llm", unit="step")
    for step in progress:
        loss = model(**draw_batch(reports, tokenizer, args.batch_size, rng), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 50 == 0 or step == args.num_steps - 1:
            tqdm.write(f"step {step} loss {loss.item():.3f}")

    # Save
    model.eval()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {time.monotonic() - start:.0f} s")
    return DONE


if __name__ == "__main__":
    run(main)
