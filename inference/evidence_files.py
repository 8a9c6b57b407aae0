"""Evidence on disk: pictures to look at, GeoJSON for QuPath, JSON for programs.

    DIR/evidence.json                          report, lines, their tiles of most evidence, and every map
    DIR/<slide_id>/report.png line_<i>.png     the slide under the evidence for the report and each line
    DIR/<slide_id>/evidence.geojson            tiles with the evidence for each as measurements; the top tiles
    DIR/<slide_id>/tiles/line_<i>_<rank>.png   the top tiles themselves, where the slide is at hand

Pictures are of the slide's pyramid alone: no label, no macro image.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inference.evidence import INTEGRATED, Evidence, split_lines
from slide_features import read_slide_coords, slide_id_of_features
from stage0_tiling.geojson import write_measured_tiles_geojson
from stage0_tiling.lettering import label_font
from stage0_tiling.slide import Slide
from stage0_tiling.tissue import Grid, make_grid

FOR, AGAINST = (213, 94, 0), (0, 114, 178)  # vermilion and blue, which colour-blind readers tell apart
INK = (40, 40, 48)
STRONGEST = 0.75  # opacity of the tile of most evidence
LONG_SIDE = 1400  # pixels of a picture's longer side
TOP_TILES = 5
WORTH_NAMING = 0.05  # of the strongest evidence, for or against, that a top tile has at least


@dataclass(frozen=True)
class TiledSlide:
    """What the pictures of one slide need.

    Attributes:
        slide_id: names its folder.
        grid: sizes of its tiles.
        width: level-0 pixels; of the tiles' extent where the slide's is unknown.
        height: likewise.
        path: the slide; None where only its features are at hand.
        tile_px: side of the tile pictures in pixels.
    """

    slide_id: str
    grid: Grid
    width: int
    height: int
    path: Path | None = None
    tile_px: int = 256


def tiled_slide(path: str | Path, tiling: dict[str, Any], assume_mpp: float | None = None) -> TiledSlide:
    """A slide that is at hand, cut as the model's slides are: ``tiling`` has at least ``tile_size`` and ``mpp``."""
    with Slide(path) as slide:
        grid = make_grid(tiling["tile_size"], tiling.get("overlap") or 0, tiling["mpp"], slide.pixel_size(assume_mpp))
        return TiledSlide(Path(path).stem, grid, slide.width, slide.height, Path(path), tiling["tile_size"])


def tiled_slide_of_features(path: str | Path) -> TiledSlide:
    """A slide of which only the feature file is at hand; tiles of unknown size are taken to touch each other."""
    about = read_slide_coords(path)
    side = about.patch_size_level0 or _least_distance(about.coords)
    far = about.coords.max(0) + side
    width, height = about.level0_width or int(far[0]), about.level0_height or int(far[1])
    return TiledSlide(slide_id_of_features(path), Grid(side, side, side, side), width, height)


def check_evidence_folder(folder: Path) -> None:
    """Refuse to replace anything but evidence.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / "evidence.json").exists() or not any(folder.iterdir()))):
        raise ValueError(f"--evidence {folder} holds something else; name a new folder")


def write_evidence(folder: str | Path, evidence: Evidence, slides: Sequence[TiledSlide], about: dict[str, Any]) -> None:
    """Write the files named above, all or none; an earlier result in ``folder`` is replaced.

    Args:
        folder: to make.
        evidence: with the map :data:`inference.evidence.INTEGRATED`.
        slides: of the case, in its order.
        about: what evidence.json says besides: model, question, ...

    Raises:
        ValueError: the folder holds something else than evidence.
    """
    folder = Path(folder)
    check_evidence_folder(folder)
    slides = _with_own_names(slides)
    partial = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, slide in enumerate(slides):
        write_slide_evidence(partial / slide.slide_id, evidence, number, slide)
    content = {**about, **describe(evidence, slides)}
    (partial / "evidence.json").write_text(json.dumps(content, indent=1) + "\n")
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        os.replace(folder, outdated)
    os.replace(partial, folder)
    shutil.rmtree(outdated, ignore_errors=True)


def write_slide_evidence(folder: Path, evidence: Evidence, number: int, slide: TiledSlide) -> None:
    """Write pictures, GeoJSON and tiles of one slide of the case."""
    folder.mkdir(parents=True)
    rows = evidence.maps[INTEGRATED][number]
    names = row_names(evidence)
    tops = [
        [(rank, tile) for rank, of_slide, tile in top_tiles(evidence, row) if of_slide == number]
        for row in range(len(names))
    ]
    coords, origin = evidence.coords[number], (0, 0)
    with nullcontext() if slide.path is None else Slide(slide.path) as opened:
        picture = base_picture(slide, opened)
        if opened is not None:
            origin = opened.bounds[:2]
            write_tiles(folder / "tiles", opened, slide, coords, dict(zip(names, tops, strict=True)))
    for row, values in enumerate(rows):
        strongest, total = strongest_and_total(evidence, row)
        overlay = draw_evidence(picture, slide, coords, values / (strongest or 1), tops[row])
        legend = draw_legend(overlay.shape[1], evidence.rows[row].text, in_words(strongest, total))
        Image.fromarray(np.vstack([overlay, legend])).save(folder / f"{names[row]}.png")
    measurements = {f"{name.replace('_', ' ')}: {INTEGRATED}": v for name, v in zip(names, rows, strict=True)}
    marked = [
        (f"{name.replace('_', ' ')}, tile {rank}", tile)
        for name, of_row in zip(names, tops, strict=True)
        for rank, tile in of_row
    ]
    write_measured_tiles_geojson(folder / "evidence.geojson", coords, slide.grid, measurements, marked, origin)


def row_names(evidence: Evidence) -> list[str]:
    """Names of the maps' rows in files: ``report``, ``line_1``, ..."""
    return ["report", *(f"line_{i}" for i in range(1, len(evidence.lines) + 1))]


