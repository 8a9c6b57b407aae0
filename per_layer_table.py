"""Gemma-3n's table of per-layer embeddings in CPU memory, mapped from its safetensors file; rows go to the device.

The table has a row for each token id and holds 2.0 of the 4.4 billion weights of E2B, 4 GB in bfloat16. A batch reads a
few hundred rows, and nothing ever trains them. Mapped, the table takes no memory of a GPU, and of the machine only what
the system keeps of the file while nobody else wants the space.

Shapes: U distinct ids of a batch, W width of a row, which is layers times width of a layer's input.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

TABLE = "embed_tokens_per_layer"
WEIGHT = f"{TABLE}.weight"


class PerLayerTable(nn.Module):
    """Stands in for the embedding of per-layer inputs, bit by bit the same; moving the model leaves its rows behind.

    The rows are no parameter: no optimizer, distributed wrapper or ``to(device)`` sees them. They are in the state
    dictionary, as ``weight``, so that fingerprints and saved models are those of the whole model.
    """

    def __init__(self, rows: Tensor, scale: Tensor, dtype: torch.dtype):
        """Table of ``rows`` (ids, W) on the CPU, in any dtype, that gives embeddings times ``scale`` in ``dtype``."""
        super().__init__()
        self.weight = rows
        self.dtype = dtype
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (…, W) of ids (…), on their device; each distinct row is sent there once."""
        distinct, places = input_ids.cpu().unique(return_inverse=True)
        rows_UW = F.embedding(distinct, self.weight).to(input_ids.device).to(self.dtype)
        return F.embedding(places.to(input_ids.device), rows_UW * self.embed_scale.to(self.dtype))

    def extra_repr(self) -> str:
        """What printing the model shows."""
        return f"{', '.join(map(str, self.weight.shape))}, {self.weight.dtype} on the CPU"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *others) -> None:
        rows = state_dict.get(prefix + "weight")
        if rows is None:
            missing_keys.append(prefix + "weight")
        elif rows.shape == self.weight.shape:
            self.weight = rows.detach().cpu()
        else:
            raise ValueError(f"{prefix}weight has shape {tuple(rows.shape)}, not {tuple(self.weight.shape)}")


def has_per_layer_table(model_class: type[PreTrainedModel]) -> bool:
    """Whether models of this class have per-layer embeddings."""
    return hasattr(model_class, "get_per_layer_input_embeddings")


def load_with_table_on_cpu(
    model_class: type[PreTrainedModel], name: str, *, revision: str | None, dtype: torch.dtype, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What ``from_pretrained`` with ``output_loading_info`` gives, but for the table, which is never read as a whole.

    A checkpoint that is not in safetensors is loaded in the usual way, and its table stays in memory.
    """
    loading = {"revision": revision, "dtype": dtype, "output_loading_info": True, **kwargs}
    rows = map_table(name, revision)
    if rows is None:
        llm, report = model_class.from_pretrained(name, **loading)
        table = llm.get_decoder().embed_tokens_per_layer
        llm.get_decoder().embed_tokens_per_layer = PerLayerTable(table.weight.detach().cpu(), table.embed_scale, dtype)
        return llm, report
    llm, report = without_table(model_class).from_pretrained(name, **loading)
    llm.__class__ = model_class
    config = llm.config.get_text_config()
    wanted = (config.vocab_size_per_layer_input, config.num_hidden_layers * config.hidden_size_per_layer_input)
    if rows.shape != wanted:
        raise ValueError(f"{name}: its {WEIGHT} has shape {tuple(rows.shape)}, not {wanted}; download it anew")
    scale = torch.tensor(config.hidden_size_per_layer_input**0.5)
    llm.get_decoder().embed_tokens_per_layer = PerLayerTable(rows, scale, dtype)
    return llm, report


def without_table(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class under the same name, by which the library knows it, whose models are built without the table."""

    def build(self, config, *arguments, **kwargs) -> None:
        model_class.__init__(self, config, *arguments, **kwargs)
        self.get_decoder().embed_tokens_per_layer = nn.Identity()

    members = {"__init__": build, "__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": [TABLE]}
    return type(model_class.__name__, (model_class,), members)


def map_table(name: str, revision: str | None) -> Tensor | None:
    """The table of a checkpoint, (ids, W) as stored, mapped from its file; None if that is not in safetensors.

    Pages of the file are read when rows are, and the system may drop them again.
    """
    index = _file_of(name, revision, "model.safetensors.index.json")
    if index is not None:
        shards = json.loads(index.read_text())["weight_map"]
        shard = next((file for key, file in shards.items() if key.endswith(WEIGHT)), None)
        if shard is not None and Path(shard).name != shard:
            raise ValueError(f"{index}: names a file outside its folder ({shard}); download it anew")
        path = None if shard is None else _file_of(name, revision, shard)
    else:
        path = _file_of(name, revision, "model.safetensors")
    if path is None:
        return None
    with safe_open(path, framework="pt", device="cpu") as file:
        key = next((key for key in file.keys() if key.endswith(WEIGHT)), None)
        return None if key is None else file.get_tensor(key)  # a view of the mapped file, which it keeps open


def _file_of(name: str, revision: str | None, file: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
