"""Flags that generate.py and predict.py share. Imports nothing heavy, so that a wrong flag is refused at once."""

from pathlib import Path

from jsonargparse.typing import PositiveFloat, PositiveInt

MEASURES = ("mean_token_probability", "min_token_probability", "probability")  # of confidence in an answer
SAVED = ("num_beams", "max_new_tokens", "length_penalty")  # what vlm.json may hold, and flags override
DEFAULTS = {"num_beams": 3, "max_new_tokens": 256, "length_penalty": 1.0}


def add_decoding_arguments(parser) -> None:
    """Flags of decoding and of where the model runs, the same for one slide and for many."""
    group = parser.add_argument_group("Decoding")
    default = "default: what the model's vlm.json says, else {}"
    group.add_argument(
        "--num_beams", type=PositiveInt, default=None, help="beams of the search; 1 is greedy; " + default.format(3)
    )
    group.add_argument(
        "--max_new_tokens", type=PositiveInt, default=None, help="longest report in tokens; " + default.format(256)
    )
    group.add_argument(
        "--length_penalty", type=float, default=None, help="above 0 favours longer reports; " + default.format("1.0")
    )
    group.add_argument("--do_sample", action="store_true", help="draw tokens instead of searching; needs --num_beams 1")
    group.add_argument("--temperature", type=PositiveFloat, default=1.0, help="of the draws; below 1 is less random")
    group.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest tokens that together have this probability"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draws; with it they are the same again")
    group.add_argument(
        "--num_return", type=PositiveInt, default=1, help="answers of each question: the best beams, or as many draws"
    )
    group.add_argument(
        "--allowed_reports", default=None, help="annotation file; answers are limited to the texts in it, word for word"
    )
    group.add_argument(
        "--grammar",
        default=None,
        help="file that answers must follow: a regular expression, a Lark grammar (.lark) or a JSON schema (.json); "
        "needs the extra [constraints]",
    )
    group.add_argument(
        "--snap_to",
        default=None,
        help="annotation file; an answer is replaced by the text in it that is nearest by edits; needs [constraints]",
    )
    group = parser.add_argument_group("Where it runs")
    group.add_argument("--device", default=None, help="cuda, cuda:1, cpu, …; default: a GPU where there is one")
    group.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        default=None,
        help="of the LLM; default: bf16 on a GPU; on a CPU that of the model's files if it computes in bf16, else fp32",
    )
    group.add_argument(
        "--load_in", choices=["int8", "nf4"], default=None, help="quantise the LLM's linear layers with bitsandbytes"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the LLM's feed-forward blocks: a minute first, then faster",
    )
    group.add_argument(
        "--threads",
        type=PositiveInt,
        default=None,
        help="of PyTorch on a CPU; default: OMP_NUM_THREADS, else the cores",
    )
    group.add_argument(
        "--ple_device",
        choices=["model", "cpu"],
        default=None,
        help="where Gemma-3n's table of per-layer embeddings is: with the model, or in its file, of which rows are "
        "read; cpu: 4 GB less of a GPU for E2B, the same reports; default: model on a GPU, cpu on a CPU",
    )
    group.add_argument("--llm_name", default=None, help="where the base LLM is now, if it moved since training")
    group.add_argument("--vision_model_name", default=None, help="where the image encoder is now, if it moved")


def check_decoding_arguments(args) -> None:
    """Refuse what could not be decoded with, before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: with the flag.
    """
    if args.grammar and not Path(args.grammar).is_file():
        raise FileNotFoundError(f"--grammar {args.grammar}: no such file")
    if not args.do_sample and (args.temperature, args.top_p) != (1.0, 1.0):
        raise ValueError("--temperature and --top_p are of draws; add --do_sample")
    if args.allowed_reports and args.grammar:
        raise ValueError("give --allowed_reports or --grammar, not both")


def decoding_flags(args, saved: dict) -> dict:
    """Settings of decoding: flags, else what the model saved, else defaults.

    Raises:
        ValueError: the model saved what is no number, or none that can be used.
    """
    for name in SAVED:
        value, whole = saved.get(name, 1), name != "length_penalty"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or (whole and value < 1):
            wanted = "a whole number above 0" if whole else "a number"
            raise ValueError(f"{args.model}/vlm.json: decoding: {name} is {value!r}, where {wanted} belongs")
    given = {name: getattr(args, name) for name in SAVED if getattr(args, name) is not None}
    more = {name: getattr(args, name) for name in ("do_sample", "temperature", "top_p", "seed", "num_return")}
    known = {name: saved[name] for name in SAVED if name in saved}
    if args.do_sample and "num_beams" not in given:
        known["num_beams"] = 1
    return DEFAULTS | known | given | more