def top_tiles(evidence: Evidence, row: int, count: int = TOP_TILES) -> list[tuple[int, int, int]]:
    """Tiles of most evidence in the whole case, best first, as (rank, slide, tile), all counted but the rank from 0.

    Tiles whose evidence is against the line, or next to nothing beside the strongest, are left out.
    """
    slides = [of_slide[row] for of_slide in evidence.maps[INTEGRATED]]
    places = [(number, tile) for number, values in enumerate(slides) for tile in range(len(values))]
    values = np.concatenate(slides)
    best = [
        place for place in np.argsort(-values, kind="stable") if values[place] > WORTH_NAMING * np.abs(values).max()
    ]
    return [(rank, *places[place]) for rank, place in enumerate(best[:count], 1)]


def strongest_and_total(evidence: Evidence, row: int) -> tuple[float, float]:
    """Of the tiles of a case, natural logarithms: the greatest evidence for or against, and the sum of all.

    The sum is how much more probable the line is behind its slide than behind the slide's mean tile alone.
    """
    values = np.concatenate([of_slide[row] for of_slide in evidence.maps[INTEGRATED]])
    return float(np.abs(values).max()), float(values.sum())


def in_words(strongest: float, total: float) -> str:
    """How much the colours stand for, which every line scales anew."""
    return (
        f"All tiles together: {_times(total)} as probable as with the slide's mean tile alone. Full colour: "
        f"{strongest:.2g} in log-probability."
    )


def _times(logarithm: float) -> str:
    if abs(logarithm) > 20:
        return f"e^{logarithm:.0f} times"
    factor = math.exp(logarithm)
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.2f} times" if factor >= 0.1 else f"{factor:.1g} times"


def describe(evidence: Evidence, slides: Sequence[TiledSlide]) -> dict[str, Any]:
    """The content of evidence.json: log-probabilities are natural logarithms, positions level-0 pixels."""
    lines = []
    for row, (name, line) in enumerate(zip(row_names(evidence), evidence.rows, strict=True)):
        tops = []
        for rank, number, tile in top_tiles(evidence, row):
            slide_id, (x, y) = slides[number].slide_id, evidence.coords[number][tile].tolist()
            picture = f"{slide_id}/tiles/{name}_{rank}.png" if slides[number].path else None
            where = {"slide_id": slide_id, "tile": tile, "x": x, "y": y, "picture": picture}
            tops.append({"rank": rank, **where, "evidence": float(evidence.maps[INTEGRATED][number][row, tile])})
        strongest, total = strongest_and_total(evidence, row)
        weight = {"strongest_evidence": strongest, "evidence_of_all_tiles": total}
        lines.append({"name": name, **asdict(line), **weight, "top_tiles": tops})
    return {
        "report": evidence.report,
        "method": INTEGRATED,
        "lines": lines,
        "slides": [
            {
                "slide_id": slide.slide_id,
                "width": slide.width,
                "height": slide.height,
                "tile_width": slide.grid.tile_width,
                "tile_height": slide.grid.tile_height,
                "coords": evidence.coords[number].tolist(),
                "maps": {name: np.round(of[number], 6).astype(float).tolist() for name, of in evidence.maps.items()},
            }
            for number, slide in enumerate(slides)
        ],
    }


