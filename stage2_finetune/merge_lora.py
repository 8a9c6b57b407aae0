r"""Merge the LoRA adapter of a stage 2 result into its language model: a result like any other, without peft.

  python stage2_finetune/merge_lora.py --model runs/stage2/final_model --output_dir runs/merged

Its language_model/ opens with transformers' from_pretrained, the folder itself with inference/generate.py, and stage 2
can go on from it. An adapter that was trained over 4-bit weights is merged into the values that those stand for.

Before the folder gets its name it is opened again, and its logits on a few prompts with visual tokens are compared with
those of adapter and language model apart, both in float32 arithmetic: the largest difference may be 1e-5 of the largest
logit with float32 weights, 1e-3 with bfloat16 ones.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from command_line import DONE, make_parser, run
from slide_reports import Prompt, collate
from slide_vlm import SlideVLM, VLMSettings, load_vlm, position_arguments

LIMITS = {"fp32": 1e-5, "bf16": 1e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POSITIONS = 64  # of each prompt whose logits are compared; one of a large vocabulary takes 1 MB


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="final_model folder of a stage 2 run with --llm_training lora, qlora"
    )
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of the merged weights; auto: as the base language model's files where the logits then agree, else fp32",
    )
    parser.add_argument("--num_prompts", type=PositiveInt, default=4, help="to compare logits on")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; needs room for the language model in float32")
    parser.add_argument("--llm_name", default=None, help="where the base language model is now, if it moved")
    parser.add_argument("--vision_model_name", default=None, help="where the image encoder is now, if it moved")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir when it exists")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    folder, output = Path(args.model), Path(args.output_dir)
    VLMSettings.read(folder)
    if not (folder / "adapter").is_dir():
        raise ValueError(f"{folder} holds no LoRA adapter; there is nothing to merge")
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output_dir {output} is the model itself; name another folder")
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output_dir {output} exists; name another folder, or add --overwrite")
    where = {"device": args.device, "llm_name": args.llm_name, "encoder_name": args.vision_model_name}

    # Unmerged
    model, tokenizer = load_vlm(folder, **where)
    prompts = example_prompts(model, tokenizer, args.num_prompts)
    unmerged = logits_of(model, prompts)
    del model

    # Merged
    dtypes = dtypes_to_try(args.dtype, args.llm_name or VLMSettings.read(folder).llm_name)
    temporary = output.with_name(output.name + ".unchecked")
    for dtype in dtypes:
        model, tokenizer = load_vlm(folder, dequantized=True, **where)
        save_merged(model, tokenizer, temporary, DTYPES[dtype], encoder=(folder / "encoder").is_dir())
        del model
        merged, _ = load_vlm(temporary, device=args.device, encoder_name=args.vision_model_name)
        difference = float((logits_of(merged, prompts) - unmerged).abs().max() / unmerged.abs().max())
        del merged
        print(f"{dtype}: logits differ by {difference:.1e} of the largest", file=sys.stderr)
        if difference <= LIMITS[dtype]:
            break
    else:
        shutil.rmtree(temporary)
        advice = "; try --dtype fp32" if dtype == "bf16" else ""
        raise ValueError(
            f"{folder}: merged, its logits differ by {difference:.1e} of the largest, more than {LIMITS[dtype]:.0e}; "
            f"keep the adapter apart{advice}"
        )

    # Save
    outdated = output.with_name(output.name + ".outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if output.exists():
        os.replace(output, outdated)
    os.replace(temporary, output)
    shutil.rmtree(outdated, ignore_errors=True)
    print(output)
    return DONE


def dtypes_to_try(choice: str, llm_name: str) -> list[str]:
    """The dtype asked for, or, of the language model's own files first, those that may do."""
    if choice != "auto":
        return [choice]
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(llm_name, trust_remote_code=False).get_text_config().dtype
    return ["fp32"] if own == torch.float32 else ["bf16", "fp32"]


def save_merged(model: SlideVLM, tokenizer, folder: Path, dtype: torch.dtype, *, encoder: bool) -> None:
    """Merge, which leaves ``model`` without adapter, and write a whole result folder."""
    model.llm = model.llm.merge_and_unload(safe_merge=True).to(dtype)
    model.llm_learned = True
    model.encoder_learned = encoder
    model.settings.llm_four_bit = None
    model.save(folder, tokenizer)


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


if __name__ == "__main__":
    run(main, to_go_on="run it again")
