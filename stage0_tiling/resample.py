"""Resample pictures: by area where they shrink, without loss where they stay."""

import cv2
import numpy as np

ON_GRID = 0.02  # pixels: a box this close to the pixel grid lies on it


def on_grid(*edges: float) -> bool:
    """Whether edges lie between pixels, not within one."""
    return all(abs(edge - round(edge)) <= ON_GRID for edge in edges)


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to `size`, (width, height)."""
    if picture.shape[1::-1] == size:
        return picture
    shrinks = picture.shape[1] >= size[0] and picture.shape[0] >= size[1]
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def sample_box(
    picture: np.ndarray,
    left: float,
    top: float,
    width: float,
    height: float,
    size: tuple[int, int],
    interpolation: int = cv2.INTER_LINEAR,
) -> np.ndarray:
    """Resample a box of a picture that may begin and end within a pixel.

    Args:
        picture: (H, W, 3) uint8.
        left: pixels of the picture from its left edge to the box.
        top: pixels of the picture from its top edge to the box.
        width: pixels of the picture.
        height: pixels of the picture.
        size: (width, height) in pixels of the result.
        interpolation: OpenCV's, for a box that lies between pixels.

    Returns:
        (size[1], size[0], 3) uint8.
    """
    columns, rows = max(1, round(width)), max(1, round(height))
    if on_grid(left, top, left + width, top + height):
        x, y = round(left), round(top)
        return resize(picture[y : y + rows, x : x + columns], size)
    # to whole pixels first: centre of pixel i of the result to a position among the centres of the picture's pixels
    scale_x, scale_y = width / columns, height / rows
    matrix = np.array([[scale_x, 0, left + (scale_x - 1) / 2], [0, scale_y, top + (scale_y - 1) / 2]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    shifted = cv2.warpAffine(picture, matrix, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return resize(shifted, size)
