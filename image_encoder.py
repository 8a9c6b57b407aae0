"""One interface to image encoders of timm and transformers: pixels to patch tokens; `encoders` opens them.

Shapes: B images, N patch tokens of one image, D width, H and W pixels.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from encoder_presets import EncoderPreset


class ImageEncoder(nn.Module):
    """A timm or transformers vision model with its own preprocessing.

    Attributes:
        backbone: the model itself.
        name: what `load_encoder` opens again: a timm or hub name, or an absolute folder.
        width: D of `encode_tiles`.
        patch_width: D of `encode_patches`; equal to `width` but for a few CNNs.
        image_size: side in pixels of what `transform` returns.
        mean: of each channel, subtracted by `transform`.
        std: of each channel, divided by in `transform`.
        patch_grid: (rows, columns) of `encode_patches`, None if the model gives no grid of patches.
        num_prefix_tokens: class and register tokens ahead of the patches.
        token_pooling: how `encode_tiles` makes one vector of the tokens, a key of `encoder_presets.POOLINGS`.
        preset: the published settings that the model was built with, if any.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        *,
        name: str,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        processor: Any = None,
        token_pooling: str | None = None,
    ):
        """Wrap `backbone`; `processor` is a transformers image processor, None for a timm model."""
        super().__init__()
        self.backbone = backbone
        self.name = name
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.processor = processor
        self.token_pooling = token_pooling
        self.preset: EncoderPreset | None = None
        self._transform = transform
        self.eval()
        self._measure()

    def transform(self, image: Image.Image) -> Tensor:
        """Resize, crop and normalise a PIL image as the encoder's authors did: (3, H, W) float32."""
        return self._transform(image.convert("RGB"))

    @property
    def transform_steps(self) -> list[Callable]:
        """The steps of `transform` where it is torchvision's Compose, as timm's are; none otherwise."""
        return list(getattr(self._transform, "transforms", ()))

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) into (B, D), one patch token per tile.

        Presets pool as their authors do (`token_pooling`). Other timm models give what they give with `num_classes=0`:
        the class token, the mean or the attention pool of their configuration. Other transformers models give the class
        token where they have one, else their pooled output.
        """
        if self.token_pooling in ("projection", "attention"):
            return self.backbone(pixels) if self.processor is None else self.backbone(pixel_values=pixels).image_embeds
        if self.token_pooling is not None:
            return self._pool(self._feature_map(pixels))
        if self.processor is None:
            return self.backbone.forward_head(self.backbone.forward_features(pixels), pre_logits=True)
        output = self.backbone(pixel_values=pixels)
        # CLIP normalises its class token only in the pooled output; ViT's pooler is a layer that is often untrained
        if self.num_prefix_tokens and "clip" not in self.backbone.config.model_type:
            return output.last_hidden_state[:, 0]
        pooled = output.get("pooler_output")
        return _tokens(output.last_hidden_state).mean(dim=1) if pooled is None else pooled.flatten(1)

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) into (B, N, D), the patch tokens in raster order, without class and register tokens.

        Raises:
            ValueError: if the model gives no grid of patches.
        """
        if self.patch_grid is None:
            raise ValueError(f"encoder {self.name} gives no grid of patch tokens: use a ViT or a CNN")
        return _tokens(self._feature_map(pixels), channels_last=self._channels_last)[:, self.num_prefix_tokens :]

    @property
    def wears_lora(self) -> bool:
        """Whether `encoder_lora.add_encoder_lora` put adapters on it."""
        return any(".lora_A." in name for name, _ in self.backbone.named_parameters())

    def save_pretrained(self, folder: str | Path) -> None:
        """Save config.json and model.safetensors, which `load_encoder(folder)` opens again with equal outputs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.processor is not None:
            self.backbone.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        else:
            from timm.models import save_for_hf

            save_for_hf(self.backbone, folder, safe_serialization=True)
        if self.token_pooling is not None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"token_pooling": self.token_pooling}, indent=2))

    def fingerprint(self) -> str:
        """16 hex digits of the weights: a hash of the first values of every tensor. Tells a retrained encoder apart.

        A pooling that is not the model's own counts too: the same weights then give other vectors.
        """
        not_its_own = self.token_pooling in ("class_mean", "projection", "attention")
        return weights_fingerprint(self.backbone.state_dict(), self.token_pooling if not_its_own else "")

    def _pool(self, tokens: Tensor) -> Tensor:
        """(B, D) or (B, 2 D) from class, register and patch tokens (B, N, D)."""
        if self.token_pooling == "class":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)

    def _feature_map(self, pixels: Tensor) -> Tensor:
        if self.processor is None:
            return self.backbone.forward_features(pixels)
        return self.backbone(pixel_values=pixels).last_hidden_state

    @torch.inference_mode()
    def _measure(self) -> None:
        """Measure widths and patch grid on one blank image: what architectures say of themselves does not agree."""
        parameter = next(self.backbone.parameters())
        blank = torch.zeros(1, 3, self.image_size, self.image_size, device=parameter.device, dtype=parameter.dtype)
        features = self._feature_map(blank)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError(f"encoder {self.name} gives no feature map or tokens: choose another architecture")
        self._channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).upper().endswith("NHWC")
        self.num_prefix_tokens = 0
        self.patch_grid = self._grid_of(features)
        if self.patch_grid is not None and features.ndim == 3:
            self.num_prefix_tokens = features.shape[1] - math.prod(self.patch_grid)
        self.patch_width = _tokens(features, channels_last=self._channels_last).shape[-1]
        pools_itself = self.token_pooling in ("class", "class_mean")  # spares a huge model the second pass
        self.width = (self._pool(features) if pools_itself else self.encode_tiles(blank)).shape[-1]

    def _grid_of(self, features: Tensor) -> tuple[int, int] | None:
        if features.ndim == 4:
            rows, columns = features.shape[1:3] if self._channels_last else features.shape[2:]
            return rows, columns
        num_tokens = features.shape[1]
        for rows, columns in (_stated_grid(self.backbone, self.image_size), (math.isqrt(num_tokens),) * 2):
            num_prefix = num_tokens - rows * columns
            if rows and 0 <= num_prefix <= 64 and (num_prefix == 0 or num_prefix == _stated_prefix(self.backbone)):
                return rows, columns
        return None


def weights_fingerprint(weights: dict[str, Tensor], salt: str = "") -> str:
    """16 hex digits of named weights: a hash of `salt` and of the name, shape and first values of every tensor."""
    digest = hashlib.sha256(salt.encode())
    for key, tensor in weights.items():
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stated_grid(backbone: nn.Module, image_size: int) -> tuple[int, int]:
    """(rows, columns) of patches by what the model says of itself, (0, 0) if it does not."""
    config = getattr(backbone, "config", None)
    patch_size = getattr(config, "patch_size", None)
    if isinstance(patch_size, int):
        return image_size // patch_size, image_size // patch_size
    return getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or (0, 0)


def _stated_prefix(backbone: nn.Module) -> int:
    config = getattr(backbone, "config", None)
    if config is not None:
        return 1 + getattr(config, "num_register_tokens", 0)
    return getattr(backbone, "num_prefix_tokens", 1)


def _tokens(features: Tensor, *, channels_last: bool = False) -> Tensor:
    """(B, N, D) from tokens (B, N, D) or a map (B, D, rows, columns) or (B, rows, columns, D), in raster order."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