def describe_lines(report: str) -> dict[str, Any]:
    """What `describe` says of a report without evidence: its lines, none of which has tiles."""
    spans = [(0, len(report)), *split_lines(report)]
    names = ["report", *(f"line_{i}" for i in range(1, len(spans)))]
    lines = [
        {"name": name, "text": report[start:end], "start": start, "end": end, "top_tiles": []}
        for name, (start, end) in zip(names, spans, strict=True)
    ]
    return {"report": report, "method": None, "lines": lines}


def base_picture(slide: TiledSlide, opened: Slide | None) -> np.ndarray:
    """The slide, a little faded, or a blank ground where it is not at hand, (H, W, 3) uint8 RGB."""
    zoom = LONG_SIDE / max(slide.width, slide.height)
    zoom = min(zoom, 1.0) if opened is not None else zoom
    size = max(1, round(slide.width * zoom)), max(1, round(slide.height * zoom))
    if opened is None:
        return np.full((size[1], size[0], 3), 248, np.uint8)
    picture = opened.read_whole(*size)
    return cv2.addWeighted(picture, 0.8, np.full_like(picture, 255), 0.2, 0)


def draw_evidence(
    picture: np.ndarray, slide: TiledSlide, coords: np.ndarray, values: np.ndarray, top: list[tuple[int, int]]
) -> np.ndarray:
    """Lay evidence (N,), from -1 to 1, over a picture of the whole slide; top tiles (rank, tile) are outlined."""
    drawn = picture.copy()
    scale = np.array([picture.shape[1] / slide.width, picture.shape[0] / slide.height])
    lows = np.round(coords * scale).astype(int)
    highs = np.round((coords + [slide.grid.tile_width, slide.grid.tile_height]) * scale).astype(int)
    for (left, upper), (right, lower), value in zip(lows.tolist(), highs.tolist(), values.tolist(), strict=True):
        under = drawn[upper:lower, left:right]
        if under.size:
            colour = np.full_like(under, FOR if value > 0 else AGAINST)
            share = STRONGEST * min(1.0, abs(value))
            drawn[upper:lower, left:right] = cv2.addWeighted(under, 1 - share, colour, share, 0)
        cv2.rectangle(drawn, (left, upper), (right - 1, lower - 1), (170, 170, 176), 1)
    image = Image.fromarray(drawn)
    draw = ImageDraw.Draw(image)
    font = label_font(max(12, round(max(picture.shape) / 65)))
    for rank, tile in top:
        (left, upper), (right, lower) = lows[tile].tolist(), highs[tile].tolist()
        draw.rectangle([left, upper, right - 1, lower - 1], outline=INK, width=3)
        draw.text((left + 6, upper + 3), str(rank), INK, font, stroke_width=2, stroke_fill="white")
    return np.asarray(image)


def draw_legend(width: int, text: str, weight: str, height: int = 66) -> np.ndarray:
    """A strip with the words that the evidence is for, what colours mean and how much, (height, width, 3) uint8."""
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    font, small = label_font(14), label_font(12)
    right = width - 12
    for label, colour in (("against", AGAINST), ("speaks for", FOR)):
        right -= draw.textlength(label, font)
        draw.text((right, 22), label, INK, font, anchor="lm")
        draw.rectangle([right - 22, 15, right - 8, 29], fill=colour)
        right -= 40
    for y, words, letters, room in ((22, text, font, right - 24), (47, weight, small, width - 24)):
        draw.text((12, y), _cut(draw, words, letters, room), INK, letters, anchor="lm")
    return np.asarray(strip)


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of a text as there is room for."""
    words = " ".join(text.split())
    while words and draw.textlength(words, font) > room:
        words = words[:-2].rstrip() + "…" if len(words) > 2 else ""
    return words


def write_tiles(folder: Path, opened: Slide, slide: TiledSlide, coords: np.ndarray, tops: dict[str, list]) -> None:
    """Write the pixels of the top tiles, as the encoder was shown them before its own transform."""
    folder.mkdir()
    for name, tiles in tops.items():
        for rank, tile in tiles:
            x, y = coords[tile].tolist()
            size = slide.tile_px, slide.tile_px
            pixels = opened.read_region(x, y, slide.grid.tile_width, slide.grid.tile_height, size)
            Image.fromarray(pixels).save(folder / f"{name}_{rank}.png")


def _with_own_names(slides: Sequence[TiledSlide]) -> list[TiledSlide]:
    """Slides of one case may have the same file name in several folders; a number tells the later ones apart."""
    named, seen = [], {}
    for slide in slides:
        seen[slide.slide_id] = number = seen.get(slide.slide_id, 0) + 1
        named.append(slide if number == 1 else replace(slide, slide_id=f"{slide.slide_id} ({number})"))
    return named


def _least_distance(coords: np.ndarray) -> int:
    """The least step from a tile to another in x or y; 1 where there is only one tile."""
    steps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    return int(steps.min()) if len(steps) else 1
