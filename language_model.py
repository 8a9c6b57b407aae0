"""Hugging Face causal language models: load their language layers, recognise, unfreeze and adapt them.

Shapes: H language model width, V vocabulary.
"""

import hashlib
import importlib.util
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from command_line import first_line
from per_layer_table import has_per_layer_table, load_with_table_on_cpu
from weight_reading import class_that_reads

OLDEST_TRANSFORMERS = "5.21"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")

ALTUP_LAYERS = ("correction_coefs", "prediction_coefs", "modality_router")  # get no gradient, yet act at evaluation

# Names of the language layers in a multimodal checkpoint, by their names in a causal language model.
TEXT_PART_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
ELSEWHERE = "give a folder or hub name with --llm_name; gated models need `hf auth login`"
# peft 0.21 asks transformers 5.23 by the old name of a method.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
# bitsandbytes, which peft opens, takes a CPU kernel from the hub and runs it wherever the package `kernels` is there,
# and complains where it is not. It computes without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
if importlib.util.find_spec("kernels") and "bitsandbytes" not in sys.modules:
    kernels, sys.modules["kernels"] = sys.modules.get("kernels"), None
    try:
        import bitsandbytes  # noqa: F401
    finally:
        sys.modules.pop("kernels")
        if kernels is not None:
            sys.modules["kernels"] = kernels


def llm_width(llm: PreTrainedModel) -> int:
    """H, the width of the token embeddings."""
    return llm.get_input_embeddings().weight.shape[1]


def absolute_if_folder(name: str) -> str:
    """A folder's absolute path, so that a result finds it from anywhere; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_tokenizer(name: str | Path, *, revision: str | None = None, mend: str = ELSEWHERE) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or folder; ``mend`` is what the user is told to do where that fails.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: no tokenizer to open there ({why_not_opened(name, error)}); {mend}") from error


def why_not_opened(name: str | Path, error: Exception) -> str:
    """The library's reason; it takes a folder that is not there for a misspelt name on the hub."""
    return "no such folder" if Path(name).is_absolute() and not Path(name).exists() else first_line(error)


def load_llm(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    ple_device: str = "model",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the language layers of a Hugging Face checkpoint, in evaluation mode.

    Of a multimodal checkpoint (Gemma-3n, Gemma-3) only the text part is built and read, no vision or audio tower.

    Args:
        name: hub name or local folder.
        revision: hub revision.
        dtype: of the weights; None: as :func:`stored_dtype` says. Gemma-3n overflows in float16, so it is refused for
            every model.
        ple_device: ``cpu`` leaves Gemma-3n's table of per-layer embeddings in CPU memory, mapped from its file,
            wherever the model goes; ``model`` keeps it with the rest; ``auto`` is ``cpu`` for a model that has one.
        **kwargs: further arguments of ``from_pretrained``, such as ``quantization_config``.

    Raises:
        ValueError: there is no such model, a weight is missing from the checkpoint, the model scales its logits in a
            way that the loss does not know, transformers is too old; ``cpu`` for a model without per-layer embeddings.
    """
    refuse_old_transformers()
    if dtype == torch.float16:
        raise ValueError("float16 overflows in Gemma-3n; use bf16 or no mixed precision")
    config = load_llm_config(name, revision)
    text_config = config.get_text_config()
    for scale in ("logit_scale", "logits_scaling"):
        if getattr(text_config, scale, None) not in (None, 1, 1.0):
            raise ValueError(f"{name}: language models with {scale} are not supported; choose another --llm_name")
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    except KeyError:
        raise ValueError(
            f"{name}: {config.model_type} is not a causal language model; choose another --llm_name"
        ) from None
    if config is not text_config and not text_config.model_type.startswith("gemma3n"):
        kwargs["key_mapping"] = TEXT_PART_NAMES  # transformers itself knows Gemma-3n's
    kwargs |= {"revision": revision, "dtype": dtype or stored_dtype(config), "trust_remote_code": False}
    has_table = has_per_layer_table(model_class)
    if ple_device == "cpu" and not has_table:
        raise ValueError(f"--ple_device cpu: {config.model_type} has no per-layer embeddings; drop the flag")
    if ple_device != "model" and has_table:
        llm, report = load_with_table_on_cpu(class_that_reads(model_class), name, **kwargs)
    else:
        llm, report = class_that_reads(model_class).from_pretrained(name, output_loading_info=True, **kwargs)
    llm.__class__ = model_class
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(
            f"{name}: {len(missing)} weights are missing or misshapen, such as {missing[0]}; download it anew"
        )
    return llm.eval()


def load_llm_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Configuration of the language model of a hub name or folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: no language model to open there ({why_not_opened(name, error)}); {ELSEWHERE}"
        ) from error


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """bfloat16 if the files of a checkpoint with this configuration hold it, else float32, which loses nothing."""
    dtypes = [config.get_text_config().dtype, config.dtype]
    return torch.bfloat16 if next(filter(None, dtypes), None) == torch.bfloat16 else torch.float32


def fingerprint(llm: PreTrainedModel, samples_per_weight: int = 64) -> str:
    """SHA-256 over every weight's name, shape and an even sample of its values, rounded to bfloat16.

    Tells a base language model from another of the same architecture in seconds; the same in float32 and bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(llm.state_dict().items()):
        flat = weight.detach().reshape(-1)
        chosen = torch.linspace(0, max(0, flat.numel() - 1), min(samples_per_weight, flat.numel()), dtype=torch.float64)
        values = flat[chosen.long().to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values)
    return digest.hexdigest()


def choose_placeholder(llm: PreTrainedModel) -> int:
    """The id that the language model sees at visual positions, where its embedding is replaced.

    For Gemma-3n it must lie outside the per-layer table (262145 in the published models), or that word's identity would
    enter every layer; for other models any id does.

    Raises:
        ValueError: a Gemma-3n whose vocabulary has no id outside its per-layer table.
    """
    config = llm.config.get_text_config()
    last = llm.get_input_embeddings().weight.shape[0] - 1
    if not hasattr(llm.get_decoder(), "get_per_layer_inputs"):
        return last
    outside = config.vocab_size_per_layer_input
    if outside > last:
        raise ValueError(
            f"{config.model_type}: vocab_size {config.vocab_size} leaves no id outside vocab_size_per_layer_input "
            f"{outside}; make the vocabulary at least one larger"
        )
    return min(outside + 1, last)


def text_embedding_rms(llm: PreTrainedModel) -> float:
    """Root mean square that visual tokens should have: 1.0 for Gemma-3n (its native soft tokens), else that of text."""
    if hasattr(llm.get_decoder(), "get_per_layer_inputs"):
        return 1.0
    vocabulary = llm.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, min(4096, vocabulary), device=llm.device).long()
    with torch.no_grad():
        return float(llm.get_input_embeddings()(ids).float().pow(2).mean().sqrt())


