"""The classifier: an image encoder or gated attention over a bag, and a linear head a label.

Shapes: B examples, L labels, C classes of all labels together, D width of the encoder.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from encoder_lora import merged_encoder
from encoders import load_encoder
from image_encoder import ImageEncoder
from run_checkpoints import delete_folder
from slide_encoders import GatedAttention, save_slide_encoder
from stage0_encoder.labels import UNLABELLED

OWN_NETWORKS = ("vit", "cnn")


class Classifier(nn.Module):
    """Encoder and head.

    Attributes:
        encoder: an `ImageEncoder`, or `GatedAttention` for bags.
        head: linear, to the logits of all labels one after the other.
        class_names: the classes of each label.
        average: moving average of this classifier, or None; not a part of it, but checkpoints hold it.
    """

    def __init__(
        self,
        encoder: ImageEncoder | GatedAttention,
        class_names: dict[str, list[str]],
        *,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[Tensor] | None = None,
        mixup: Any = None,
    ):
        """Make it with a head of zero bias.

        Args:
            encoder: of pictures or bags.
            class_names: the classes of each label.
            dropout: of the encoder's vector.
            label_smoothing: of the training loss.
            class_weights: of each label's classes in the training loss, (classes,) each.
            mixup: `timm.data.Mixup` of the training pictures, or None.
        """
        super().__init__()
        self.encoder = encoder
        self.class_names = class_names
        self.sizes = [len(names) for names in class_names.values()]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.width, sum(self.sizes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        weights = torch.cat(list(class_weights)) if class_weights else torch.ones(sum(self.sizes))
        self.register_buffer("class_weights", weights, persistent=False)
        self.__dict__["average"] = None

    def begin_average(self, decay: float) -> None:
        """Keep a moving average of the weights from here on (timm's ModelEmaV3); a decay of 0 keeps none."""
        self.__dict__["average"] = ModelEmaV3(self, decay=decay, use_warmup=True) if decay else None

    def update_average(self, step: int) -> None:
        """Take the weights after an optimizer step into the average, if there is one."""
        if self.average is not None:
            self.average.update(self, step=step)

    @property
    def result(self) -> "Classifier":
        """What is evaluated and saved: the average, or the classifier itself."""
        return self if self.average is None else self.average.module

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether nothing of the encoder learns."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode; a frozen encoder stays in evaluation mode, so that its running statistics stay too."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits of each label, (B, classes of it) each."""
        if "pixels" in batch:
            encoded = self.encoder.encode_tiles(batch["pixels"])
        else:
            places = batch["features"].new_zeros((*batch["features"].shape[:2], 2))
            encoded = self.encoder(batch["features"], places, batch["patch_mask"])[:, 0]
        return self.head(self.dropout(encoded.to(self.head.weight.dtype))).split(self.sizes, dim=1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each example and label, (L * B,), zero where there is no label.

        In training labels are mixed with their pictures, smoothed and weighted; in evaluation they are as they are.
        """
        mixing = self._mix(batch) if self.training and self.mixup is not None and "pixels" in batch else None
        losses = []
        weights = self.class_weights.split(self.sizes)
        for number, logits in enumerate(self.logits(batch)):
            labels = batch["labels"][:, 1 + number]
            targets = nn.functional.one_hot(labels.clamp(min=0), self.sizes[number]).float()
            targets = targets * (labels != UNLABELLED)[:, None]
            if self.training:
                targets = targets if mixing is None else mixing @ targets
                stated = targets.sum(dim=1, keepdim=True)
                smooth = self.label_smoothing
                targets = (targets * (1 - smooth) + smooth * stated / self.sizes[number]) * weights[number]
            losses.append(-(targets * logits.float().log_softmax(dim=1)).sum(dim=1))
        return torch.cat(losses)

    def _mix(self, batch: dict[str, Tensor]) -> Tensor:
        """Mix the pictures in place; how much of each example's labels each example now has, (B, B)."""
        pixels = batch["pixels"]
        num_even = len(pixels) // 2 * 2  # timm mixes pairs
        mixing = torch.eye(len(pixels), device=pixels.device)
        if num_even:
            self.mixup.num_classes = num_even  # the class of each picture is its place
            _, mixed = self.mixup(pixels[:num_even], torch.arange(num_even, device=pixels.device))
            mixing[:num_even, :num_even] = mixed.to(mixing.dtype)
        return mixing

    def learned_state(self) -> dict[str, Tensor]:
        """What changes in training, by name: weights, running statistics, and the moving average of both."""
        fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        if self.encoder_is_frozen:
            fixed |= {f"encoder.{name}" for name, _ in self.encoder.named_buffers()}
        own = {name: value for name, value in self.state_dict().items() if name not in fixed}
        if self.average is None:
            return own
        averaged = self.average.module.state_dict()
        return own | {f"average.{name}": averaged[name] for name in own}

    def save(self, folder: Path) -> None:
        """Write a result folder, whole or not at all.

        ::

            folder/config.json              timm's layout (or a slide encoder's, for bags): --encoder and
            folder/model.safetensors        --vision_model_name take the folder as it is; LoRA is merged
            folder/classifier.json          the classes of each label
            folder/classifier.safetensors   head.weight (C, D), head.bias (C,)
        """
        temporary = folder.with_name(folder.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if isinstance(self.encoder, GatedAttention):
            save_slide_encoder(self.encoder, temporary)
        else:
            merged_encoder(self.encoder).save_pretrained(temporary)
        head = {f"head.{name}": value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        save_file(head, temporary / "classifier.safetensors", metadata={"format": "pt"})
        (temporary / "classifier.json").write_text(json.dumps({"class_names": self.class_names}, indent=2) + "\n")
        delete_folder(folder)
        temporary.rename(folder)


def own_vit(*, image_size: int, patch_size: int, width: int, depth: int, num_heads: int) -> ImageEncoder:
    """A `timm.models.VisionTransformer` of these sizes with random weights.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if image_size % patch_size:
        raise ValueError(f"--image_size {image_size} is no multiple of --vit_patch_size {patch_size}")
    if width % num_heads:
        raise ValueError(f"--vit_width {width} is no multiple of --vit_heads {num_heads}")
    sizes = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width}
    sizes |= {"depth": depth, "num_heads": num_heads}
    return load_encoder(
        "vit_tiny_patch16_224", pretrained=False, model_args={**sizes, **_input_size(image_size), "global_pool": "avg"}
    )


def own_cnn(*, image_size: int, width: int, depths: Sequence[int]) -> ImageEncoder:
    """A `timm.models.ResNet` of basic blocks with a deep stem and random weights.

    Args:
        image_size: side of a picture in pixels.
        width: channels of the first stage, doubled in each later one.
        depths: blocks of each of the four stages.

    Raises:
        ValueError: there are not four stages.
    """
    if len(depths) != 4:
        raise ValueError(f"--cnn_depths {' '.join(map(str, depths))}: timm's ResNet has four stages; give four numbers")
    sizes = {"layers": list(depths), "channels": [width * 2**stage for stage in range(len(depths))]}
    sizes |= {"stem_width": max(1, width // 2), "stem_type": "deep"}
    return load_encoder("resnet18", pretrained=False, model_args={**sizes, **_input_size(image_size)})


def _input_size(image_size: int) -> dict[str, Any]:
    size = {"input_size": (3, image_size, image_size), "test_input_size": None, "interpolation": "bicubic"}
    whole_picture = {"crop_pct": 1.0, "test_crop_pct": None}
    of_other_weights = {"tag": "", "license": "", "hf_hub_id": None, "origin_url": None, "paper_ids": None}
    return {"pretrained_cfg_overlay": size | whole_picture | of_other_weights}


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights of classes by their rarity, (num_classes,): every class weighs the same in a loss over ``labels`` (N,).

    They are scikit-learn's ``balanced``: N / (classes * examples of the class).
    """
    counts = torch.bincount(labels[labels != UNLABELLED], minlength=num_classes).clamp(min=1)
    return (labels != UNLABELLED).sum() / (num_classes * counts).float()
