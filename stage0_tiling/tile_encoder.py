"""An image encoder as the tiles of many slides meet it: what is done to a tile before, and how batches go through.

encoder = TileEncoder(load_encoder("uni2-h").to("cuda"), tile_size=256, batch_size=64)
pixels = encoder.prepare(tiles)      (B, T, T, 3) uint8 to what `encode` takes; called in the threads that read
encoder.encode(pixels)               (B, D) float16 on the encoder's device
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders import load_encoder
from image_encoder import ImageEncoder
from stage0_tiling.slide import SlideError

EQUAL = 1e-6  # largest difference between an encoder's own transform and our way to do the same
CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # what its allocator says in a RuntimeError

logger = logging.getLogger("stage0_tiling")


class TileEncoder:
    """An image encoder with a batch size that shrinks when a batch does not fit the memory, for good.

    Attributes:
        name: what `load_encoder` opens again.
        width: D.
        fingerprint: of the weights.
        preset: the published settings of the encoder, if any.
        device: where the encoder is.
        batch_size: tiles per forward pass, from now on.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        tile_size: int,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ):
        """Wrap an encoder for tiles of `tile_size` pixels.

        Args:
            encoder: on the device where it is to run.
            tile_size: side of a tile in pixels.
            batch_size: tiles per forward pass at most.
            dtype: precision of the forward pass (autocast); None means bfloat16 on a GPU, else float32.
            compiled: through `torch.compile`; every batch then has the same shape, the last one padded.
        """
        self.name, self.width, self.fingerprint = encoder.name, encoder.width, encoder.fingerprint()
        self.preset = encoder.preset
        self.device = next(encoder.parameters()).device
        self.batch_size = batch_size
        self._dtype = dtype or choose_dtype(None, self.device)
        self._transform = encoder.transform
        self._steps_before_normalising = find_shortcut(encoder, tile_size)
        self._mean, self._std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
        self._compiled = compiled
        self._forward = torch.compile(encoder.encode_tiles, dynamic=False) if compiled else encoder.encode_tiles
        if self.device.type == "cuda" and self._dtype == torch.bfloat16:
            torch.backends.cudnn.benchmark = True  # shapes hardly change; in full precision results come first

    @property
    def identity(self) -> dict[str, str]:
        """What tells features of this encoder from those of others."""
        return {"encoder": self.name, "fingerprint": self.fingerprint}

    def prepare(self, tiles: Tensor) -> Tensor:
        """Turn (B, T, T, 3) uint8 into the encoder's input.

        Returns:
            (B, H, W, 3) uint8, resized and cropped, where normalising is shown to be all that remains of the encoder's
            transform; it is done on the device then. Else (B, 3, H, W) float32 by the transform itself. In pinned
            memory where the encoder is on a GPU: torch keeps such blocks for the next batch, once they are copied.
        """
        steps = self._steps_before_normalising
        if steps == []:
            return tiles
        pictures = (Image.fromarray(tile) for tile in tiles.numpy())
        if steps is None:
            return _stack([self._transform(picture) for picture in pictures], self.device)
        return _stack([torch.from_numpy(np.array(_through(steps, picture))) for picture in pictures], self.device)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn what `prepare` gives into (B, D) float16 on the device, in as many parts as the memory asks for.

        Raises:
            SlideError: if not even a single tile fits.
        """
        parts, done, asked = [], 0, self.batch_size
        while done < len(pixels):
            part = pixels[done : done + self.batch_size]
            features = self._try(part)
            if features is None:
                self._halve(len(part))
                continue
            parts.append(features)
            done += len(part)
        if self.batch_size < asked:
            where = f"the memory of {self.device}; going on with"
            logger.warning("%s: batches of %d tiles do not fit %s %d", self.name, asked, where, self.batch_size)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(self, pixels: Tensor) -> Tensor | None:
        """Features of one batch; None if the memory does not suffice, with all that the attempt held given back."""
        try:
            return self._features(pixels)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _features(self, pixels: Tensor) -> Tensor:
        autocast = nullcontext() if self._dtype == torch.float32 else torch.autocast(self.device.type, self._dtype)
        with autocast:
            inputs = self._normalise(pixels.to(self.device, non_blocking=True))
            if self._compiled and len(inputs) < self.batch_size:
                inputs = torch.cat([inputs, inputs[:1].expand(self.batch_size - len(inputs), -1, -1, -1)])
            return self._forward(inputs)[: len(pixels)].to(torch.float16)

    def _halve(self, did_not_fit: int) -> None:
        if did_not_fit == 1:
            raise SlideError(
                f"not even one tile fits the memory of {self.device} with encoder {self.name}: free memory there, "
                "or take --mixed_precision bf16 or a smaller encoder"
            )
        self.batch_size = did_not_fit // 2

    def _normalise(self, pixels: Tensor) -> Tensor:
        if self._steps_before_normalising is None:
            return pixels
        return normalise(pixels, self._mean, self._std)


def load_tile_encoders(
    names: Sequence[str], device: torch.device, *, mixed_precision: str | None = None, **how: Any
) -> dict[str, TileEncoder]:
    """Open encoders for `TileEncoder(**how)`, by the folders that their features go to: see `name_folders`."""
    encoders = [load_encoder(name).to(device) for name in names]
    dtype = choose_dtype(mixed_precision, device)
    folders = name_folders(encoders)
    return {name: TileEncoder(model, dtype=dtype, **how) for name, model in zip(folders, encoders, strict=True)}


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32, by the very operations of torchvision's ToTensor and Normalize."""
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255).sub_(mean).div_(std)


