"""MIRAX slides for tests, which OpenSlide opens: a few images of a large, mostly empty slide, and a label."""

import configparser
import struct
from pathlib import Path

import cv2
import imagecodecs
import numpy as np

IMAGE_PX = 256
UUID = "0123456789abcdef0123456789abcdef"


def write_mirax_slide(
    path: Path, picture: np.ndarray, mpp: float, *, images: tuple[int, int], first: tuple[int, int], label: np.ndarray
) -> None:
    """Write (H, W, 3) uint8 RGB as what was scanned, in two levels.

    Args:
        path: the .mrxs file, itself a JPEG that shows the label; a folder of the same name is made beside it.
        picture: what was scanned, its sides multiples of 512 px.
        mpp: um per pixel.
        images: (columns, rows) of images of 256 px that the whole slide has room for.
        first: (column, row) of the image at the top left of `picture`, both even.
        label: the label image.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(_jpeg(label))
    data, levels = [_jpeg(label)], []
    half = cv2.resize(picture, (picture.shape[1] // 2, picture.shape[0] // 2), interpolation=cv2.INTER_AREA)
    for level, pixels in enumerate((picture, half)):
        entries = []
        for y in range(0, pixels.shape[0], IMAGE_PX):
            for x in range(0, pixels.shape[1], IMAGE_PX):
                column, row = (start + 2**level * at // IMAGE_PX for start, at in zip(first, (x, y), strict=True))
                jpeg = _jpeg(pixels[y : y + IMAGE_PX, x : x + IMAGE_PX])
                entries.append((row * images[0] + column, sum(map(len, data)), len(jpeg), 0))
                data.append(jpeg)
        levels.append(entries)
    (folder / "Data0000.dat").write_bytes(b"".join(data))
    (folder / "Index.dat").write_bytes(_index(levels, len(data[0])))
    _write_ini(folder / "Slidedat.ini", mpp, images)


def _index(levels: list[list[tuple[int, ...]]], label_bytes: int) -> bytes:
    """Pointers to pages of (image number, offset, length, file), and to the one record beside them, the label."""
    start = len("01.02") + len(UUID)
    tables = start + 8
    pages, body = [], b""
    at = tables + 4 * (len(levels) + 1)
    records = [
        struct.pack("<2i", len(entries), 0) + b"".join(struct.pack("<4i", *e) for e in entries) for entries in levels
    ]
    records.append(struct.pack("<7i", 1, 0, 0, 0, 0, label_bytes, 0))
    for record in records:
        pages.append(at + len(body))
        body += struct.pack("<2i", 0, at + len(body) + 8) + record
    roots = struct.pack("<2i", tables, tables + 4 * len(levels))
    return b"01.02" + UUID.encode() + roots + struct.pack(f"<{len(pages)}i", *pages) + body


def _write_ini(path: Path, mpp: float, images: tuple[int, int]) -> None:
    ini = configparser.ConfigParser()
    ini.optionxform = str
    ini["GENERAL"] = {
        "SLIDE_VERSION": "01.02",
        "SLIDE_ID": UUID,
        "IMAGENUMBER_X": images[0],
        "IMAGENUMBER_Y": images[1],
        "OBJECTIVE_MAGNIFICATION": 20,
    }
    ini["HIERARCHICAL"] = {
        "INDEXFILE": "Index.dat",
        "HIER_COUNT": 1,
        "NONHIER_COUNT": 1,
        "HIER_0_NAME": "Slide zoom level",
        "HIER_0_COUNT": 2,
        "HIER_0_VAL_0_SECTION": "LEVEL_0",
        "HIER_0_VAL_1_SECTION": "LEVEL_1",
        "NONHIER_0_NAME": "Scan data layer",
        "NONHIER_0_COUNT": 1,
        "NONHIER_0_VAL_0": "ScanDataLayer_SlideBarcode",
        "NONHIER_0_VAL_0_SECTION": "BARCODE",
    }
    ini["BARCODE"] = {"BARCODE_IMAGE_TYPE": "JPEG"}
    ini["DATAFILE"] = {"FILE_COUNT": 1, "FILE_0": "Data0000.dat"}
    for level in range(2):
        ini[f"LEVEL_{level}"] = {
            "IMAGE_CONCAT_FACTOR": level,
            "OVERLAP_X": 0,
            "OVERLAP_Y": 0,
            "MICROMETER_PER_PIXEL_X": mpp * 2**level,
            "MICROMETER_PER_PIXEL_Y": mpp * 2**level,
            "IMAGE_FORMAT": "JPEG",
            "IMAGE_FILL_COLOR_BGR": 0xFFFFFF,
            "DIGITIZER_WIDTH": IMAGE_PX,
            "DIGITIZER_HEIGHT": IMAGE_PX,
        }
    with path.open("w", encoding="utf-8") as file:
        ini.write(file, space_around_delimiters=False)


def _jpeg(picture: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(np.ascontiguousarray(picture), level=92)
