"""Flags that generate.py and predict.py share. Imports nothing heavy, so that a wrong flag is refused at once."""

from jsonargparse.typing import PositiveInt


def add_decoding_arguments(parser) -> None:
    """Flags of decoding and of where the model runs, the same for one slide and for many."""
    group = parser.add_argument_group("Decoding")
    group.add_argument("--num_beams", type=PositiveInt, default=3, help="beams of the search; 1 is greedy")
    group.add_argument("--max_new_tokens", type=PositiveInt, default=256, help="longest report in tokens")
    group.add_argument("--length_penalty", type=float, default=1.0, help="above 0 favours longer reports")
    group = parser.add_argument_group("Where it runs")
    group.add_argument("--device", default=None, help="cuda, cuda:1, cpu, …; default: a GPU where there is one")
    group.add_argument("--dtype", choices=["bf16", "fp32"], default=None, help="of the LLM; default: bf16 on a GPU")
    group.add_argument(
        "--ple_device",
        choices=["model", "cpu"],
        default="model",
        help="where Gemma-3n's table of per-layer embeddings is; cpu: 4 GB less of a GPU for E2B, the same reports",
    )
    group.add_argument("--llm_name", default=None, help="where the base LLM is now, if it moved since training")
    group.add_argument("--vision_model_name", default=None, help="where the image encoder is now, if it moved")
