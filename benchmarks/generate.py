r"""How much faster reports are decoded when the visual prefix is read once: ratios measured in one run.

    python benchmarks/generate.py --json generate.json
    python benchmarks/generate.py --family gemma3n --num_beams 3
    python benchmarks/generate.py --only questions --repeats 5

A language model of about 80 M random weights, behind as many visual tokens as a slide may have, decodes

- with the stock `generate` of transformers, which reads the prompt once per beam,
- as inference does: the prefix is read once and shared by the beams,
- several questions about the slide, one by one and together.

Every answer has the full length. The stock way is given the embedded prompt (`inputs_embeds`); with Gemma-3n, whose
per-layer inputs cannot be given so, ids of the same number in its place. Its linear layers are PyTorch's own; ours are
those that inference computes with on a CPU. Each way is timed in turn, the rounds are
repeated, and the median is taken: on a CPU of CPU time, so that other work on the machine counts little.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from inference.cpu_products import use_onednn
from inference.decoding import Decoding, decode
from inference.loading import DTYPES
from inference.prefixes import read_batch
from language_model import choose_placeholder, text_embedding_rms
from slide_vlm import IMAGE_MARKER, SlideVLM
from vlm_settings import VLMSettings

PATCH_WIDTH = 256
QUESTION_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama", help="default: llama")
    parser.add_argument("--num_visual_tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--num_beams", type=int, default=5, help="default: 5")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of every answer (default: 64)")
    parser.add_argument("--questions", type=int, default=8, help="about the slide (default: 8)")
    parser.add_argument("--only", choices=["questions"], default=None, help="leave the stock way out")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the language model (default: fp32)")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, stock_model = (make_model(args.family, args.num_visual_tokens).to(args.device) for _ in range(2))
    for each in (model, stock_model):
        each.llm.to(DTYPES[args.dtype])
    if args.device == "cpu":
        use_onednn(model.llm)  # as `inference.loading` does
    ways = make_ways(model, stock_model, args)
    if args.only:
        ways = {name: ways[name] for name in ("one by one", "together")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, Any] = {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way, tokens, name, args.device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {"together / one by one": medians["one by one"] / medians["together"]}
    if not args.only:
        stock = medians["stock, one question"]
        ratios["prefix once / stock generate"] = stock / medians["one question"]
        ratios["together / stock one by one"] = args.questions * stock / medians["together"]
    parameters = sum(parameter.numel() for parameter in model.llm.parameters())
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{args.family}, {parameters / 1e6:.0f} M weights in {args.dtype}, {threads} threads, load {load:.1f}")
    for name, value in medians.items():
        print(f"{name:24} {value:8.2f} s")
    for name, value in ratios.items():
        print(f"{name:32} {value:5.1f} x")
    same = {"together": tokens["one by one"] == tokens["together"]}
    if args.family != "gemma3n" and not args.only:
        same["stock"] = tokens["stock, one question"] == tokens["one question"]
    print("same tokens:", ", ".join(f"{name} {value}" for name, value in same.items()))
    if args.json:
        about = {name: value for name, value in vars(args).items() if name != "json"}
        about |= {"parameters": parameters, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
        about |= {"seconds": seconds, "ratios": ratios, "same_tokens": same}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


def make_ways(model: SlideVLM, stock_model: SlideVLM, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, with two models of the same weights: each returns the tokens of its answers."""
    generator = torch.Generator().manual_seed(0)
    slide = {
        "patch_tokens": torch.randn(1, args.num_visual_tokens, PATCH_WIDTH, generator=generator),
        "coords": torch.arange(args.num_visual_tokens).repeat(2, 1).T[None] * 256,
        "patch_mask": torch.ones(1, args.num_visual_tokens, dtype=torch.bool),
    }
    asked = torch.randint(3, 1000, (args.questions, QUESTION_TOKENS), generator=generator)
    shapes = torch.arange(args.questions) % 4  # questions differ in length
    questions = [row[int(drop) :].tolist() for row, drop in zip(asked, shapes, strict=True)]
    decoding = Decoding(num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
    stop_ids = [model.llm.config.vocab_size + 7]  # never generated, so that answers have the full length

    def batch_of(question: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[2, IMAGE_MARKER, *question]])
        batch = slide | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {name: value.to(args.device) for name, value in batch.items()}

    def answer(asked: list[list[int]]) -> list[list[int]]:
        prefix = read_batch(model, batch_of(asked[0]))[0]
        found = decode(model, [prefix] * len(asked), asked, stop_ids=stop_ids, decoding=decoding)
        return [best.token_ids for best, *_ in found]

    def stock() -> list[list[int]]:
        with torch.inference_mode():
            inputs = stock_model.embed(batch_of(questions[0]), padding_side="left")
            ids = inputs["input_ids"]
            prompt = {"inputs_embeds": inputs["conditioning"]["inputs_embeds"]}
            if args.family == "gemma3n":
                prompt = {"input_ids": ids}
            settings = GenerationConfig(
                num_beams=args.num_beams, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0
            )
            output = stock_model.llm.generate(
                **prompt, attention_mask=inputs["attention_mask"], generation_config=settings
            )
            return [row[-args.max_new_tokens :].tolist() for row in output]

    return {
        "stock, one question": stock,
        "one question": lambda: answer(questions[:1]),
        "one by one": lambda: [answer([question])[0] for question in questions],
        "together": lambda: answer(questions),
    }


def timed(way: Callable[[], Any], tokens: dict[str, Any], name: str, device: str) -> float:
    """Seconds that one way takes; its tokens are kept."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    tokens[name] = way()
    seconds = clock() - began
    print(f"{name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return seconds


def make_model(family: str, num_visual_tokens: int) -> SlideVLM:
    """A random model in evaluation mode, every part of which matters; the same weights each time."""
    torch.manual_seed(0)
    llm = FAMILIES[family]()
    llm.generation_config = GenerationConfig()
    for name, parameter in llm.named_parameters():
        if name.endswith("correct_output_scale"):
            torch.nn.init.normal_(parameter)
    settings = VLMSettings(
        llm_name=family,
        patch_width=PATCH_WIDTH,
        num_visual_tokens=num_visual_tokens,
        output_rms=text_embedding_rms(llm),
        placeholder_id=choose_placeholder(llm),
    )
    return SlideVLM(llm, settings).eval()


def make_llama() -> PreTrainedModel:
    """Layers of the shape of small published models, 80 M weights."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=640,
        intermediate_size=1760,
        num_hidden_layers=16,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_gemma3n() -> PreTrainedModel:
    """Gemma-3n's pattern of layers (four sliding, one full; a third share keys and values), 80 M weights."""
    layers = 15
    config = Gemma3nTextConfig(
        vocab_size=16_004,
        vocab_size_per_layer_input=16_000,
        hidden_size=512,
        intermediate_size=[1536] * layers,
        num_hidden_layers=layers,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * (layers // 5),
        num_kv_shared_layers=5,
        sliding_window=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        hidden_size_per_layer_input=64,
        laurel_rank=16,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.95] * 5 + [0.0] * (layers - 5),
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma3nForCausalLM(config)


FAMILIES = {"llama": make_llama, "gemma3n": make_gemma3n}


if __name__ == "__main__":
    main()