def find_shortcut(encoder: ImageEncoder, tile_size: int) -> list[Callable] | None:
    """The steps of an encoder's transform that must be done on each picture, if the rest is only normalising.

    Returns:
        No steps if tiles need no resizing, torchvision's steps up to its ToTensor where there are such, None where
        neither gives the same within 1e-6 on tiles of noise, which hold every value of every channel.
    """
    if tile_size**2 < 256:
        return None
    values = [np.random.default_rng(seed).permutation(np.arange(tile_size**2) % 256) for seed in range(3)]
    tile = np.stack(values, axis=-1).astype(np.uint8).reshape(tile_size, tile_size, 3)
    expected = encoder.transform(Image.fromarray(tile))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    for steps in ([], list(encoder.transform_steps[:-2])):
        picture = _through(steps, Image.fromarray(tile))
        if not isinstance(picture, Image.Image) or picture.mode != "RGB":
            continue
        found = normalise(torch.from_numpy(np.array(picture))[None], mean, std)[0]
        if found.shape == expected.shape and (found - expected).abs().max() <= EQUAL:
            return steps
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a forward pass failed for want of memory, of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in CPU_OUT_OF_MEMORY)


def choose_dtype(mixed_precision: str | None, device: torch.device) -> torch.dtype:
    """Precision of the forward pass: as asked, else bfloat16 on a GPU and float32 elsewhere."""
    if mixed_precision is None:
        mixed_precision = "bf16" if device.type == "cuda" else "no"
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def name_folders(encoders: Sequence[ImageEncoder]) -> list[str]:
    """Where the features of each encoder go: `features` of one alone, else `features_<short name>` of each.

    The short name is that of the preset, else the last part of the hub name or folder. Encoders that would share one
    have a hash of their full names in it, so that a folder's name does not depend on the other encoders' order.

    Raises:
        ValueError: if an encoder is given twice.
    """
    if len(encoders) == 1:
        return ["features"]
    names = [encoder.name for encoder in encoders]
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise ValueError(f"--encoder {twice} is given twice")
    shorts = [_short_name(encoder) for encoder in encoders]
    times = Counter(short.casefold() for short in shorts)
    digests = [hashlib.sha256(name.encode()).hexdigest()[:8] for name in names]
    pairs = zip(shorts, digests, strict=True)
    return [f"features_{short if times[short.casefold()] == 1 else f'{short}_{digest}'}" for short, digest in pairs]


def _short_name(encoder: ImageEncoder) -> str:
    last = encoder.preset.name if encoder.preset else encoder.name.rstrip("/").split("/")[-1].split(":")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._-")[:100] or "encoder"


def _stack(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Stack tensors, straight into pinned memory if they go to a GPU."""
    shape = (len(tensors), *tensors[0].shape)
    out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    return torch.stack(tensors, out=out)


def _through(steps: Sequence[Callable], picture: Image.Image) -> Image.Image:
    for step in steps:
        picture = step(picture)
    return picture
