"""One picture of a demo run: held-out slides, what stage 0 saw in them, what was written, and the training curves."""

import json
import textwrap
from pathlib import Path

NUM_SLIDES = 6
ROW_INCHES = 2.6
ROW_PT = 72 * ROW_INCHES - 20  # less the name of the next slide
LARGEST_PT, LINE_HEIGHT = 11, 1.25


def draw_contact_sheet(out: Path, picture: Path) -> None:
    """Draw ``picture`` from a finished demo folder: slide, overlay, written and true report in a row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    predictions = {row["id"]: row["report"] for row in json.loads((out / "predictions.json").read_text())}
    references = {row["id"]: row["report"] for row in json.loads((out / "test.json").read_text())}
    slides = list(references)[:: max(1, len(references) // NUM_SLIDES)][:NUM_SLIDES]
    figure = pyplot.figure(figsize=(16, ROW_INCHES * NUM_SLIDES + 4.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[ROW_INCHES * NUM_SLIDES, 4.5])
    top.suptitle("Held-out slides: the slide, tissue and tiles of stage 0, the written report and the reference")
    axes = top.subplots(NUM_SLIDES, 3, width_ratios=[1, 1, 2.2], squeeze=False)
    for row, slide in zip(axes, slides, strict=False):
        stem = Path(slide).stem
        row[0].imshow(thumbnail(out / "slides" / slide))
        row[0].set_title(stem, fontsize=9)
        row[1].imshow(pyplot.imread(out / "stage0" / "overlays" / f"{stem}.jpg"))
        written, reference = predictions[slide], references[slide]
        color = "darkgreen" if written.split() == reference.split() else "firebrick"
        write_below(row[2], [("written", written, color), ("reference", reference, "black")])
        for axis in row:
            axis.axis("off")
    for axis, stage in zip(bottom.subplots(1, 2), ("stage1", "stage2"), strict=True):
        axis.imshow(pyplot.imread(out / stage / "curves.png"))
        axis.set_title(f"{stage}: training and validation loss, learning rate")
        axis.axis("off")
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)


def thumbnail(slide: Path, side: int = 512):
    """The slide shrunk to at most ``side`` pixels."""
    import openslide

    with openslide.open_slide(slide) as opened:
        return opened.get_thumbnail((side, side))


def write_below(axis, reports: list[tuple[str, str, str]]) -> None:
    """Write (caption, report, colour) below one another, smaller where they would not fit the height of the row."""
    texts = [(caption, wrap(report), color) for caption, report, color in reports]
    num_lines = sum(2 + text.count("\n") + 1 for _, text, _ in texts)  # with a caption and a gap each
    size = min(LARGEST_PT, ROW_PT / (num_lines * LINE_HEIGHT))
    top = 0.0  # points below the axis' upper edge
    for caption, text, color in texts:
        for words, points, ink in ((caption, min(9, size), "grey"), (text, size, color)):
            axis.annotate(
                words, (0, 1), (0, -top), xycoords="axes fraction", textcoords="offset points", va="top",
                fontsize=points, color=ink, linespacing=LINE_HEIGHT, annotation_clip=False,
            )  # fmt: skip
            top += (words.count("\n") + 1) * size * LINE_HEIGHT
        top += size * LINE_HEIGHT


def wrap(report: str) -> str:
    return "\n".join("\n".join(textwrap.wrap(line, 70, subsequent_indent="    ")) for line in report.splitlines())