def add_lora(
    llm: PreTrainedModel, *, rank: int, alpha: float, dropout: float, target_modules: list[str] | None = None
) -> nn.Module:
    """Wrap the language model in LoRA adapters (Hu et al. 2021) on its attention and feed-forward projections.

    Targets are named, all of :data:`LORA_TARGETS` that the model has unless others are given.

    Raises:
        ValueError: a target that the model lacks, or that is unsafe in Gemma-3n.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(llm, target_modules),
        bias="none",
    )
    return get_peft_model(llm, config)


def lora_targets(llm: PreTrainedModel, chosen: list[str] | None = None) -> list[str] | str | None:
    """Names of the layers that LoRA adapts; None leaves the choice to peft, which knows some families.

    Raises:
        ValueError: a chosen name that the model lacks, or Gemma-3n's AltUp layers, by name or as part of `all-linear`:
            they get no gradient in training and yet act at evaluation.
    """
    present = {name.rsplit(".", 1)[-1] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    if chosen is None:
        return [name for name in LORA_TARGETS if name in present] or None
    if (chosen == ["all-linear"] or set(chosen) & set(ALTUP_LAYERS)) and present & set(ALTUP_LAYERS):
        raise ValueError(
            f"--lora_target_modules {' '.join(chosen)}: would adapt Gemma-3n's {ALTUP_LAYERS[0]}, which gets no "
            "gradient in training and yet acts at evaluation; name layers such as q_proj v_proj"
        )
    if chosen == ["all-linear"]:
        return "all-linear"
    if unknown := [name for name in chosen if name not in present]:
        have = ", ".join(sorted(present - set(ALTUP_LAYERS)))
        raise ValueError(f"--lora_target_modules {unknown[0]}: the language model has no such layer; it has {have}")
    return chosen


def unfreeze_llm(llm: PreTrainedModel, last_layers: int | None = None) -> None:
    """Let the whole language model learn, but for its token embedding (tied to the head in Gemma) and Gemma-3n's table.

    The per-layer table alone is 2 of E2B's 4.4 billion weights, almost none of which a corpus of reports touches.

    Args:
        llm: the language model, without adapters.
        last_layers: let only so many of its last layers learn, and nothing besides.

    Raises:
        ValueError: it has fewer layers.
    """
    if last_layers is not None:
        layers = [module for module in llm.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
        if last_layers > len(layers):
            raise ValueError(f"--unfreeze_last_layers {last_layers}: the language model has {len(layers)} layers")
        for layer in layers[-last_layers:]:
            layer.requires_grad_(True)
        return
    llm.requires_grad_(True)
    llm.get_input_embeddings().requires_grad_(False)
    decoder = llm.get_decoder()
    if hasattr(decoder, "embed_tokens_per_layer"):
        decoder.embed_tokens_per_layer.requires_grad_(False)


def shares_keys_and_values(llm: PreTrainedModel) -> bool:
    """Whether layers read keys and values of earlier layers, as Gemma-3n's do."""
    return bool(getattr(llm.config.get_text_config(), "num_kv_shared_layers", 0))


def refuse_old_transformers() -> None:
    """Refuse a transformers whose Gemma-3n is wrong without a cache.

    Raises:
        ValueError: says which version would do.
    """
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ValueError(
            f"transformers {transformers.__version__} is too old: in Gemma-3n's last layers it trains with other "
            f"weights than it generates with; install {OLDEST_TRANSFORMERS} or later"
        )
