"""Two encoders that meet in one space: of images or slides, and of texts; with its settings, saved and opened.

Shapes: B items, N tiles, T tokens, D width of an embedding.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from encoders import load_encoder
from image_encoder import ImageEncoder, weights_fingerprint
from slide_encoders import load_slide_encoder, save_slide_encoder
from stage0_encoder.adapters import merged
from stage0_encoder.contrastive_loss import FIRST_LOG_SCALE, FIRST_SIGMOID_BIAS, SIGMOID
from stage0_encoder.grad_cache import Embedded
from stage0_encoder.text_encoder import TextEncoder, load_text_encoder

FORMAT_VERSION = 1
RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # of batch normalisation
SETTINGS_FILE, SPACE_FILE = "alignment.json", "space.safetensors"
IMAGE_FOLDER, SLIDE_FOLDER, TEXT_FOLDER = "image_encoder", "slide_encoder", "text_encoder"


@dataclass
class AlignmentSettings:
    """What ``alignment.json`` says of a model.

    Attributes:
        input_kind: `images` or `features`.
        loss: one of `contrastive_loss.KINDS`.
        embedding_width: D; 0 for no projections, the encoders' own width.
        text_model: name of the text model, which is opened again where it did not learn.
        text_fingerprint: of its weights before training.
        image_fingerprint: of the image or slide encoder's, before training.
        text_pooling: see `TextEncoder`.
        max_text_tokens: a longer text loses its end.
        num_patches: patch tokens of a slide at most.
        features_made: how feature files must have been made.
        training: flags of the command.
        git_revision: of the checkout that trained it.
    """

    input_kind: str
    loss: str
    embedding_width: int
    text_model: str
    text_fingerprint: str
    image_fingerprint: str
    text_pooling: str
    max_text_tokens: int
    num_patches: int
    features_made: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    git_revision: str | None = None


class AlignmentModel(nn.Module):
    """An encoder of images or slides and one of texts, each with a linear projection to the common space."""

    def __init__(self, image: nn.Module, text: TextEncoder, settings: AlignmentSettings, image_width: int):
        """Put the encoders together; projections are new.

        Args:
            image: an `ImageEncoder`, or a slide encoder.
            text: the text encoder.
            settings: of the model.
            image_width: of what `image` gives of an item.

        Raises:
            ValueError: there are to be no projections, and the encoders' widths differ.
        """
        super().__init__()
        self.settings = settings
        self.image = image
        self.text = text
        width = settings.embedding_width
        if not width and image_width != text.width:
            raise ValueError(
                f"--embedding_width 0: the image encoder is {image_width} wide and the text encoder {text.width}; give "
                "a width to project both to, such as 512"
            )
        self.image_projection = nn.Linear(image_width, width, bias=False) if width else nn.Identity()
        self.text_projection = nn.Linear(text.width, width, bias=False) if width else nn.Identity()
        for projection in (self.image_projection, self.text_projection):
            if width:
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # as CLIP's
        self.log_scale = nn.Parameter(torch.tensor(FIRST_LOG_SCALE[settings.loss]))
        self.bias = nn.Parameter(torch.tensor(FIRST_SIGMOID_BIAS if settings.loss in SIGMOID else 0.0))

    def forward(self, batch: dict[str, Tensor]) -> Embedded:
        """Embeddings (B, D) float32 of length 1 of both sides, and the temperature."""
        return Embedded(self.embed_images(batch), self.embed_texts(batch), self.log_scale.clone(), self.bias.clone())

    def embed_images(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D) from `pixel_values` (B, 3, H, W), or from `patch_tokens` (B, N, E), `cells` and `patch_mask`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(self.image)):
            if isinstance(self.image, ImageEncoder):
                encoded = self.image.encode_tiles(batch["pixel_values"])
            else:
                encoded = self.image(batch["patch_tokens"], batch["cells"], batch["patch_mask"]).mean(dim=1)
        return F.normalize(self.image_projection(encoded).float(), dim=-1)

    def embed_texts(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D) from `input_ids` and `text_mask`, (B, T)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(self.text)):
            encoded = self.text(batch["input_ids"], batch["text_mask"])
        return F.normalize(self.text_projection(encoded).float(), dim=-1)

    def train(self, mode: bool = True) -> "AlignmentModel":
        """As ever, but encoders that do not learn stay in evaluation mode."""
        super().train(mode)
        for encoder in (self.image, self.text):
            encoder.train(mode and learns(encoder))
        return self

    @torch.no_grad()
    def bound_scale(self, max_scale: float) -> None:
        """Keep the inverse temperature between 1 and `max_scale`, as CLIP does after each step."""
        self.log_scale.clamp_(0, torch.tensor(max_scale).log().item())

    def learned_state(self) -> dict[str, Tensor]:
        """What learns, by name, and the running statistics of encoders that do; with the optimizer, a checkpoint."""
        state = {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}
        for part in ("image", "text"):
            encoder = getattr(self, part)
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                statistics = encoder.named_buffers()
                state |= {f"{part}.{name}": value for name, value in statistics if name.endswith(RUNNING)}
        return state

    def save(self, folder: str | Path) -> None:
        """Write a result folder, whole or not at all.

        ::

            folder/alignment.json
            folder/space.safetensors       projections and temperature
            folder/image_encoder/          what --encoder of stage 0 and --vision_model_name take; LoRA is merged
            folder/slide_encoder/          or what --slide_encoder of encode_slides.py takes
            folder/text_encoder/           where it learned
        """
        folder = Path(folder)
        temporary = folder.with_name(folder.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        said = {"format_version": FORMAT_VERSION} | asdict(self.settings)
        (temporary / SETTINGS_FILE).write_text(json.dumps(said, indent=2) + "\n")
        save_file(self._space(), temporary / SPACE_FILE, metadata={"format": "pt"})
        if isinstance(self.image, ImageEncoder):
            worn, self.image.backbone = self.image.backbone, merged(self.image.backbone)
            try:
                self.image.save_pretrained(temporary / IMAGE_FOLDER)
            finally:
                self.image.backbone = worn
        else:
            save_slide_encoder(self.image, temporary / SLIDE_FOLDER)
        if learns(self.text):
            self.text.save_pretrained(temporary / TEXT_FOLDER, merged(self.text.backbone))
        outdated = folder.with_name(folder.name + ".outdated")
        shutil.rmtree(outdated, ignore_errors=True)
        if folder.exists():
            os.replace(folder, outdated)
        os.replace(temporary, folder)
        shutil.rmtree(outdated, ignore_errors=True)

    def _space(self) -> dict[str, Tensor]:
        """Projections and temperature, by name."""
        names = ("image_projection.weight", "text_projection.weight", "log_scale", "bias")
        state = self.state_dict()
        return {name: state[name].detach().cpu().contiguous() for name in names if name in state}

    def load_space(self, weights: dict[str, Tensor]) -> None:
        """Give projections and temperature their weights.

        Raises:
            ValueError: names or shapes differ.
        """
        own = self._space()
        for name in sorted(own.keys() | weights.keys()):
            if name not in own or name not in weights or own[name].shape != weights[name].shape:
                raise ValueError(f"{SPACE_FILE} does not fit {SETTINGS_FILE} at {name}; copy the folder again")
        self.load_state_dict(weights, strict=False)


def learns(module: nn.Module) -> bool:
    """Whether any weight of it learns."""
    return any(parameter.requires_grad for parameter in module.parameters())


def load_alignment(folder: str | Path) -> AlignmentModel:
    """Open what :meth:`AlignmentModel.save` wrote, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is of a later version, or the text model it names has changed.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"{folder}: no {SETTINGS_FILE} there; give a final_model of train_contrastive.py")
    said = json.loads((folder / SETTINGS_FILE).read_text())
    if said.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(f"{folder / SETTINGS_FILE}: of another version of this project; open it with that version")
    unknown = set(said) - {each.name for each in fields(AlignmentSettings)}
    if unknown:
        raise ValueError(f"{folder / SETTINGS_FILE}: unknown {', '.join(sorted(unknown))}; copy the folder again")
    settings = AlignmentSettings(**said)
    own_text = folder / TEXT_FOLDER
    text = load_text_encoder(own_text if own_text.is_dir() else settings.text_model, settings.text_pooling)
    if not own_text.is_dir() and text_fingerprint(text) != settings.text_fingerprint:
        raise ValueError(f"{settings.text_model} has other weights than when {folder} was trained on it; put them back")
    if settings.input_kind == "images":
        image = load_encoder(folder / IMAGE_FOLDER)
        width = image.width
    else:
        image = load_slide_encoder(folder / SLIDE_FOLDER)
        width = image.width or settings.features_made["patch_width"]
    model = AlignmentModel(image, text, settings, width)
    model.load_space(load_file(folder / SPACE_FILE))
    return model.requires_grad_(False).eval()


