r"""Judge the maps of evidence on slides whose lesions are outlined: do they point there, does the model miss them?

  python inference/judge_evidence.py --model runs/stage2/final_model --test_json test.json \
      --features_dir OUT/features --lesions_dir lesions --output_dir judged

LESIONS/<slide_id>.geojson (polygons in level-0 pixels, as QuPath exports them) or .png (above 0 is lesion, in the
slide's aspect ratio) says where the lesion is. For each slide the text of its record (or what the model writes) is read
behind it, and for the whole report and some of its lines the maps of evidence are made and compared:

  pointing game   share of slides whose tile of most evidence lies in the lesion; chance: the share of tiles there
  AUROC           that a tile of the lesion has more evidence than another
  deletion        log-probability per token while tiles are taken away, most evidence first: lower is better
  insertion       the same while they are put back, most evidence first: higher is better

Beside the maps of evidence stand a random map; leave_one_out, which is the true effect of each tile alone; and
unlike_the_rest, the distance of a tile from the slide's mean, which asks no model.

  OUT/judged.json   the table, and every slide's figures
  OUT/curves.png    the curves, means over slides
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from jsonargparse.typing import NonNegativeInt
from tqdm import tqdm

from command_line import DONE, SOME_FAILED, check_output_folder, counted, make_parser, run
from inference.arguments import add_decoding_arguments, check_decoding_arguments

RANDOM, CHANCE = "random", "chance"
INTEGRATED = "integrated_gradients"  # as in inference.evidence, which is slow to import
RANDOM_ORDERS = 4  # of each slide and line, whose curves are averaged


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Model and slides")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2")
    group.add_argument("--test_json", required=True, help="records of one slide each, with their reports")
    group.add_argument("--features_dir", required=True, help="folder of stage 0's <slide_id>.h5")
    group.add_argument("--lesions_dir", required=True, help="folder of <slide_id>.geojson or .png")
    group.add_argument("--output_dir", required=True, help="folder that receives judged.json and curves.png")
    group = parser.add_argument_group("What is judged")
    group.add_argument("--text", choices=["reference", "written"], default="reference", help="whose grounds are sought")
    group.add_argument(
        "--lines", type=list[NonNegativeInt], default=[0, 1, 2], help="0 is the report, 1 its first line"
    )
    group.add_argument(
        "--min_lesion", type=float, default=0.5, help="share of a tile from which on it is of the lesion"
    )
    add_decoding_arguments(parser)
    args = parser.parse_args()
    if not 0 < args.min_lesion <= 1:
        raise ValueError(f"--min_lesion {args.min_lesion} must be above 0 and at most 1")
    return args


def main() -> int:
    args = parse_arguments()
    check_output_folder(args.output_dir)

    from inference.answers import Answering
    from inference.loading import open_model
    from slide_reports import ReportDataset, SampleKey, check_input_kind, read_records
    from stage0_tiling.user_masks import check_masks
    from vlm_settings import VLMSettings

    # Slides and lesions
    check_decoding_arguments(args)
    settings = VLMSettings.read(args.model)
    check_input_kind(args.model, settings, None)
    answering = Answering.of(args, settings)
    records = read_records(args.test_json, features_dir=args.features_dir)
    if several := next((record.id for record in records if len(record.inputs) != 1), None):
        raise ValueError(f"{several} is of several slides; judge cases of one slide each")
    lesions_dir = check_masks(args.lesions_dir, "--lesions_dir")

    # Model
    model, tokenizer = open_model(args)
    dataset = ReportDataset.for_model(model, tokenizer, [replace(r, answer="", later_turns=()) for r in records])

    # Judge
    judged, failed = [], 0
    for index, record in enumerate(tqdm(records, unit="slide")):
        try:
            sample = dataset[SampleKey(index, 0, False)]
            judged += judge_slide(args, model, tokenizer, answering, record, sample, lesions_dir, index)
        except (ValueError, OSError) as error:
            print(f"failed: {record.id}: {error}", file=sys.stderr)
            failed += 1
    if not judged:
        raise ValueError("no slide could be judged; see the messages above")

    # Report
    table = tabulate(judged)
    print_table(table, judged)
    write_results(Path(args.output_dir), args, table, judged)
    return SOME_FAILED if failed else DONE


def judge_slide(args, model, tokenizer, answering, record, sample: dict, lesions_dir: Path, index: int) -> list[dict]:
    """Figures of one slide, a dictionary for each line that is judged."""
    from inference import judging
    from inference.evidence import explain
    from slide_features import read_slide_coords, slide_id_of_features
    from stage0_tiling.user_masks import find_mask

    text = record.answer
    if args.text == "written":
        text = answering.answer(model, tokenizer, [sample])[0]["report"]
    slide_id = slide_id_of_features(record.inputs[0])
    mask = find_mask(lesions_dir, slide_id)
    if mask is None:
        raise ValueError(f"{lesions_dir} holds no outline of {slide_id}'s lesion")
    evidence = explain(model, tokenizer, sample, text)
    shares = judging.lesion_shares(mask, read_slide_coords(record.inputs[0]), evidence.coords[0])
    is_lesion = shares >= args.min_lesion
    rng = np.random.default_rng(index)
    maps = {method: of_slides[0] for method, of_slides in evidence.maps.items()}
    maps["leave_one_out"] = judging.leave_one_out(model, tokenizer, sample, text)
    maps["unlike_the_rest"] = judging.unlike_the_rest(sample, evidence)
    maps[RANDOM] = rng.normal(size=maps["leave_one_out"].shape)
    figures = []
    for row in [row for row in args.lines if row < len(evidence.rows)]:
        line = {"id": record.id, "line": row, "text": evidence.rows[row].text, "num_tiles": len(shares)}
        line[CHANCE] = float(is_lesion.mean())
        line["maps"] = {}
        for name, values in maps.items():
            orders = [np.argsort(-values[row], kind="stable")]
            if name == RANDOM:
                orders += [rng.permutation(len(shares)) for _ in range(RANDOM_ORDERS - 1)]
            down = judging.deletion_curves(model, tokenizer, sample, text, row, orders).mean(0)
            up = judging.deletion_curves(model, tokenizer, sample, text, row, [o[::-1].copy() for o in orders]).mean(0)
            top = judging.top_tile(values[row])
            is_split = is_lesion.any() and not is_lesion.all()  # else there is nothing to tell apart
            line["maps"][name] = {
                "hit": bool(is_lesion[top]) if is_split else None,
                "lesion_share_of_top_tile": float(shares[top]),
                "auroc": judging.auroc(values[row], is_lesion) if is_split else None,
                "deletion": judging.area(down),
                "insertion": judging.area(up),
                "deletion_curve": down.tolist(),
                "insertion_curve": up[::-1].tolist(),
            }
        figures.append(line)
    return figures


def tabulate(judged: list[dict]) -> list[dict]:
    """Means over slides of each line and map; the pointing game with its 95 % interval (Wilson 1927)."""
    table = []
    for row in sorted({line["line"] for line in judged}):
        lines = [line for line in judged if line["line"] == row]
        for name in lines[0]["maps"]:
            figures = [line["maps"][name] for line in lines]
            split = [(f, line) for f, line in zip(figures, lines, strict=True) if f["hit"] is not None]
            hits = [f["hit"] for f, _ in split]
            entry = {"line": row, "map": name, "slides": len(lines), "pointing_slides": len(split)}
            if split:
                entry |= {
                    "pointing": float(np.mean(hits)),
                    "interval": wilson(sum(hits), len(hits)),
                    CHANCE: float(np.mean([line[CHANCE] for _, line in split])),
                    "auroc": float(np.mean([f["auroc"] for f, _ in split])),
                }
            for curve in ("deletion", "insertion"):
                entry[curve] = float(np.mean([f[curve] for f in figures]))
                entry[f"{curve}_curve"] = np.mean([f[f"{curve}_curve"] for f in figures], axis=0).tolist()
            table.append(entry)
    return table


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return middle - half, middle + half


def print_table(table: list[dict], judged: list[dict]) -> None:
    head = f"{'line':<8}{'map':<22}{'pointing':>9}{'95 % interval':>17}{'chance':>8}{'AUROC':>7}"
    print(f"{head}{'deletion':>10}{'insertion':>11}")
    for entry in table:
        name = "report" if entry["line"] == 0 else str(entry["line"])
        pointing = f"{'-':>9}{'-':>17}{'-':>8}{'-':>7}"
        if entry["pointing_slides"]:
            low, high = entry["interval"]
            pointing = (
                f"{entry['pointing']:>9.1%}{f'{low:.1%} to {high:.1%}':>17}{entry[CHANCE]:>8.1%}{entry['auroc']:>7.3f}"
            )
        print(f"{name:<8}{entry['map']:<22}{pointing}{entry['deletion']:>10.3f}{entry['insertion']:>11.3f}")
    slides = {line["id"]: line for line in judged}
    unsplit = sum(line["maps"][RANDOM]["hit"] is None for line in slides.values())
    told = f"{counted(len(slides), 'slide')}, {np.mean([line['num_tiles'] for line in slides.values()]):.1f} tiles each"
    print(f"{told}; {unsplit} without a lesion, or nothing but lesion, stayed out of the pointing game")
    print(
        "pointing: share of slides whose tile of most evidence lies in the lesion; chance: of a tile drawn blindly, "
        "which the one random map of each slide comes near; deletion: lower is better; insertion: higher is better"
    )
    for row in sorted({entry["line"] for entry in table}):
        of_map = {entry["map"]: entry for entry in table if entry["line"] == row}
        for told in readings(of_map, [line["maps"] for line in judged if line["line"] == row]):
            print(f"{'report' if row == 0 else f'line {row}'}: {told}")


def readings(maps: dict[str, dict], slides: list[dict]) -> list[str]:
    """What the figures of a line say of the map that is drawn, and what they do not.

    Args:
        maps: the line's entries of the table, by map.
        slides: the line's figures of each slide, by map.
    """
    drawn, blind, told = maps[INTEGRATED], maps["unlike_the_rest"], []
    if drawn["pointing_slides"]:
        low, high = drawn["interval"]
        place = "above" if low > drawn[CHANCE] else "below" if high < drawn[CHANCE] else "within the error of"
        told.append(f"{INTEGRATED} points at the lesion {place} chance")
        if low > drawn[CHANCE] and blind["pointing"] >= low:
            told[-1] += "; unlike_the_rest, which asks no model, does so as often or more: this alone proves nothing"
    wins = sum(of[INTEGRATED]["deletion"] < of[RANDOM]["deletion"] for of in slides)
    costs = "costs more" if wilson(wins, len(slides))[0] > 0.5 else "does not reliably cost more"
    told.append(
        f"taking its first tiles away {costs} than taking random ones ({wins} of {counted(len(slides), 'slide')})"
    )
    return told


def write_results(folder: Path, args, table: list[dict], judged: list[dict]) -> None:
    from command_line import flags_of
    from slide_features import atomic_path

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "judged.json") as partial:
        partial.write_text(json.dumps({"flags": flags_of(args), "table": table, "slides": judged}, indent=1) + "\n")
    draw_curves(folder / "curves.png", table)


def draw_curves(path: Path, table: list[dict]) -> None:
    """Deletion and insertion, a row of two panels for each line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from inference.judging import STEPS
    from slide_features import atomic_path

    rows = sorted({entry["line"] for entry in table})
    figure, panels = pyplot.subplots(len(rows), 2, figsize=(9, 3 * len(rows)), sharey="row", squeeze=False)
    for row, pair in zip(rows, panels, strict=True):
        for panel, kind in zip(pair, ("deletion", "insertion"), strict=True):
            for entry in (entry for entry in table if entry["line"] == row):
                style = {"color": "0.5", "linestyle": "--"} if entry["map"] == RANDOM else {}
                panel.plot(100 * STEPS, entry[f"{kind}_curve"], label=entry["map"].replace("_", " "), **style)
            panel.set_title(f"{'report' if row == 0 else f'line {row}'}: {kind}", fontsize=10)
            panel.set_xlabel("tiles " + ("taken away" if kind == "deletion" else "read") + ", %")
            panel.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel("log-probability per token")
    panels[0, 0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    run(main, to_go_on="run it again")
