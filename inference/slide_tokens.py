"""The encoders that a model's features were made with: of tiles, and where one followed, of the slide."""

from collections.abc import Callable

import torch

from encoders import load_encoder
from image_encoder import ImageEncoder
from slide_features import SlideFeatures
from stage0_tiling.slide_tokens import encode_features, encoders_named, stated_encoder
from vlm_loading import check_encoder
from vlm_settings import VLMSettings


def reads_tiles(settings: VLMSettings) -> bool:
    """Whether the model's patch tokens are of tiles; tokens of the slide as a whole belong to none."""
    _, slide_name, tokens = encoders_named(settings.encoder or "")
    return slide_name is None or tokens == "all"


def check_has_tiles(settings: VLMSettings, folder: str) -> None:
    """Refuse to look for the tiles that a report rests on where there are none.

    Raises:
        ValueError: the model is given tokens of the whole slide.
    """
    if not reads_tiles(settings):
        raise ValueError(
            f"{folder} reads tokens of the whole slide, behind which no evidence can be told apart by tiles; train on "
            "tiles, or on encode_slides.py --tokens all"
        )


def load_encoders(
    settings: VLMSettings, device: torch.device | str, given: str | None = None
) -> tuple[ImageEncoder, Callable[[SlideFeatures], SlideFeatures]]:
    """Open the encoders that a new slide is given, as `settings` or the user name them.

    Args:
        settings: of the model.
        device: where they run.
        given: the tile encoder's name or folder now, or both as a feature file states them; None as in training.

    Returns:
        The tile encoder, and what makes the model's features of those of the tiles, which must be in raster order.

    Raises:
        ValueError: one of them is not what the model was trained with, or cannot be opened.
    """
    name, slide_name, tokens = encoders_named(given or settings.encoder)
    if given and slide_name is None and settings.encoder:
        _, slide_name, tokens = encoders_named(settings.encoder)
    if slide_name is None:
        encoder = load_encoder(name).to(device)
        check_encoder(encoder, settings)
        return encoder, lambda tiles: tiles

    from slide_encoders import load_slide_encoder
    from stage0_tiling.tile_encoder import choose_dtype

    slide_encoder = load_slide_encoder(slide_name).to(device)
    encoder = load_encoder(name).to(device)
    _, found = stated_encoder(name, encoder.fingerprint(), slide_encoder, tokens)
    if settings.encoder_fingerprint and found != settings.encoder_fingerprint:
        raise ValueError(
            f"{name} and {slide_name}: their weights are not those that this model was trained with "
            f"({settings.encoder}); encode the slide with stage0_tiling/encode.py and encode_slides.py and give "
            "--features, or name the right ones with --vision_model_name 'TILE_ENCODER + SLIDE_ENCODER'"
        )
    dtype = choose_dtype(None, torch.device(device))

    def to_slide_tokens(tiles: SlideFeatures) -> SlideFeatures:
        return encode_features(tiles, slide_encoder, tokens=tokens, dtype=dtype)

    return encoder, to_slide_tokens
