"""Opening the result folder of a training stage as a :class:`slide_vlm.SlideVLM`, every part checked against it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from command_line import first_line
from encoders import load_encoder
from four_bit import FourBit, dequantize, quantize
from image_encoder import ImageEncoder
from language_model import fingerprint, load_llm, load_tokenizer
from slide_vlm import SlideVLM
from vlm_settings import VLMSettings


def load_vlm(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    llm_name: str | None = None,
    encoder_name: str | None = None,
    four_bit: FourBit | None = None,
    dequantized: bool = False,
    ple_device: str = "model",
) -> tuple[SlideVLM, PreTrainedTokenizerBase]:
    """Open a ``final_model`` folder for inference or further training, in evaluation mode.

    The model's settings say where its language model and encoder were found this time. A language model whose adapter
    was trained over 4-bit weights is opened with them, since the adapter makes up for their error as well.

    Args:
        folder: result of stage 1 or 2.
        device: where to put the model.
        dtype: of the language model, None for that of its files; projector and encoder stay in float32.
        llm_name: where the base language model is now, when it moved since training.
        encoder_name: likewise for the image encoder.
        four_bit: hold the language model in this form from now on.
        dequantized: compute with the very values of the 4-bit weights, but in full layers, which LoRA merges into.
        ple_device: where Gemma-3n's per-layer embeddings are, as for :func:`language_model.load_llm`.

    Raises:
        FileNotFoundError: no such result.
        ValueError: the base language model is not the one that the result was trained with.
    """
    folder = Path(folder)
    settings = VLMSettings.read(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", mend="copy the folder of the model anew")
    if (folder / "language_model").is_dir():
        settings.llm_name, settings.llm_revision = str(folder / "language_model"), None
        llm = load_llm(settings.llm_name, dtype=dtype, ple_device=ple_device)
        settings.llm_fingerprint = fingerprint(llm)
    else:
        settings.llm_name = llm_name or settings.llm_name
        llm = load_llm(settings.llm_name, revision=settings.llm_revision, dtype=dtype, ple_device=ple_device)
        check_fingerprint(llm, settings)
    check_placeholder(llm, settings, folder)
    if four_bit is not None:
        settings.llm_four_bit = four_bit.to_json()
    if settings.llm_four_bit is not None:
        quantize(llm, FourBit(**settings.llm_four_bit), device)
        if dequantized:
            dequantize(llm)
    if (folder / "adapter").is_dir():
        llm = open_adapter(llm, folder / "adapter")
    encoder = None
    if settings.input_kind == "images":
        own = folder / "encoder"
        settings.encoder = encoder_name or (str(own) if own.is_dir() else settings.encoder)
        encoder = load_encoder(settings.encoder)
        if own.is_dir():
            settings.encoder_fingerprint = encoder.fingerprint()  # it learned after stage 1 took down the other's
        else:
            check_encoder(encoder, settings)
    model = SlideVLM(llm, settings, encoder)
    model.load_projector(folder)
    return model.to(device).eval(), tokenizer


def open_adapter(llm: PreTrainedModel, folder: Path) -> nn.Module:
    """A language model with the LoRA adapter in a folder of peft's layout.

    Raises:
        FileNotFoundError, ValueError: there is none that fits.
    """
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found; copy the folder of the model anew")
    try:
        return PeftModel.from_pretrained(llm, folder)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise  # want of memory, for one
        raise ValueError(
            f"{folder}: no adapter that fits ({type(error).__name__}: {first_line(error)}); "
            "copy the folder of the model anew"
        ) from error


def check_fingerprint(llm: PreTrainedModel, settings: VLMSettings) -> None:
    """Raise ValueError unless ``llm`` is the base language model that ``settings`` were trained with."""
    if settings.llm_fingerprint and fingerprint(llm) != settings.llm_fingerprint:
        raise ValueError(
            f"{settings.llm_name}: its weights are not those that this model was trained with; "
            "give the right language model with --llm_name"
        )


def check_placeholder(llm: PreTrainedModel, settings: VLMSettings, folder: Path) -> None:
    """Raise ValueError unless the id at visual positions is one of the language model's vocabulary."""
    size = llm.get_input_embeddings().weight.shape[0]
    if not 0 <= settings.placeholder_id < size:
        raise ValueError(
            f"{folder / 'vlm.json'}: placeholder_id is {settings.placeholder_id}, where an id of the language model's "
            f"vocabulary of {size} belongs; mend it, or copy the folder anew"
        )


def check_encoder(encoder: ImageEncoder, settings: VLMSettings) -> None:
    """Raise ValueError unless ``encoder`` is, as far as is known, the one that the model was trained with."""
    if encoder.width != settings.patch_width and settings.input_kind == "features":
        raise ValueError(
            f"{encoder.name}: its patch tokens are {encoder.width} wide, the model takes {settings.patch_width}; "
            "give the right image encoder with --vision_model_name"
        )
    if settings.encoder_fingerprint and encoder.fingerprint() != settings.encoder_fingerprint:
        raise ValueError(
            f"{encoder.name}: its weights are not those that this model was trained with; "
            "give the right image encoder with --vision_model_name"
        )
