"""Pictures of what was tiled: a plain thumbnail, and an overlay with tissue, tiles and a scale bar.

Both are the thumbnail that tissue was sought on, so they show nothing but the slide itself: no label, no macro image.
"""

import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from command_line import counted
from slide_features import atomic_path
from stage0_tiling.plan import TilePlan

THUMBNAIL_SIDE = 1024  # most pixels of a thumbnail's longer side
LONG_SIDE = (1024, 2048)  # least and most pixels of an overlay's longer side, without its legend
OUTLINE = (0, 160, 0)
TILE = (30, 80, 220)
FADE = 0.5  # how far what is not tiled goes to white
LEAST_GRID_PX = 16  # of a tile in the picture, for lines between tiles
INK = (40, 40, 48)
QUALITY = 88


def write_thumbnail(path: str | Path, plan: TilePlan) -> None:
    """Write the thumbnail of one slide as a JPEG without metadata, atomically, its longer side 1024 pixels at most."""
    picture = plan.tissue.picture
    zoom = min(1.0, THUMBNAIL_SIDE / max(picture.shape))
    _write_jpeg(path, cv2.resize(picture, _size(picture, zoom), interpolation=cv2.INTER_AREA))


def write_overlay(path: str | Path, plan: TilePlan) -> None:
    """Write the overlay of one slide with its legend below as a JPEG without metadata, atomically."""
    picture = draw_overlay(plan)
    height, width = picture.shape[:2]
    legend = draw_legend(plan, width, max(1, round(min(max(height, width) / 28, width / 16))))
    _write_jpeg(path, np.vstack([picture, legend]))


def draw_overlay(plan: TilePlan) -> np.ndarray:
    """Draw the overlay as (H, W, 3) uint8 RGB, its longer side between 1024 and 2048 pixels.

    What lies outside all tiles is faded, which shows at any size; tiles and tissue are outlined.
    """
    tissue = plan.tissue
    zoom = np.clip(max(tissue.mask.shape), *LONG_SIDE) / max(tissue.mask.shape)
    size = _size(tissue.mask, zoom)
    picture = cv2.resize(tissue.picture, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR)
    thickness = max(2, round(max(size) / 700))
    tiled, between = _tiled_area(plan, size, zoom)
    picture[~tiled] = cv2.addWeighted(picture, 1 - FADE, np.full_like(picture, 255), FADE, 0)[~tiled]
    picture[between] = cv2.addWeighted(picture, 0.4, np.full_like(picture, TILE), 0.6, 0)[between]
    _outline(picture, tiled, TILE, thickness)
    mask = cv2.resize(tissue.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    _outline(picture, mask, OUTLINE, thickness)
    return picture


def draw_legend(plan: TilePlan, width: int, height: int) -> np.ndarray:
    """Draw the strip below an overlay as (`height`, `width`, 3) uint8 RGB: scale bar, tissue and tiles."""
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(max(1.0, height * 0.45))  # on a very narrow slide nothing is legible
    middle, gap = height // 2, height // 3
    left = gap
    um_per_px = plan.pixel_size and plan.pixel_size.x / plan.tissue.scale_x * plan.tissue.mask.shape[1] / width
    if um_per_px:
        length_um = round_length(width / 5 * um_per_px)
        end = left + length_um / um_per_px
        draw.line([(left, middle), (end, middle)], INK, max(2, height // 12))
        for x in (left, end):
            draw.line([(x, middle - height // 5), (x, middle + height // 5)], INK, max(2, height // 16))
        label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"
        left = _write_text(draw, end + gap, middle, label, font) + 2 * gap
    tile_um = f" of {plan.grid.tile_width * plan.pixel_size.x:.0f} um" if plan.pixel_size else ""
    tissue = f"tissue {100 * plan.tissue.fraction:.1f} %"
    tiles = counted(len(plan.coords), "tile") + tile_um
    for color, text in ((OUTLINE, tissue), (TILE, tiles)):
        side = height // 5
        draw.rectangle([left, middle - side, left + 2 * side, middle + side], outline=color, width=max(2, height // 12))
        left = _write_text(draw, left + 2 * side + gap // 2, middle, text, font) + 2 * gap
    return np.asarray(strip)


def round_length(longest_um: float) -> float:
    """The longest of 1, 2, 5, 10, 20, 50, ... um that is not longer than `longest_um`."""
    power = 10.0 ** math.floor(math.log10(longest_um))
    return next(length for length in (5 * power, 2 * power, power, power / 2) if length <= longest_um)


def _tiled_area(plan: TilePlan, size: tuple[int, int], zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles lie and where the lines between them run, each (H, W) bool in a picture of `size`."""
    tiled, between = np.zeros(size[::-1], np.uint8), np.zeros(size[::-1], np.uint8)
    scale = np.array([plan.tissue.scale_x, plan.tissue.scale_y]) * zoom
    tile = np.array([plan.grid.tile_width, plan.grid.tile_height])
    corners = np.round(plan.coords * scale).astype(int)
    ends = np.round((plan.coords + tile) * scale).astype(int)
    for (left, top), (right, bottom) in zip(corners.tolist(), ends.tolist(), strict=True):
        tiled[top:bottom, left:right] = 1
        if min(tile * scale) >= LEAST_GRID_PX:
            cv2.rectangle(between, (left, top), (right, bottom), 1, 1 if min(tile * scale) < 48 else 2)
    return tiled.astype(bool), between.astype(bool)


def _outline(picture: np.ndarray, area: np.ndarray, color: tuple[int, int, int], thickness: int) -> None:
    lines, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, lines, -1, color, thickness, cv2.LINE_AA)


def _write_text(draw: ImageDraw.ImageDraw, x: float, middle: int, text: str, font: ImageFont.FreeTypeFont) -> float:
    """Write a line of text, centred on `middle`; its right end."""
    draw.text((x, middle), text, INK, font, anchor="lm")
    return x + draw.textlength(text, font)


def _size(picture: np.ndarray, zoom: float) -> tuple[int, int]:
    return max(1, round(picture.shape[1] * zoom)), max(1, round(picture.shape[0] * zoom))


def _write_jpeg(path: str | Path, picture: np.ndarray) -> None:
    how = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    succeeded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), how)
    assert succeeded
    with atomic_path(path) as partial:
        partial.write_bytes(jpeg.tobytes())
