"""A survey in pictures: charts of the collection, and sheets of thumbnails with the tissue outlined."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from command_line import counted
from slide_features import atomic_path
from stage0_tiling.lettering import label_font
from stage0_tiling.slide_files import SURVEY_FOLDER
from stage0_tiling.slide_survey import BLURRED_BELOW, TILINGS, SurveyRow
from stage0_tiling.survey_summary import bytes_of
from stage0_tiling.tissue import TissueMask

THUMBNAIL_PX = 320
COLUMNS, ROWS, GAP, CAPTION_PX = 5, 6, 16, 52
OUTLINE, INK, FAINT, WARNING, PAPER = (0, 150, 60), "#222222", "#777777", "#c0392b", "#f4f4f2"
PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
MAX_BARS = 8


def write_thumbnail(path: Path, tissue: TissueMask) -> None:
    """Write the thumbnail of a slide with its tissue outlined as a JPEG, longer side 320 px, atomically."""
    height, width = tissue.mask.shape
    zoom = THUMBNAIL_PX / max(height, width)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    picture = cv2.resize(tissue.picture, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR)
    mask = cv2.resize(tissue.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, OUTLINE, 1, cv2.LINE_AA)
    with atomic_path(path) as partial:
        Image.fromarray(picture).save(partial, "JPEG", quality=88)


def write_contact_sheets(folder: Path, rows: list[SurveyRow]) -> int:
    """Write survey_thumbnails_<page>.jpg, 30 slides a page, in the order of the rows, and return how many pages."""
    per_page = COLUMNS * ROWS
    pages = [rows[first : first + per_page] for first in range(0, len(rows), per_page)]
    for old in folder.glob("survey_thumbnails_*.jpg"):
        old.unlink()
    for number, page in enumerate(pages, 1):
        with atomic_path(folder / f"survey_thumbnails_{number:02d}.jpg") as partial:
            _sheet(folder / SURVEY_FOLDER, page).save(partial, "JPEG", quality=90)
    return len(pages)


def _sheet(thumbnails: Path, rows: list[SurveyRow]) -> Image.Image:
    cell = THUMBNAIL_PX + GAP, THUMBNAIL_PX + CAPTION_PX + GAP
    num_columns, num_rows = min(COLUMNS, len(rows)), -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (num_columns * cell[0] + GAP, num_rows * cell[1] + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x, y = GAP + index % COLUMNS * cell[0], GAP + index // COLUMNS * cell[1]
        draw.rectangle((x, y, x + THUMBNAIL_PX - 1, y + THUMBNAIL_PX - 1), fill="white", outline="#dddddd")
        if (path := thumbnails / f"{row.slide_id}.jpg").is_file():
            with Image.open(path) as picture:
                left, top = ((THUMBNAIL_PX - side) // 2 for side in picture.size)
                sheet.paste(picture, (x + left, y + top))
        else:
            middle = x + THUMBNAIL_PX // 2, y + THUMBNAIL_PX // 2
            draw.text(middle, "not readable", fill=FAINT, font=label_font(15), anchor="mm")
        _caption(draw, x, y + THUMBNAIL_PX + 6, row)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, x: int, y: int, row: SurveyRow) -> None:
    facts = [f"{row.mpp:.3g} um/px"] if row.mpp else []
    facts += [f"{row.tissue_mm2:,.1f} mm2"] if row.tissue_mm2 is not None else []
    facts += [counted(row.tiles[0], "tile")] if row.tiles[0] is not None else []
    problems = "; ".join(row.problems)
    for text, colour, size in ((row.slide_id, INK, 14), ("  ".join(facts), FAINT, 12), (problems, WARNING, 11)):
        if text:
            draw.text((x, y), _shorten(draw, text, size), fill=colour, font=label_font(size))
            y += size + 4


def _shorten(draw: ImageDraw.ImageDraw, text: str, size: int) -> str:
    """As much of the ends of a text as there is room for below a thumbnail."""
    shown, kept = text, len(text)
    while draw.textlength(shown, label_font(size)) > THUMBNAIL_PX:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def write_charts(path: Path, rows: list[SurveyRow]) -> None:
    """Write survey.png: size, um per pixel, formats, tissue, tiles per slide, sharpness."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_failed = sum(row.failed for row in rows)
    title = counted(len(rows), "slide") + (f", {num_failed:,} of them not readable" if num_failed else "")
    rows = [row for row in rows if not row.failed]
    figure = Figure(figsize=(13, 7.6), facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.975, top=0.885, bottom=0.085, wspace=0.3, hspace=0.42)
    figure.text(0.012, 0.955, title, fontsize=16, fontweight="bold", color=INK)
    panels = figure.subplots(2, 3)
    for panel, draw in zip(panels.flat, (_sizes, _resolutions, _formats, _tissue, _tiles, _sharpness), strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#bbbbbb")
        panel.tick_params(colors=FAINT, labelsize=9, length=3)
        panel.set_axisbelow(True)
        draw(panel, rows)
        for label in (panel.xaxis.label, panel.yaxis.label):
            label.set(color=FAINT, fontsize=9)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _title(panel, title: str, detail: str = "") -> None:
    panel.set_title(title, fontsize=11.5, color=INK, loc="left", pad=20, fontweight="bold")
    panel.text(0, 1.03, detail, fontsize=9.5, color=FAINT, transform=panel.transAxes)


def _sizes(panel, rows: list[SurveyRow]) -> None:
    known = [row for row in rows if row.width_mm]
    formats = [name for name, _ in Counter(row.format for row in known).most_common()]
    for index, name in enumerate(formats):
        sizes = [(row.width_mm, row.height_mm) for row in known if row.format == name]
        colour = PALETTE[index % len(PALETTE)]
        panel.scatter(*zip(*sizes, strict=True), s=30, alpha=0.75, color=colour, edgecolors="white", label=name)
    if not known:
        _title(panel, "Size of the scan")
        return _not_known(panel)
    widths, heights = ([getattr(row, side) for row in known] for side in ("width_mm", "height_mm"))
    _title(panel, "Size of the scan", f"median {np.median(widths):.3g} x {np.median(heights):.3g} mm")
    headroom = 1.12 + 0.08 * len(formats)  # for the legend
    panel.set(xlim=(0, 1.08 * max(widths)), ylim=(0, headroom * max(heights)), xlabel="width, mm", ylabel="height, mm")
    panel.grid(color="#eeeeee")
    panel.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc="upper left")


