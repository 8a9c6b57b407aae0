"""Slide encoders: the features of a slide's tiles to slide tokens.

    encoder = load_slide_encoder("gigapath")                  mean, max, gigapath, a checkpoint or a saved folder
    cells_BN2 = tile_cells(coords_BN2, patch_size_level0)
    encoder(features_BND, cells_BN2, tile_mask_BN)            (B, K, E): K slide tokens per slide

An encoder is a module with `encoder(features_BND, cells_BN2, tile_mask_BN=None, *, tokens="slide") -> (B, K, E)`, with
`name`, `input_width` (D, None if it takes any), `width` (E, None if it is D) and `arguments`, what it was made with.
`tokens="all"` asks for every tile seen in its slide, (B, N, E), which only LongNet gives.

Shapes: B slides, N tiles, D width of the features, K slide tokens, E their width.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hub_access import explained
from image_encoder import weights_fingerprint
from longnet import LongNet

FORMAT_VERSION = 1
GIGAPATH = ("prov-gigapath/prov-gigapath", "slide_encoder.pth")
GIGAPATH_NAMES = ("gigapath", "prov-gigapath", "hf-hub:prov-gigapath/prov-gigapath", "prov-gigapath/prov-gigapath")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class TilePool(nn.Module):
    """One slide token: the mean or the maximum of each feature over the tiles. It has no weights."""

    def __init__(self, kind: str):
        """Pool by `mean` or `max`."""
        super().__init__()
        if kind not in ("mean", "max"):
            raise ValueError(f"unknown pooling {kind}, expected mean or max")
        self.kind = self.name = kind
        self.input_width = self.width = None
        self.arguments = {"kind": kind}

    def forward(
        self, features: Tensor, cells: Tensor, tile_mask: Tensor | None = None, *, tokens: str = "slide"
    ) -> Tensor:
        """Turn (B, N, D) into (B, 1, D) float32; `cells` is not looked at."""
        check_tokens(self, tokens)
        features, mask_BN1 = features.float(), _real(features, tile_mask)[..., None]
        if self.kind == "max":
            return features.masked_fill(~mask_BN1, -torch.inf).amax(dim=1, keepdim=True)
        return features.masked_fill(~mask_BN1, 0).sum(dim=1, keepdim=True) / mask_BN1.sum(dim=1, keepdim=True)


class GatedAttention(nn.Module):
    """Gated-attention pooling of tiles (Ilse et al. 2018, arXiv:1802.04712, equation 9), in CLAM's layout.

    Tiles are projected and passed through a ReLU; `num_tokens` attention branches, each with a softmax over the tiles,
    give as many slide tokens. One branch is ABMIL and CLAM_SB, several are CLAM_MB (Lu et al. 2021).
    """

    def __init__(
        self,
        input_width: int,
        width: int = 512,
        *,
        attention_width: int = 256,
        num_tokens: int = 1,
        dropout: float = 0.25,
    ):
        """Make it with random weights.

        Args:
            input_width: D.
            width: E.
            attention_width: hidden width of the attention network.
            num_tokens: K.
            dropout: of projected tiles and of both halves of the attention network, while training.
        """
        super().__init__()
        self.name = "abmil"
        self.input_width = input_width
        self.width = width
        self.arguments = {
            "input_width": input_width,
            "width": width,
            "attention_width": attention_width,
            "num_tokens": num_tokens,
            "dropout": dropout,
        }
        self.projection = nn.Linear(input_width, width)
        self.attention_a = nn.Linear(width, attention_width)
        self.attention_b = nn.Linear(width, attention_width)
        self.attention_c = nn.Linear(attention_width, num_tokens)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, features: Tensor, cells: Tensor, tile_mask: Tensor | None = None, *, tokens: str = "slide"
    ) -> Tensor:
        """Turn (B, N, D) into (B, K, E); `cells` is not looked at."""
        check_tokens(self, tokens)
        projected = self._project(features)
        return self._weights(projected, _real(features, tile_mask)) @ projected

    def attention(self, features: Tensor, tile_mask: Tensor | None = None) -> Tensor:
        """How much each slide token heeds each tile, (B, K, N), of sum 1 over the tiles."""
        return self._weights(self._project(features), _real(features, tile_mask))

    def _project(self, features: Tensor) -> Tensor:
        return self.dropout(self.projection(features.to(self.projection.weight.dtype)).relu())

    def _weights(self, projected: Tensor, mask_BN: Tensor) -> Tensor:
        content = self.dropout(self.attention_a(projected).tanh())
        gate = self.dropout(self.attention_b(projected).sigmoid())
        scores_BKN = self.attention_c(content * gate).transpose(1, 2)
        return scores_BKN.masked_fill(~mask_BN[:, None], -torch.inf).softmax(dim=-1)


SLIDE_ENCODERS = {"pool": TilePool, "abmil": GatedAttention, "longnet": LongNet}


def tile_cells(coords: Tensor, patch_size_level0: int) -> Tensor:
    """Places of tiles in a grid of tiles: (..., 2) int64 from level-0 pixels (x, y) and the side of a tile in them.

    Prov-GigaPath divides by 256 px whatever the slide's resolution; its slides were read at level 0. Dividing by the
    side of a tile is the same there, and makes neighbours of neighbouring tiles on slides of any resolution.
    """
    return coords.div(patch_size_level0, rounding_mode="floor").long()


def load_slide_encoder(name_or_path: str | Path) -> nn.Module:
    """Open a slide encoder, in eval mode on the CPU.

    Args:
        name_or_path: `mean` or `max`; `gigapath`, Prov-GigaPath's LongNet from the hub (gated); a folder of
            `save_slide_encoder`; or a checkpoint in the layout of Prov-GigaPath or of CLAM.

    Returns:
        The encoder, with a `name`: what this function was given, a path made absolute.

    Raises:
        ValueError: if the name is unknown, or the weights are of none of these layouts.
        FileNotFoundError: if there is no such file or folder.
        PermissionError: if Prov-GigaPath's terms were not accepted yet.
        ConnectionError: if weights are neither here nor reachable.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in ("mean", "max"):
        encoder = TilePool(name)
    elif path.is_dir():
        encoder, name = _load_folder(path), str(path.absolute())
    elif path.is_file():
        encoder, name = _load_checkpoint(path), str(path.absolute())
    elif name.lower() in GIGAPATH_NAMES:
        encoder, name = _load_checkpoint(_download(*GIGAPATH)), "gigapath"
    elif name.lower() in ("abmil", "clam"):
        raise ValueError(
            f"slide encoder {name} has no published weights: give a folder of save_slide_encoder or CLAM's checkpoint"
        )
    elif name.startswith(("/", ".", "~")) or path.suffix in CHECKPOINT_SUFFIXES:
        raise FileNotFoundError(f"no slide encoder {name}: no such file or folder")
    else:
        raise ValueError(f"unknown slide encoder {name}: expected mean, max, gigapath, a folder or a checkpoint")
    encoder.name = name
    return encoder.eval()