def text_fingerprint(text: TextEncoder) -> str:
    """16 hex digits of a text encoder's weights and pooling."""
    return weights_fingerprint(text.backbone.state_dict(), text.pooling)


@torch.no_grad()
def take_joint_space(model: AlignmentModel, name: str) -> bool:
    """Give projections and temperature of a published CLIP or SigLIP to a model of its two towers.

    Args:
        model: of one space width with the checkpoint: without projections for SigLIP.
        name: hub name or folder of both towers.

    Returns:
        Whether the checkpoint has them.
    """
    from transformers import AutoConfig, AutoModel

    if AutoConfig.from_pretrained(name, trust_remote_code=False).model_type not in ("clip", "siglip", "siglip2"):
        return False
    joint = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
    if hasattr(joint, "visual_projection"):
        model.image_projection.weight.copy_(joint.visual_projection.weight)
        model.text_projection.weight.copy_(joint.text_projection.weight)
    model.log_scale.copy_(joint.logit_scale.reshape(()))
    if hasattr(joint, "logit_bias") and model.settings.loss in SIGMOID:
        model.bias.copy_(joint.logit_bias.reshape(()))
    return True


def joint_width(name: str) -> int | None:
    """D of a published CLIP or SigLIP; 0 where its towers have no projections, None if it is neither."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return {"clip": getattr(config, "projection_dim", None), "siglip": 0, "siglip2": 0}.get(config.model_type)
