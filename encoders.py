"""Image encoders by name: presets, timm, the hub, local folders.

    encoder = load_encoder("virchow2")                          a preset, timm name, hub name or local folder
    pixels_B3HW = torch.stack([encoder.transform(tile) for tile in tiles])
    encoder.encode_tiles(pixels_B3HW)                           (B, D): one patch token per tile, for slides
    encoder.encode_patches(pixels_B3HW)                         (B, N, D): the patch tokens of an image

B images, N patch tokens of one image, D width, H and W pixels. `image_encoder` is what all of them are behind.
"""

import difflib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from encoder_presets import EncoderPreset, find_preset, preset_names
from hub_access import explained
from image_encoder import ImageEncoder

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
SLIDE_ENCODER_MARK = " + "  # between tile and slide encoder in the `encoder` of a file of slide tokens


def load_encoder(
    name_or_path: str | Path, *, pretrained: bool = True, model_args: dict[str, Any] | None = None
) -> ImageEncoder:
    """Open an image encoder, in eval mode on the CPU.

    Args:
        name_or_path: a preset (`virchow2`; `docs/encoders.md` lists them), a timm name
            (`vit_small_patch14_dinov2.lvd142m`), a hub name (`hf-hub:org/name` or `org/name`; a preset's settings apply
            to its hub name too), `preset=FILE` for a preset's weights in a file that was downloaded by hand
            (`ctranspath=ctranspath.pth`), or a folder in timm's layout (config.json has `architecture`) or
            transformers' (config.json has `model_type`).
        pretrained: False leaves the weights random; nothing is downloaded for a timm name or a folder.
        model_args: further arguments of `timm.create_model`, e.g. `{"img_size": 128, "depth": 4}`; of transformers
            models only presets without weights take them, as fields of the configuration.

    Raises:
        ValueError: if the name is unknown (with the nearest known ones) or the folder is in neither layout.
        FileNotFoundError: if the folder or hub repository does not exist.
        PermissionError: if the hub repository is gated and access was not granted.
        ConnectionError: if weights are neither here nor reachable.
    """
    name = str(name_or_path)
    if SLIDE_ENCODER_MARK in name and not Path(name).is_dir():
        raise ValueError(
            f"{name} are a tile encoder and a slide encoder: give the first to stage0_tiling/encode.py and the second "
            "to stage0_tiling/encode_slides.py, and go on with the feature files of the latter"
        )
    name, weights_path = _split_weights(name)
    preset = find_preset(name)
    folder = Path(name).expanduser()
    if weights_path is not None:
        encoder = _build_timm_preset(preset, "", pretrained, model_args or {}, weights_path)
        encoder.preset = preset
        return encoder
    if folder.is_dir() and (preset is None or (folder / "config.json").is_file()):
        return _load_folder(folder.absolute(), pretrained, model_args or {})
    if name.startswith(("/", ".", "~")) or folder.is_file():
        raise FileNotFoundError(f"no encoder folder {name}: give a folder that holds config.json and model.safetensors")
    repository = preset.repository if preset is not None else _without_prefix(name).partition("@")[0]
    licence, gated = (preset.licence, preset.gated) if preset is not None else (None, False)
    with explained(f"encoder {name}", repository, licence=licence, gated=gated):
        encoder = _load_name(name, preset, pretrained, model_args or {})
    encoder.preset = preset
    return encoder


def _split_weights(name: str) -> tuple[str, Path | None]:
    """A preset's name and the file of its weights, of `preset=FILE`; other names as they are."""
    preset_name, _, file = name.partition("=")
    preset = find_preset(preset_name)
    if not file or preset is None:
        return name, None
    if preset.library != "timm" or preset.is_timm_name:
        raise ValueError(
            f"encoder {name}: {preset.name} takes no file of weights; give a folder that holds config.json"
        )
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(
            f"encoder {name}: no file {path}; it is the {preset.weights_file or 'weights'} of {preset.url}"
        )
    return preset_name, path