def save_slide_encoder(encoder: nn.Module, folder: str | Path) -> None:
    """Save config.json and model.safetensors, which `load_slide_encoder(folder)` opens again with equal outputs."""
    from safetensors.torch import save_file

    kind = next((kind for kind, made_as in SLIDE_ENCODERS.items() if type(encoder) is made_as), None)
    assert kind is not None, f"{type(encoder).__name__} is no slide encoder of ours"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"slide_encoder": kind, "arguments": encoder.arguments, "format_version": FORMAT_VERSION}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def slide_fingerprint(encoder: nn.Module) -> str:
    """16 hex digits that tell a retrained slide encoder apart: of its weights and of what it was made with."""
    return weights_fingerprint(encoder.state_dict(), json.dumps(encoder.arguments, sort_keys=True))


def _load_folder(folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"no {needed} in slide encoder folder {folder}: save one with save_slide_encoder")
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("slide_encoder")
    if kind not in SLIDE_ENCODERS:
        raise ValueError(f"{folder / 'config.json'} names slide encoder {kind}, not {', '.join(SLIDE_ENCODERS)}")
    return _filled(SLIDE_ENCODERS[kind](**config["arguments"]), load_file(folder / "model.safetensors"), folder)


def _load_checkpoint(path: Path) -> nn.Module:
    weights = _read_weights(path)
    if "cls_token" in weights and "patch_embed.proj.weight" in weights:
        return _filled(LongNet(**_longnet_sizes(weights)), weights, path)
    if "attention_net.0.weight" in weights:
        weights = _clam_names(weights, path)
        sizes = {
            "input_width": weights["projection.weight"].shape[1],
            "width": weights["projection.weight"].shape[0],
            "attention_width": weights["attention_a.weight"].shape[0],
            "num_tokens": weights["attention_c.weight"].shape[0],
        }
        return _filled(GatedAttention(**sizes), weights, path)
    raise ValueError(f"{path} holds neither Prov-GigaPath's LongNet nor an attention network of CLAM")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data that training scripts leave beside
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not the weights of a slide encoder")
    return {key.removeprefix("module."): value for key, value in stored.items() if isinstance(value, Tensor)}


