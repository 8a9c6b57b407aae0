"""Per-layer embeddings in CPU memory: bit by bit those of the model, mapped and not copied, through every wrapper."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3nForCausalLM

from inference import generate
from language_model import add_lora, fingerprint, load_llm, unfreeze_llm
from per_layer_table import PerLayerTable, map_table
from tests.test_inference import save_model
from tests.tiny_models import PATCH_WIDTH, gemma3n_config, make_batch, make_llm, make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same tiny Gemma-3n in one file, in many, in bfloat16 and as pickles."""
    root = tmp_path_factory.mktemp("llm")
    llm = make_llm()
    llm.save_pretrained(root / "one")
    llm.save_pretrained(root / "sharded", max_shard_size="30KB")
    llm.to(torch.bfloat16).save_pretrained(root / "bf16")
    (root / "pickled").mkdir()
    llm.config.save_pretrained(root / "pickled")
    torch.save(llm.state_dict(), root / "pickled" / "pytorch_model.bin")
    assert (root / "sharded" / "model.safetensors.index.json").is_file()
    return root


def both(path, dtype=torch.float32):
    return load_llm(str(path), dtype=dtype), load_llm(str(path), dtype=dtype, ple_device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["one", "sharded", "bf16", "pickled"])
def test_outputs_are_bit_equal(saved, kind, dtype):
    plain, ours = both(saved / kind, dtype)
    table = ours.get_decoder().embed_tokens_per_layer
    assert isinstance(table, PerLayerTable) and type(ours) is Gemma3nForCausalLM
    assert "embed_tokens_per_layer.weight" not in dict(ours.named_parameters())
    assert table.weight.dtype == (dtype if kind == "pickled" else torch.bfloat16 if kind == "bf16" else torch.float32)
    ids = torch.randint(0, 328, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
        assert torch.equal(ours.get_decoder().get_per_layer_inputs(ids), plain.get_decoder().get_per_layer_inputs(ids))
    assert fingerprint(ours) == fingerprint(plain)


def test_the_rows_stay_on_the_cpu_when_the_model_moves(saved):
    llm = load_llm(str(saved / "one"), ple_device="cpu").to("meta")
    assert all(parameter.is_meta for parameter in llm.parameters())
    assert llm.get_decoder().embed_tokens_per_layer.weight.device.type == "cpu"


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_bit_equal_losses_and_gradients(saved, training, checkpointing):
    results = []
    for llm in both(saved / "one"):
        model, tokenizer = make_model()
        model.requires_grad_(False)
        torch.manual_seed(3)
        model.llm = add_lora(llm, rank=2, alpha=4, dropout=0.1) if training == "lora" else llm
        llm.requires_grad_(False) if training == "frozen" else None
        if training == "full":
            unfreeze_llm(model.llm)
        model.projector.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        torch.manual_seed(4)
        loss = model(make_batch(tokenizer)).mean()
        loss.backward()
        named = [item for item in model.named_parameters() if item[1].requires_grad]
        results.append((loss.detach(), {name: parameter.grad for name, parameter in named}))
    (plain, plain_gradients), (ours, gradients) = results
    assert torch.equal(ours, plain)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert (gradient is None) == (gradients[name] is None)
        assert gradient is None or torch.equal(gradients[name], gradient), name


def test_a_fully_trained_model_is_saved_with_its_table(saved, tmp_path):
    llm = load_llm(str(saved / "one"), ple_device="cpu")
    llm.save_pretrained(tmp_path / "saved")
    opened, original = load_llm(str(tmp_path / "saved")), load_llm(str(saved / "one"))
    assert opened.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in opened.state_dict().items())
    with pytest.raises(ValueError, match="has shape"):
        llm.load_state_dict(llm.state_dict() | {"model.embed_tokens_per_layer.weight": torch.zeros(2, 2)})
    llm.load_state_dict(original.state_dict())


def test_models_without_per_layer_embeddings_are_refused(tmp_path):
    make_llm("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--ple_device cpu: llama has no per-layer embeddings; drop the flag"):
        load_llm(str(tmp_path), ple_device="cpu")


def test_an_index_that_leaves_its_folder_is_refused(saved, tmp_path):
    weight_map = {"model.embed_tokens_per_layer.weight": "../one/model.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="outside its folder"):
        map_table(str(tmp_path), None)


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmHWM is the peak of resident memory, RssAnon what is not of files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Return what is free to the system: glibc keeps pages of buffers that weights were read into."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_table_is_never_copied_into_memory(tmp_path):
    rows, layers, width = 60_000, 4, 128
    config = gemma3n_config(vocab_size_per_layer_input=rows, vocab_size=rows + 4, hidden_size_per_layer_input=width)
    Gemma3nForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    table = rows * layers * width * 4  # in float32
    grown = {}
    for place in ("cpu", "model"):
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, anonymous_before = memory("VmRSS"), memory("RssAnon")
        llm = load_llm(str(tmp_path), dtype=torch.float32, ple_device=place)
        with torch.no_grad():
            llm.get_decoder()(torch.arange(40).view(2, 20))
        peak = memory("VmHWM") - before
        give_back()
        grown[place] = peak, memory("RssAnon") - anonymous_before
        del llm
    peak, anonymous = (grown["model"][i] - grown["cpu"][i] for i in (0, 1))
    assert peak > 0.9 * table and anonymous > 0.9 * table


def test_generate_writes_the_same_report(corpus, tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "final_model", corpus, patch_width=PATCH_WIDTH)
    features = next(iter(sorted(corpus.features.iterdir())))
    words = ["--model", model, "--features", features, "--max_new_tokens", 8, "--device", "cpu"]
    written = []
    for more in ([], ["--ple_device", "cpu"]):
        monkeypatch.setattr("sys.argv", list(map(str, ["generate.py", *words, *more])))
        assert generate.main() == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != ""