def _resolutions(panel, rows: list[SurveyRow]) -> None:
    known = [row.mpp for row in rows if row.mpp]
    unknown = len(rows) - len(known)
    detail = f"{unknown} of {len(rows)} state none that is plausible" if unknown else ""
    _title(panel, "Microns per pixel", detail)
    counts = Counter(f"{row.mpp:.2f}" if row.mpp else "unknown" for row in rows)
    if len(counts) > MAX_BARS:
        return _histogram(panel, known, "um per pixel", logarithmic=False)
    names = sorted(counts, key=lambda name: (name == "unknown", float(name) if name != "unknown" else 0))
    colours = [WARNING if name == "unknown" else PALETTE[0] for name in names]
    bars = panel.bar(names, [counts[name] for name in names], color=colours, width=0.6)
    panel.bar_label(bars, fontsize=9.5, color=INK, padding=2)
    panel.margins(x=0.15, y=0.12)
    panel.set_ylabel("slides")
    panel.yaxis.get_major_locator().set_params(integer=True)


def _formats(panel, rows: list[SurveyRow]) -> None:
    total = sum(row.file_mb or 0 for row in rows)
    _title(panel, "Format and compression", f"{bytes_of(total)} in all")
    counts = Counter(f"{row.format}\n{row.compression}" if row.compression else str(row.format) for row in rows)
    names, values = zip(*counts.most_common(MAX_BARS), strict=True) if counts else ((), ())
    panel.bar_label(panel.barh(names, values, color=PALETTE[1], height=0.6), fontsize=9.5, color=INK, padding=3)
    panel.tick_params(axis="y", labelsize=8, length=0)
    panel.margins(x=0.12)
    panel.invert_yaxis()
    panel.set_xlabel("slides")
    panel.xaxis.get_major_locator().set_params(integer=True)


def _tissue(panel, rows: list[SurveyRow]) -> None:
    values = [row.tissue_mm2 for row in rows if row.tissue_mm2]
    _title(panel, "Tissue", f"median {np.median(values):,.3g} mm²" if values else "")
    _histogram(panel, values, "mm² of a slide")


def _tiles(panel, rows: list[SurveyRow]) -> None:
    values = [row.tiles[0] for row in rows if row.tiles[0]]
    tile_px, mpp = TILINGS[0]
    detail = f"median {np.median(values):,.0f}, {sum(values):,} in all" if values else ""
    _title(panel, f"Tiles of {tile_px} px at {mpp:g} um/px", detail)
    _histogram(panel, values, "tiles of a slide")


def _sharpness(panel, rows: list[SurveyRow]) -> None:
    values = [row.sharpness for row in rows if row.sharpness]
    blurred = sum(value < BLURRED_BELOW for value in values)
    detail = f"median {np.median(values):.2f}, {blurred} below {BLURRED_BELOW}, which looks blurred" if values else ""
    _title(panel, "Sharpness of the tissue", detail)
    _histogram(panel, values, "fine detail over contrast")
    if values:
        panel.axvline(BLURRED_BELOW, color=WARNING, linestyle="--", linewidth=1.3)


def _histogram(panel, values: list[float], label: str, logarithmic: bool = True) -> None:
    """Bars of counts with a line at the median."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values:
        return _not_known(panel)
    low, high = min(values), max(values)
    num_bins = int(np.clip(2 * np.sqrt(len(values)), 8, 40))
    if logarithmic:
        low, high = (low / 2, high * 2) if high < 4 * low else (low / 1.2, high * 1.2)
        panel.set_xscale("log")
        steps = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
        panel.xaxis.set_major_locator(LogLocator(subs=steps))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        bins = np.geomspace(low, high, num_bins + 1)
    else:
        bins = np.linspace(low * 0.95, high * 1.05, num_bins + 1)
    panel.hist(values, bins, color=PALETTE[0], edgecolor="white", linewidth=0.6)
    panel.axvline(float(np.median(values)), color=INK, linewidth=1.3)
    panel.grid(axis="y", color="#eeeeee")
    panel.set(xlabel=label, ylabel="slides")
    panel.yaxis.get_major_locator().set_params(integer=True)


def _not_known(panel) -> None:
    panel.text(0.5, 0.5, "not known", color=FAINT, ha="center", transform=panel.transAxes)
    panel.set(xticks=[], yticks=[])