def _longnet_sizes(weights: dict[str, Tensor]) -> dict[str, Any]:
    width, input_width = weights["patch_embed.proj.weight"].shape
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
    hidden = weights.get("encoder.layers.0.ffn.fc1.weight")
    return {
        "input_width": input_width,
        "width": width,
        "depth": len(layers),
        "feed_forward_width": None if hidden is None else hidden.shape[0],
    }


def _clam_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """CLAM's attention network under our names; its classifiers are left out."""
    names = {"attention_net.0.": "projection."}
    for place in ("attention_net.2.", "attention_net.3."):  # with dropout in front of it or not
        names |= {f"{place}attention_{half}.0.": f"attention_{half}." for half in "ab"}
        names[f"{place}attention_c."] = "attention_c."
    renamed = {}
    for key, value in weights.items():
        old = next((old for old in names if key.startswith(old)), None)
        if old is not None:
            renamed[key.replace(old, names[old], 1)] = value
    if "attention_b.weight" not in renamed:
        raise ValueError(f"{path} holds an attention network without a gate: train CLAM with its default, gate=True")
    return renamed


def _filled(encoder: nn.Module, weights: dict[str, Tensor], source: Path) -> nn.Module:
    """The encoder with these weights; those of a decoder that pretraining needed are left out."""
    expected = encoder.state_dict()
    missing = sorted(set(expected) - set(weights))
    spare = [key for key in set(weights) - set(expected) if not key.startswith(("decoder", "mask_token", "pos_embed"))]
    misshapen = sorted(key for key in expected if key in weights and weights[key].shape != expected[key].shape)
    for what, keys in (("lacks", missing), ("has unknown", sorted(spare)), ("has misshapen", misshapen)):
        if keys:
            raise ValueError(f"slide encoder {source} {what} {len(keys)} weights, e.g. {keys[0]}")
    encoder.load_state_dict({key: weights[key] for key in expected})
    return encoder


def _download(repository: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    with explained("slide encoder gigapath", repository, licence="apache-2.0 with conditions", gated=True):
        return Path(hf_hub_download(repository, filename))


def check_tokens(encoder: nn.Module, tokens: str) -> None:
    """Refuse what a slide encoder does not give.

    Raises:
        ValueError: if `tokens` is not `slide`, and the encoder is no LongNet.
    """
    if tokens != "slide" and not isinstance(encoder, LongNet):
        raise ValueError(f"slide encoder {encoder.name} gives slide tokens only, not tokens {tokens}: use LongNet")


def _real(features: Tensor, tile_mask: Tensor | None) -> Tensor:
    """(B, N) boolean mask of real tiles, of which every slide has one."""
    if tile_mask is None:
        tile_mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if not tile_mask.any(dim=1).all():
        raise ValueError("a slide without tiles cannot be encoded")
    return tile_mask