def _load_name(name: str, preset: EncoderPreset | None, pretrained: bool, model_args: dict[str, Any]) -> ImageEncoder:
    hub_name = _without_prefix(name)
    if preset is not None and not preset.is_timm_name:
        build = _build_timm_preset if preset.library == "timm" else _build_transformers_preset
        return build(preset, hub_name.partition("@")[2], pretrained, model_args)
    if name.startswith(HUB_PREFIXES) or "/" in name:
        return _load_hub(hub_name, pretrained, model_args)
    return _load_timm_name(name, pretrained, model_args)


def _without_prefix(name: str) -> str:
    return name.removeprefix(HUB_PREFIXES[0]).removeprefix(HUB_PREFIXES[1])


def _load_folder(folder: Path, pretrained: bool, model_args: dict[str, Any]) -> ImageEncoder:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"no config.json in encoder folder {folder}: save one with timm or transformers")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise ValueError(f"{config_path} is no JSON ({error}): copy or save the encoder again") from error
    token_pooling = config.get("token_pooling")
    if "architecture" in config:
        return _build_timm(f"local-dir:{folder}", str(folder), pretrained, model_args, token_pooling)
    if "model_type" in config:
        return _build_transformers(str(folder), pretrained, token_pooling=token_pooling)
    raise ValueError(f"{config_path} names neither `architecture` (timm) nor `model_type` (transformers)")


def _load_hub(name: str, pretrained: bool, model_args: dict[str, Any]) -> ImageEncoder:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    config = json.loads(Path(hf_hub_download(repository, "config.json", revision=revision or None)).read_text())
    if "architecture" in config:
        return _build_timm(f"hf-hub:{name}", f"hf-hub:{name}", pretrained, model_args)
    if "model_type" in config:
        return _build_transformers(repository, pretrained, revision or None)
    raise ValueError(f"config.json of {name} names neither `architecture` (timm) nor `model_type` (transformers)")


def _load_timm_name(name: str, pretrained: bool, model_args: dict[str, Any]) -> ImageEncoder:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(
            name, [*preset_names(), *timm.list_models(), *timm.list_pretrained()], n=4, cutoff=0.5
        )
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all"
        raise ValueError(f"unknown encoder {name}: {hint}")
    if pretrained and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(
            f"encoder {name} has no published weights" + (f"; {architecture} has {', '.join(tags)}" if tags else "")
        )
    return _build_timm(name, name, pretrained, model_args)


def _build_timm_preset(
    preset: EncoderPreset,
    revision: str,
    pretrained: bool,
    model_args: dict[str, Any],
    weights_path: Path | None = None,
) -> ImageEncoder:
    arguments = {"num_classes": 0, **preset.arguments, **model_args}
    config = {
        "source": "hf-hub",
        "hf_hub_id": f"{preset.repository}@{revision}" if revision else preset.repository,
        "hf_hub_filename": preset.weights_file,
        "num_classes": arguments["num_classes"],
        "classifier": "head",
        "first_conv": "patch_embed.proj",
        "input_size": (3, preset.input_size, preset.input_size),
        "interpolation": preset.interpolation,
        "crop_pct": preset.crop_pct,
        "mean": preset.mean,
        "std": preset.std,
        "license": preset.licence,
    }
    name = f"hf-hub:{config['hf_hub_id']}"
    if weights_path is not None:
        config |= {"source": "file", "file": str(weights_path)}
        name = f"{preset.name}={weights_path}"
    arguments["pretrained_cfg"] = config
    return _build_timm(preset.architecture, name, pretrained, arguments, preset.token_pooling)


def _build_timm(
    source: str, name: str, pretrained: bool, model_args: dict[str, Any], token_pooling: str | None = None
) -> ImageEncoder:
    import timm
    from timm.data import create_transform
    from timm.data.model_config import resolve_input_data_config

    import encoder_backbones  # noqa: F401 - registers its architectures with timm

    headless = {} if token_pooling == "projection" else {"num_classes": 0}
    try:
        model = timm.create_model(source, pretrained=pretrained, **{**headless, **model_args})
    except (RuntimeError, TypeError, pickle.UnpicklingError, SafetensorError) as error:
        if isinstance(error, hub_errors.HfHubHTTPError):
            raise
        raise ValueError(f"encoder {name} cannot be built: {str(error).splitlines()[0]}") from error
    # as resolve_data_config, which it calls, but it also sees an image size that was set when the model was made
    settings = resolve_input_data_config(model)
    return ImageEncoder(
        model,
        create_transform(**settings, is_training=False),
        name=name,
        image_size=settings["input_size"][-1],
        mean=settings["mean"],
        std=settings["std"],
        token_pooling=token_pooling,
    )


