"""Weights that are converted while they load are those of the plain way, and come by reads, not by a mapped file."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import Gemma3nForCausalLM

import weight_reading
from inference.loading import default_dtype, open_model
from language_model import load_llm, load_llm_config, stored_dtype
from per_layer_table import PerLayerTable
from tests.test_inference import save_model
from tests.tiny_models import PATCH_WIDTH, make_llm
from weight_reading import class_that_reads, lazy_weights

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same tiny Gemma-3n in one file and in many, in both dtypes."""
    root = tmp_path_factory.mktemp("llm")
    for dtype in DTYPES:
        llm = make_llm().to(dtype)
        llm.save_pretrained(root / f"{dtype}_one")
        llm.save_pretrained(root / f"{dtype}_sharded", max_shard_size="30KB")
    return root


@pytest.mark.parametrize("layout", ["one", "sharded"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_weights_and_buffers_are_those_of_the_plain_way(saved, stored, wanted, layout):
    folder = saved / f"{stored}_{layout}"
    ours, report = class_that_reads(Gemma3nForCausalLM).from_pretrained(folder, dtype=wanted, output_loading_info=True)
    plain, plain_report = Gemma3nForCausalLM.from_pretrained(folder, dtype=wanted, output_loading_info=True)
    assert report == plain_report
    assert ours.generation_config.to_dict() == plain.generation_config.to_dict()
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(ours, kind)()), dict(getattr(plain, kind)())
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert type(load_llm(str(folder), dtype=wanted)) is Gemma3nForCausalLM


@pytest.mark.parametrize("wanted", DTYPES)
def test_only_what_keeps_its_dtype_is_mapped(saved, wanted, monkeypatch):
    class Opened:
        def __init__(self, path, backend="mmap", **kwargs):
            self.file, self.way = safe_open(path, backend=backend, **kwargs), backend
            self.keys = self.file.keys

        def get_slice(self, name):
            return SimpleNamespace(get_dtype=self.file.get_slice(name).get_dtype, way=self.way)

    monkeypatch.setattr(weight_reading, "safe_open", Opened)
    file = saved / f"{torch.bfloat16}_one" / "model.safetensors"
    weights = lazy_weights([str(file)], wanted)
    assert {weight.way for weight in weights.values()} == {"mmap" if wanted == torch.bfloat16 else "pread"}


@pytest.mark.parametrize("stored", DTYPES)
def test_files_say_in_which_dtype_a_model_is_loaded_by_default(saved, stored):
    folder = str(saved / f"{stored}_one")
    assert stored_dtype(load_llm_config(folder)) == stored
    assert load_llm(folder, dtype=None).dtype == stored
    assert load_llm(folder).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "processor", "dtype"),
    [
        ("cuda", {}, torch.bfloat16),
        ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, None),
    ],
)
def test_cpus_that_emulate_bfloat16_compute_in_float32(monkeypatch, device, processor, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert default_dtype(torch.device(device)) == dtype


@pytest.mark.parametrize("able", [False, True])
def test_a_model_of_bfloat16_files_runs_as_the_processor_computes(corpus, tmp_path, monkeypatch, able):
    folder = save_model(tmp_path / "final_model", corpus, patch_width=PATCH_WIDTH)
    make_llm().to(torch.bfloat16).save_pretrained(folder / "language_model")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    flags = {"model": str(folder), "device": "cpu", "llm_name": None, "vision_model_name": None}
    for dtype, expected in ((None, DTYPES[able]), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, _ = open_model(argparse.Namespace(dtype=dtype, **flags))
        assert model.base_llm.dtype == expected
        assert isinstance(model.base_llm.get_decoder().embed_tokens_per_layer, PerLayerTable)  # rows of it are read
    kept, _ = open_model(argparse.Namespace(dtype=None, ple_device="model", **flags))
    assert not isinstance(kept.base_llm.get_decoder().embed_tokens_per_layer, PerLayerTable)
