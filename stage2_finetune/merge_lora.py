r"""Merge the LoRA adapter of a stage 2 result into its language model: a result like any other, without peft.

  python stage2_finetune/merge_lora.py --model runs/stage2/final_model --output_dir runs/merged

Its language_model/ opens with transformers' from_pretrained, the folder itself with inference/generate.py, and stage 2
can go on from it. An adapter that was trained over 4-bit weights is merged into the values that those stand for.

Before the folder gets its name it is opened again and tried on a few prompts with visual tokens, in float32 arithmetic.
Its logits must be those of the weights meant, within 1e-5 of the largest for float32 weights and 1e-3 for bfloat16,
and its predictions those of adapter and language model apart, within as many nats and a hundredth of what the adapter
changes in them (see merge_check.py).
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from command_line import DONE, check_output_folder, make_parser, run
from language_model import load_llm_config, stored_dtype
from slide_vlm import SlideVLM
from stage2_finetune.merge_check import (
    MergeCheck,
    example_prompts,
    largest_difference,
    logits_of,
    mean_divergence,
    round_as_merged,
)
from vlm_loading import load_vlm
from vlm_settings import VLMSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        help="of the merged weights; auto: as the base language model's files where predictions then agree, else fp32",
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
    check_output_folder(output.parent if output.is_dir() else output)
    where = {"device": args.device, "llm_name": args.llm_name, "encoder_name": args.vision_model_name}

    # Unmerged
    model, tokenizer = load_vlm(folder, **where)
    prompts = example_prompts(model, tokenizer, args.num_prompts)
    unmerged = logits_of(model, prompts)
    with model.llm.disable_adapter():
        adapter_nats = mean_divergence(logits_of(model, prompts), unmerged)
    del model

    # Merged
    temporary = output.with_name(output.name + ".unchecked")
    for name in dtypes_to_try(args.dtype, args.llm_name or VLMSettings.read(folder).llm_name):
        dtype = DTYPES[name]
        model, tokenizer = load_vlm(folder, dequantized=True, **where)
        save_merged(model, tokenizer, temporary, dtype, encoder=(folder / "encoder").is_dir())
        model, _ = load_vlm(folder, dequantized=True, **where)
        round_as_merged(model.llm, dtype)
        meant = logits_of(model, prompts)
        model, _ = load_vlm(temporary, device=args.device, encoder_name=args.vision_model_name)
        logits = logits_of(model, prompts)
        del model
        differences = largest_difference(logits, meant), largest_difference(logits, unmerged)
        check = MergeCheck(*differences, mean_divergence(logits, unmerged), adapter_nats, dtype)
        print(f"{name}: {check}", file=sys.stderr)
        if check.agrees:
            break
    else:
        shutil.rmtree(temporary)
        advice = "; try --dtype fp32" if dtype == torch.bfloat16 else ""
        raise ValueError(f"{folder}: merged, it is another model ({check}); keep the adapter apart{advice}")

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
    return ["fp32"] if stored_dtype(load_llm_config(llm_name)) == torch.float32 else ["bf16", "fp32"]


def save_merged(model: SlideVLM, tokenizer, folder: Path, dtype: torch.dtype, *, encoder: bool) -> None:
    """Merge, which leaves ``model`` without adapter, and write a whole result folder."""
    model.llm = model.llm.merge_and_unload(safe_merge=True).to(dtype)
    model.llm_learned = True
    model.encoder_learned = encoder
    model.settings.llm_four_bit = None
    model.save(folder, tokenizer)


if __name__ == "__main__":
    run(main, to_go_on="run it again")