def _build_transformers_preset(
    preset: EncoderPreset, revision: str, pretrained: bool, model_args: dict[str, Any]
) -> ImageEncoder:
    """Build a model of transformers itself, whatever code its repository names."""
    from transformers import AutoConfig, CLIPImageProcessor
    from transformers.image_utils import PILImageResampling

    where = {"revision": revision or None, "trust_remote_code": False}
    with _hub_causes(preset.repository):
        published = _published_fields(preset.repository, where) if pretrained else {}
        config = AutoConfig.for_model(preset.architecture, **{**preset.arguments, **published, **model_args})
        model = _transformers_model(preset.repository, config, pretrained, preset.token_pooling, where)
    processor = CLIPImageProcessor(
        size={"shortest_edge": round(preset.input_size / preset.crop_pct)},
        crop_size={"height": preset.input_size, "width": preset.input_size},
        resample=PILImageResampling[preset.interpolation.upper()],
        image_mean=list(preset.mean),
        image_std=list(preset.std),
    )
    name = f"{preset.repository}@{revision}" if revision else preset.repository
    return _wrap_transformers(model, processor, name, preset.token_pooling)


def _published_fields(repository: str, where: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the image model from the repository's config.json, without what would choose other code or heads."""
    from transformers import PreTrainedConfig

    published, _ = PreTrainedConfig.get_config_dict(repository, **where)
    published = published.get("vision_config") or published
    unwanted = {"model_type", "auto_map", "architectures", "transformers_version", "_name_or_path", "projection_dim"}
    return {key: value for key, value in published.items() if key not in unwanted}


def _build_transformers(
    source: str, pretrained: bool, revision: str | None = None, token_pooling: str | None = None
) -> ImageEncoder:
    from transformers import AutoConfig, AutoImageProcessor

    where = {"revision": revision, "trust_remote_code": False}
    with _hub_causes(source):
        config = AutoConfig.from_pretrained(source, **where)
        config = getattr(config, "vision_config", config)  # the vision tower of CLIP, SigLIP, ...
        processor = AutoImageProcessor.from_pretrained(source, **where)
        model = _transformers_model(source, config, pretrained, token_pooling, where)
    return _wrap_transformers(model, processor, source, token_pooling)


def _transformers_model(
    source: str, config: Any, pretrained: bool, token_pooling: str | None, where: dict[str, Any]
) -> nn.Module:
    from transformers import AutoModel, CLIPVisionModelWithProjection

    projects = token_pooling == "projection"
    if not pretrained:
        return CLIPVisionModelWithProjection(config) if projects else AutoModel.from_config(config)
    open_model = CLIPVisionModelWithProjection.from_pretrained if projects else AutoModel.from_pretrained
    model, info = open_model(source, config=config, output_loading_info=True, **where)
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(f"encoder {source} lacks {len(missing)} weights, e.g. {missing[0]}: not a vision model?")
    return model


def _wrap_transformers(model: nn.Module, processor: Any, name: str, token_pooling: str | None) -> ImageEncoder:
    return ImageEncoder(
        model,
        partial(_process, processor),
        name=name,
        image_size=_processor_size(processor),
        mean=processor.image_mean,
        std=processor.image_std,
        processor=processor,
        token_pooling=token_pooling,
    )


@contextmanager
def _hub_causes(source: str) -> Iterator[None]:
    """Let the hub's own errors out of transformers' OSError; others become one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, hub_errors.HfHubHTTPError):
            raise
        if isinstance(error.__cause__, hub_errors.HfHubHTTPError | hub_errors.LocalEntryNotFoundError):
            raise error.__cause__ from error
        raise ValueError(f"encoder {source} cannot be opened: {str(error).splitlines()[0]}") from error


def _process(processor: Any, image: Image.Image) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _processor_size(processor: Any) -> int:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size.get("height") or size.get("shortest_edge")
