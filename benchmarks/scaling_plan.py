r"""A plan on paper: storage, hours and money for so many slides on so many GPUs, from costs of one tile and one token.

    python benchmarks/scaling_plan.py                     the tables of docs/scaling.md
    python benchmarks/scaling_plan.py --measure           measure what can be measured here, then the tables
    python benchmarks/scaling_plan.py --set tiles_per_slide=12000 encoder_utilisation=0.3

Every figure says where it is from: measured (by a command of this repository), published (with source and date),
computed from published sizes, or assumed. Replace the assumed ones by your own with `--set`.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SLIDES = (10_000, 100_000, 1_000_000)
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Figure:
    """A unit cost and where it is from."""

    value: float
    unit: str
    origin: str


@dataclass(frozen=True)
class Gpu:
    """Published dense bf16 rate, TFLOP/s, and rent in US dollars an hour."""

    tflops: float
    dollars_per_hour: float
    memory_gb: int
    price_source: str


RUNPOD = "runpod.io/pricing, on demand, Secure Cloud"
CHIPS = {
    "L40S": Gpu(362, 0.94, 48, "verda.com/pricing, spot, 2026-10-29"),
    "A100 80 GB": Gpu(312, 1.79, 80, f"{RUNPOD}, 2026-11-09"),
    "H100 SXM": Gpu(989, 3.99, 80, f"{RUNPOD}, 2026-11-09"),
    "H200": Gpu(989, 4.59, 141, f"{RUNPOD}, 2026-10-07"),
}
RATE_SOURCE = "NVIDIA's data sheets, dense (half of the figure with sparsity)"

FIGURES = {
    "tiles_per_slide": Figure(5000, "tiles of 256 px at 0.5 um/px", "assumed: 0.8 cm2 of tissue; biopsies have fewer"),
    "slide_gb": Figure(1.0, "GB", "assumed: 20x to 40x, JPEG"),
    "reading_cpu_ms_per_tile": Figure(0.75, "ms of one core", "measured: --measure, SVS at 0.25 um/px"),
    "feature_bytes_per_tile": Figure(3174, "bytes", "measured: --measure, file of 1,536 float16 values a tile"),
    "encoder_gflop_per_tile": Figure(
        371, "GFLOP", "computed: ViT-H/14 of UNI2-h, 681 M weights x 265 tokens x 2, and attention"
    ),
    "encoder_utilisation": Figure(0.4, "of the bf16 rate", "assumed"),
    "cores_per_gpu": Figure(16, "cores", "assumed: rented machines have 8 to 26 a GPU"),
    "network_gb_per_s": Figure(1.0, "GB/s to each machine of 8 GPUs", "assumed: object store, many streams"),
    "llm_active_parameters": Figure(
        1.89e9, "weights", "computed: E2B's text part, 4.44 B, less per-layer table 2.01 B and embedding 0.54 B"
    ),
    "head_parameters": Figure(0.54e9, "weights", "published: 262,400 x 2,048, used at supervised tokens only"),
    "tokens_per_record": Figure(330, "tokens", "assumed: 256 visual, prompt, answer"),
    "supervised_tokens_per_record": Figure(30, "tokens", "assumed: REG 2025 reports have 3 to 37 words, median 10"),
    "training_utilisation": Figure(0.3, "of the bf16 rate", "assumed; the aim is 0.4"),
    "epochs": Figure(3, "passes, in stage 1 and in stage 2", "default of both train.py"),
    "efficiency_of_8_gpus": Figure(0.95, "", "assumed"),
    "efficiency_of_64_gpus": Figure(0.85, "", "assumed"),
    "storage_dollars_per_tb_month": Figure(23, "US dollars", "assumed: list price of large object stores"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the reading of tiles and the size of features")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="figures to replace")
    parser.add_argument("--gpu", choices=list(CHIPS), default="H100 SXM", help="of the large table (default: H100 SXM)")
    args = parser.parse_args()
    figures = {name: figure.value for name, figure in FIGURES.items()}
    if args.measure:
        figures |= measure()
    for pair in args.set:
        name, _, value = pair.partition("=")
        if name not in figures:
            parser.error(f"--set {pair}: no such figure; there are {', '.join(figures)}")
        figures[name] = float(value)
    print(tables(figures, args.gpu))


def measure() -> dict[str, float]:
    """CPU time to read a tile, of all threads together, and bytes of a feature file for each tile."""
    import numpy as np

    from benchmarks.make_slides import make_slide
    from benchmarks.stage0 import tile_and_decode
    from slide_features import write_slide_features

    with tempfile.TemporaryDirectory() as folder:
        slide, features = Path(folder) / "slide.svs", Path(folder) / "features.h5"
        make_slide(slide, 12_000, tissue=0.3, mpp=0.25)
        tile_and_decode(slide, "tiff", 1)
        began = time.process_time()
        num_tiles = tile_and_decode(slide, "tiff", 1)
        seconds = time.process_time() - began
        count = 5000
        values = np.random.default_rng(0).normal(size=(count, 1536)).astype(np.float16)
        places = np.stack([np.arange(count) % 80, np.arange(count) // 80], axis=1) * 256
        known = {"mpp": 0.5, "tile_size": 256, "overlap": 0, "min_tissue": 0.1, "patch_size_level0": 256}
        write_slide_features(features, values, places, name="slide", encoder="uni2-h", **known)
        size = features.stat().st_size
    return {"reading_cpu_ms_per_tile": 1000 * seconds / num_tiles, "feature_bytes_per_tile": size / count}


def stage0_hours(figures: dict[str, float], chip: Gpu, slides: int, gpus: int) -> dict[str, float]:
    """Hours of each resource, as if it worked alone; the longest decides."""
    tiles = slides * figures["tiles_per_slide"]
    flop_rate = chip.tflops * 1e12 * figures["encoder_utilisation"] * gpus
    machines = max(1, gpus / 8)
    return {
        "GPU": tiles * figures["encoder_gflop_per_tile"] * 1e9 / flop_rate / 3600,
        "CPU": tiles * figures["reading_cpu_ms_per_tile"] / 1000 / (figures["cores_per_gpu"] * gpus) / 3600,
        "network": slides * figures["slide_gb"] / (figures["network_gb_per_s"] * machines) / 3600,
    }


def training_hours(figures: dict[str, float], chip: Gpu, records: int, gpus: int, passes: int) -> float:
    """Hours of all epochs; ``passes`` counts forward passes: 2 with the backward one for activations, 3 recomputed."""
    flop = 2 * passes * figures["llm_active_parameters"] * figures["tokens_per_record"]
    flop += 2 * passes * figures["head_parameters"] * figures["supervised_tokens_per_record"]
    efficiency = {1: 1.0, 8: figures["efficiency_of_8_gpus"], 64: figures["efficiency_of_64_gpus"]}[gpus]
    rate = chip.tflops * 1e12 * figures["training_utilisation"] * gpus * efficiency
    return records * figures["epochs"] * flop / rate / 3600


def plan(figures: dict[str, float], chip: Gpu, slides: int, gpus: int) -> dict[str, float | str]:
    """Hours of each stage, dollars of rent, and what limits stage 0."""
    stage0 = stage0_hours(figures, chip, slides, gpus)
    stage1 = training_hours(figures, chip, slides, gpus, passes=2)
    stage2 = training_hours(figures, chip, slides, gpus, passes=3)
    hours = max(stage0.values()) + stage1 + stage2
    return {
        "stage0": max(stage0.values()),
        "limit": max(stage0, key=stage0.get),
        "stage1": stage1,
        "stage2": stage2,
        "dollars": hours * gpus * chip.dollars_per_hour,
    }


def tables(figures: dict[str, float], gpu: str) -> str:
    """The tables of docs/scaling.md."""
    origins = [[name, f"{figures[name]:,.4g}", f.unit, f.origin] for name, f in FIGURES.items()]
    chips = [[name, f"{c.tflops:g}", c.memory_gb, c.dollars_per_hour, c.price_source] for name, c in CHIPS.items()]
    return "\n".join(
        [
            *table(["figure", "value", "unit", "from"], origins),
            f"\nbf16 rates are from {RATE_SOURCE}.\n",
            *table(["GPU", "bf16 TFLOP/s", "GB", "$/h", "rent from"], chips),
            "",
            *table(["slides", "slides, TB", "features, TB", "both, $/month"], [storage(figures, n) for n in SLIDES]),
            f"\nOn {gpu}; stage 2 is LoRA with gradient checkpointing:\n",
            *table(
                ["slides", "GPUs", "stage 0, h", "limited by", "stage 1, h", "stage 2, h", "rent, $"],
                [[f"{n:,}", gpus, *hours_and_rent(figures, CHIPS[gpu], n, gpus)] for n in SLIDES for gpus in GPUS],
            ),
            "\n100,000 slides on 8 GPUs:\n",
            *table(
                ["GPU", "stage 0, h", "limited by", "stage 1, h", "stage 2, h", "rent, $"],
                [[name, *hours_and_rent(figures, chip, 100_000, 8)] for name, chip in CHIPS.items()],
            ),
        ]
    )


def table(head: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def storage(figures: dict[str, float], slides: int) -> list[str]:
    """Slides, terabytes of slides and of features, and dollars a month."""
    raw = slides * figures["slide_gb"] / 1000
    features = slides * figures["tiles_per_slide"] * figures["feature_bytes_per_tile"] / 1e12
    dollars = (raw + features) * figures["storage_dollars_per_tb_month"]
    return [f"{slides:,}", f"{raw:,.0f}", f"{features:,.2f}", f"{dollars:,.0f}"]


def hours_and_rent(figures: dict[str, float], chip: Gpu, slides: int, gpus: int) -> list[str]:
    """Cells of one plan."""
    found = plan(figures, chip, slides, gpus)
    hours = [f"{found[stage]:,.2f}" for stage in ("stage1", "stage2")]
    return [f"{found['stage0']:,.1f}", str(found["limit"]), *hours, f"{found['dollars']:,.0f}"]


if __name__ == "__main__":
    main()
