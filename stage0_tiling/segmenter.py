r"""Tissue by a segmentation network of the user's: a file of weights, and what it was trained on as JSON beside it.

    net.pt           TorchScript, with net.json. It holds code as well as weights: load only what you trust
    net.safetensors  weights, with net.json, which names the architecture as well
    Tissue_Detection_MPP10.pth, deeplabv3_seg_v4.ckpt   published checkpoints, whose settings are PRESETS

    {"architecture": "smp:UnetPlusPlus", "kwargs": {"encoder_name": "timm-efficientnet-b0", "classes": 2},
     "mpp": 10, "tile_size": 512, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
     "tissue_classes": [0], "threshold": 0.5}

`smp:` are classes of segmentation-models-pytorch, `torchvision:` those of torchvision.models.segmentation. A network
takes (B, 3, S, S) float32 and gives (B, C, s, s) logits, or a dict with them as `out`; one class is read by a sigmoid,
several by a softmax.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from command_line import first_line
from stage0_tiling.groups import drop_small, fill_small
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.tissue import TissueMask, read_thumbnail
from stage0_tiling.tissue_methods import MAX_HOLE_UM2, MIN_TISSUE_UM2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXT = 8  # 1/8 of a tile at each side is there to be seen, not kept: networks are unsure at their borders
BATCH_SIZE = 8


@dataclass(frozen=True)
class SegmenterSettings:
    """What a network was trained on.

    Attributes:
        mpp: um per pixel of its input.
        tile_size: side of its input in pixels.
        tissue_classes: channels of its output that are tissue.
        threshold: least probability of tissue.
        mean: of the three channels, of values 0 to 1.
        std: of the three channels.
        architecture: `smp:` or `torchvision:` and the name of a class; None for TorchScript.
        kwargs: of the architecture.
        jpeg_quality: with which inputs are compressed first, as they were in training; None leaves them.
    """

    mpp: float
    tile_size: int = 512
    tissue_classes: tuple[int, ...] = (1,)
    threshold: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    architecture: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if not (0.05 <= self.mpp <= 100 and 16 <= self.tile_size <= 8192 and 0 < self.threshold < 1):
            raise ValueError(
                f"mpp {self.mpp}, tile_size {self.tile_size} or threshold {self.threshold} is out of range"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not self.tissue_classes:
            raise ValueError("mean and std have three values, tissue_classes at least one")


SETTINGS = TypeAdapter(SegmenterSettings)
PRESETS = {
    # GrandQC (Weng et al. 2024, doi:10.1038/s41467-024-54769-y): class 0 is tissue, 1 background; CC BY-NC-SA 4.0
    "grandqc-tissue": SegmenterSettings(
        mpp=10.0,
        tissue_classes=(0,),
        architecture="smp:UnetPlusPlus",
        kwargs={"encoder_name": "timm-efficientnet-b0", "classes": 2},
        jpeg_quality=80,
    ),
    # HEST (Jaume et al. 2024, arXiv:2406.16192): class 1 is tissue; CC BY-NC-SA 4.0
    "hest": SegmenterSettings(mpp=1.0, architecture="torchvision:deeplabv3_resnet50", kwargs={"num_classes": 2}),
}


@dataclass(frozen=True)
class Segmenter:
    """A network that is loaded. `name` tells its file and a fingerprint of weights and settings, not where it lies."""

    name: str
    network: nn.Module
    settings: SegmenterSettings
    device: torch.device
    lock: Lock = field(default_factory=Lock)  # one batch at a time, whatever the number of threads that tile


def load_segmenter(path: str | Path, preset: str | None = None) -> Segmenter:
    """Load a network once a process, on a GPU where there is one.

    Raises:
        FileNotFoundError: if the file, or the JSON beside it, is missing.
        ValueError: if either cannot be read or they do not fit.
    """
    return _load(Path(path).expanduser().resolve(), preset)


def segment(slide: Slide, pixel_size: PixelSize, segmenter: Segmenter) -> TissueMask:
    """Find the tissue of a slide by a network, in overlapping tiles of which the middles are kept.

    The mask has the size of the thumbnail; memory is bounded by that and one batch of tiles, as what a tile is shrunk
    from, 20,000 x 20,000 px and more on a slide without a pyramid, is read block by block.
    """
    picture, mpp = read_thumbnail(slide, pixel_size)
    mask = np.zeros(picture.shape[:2], bool)
    windows = list(_windows(slide, pixel_size, segmenter.settings, picture.shape[:2]))
    for first in range(0, len(windows), BATCH_SIZE):
        some = windows[first : first + BATCH_SIZE]
        size = (segmenter.settings.tile_size,) * 2
        tiles = np.stack([slide.read_large_region(x, y, width, height, size) for (x, y, width, height), _, _ in some])
        for tile, (_, kept, where) in zip(_probabilities(tiles, segmenter), some, strict=True):
            rows, columns = where
            size = columns.stop - columns.start, rows.stop - rows.start
            shrinks = size[0] <= kept[1].stop - kept[1].start
            middle = np.ascontiguousarray(tile[kept])
            middle = cv2.resize(middle, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
            mask[where] = middle >= segmenter.settings.threshold
    drop_small(mask, MIN_TISSUE_UM2 / mpp**2)
    fill_small(mask, MAX_HOLE_UM2 / mpp**2)
    return TissueMask(mask, picture, mask.shape[1] / slide.width, mask.shape[0] / slide.height)


Window = tuple[tuple[int, int, int, int], tuple[slice, slice], tuple[slice, slice]]


def _windows(
    slide: Slide, pixel_size: PixelSize, settings: SegmenterSettings, shape: tuple[int, int]
) -> Iterator[Window]:
    """Yield (x, y, width, height) to read in level-0 pixels, what of it to keep, and what of the mask to fill."""
    spans = []
    for length, pixels, um in ((slide.height, shape[0], pixel_size.y), (slide.width, shape[1], pixel_size.x)):
        side = max(1, round(settings.tile_size * settings.mpp / um))
        per_pixel = length / pixels
        step = max(1, int(side * (1 - 2 / CONTEXT) / per_pixel))  # mask pixels
        span = []
        for first in range(0, pixels, step):
            last = min(first + step, pixels)
            middle = (first + last) / 2 * per_pixel
            start = max(0, min(round(middle - side / 2), length - side))
            edges = [round((edge * per_pixel - start) * settings.tile_size / side) for edge in (first, last)]
            keep = slice(min(edges[0], settings.tile_size - 1), max(edges[0] + 1, min(edges[1], settings.tile_size)))
            span.append((start, side, keep, slice(first, last)))
        spans.append(span)
    for top, height, rows, mask_rows in spans[0]:
        for left, width, columns, mask_columns in spans[1]:
            yield (left, top, width, height), (rows, columns), (mask_rows, mask_columns)


def _probabilities(tiles: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """(B, S, S, 3) uint8 to the probability of tissue, (B, S, S) float32."""
    settings, device = segmenter.settings, segmenter.device
    if settings.jpeg_quality:
        tiles = np.stack([_compressed(tile, settings.jpeg_quality) for tile in tiles])
    with segmenter.lock, torch.inference_mode():
        pixels = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (settings.mean, settings.std))
        logits = segmenter.network((pixels - mean) / std)
        logits = (logits["out"] if isinstance(logits, dict) else logits).float()
        if logits.ndim != 4 or logits.shape[1] <= max(settings.tissue_classes) and logits.shape[1] > 1:
            raise ValueError(
                f"segmenter {segmenter.name} gives {tuple(logits.shape)}, expected (B, C, H, W) with tissue_classes "
                f"{list(settings.tissue_classes)} among C"
            )
        if logits.shape[1] == 1:
            found = logits.sigmoid()[:, 0]
        else:
            found = logits.softmax(dim=1)[:, list(settings.tissue_classes)].sum(dim=1)
        found = nn.functional.interpolate(found[:, None], tiles.shape[1:3], mode="bilinear", align_corners=False)
        return found[:, 0].cpu().numpy()


def _compressed(tile: np.ndarray, quality: int) -> np.ndarray:
    _, jpeg = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]


@lru_cache(maxsize=1)
def _load(path: Path, preset: str | None) -> Segmenter:
    if not path.is_file():
        raise FileNotFoundError(f"--segmenter {path}: no such file")
    if path.suffix == ".json":
        raise ValueError(f"--segmenter {path}: name the weights, .pt or .safetensors, that it lies beside")
    settings = PRESETS[preset] if preset else _read_settings(path)
    try:
        network = _read_network(path, settings, preset)
    except (RuntimeError, ValueError, TypeError, OSError, EOFError) as error:
        reason = first_line(error)
        raise ValueError(f"--segmenter {path}: cannot be loaded ({reason})") from error
    told = json.dumps([getattr(settings, key.name) for key in fields(settings)], sort_keys=True)
    digest = hashlib.sha256(path.read_bytes() + told.encode()).hexdigest()[:12]
    device = _device()
    return Segmenter(f"{path.stem}#{digest}", network.to(device).eval(), settings, device)


def _read_settings(path: Path) -> SegmenterSettings:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise FileNotFoundError(
            f"--segmenter {path}: {beside.name} must lie beside it and state mpp, tile_size, mean, std, tissue_classes "
            "and threshold, or --segmenter_preset name a published checkpoint"
        )
    try:
        stated = json.loads(beside.read_text(encoding="utf-8"))
        _check_stated(stated)
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        return SegmenterSettings(**lists)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--segmenter: {beside} does not describe a network ({error})") from error


def _check_stated(stated: object) -> None:
    """Refuse what cannot be fields of `SegmenterSettings`, in plain words."""
    known = [field.name for field in fields(SegmenterSettings)]
    if not isinstance(stated, dict):
        raise ValueError(f'it holds a {type(stated).__name__}; expected an object such as {{"mpp": 10, …}}')
    if unknown := [key for key in stated if key not in known]:
        raise ValueError(f"it has {unknown[0]!r}; expected of {', '.join(known)}")
    if "mpp" not in stated:
        raise ValueError("it lacks mpp, the um per pixel of the network's input")
    try:
        SETTINGS.validate_python(stated)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error


def _read_network(path: Path, settings: SegmenterSettings, preset: str | None) -> nn.Module:
    if preset:
        return _with_weights(_build(settings), _published_weights(path))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _with_weights(_build(settings), load_file(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and what people have
        return torch.jit.load(path, map_location="cpu")


def _build(settings: SegmenterSettings) -> nn.Module:
    library, _, name = (settings.architecture or "").partition(":")
    if library == "smp":
        import segmentation_models_pytorch as smp

        known = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
        if name in known:
            return known[name](**settings.kwargs | {"encoder_weights": None})
    elif library == "torchvision":
        from torchvision import models

        if name in models.list_models(module=models.segmentation):
            return models.get_model(name, weights=None, weights_backbone=None, **settings.kwargs)
    raise ValueError(
        f"architecture {settings.architecture}: expected smp:<class of segmentation-models-pytorch> or "
        "torchvision:<model of torchvision.models.segmentation>"
    )


def _published_weights(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a .pth file or of a Lightning checkpoint, without the head that was used in training alone."""
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than weights, which may be code: save its state_dict as safetensors") from error
    weights = content.get("state_dict", content)
    return {key.removeprefix("model."): value for key, value in weights.items() if "aux_classifier" not in key}


def _with_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if missing or unexpected:
        odd = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not of this architecture"
        raise ValueError(f"{odd}; {len(missing)} weights missing, {len(unexpected)} unexpected")
    return network


def _device() -> torch.device:
    from accelerator_setup import runs_on_cpu

    if runs_on_cpu() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
