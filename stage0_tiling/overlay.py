"""A picture of what was tiled: thumbnail, outline of the tissue, squares of the tiles."""

from pathlib import Path

import cv2
import numpy as np

from slide_features import atomic_path
from stage0_tiling.plan import TilePlan

LONG_SIDE = (1024, 2048)  # least and most pixels of an overlay's longer side
OUTLINE = (0, 160, 0)
TILE = (30, 80, 220)


def write_overlay(path: str | Path, plan: TilePlan) -> None:
    """Write the overlay of one slide as a JPEG, atomically. It holds no metadata of the slide."""
    succeeded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(draw_overlay(plan), cv2.COLOR_RGB2BGR))
    assert succeeded
    with atomic_path(path) as partial:
        partial.write_bytes(jpeg.tobytes())


def draw_overlay(plan: TilePlan) -> np.ndarray:
    """Draw the overlay as (H, W, 3) uint8 RGB, its longer side between 1024 and 2048 pixels."""
    tissue = plan.tissue
    height, width = tissue.mask.shape
    zoom = np.clip(max(height, width), *LONG_SIDE) / max(height, width)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    picture = cv2.resize(tissue.picture, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR)
    mask = cv2.resize(tissue.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, outlines, -1, OUTLINE, 2)
    scale = np.array([tissue.scale_x, tissue.scale_y]) * zoom
    corners = np.round(plan.coords * scale).astype(int)
    opposite = np.round((plan.coords + [plan.grid.tile_width, plan.grid.tile_height]) * scale).astype(int)
    for corner, end in zip(corners.tolist(), opposite.tolist(), strict=True):
        cv2.rectangle(picture, corner, end, TILE, 1)
    return picture
