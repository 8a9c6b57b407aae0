"""Loading a checkpoint's weights in another dtype than that of its files, without the files in memory beside them.

``from_pretrained`` maps safetensors files, so that a weight which keeps its dtype takes no memory of its own. Where it
is converted, the pages that were read of the file stay resident until every weight is loaded: a bfloat16 checkpoint
that becomes float32 takes three times its size. Such weights are read instead, and each is let go of once converted.
"""

from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as the headers of files name them


def class_that_reads(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class under its own name, by which the library knows it, whose ``from_pretrained`` loads in this way."""

    def load(model, state_dict, checkpoint_files, load_config, *others: Any, **named: Any):
        files = checkpoint_files or []
        is_plain = state_dict is None and load_config.hf_quantizer is None and not is_deepspeed_zero3_enabled()
        if is_plain and files and all(str(file).endswith(".safetensors") for file in files):
            state_dict, checkpoint_files = lazy_weights(files, load_config.dtype), None
        return model_class._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *others, **named)

    members = {"_load_pretrained_model": staticmethod(load), "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), members)


def lazy_weights(files: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Slices of safetensors files by name, that nothing was read of yet: mapped if of ``dtype``, else to be read."""
    weights = {}
    for file in files:
        mapped = safe_open(file, framework="pt", device="cpu")
        read = safe_open(file, framework="pt", device="cpu", backend="pread")
        for name in mapped.keys():
            weight = mapped.get_slice(name)
            stored = DTYPES.get(weight.get_dtype())
            weights[name] = weight if stored in (None, dtype) else read.get_slice(name)
    return weights
