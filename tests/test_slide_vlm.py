"""The model against Hugging Face's own forward: embeddings, per-layer inputs, loss, padding, freezing, loading."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma3nAudioConfig, Gemma3nConfig, Gemma3nForConditionalGeneration, Gemma3nVisionConfig

import slide_vlm
import token_nll
from encoders import load_encoder
from language_model import add_lora, choose_placeholder, fingerprint, load_llm, unfreeze_llm
from slide_reports import Record, ReportDataset, SampleKey, collate
from slide_vlm import IGNORED_LABEL, SlideVLM, expand_image_markers
from tests.tiny_models import gemma3n_config, make_batch, make_llm, make_model, make_sample, show_per_layer_inputs
from vlm_loading import load_vlm

FAMILIES = ["gemma3n", "gemma3", "llama", "qwen3", "biogpt"]


def text_batch(tokenizer) -> dict[str, torch.Tensor]:
    batch = make_batch(tokenizer)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    batch["input_ids"] = batch["input_ids"].clamp(min=3)  # no image: its marker becomes an ordinary token
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_equals_the_stock_forward(family):
    model, tokenizer = make_model(family)
    batch = text_batch(tokenizer)
    with torch.no_grad():
        inputs = model.embed(batch)
        ours = model.base_llm.get_decoder()(
            **inputs["conditioning"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        ours = model.logits(ours.last_hidden_state)
        stock = model.llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], stock[real], atol=1e-5, rtol=0)


def test_dropping_the_per_layer_inputs_is_seen():
    model, tokenizer = make_model()
    batch = text_batch(tokenizer)
    with torch.no_grad():
        embeds = model.embed(batch)["conditioning"]["inputs_embeds"]
        dropped = model.llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        stock = model.llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (dropped - stock)[batch["attention_mask"].bool()].abs().max() > 0.1


def plain_loss(model: SlideVLM, batch) -> torch.Tensor:
    """The stock loss over full logits, one sample at a time, its visual tokens put in by hand."""
    total, count = 0.0, 0
    for i in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][i].sum())
        ids, labels = batch["input_ids"][i, :length], batch["labels"][i, :length]
        at = int((ids == slide_vlm.IMAGE_MARKER).nonzero())
        patches = batch["patch_tokens"][i][batch["patch_mask"][i]]
        visual = model.projector(patches)
        ids = torch.cat([ids[:at], torch.full((len(visual),), model.settings.placeholder_id), ids[at + 1 :]])
        labels = torch.cat([labels[:at], torch.full((len(visual),), IGNORED_LABEL), labels[at + 1 :]])
        embeds = model.llm.get_input_embeddings()(ids).clone()
        embeds[at : at + len(visual)] = visual
        arguments = {"inputs_embeds": embeds[None]}
        if hasattr(model.llm.model if hasattr(model.llm, "model") else model.llm, "get_per_layer_inputs"):
            arguments["per_layer_inputs"] = model.llm.model.get_per_layer_inputs(ids[None])
        logits = model.llm(**arguments, use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1].float(), labels[1:], reduction="sum", ignore_index=IGNORED_LABEL)
        count += int((labels[1:] != IGNORED_LABEL).sum())
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_the_stock_loss_over_full_logits(family, monkeypatch):
    monkeypatch.setattr(token_nll, "ROWS_PER_CHUNK", 7)  # several chunks
    model, tokenizer = make_model(family)
    model.llm.requires_grad_(False)
    batch = make_batch(tokenizer)
    ours = model(batch)
    assert ours.dtype == torch.float32
    ours.mean().backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.projector.named_parameters()}
    model.zero_grad()
    stock = plain_loss(model, batch)
    stock.backward()
    torch.testing.assert_close(ours.mean(), stock, atol=1e-5, rtol=1e-5)
    for name, parameter in model.projector.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reducer", ["none", "grid_pool", "perceiver"])
@pytest.mark.parametrize("family", ["gemma3n", "llama"])
def test_padded_batch_equals_one_by_one(family, reducer):
    model, tokenizer = make_model(family, reducer, num_visual_tokens=6)
    sizes = (1, 14, 4)
    batch = make_batch(tokenizer, sizes)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(make_batch_of(batch, i)) for i in range(len(sizes))])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def make_batch_of(batch, i):
    length, patches = int(batch["attention_mask"][i].sum()), int(batch["patch_mask"][i].sum())
    text = {name: batch[name][i : i + 1, :length] for name in ("input_ids", "attention_mask", "labels")}
    image = {name: batch[name][i : i + 1, :patches] for name in ("patch_tokens", "coords", "patch_mask")}
    return text | image


def test_filler_batch_gives_no_loss_and_a_zero_gradient():
    model, tokenizer = make_model()
    batch = make_batch(tokenizer, sizes=(4,))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    nll = model(batch)
    assert nll.shape == (0,)
    nll.sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.projector.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_image_markers_expand_to_the_visual_tokens(side):
    batch = {
        "input_ids": torch.tensor([[5, slide_vlm.IMAGE_MARKER, 6, 7], [slide_vlm.IMAGE_MARKER, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 7], [-100, 8, -100, -100]]),
    }
    out = expand_image_markers(batch, torch.tensor([1, 4]), side)
    m = slide_vlm.IMAGE_MARKER
    second = [m, m, m, m, 8]
    first = [5, m, 6, 7]
    assert out["input_ids"].tolist() == ([[*first, 0], second] if side == "right" else [[0, *first], second])
    assert out["attention_mask"].sum(1).tolist() == [4, 5]
    assert out["labels"].tolist()[1] == [-100, -100, -100, -100, 8]


def test_composite_checkpoint_loads_its_text_part_whole(tmp_path):
    text = gemma3n_config()
    config = Gemma3nConfig(
        text_config=text.to_dict(),
        vision_config=Gemma3nVisionConfig(
            hidden_size=16, vocab_size=4, vocab_offset=324, num_features=16, architecture="test_vit"
        ).to_dict(),
        audio_config=Gemma3nAudioConfig(
            vocab_size=4,
            vocab_offset=328,
            hidden_size=16,
            conf_num_hidden_layers=1,
            conf_num_attention_heads=2,
            sscp_conv_channel_size=(8, 4),
            input_feat_size=32,
        ).to_dict(),
    )
    torch.manual_seed(0)
    whole = Gemma3nForConditionalGeneration(config).eval()
    show_per_layer_inputs(whole)
    whole.save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path))
    assert type(llm).__name__ == "Gemma3nForCausalLM"
    assert not any("vision" in name or "audio" in name for name, _ in llm.named_parameters())
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        ours = llm(input_ids=ids).logits
        theirs = whole(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert choose_placeholder(llm) == 325


def test_composite_gemma3_loads_its_text_part_too(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = make_llm("gemma3").config.to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path))
    assert type(llm).__name__ == "Gemma3ForCausalLM"
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(llm(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_incomplete_checkpoint_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_llm("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing"):
        load_llm(str(tmp_path))


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float16"):
        load_llm(str(tmp_path), dtype=torch.float16)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_are_bit_identical_after_20_steps(checkpointing):
    model, tokenizer = make_model(seed=3)
    model.llm.config.altup_coef_clip = 1e-3  # would clamp at once, were AltUp in training mode
    model.llm.requires_grad_(False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in model.llm.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = make_batch(tokenizer)
    losses = []
    for _ in range(20):
        model.train()
        loss = model(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.llm.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["gemma3n", "llama"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(family):
    model, tokenizer = make_model(family)
    model.llm.requires_grad_(False)
    batch = make_batch(tokenizer)
    calls = []
    layer = model.llm.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls.clear()
        model.train()
        model(batch).mean().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([parameter.grad.clone() for parameter in model.projector.parameters()])
        model.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-5)


def test_gradient_checkpointing_of_a_frozen_model_with_dropout_is_refused():
    model, _ = make_model("biogpt")
    model.llm.requires_grad_(False)
    with pytest.raises(ValueError, match="dropout"):
        model.enable_gradient_checkpointing()


def test_lora_trains_while_the_base_stays_bit_identical():
    model, tokenizer = make_model(seed=5)
    model.llm.config.altup_coef_clip = 1e-3
    base = {name: value.clone() for name, value in model.llm.state_dict().items()}
    model.requires_grad_(False)
    model.llm = add_lora(model.llm, rank=4, alpha=8, dropout=0.1)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)
    assert not any("altup" in name or "laurel" in name for name in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = make_batch(tokenizer)
    losses = []
    for _ in range(15):
        model.train()
        assert any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
        loss = model(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name.replace("base_layer.", ""): value for name, value in model.base_llm.state_dict().items()}
    for name, value in base.items():
        assert torch.equal(value, after[name]), name


def test_full_training_keeps_the_tables_frozen():
    llm = make_llm()
    unfreeze_llm(llm)
    frozen = {name for name, parameter in llm.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"}


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_saved_model_opens_with_equal_loss(training, tmp_path):
    model, tokenizer = make_model(token_reducer="perceiver")
    model.llm.save_pretrained(tmp_path / "llm")
    model.settings.llm_name = str(tmp_path / "llm")
    model.settings.llm_fingerprint = fingerprint(model.llm)
    model.requires_grad_(False)
    if training == "lora":
        model.llm = add_lora(model.llm, rank=2, alpha=4, dropout=0.0)
    if training == "full":
        unfreeze_llm(model.llm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save(tmp_path / "final_model", tokenizer)
    parts = {path.name for path in (tmp_path / "final_model").iterdir()}
    extra = {"frozen": set(), "lora": {"adapter"}, "full": {"language_model"}}[training]
    assert parts == {"vlm.json", "projector", "tokenizer"} | extra
    opened, opened_tokenizer = load_vlm(tmp_path / "final_model")
    batch = make_batch(opened_tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(opened(batch), model.eval()(batch), atol=1e-6, rtol=0)


def test_an_encoder_that_learned_is_the_one_that_later_results_name(corpus, tmp_path):
    model, tokenizer = make_model(encoder=load_encoder(str(corpus.encoder)))
    model.llm.save_pretrained(tmp_path / "llm")
    model.requires_grad_(False)
    model.settings.llm_name = str(tmp_path / "llm")
    model.settings.encoder_fingerprint = model.encoder.fingerprint()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1)
    model.encoder_learned = True
    model.save(tmp_path / "learned", tokenizer)
    opened, _ = load_vlm(tmp_path / "learned")
    opened.requires_grad_(False).save(tmp_path / "later", tokenizer)
    later, _ = load_vlm(tmp_path / "later")
    assert later.encoder.fingerprint() == model.encoder.fingerprint()
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        load_vlm(tmp_path / "later", encoder_name=str(corpus.encoder))


def test_chosen_patches_of_an_image_are_the_only_ones_that_count(corpus):
    model, tokenizer = make_model(encoder=load_encoder(str(corpus.encoder)), num_visual_tokens=5)
    image = corpus.images / "0.png"
    records = [Record("0", (image,), "", "Breast", "0")]
    drawn = ReportDataset.for_model(model, tokenizer, records, seed=1)
    chosen = [drawn[SampleKey(0, epoch, True)]["chosen_patches"][0].tolist() for epoch in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 5
    sample = drawn[SampleKey(0, 0, True)]
    patches = model.encoder.encode_patches(sample["pixel_values"])
    with torch.no_grad():
        tokens, mask = model.visual_tokens(collate([sample]))
        torch.testing.assert_close(tokens[0], model.projector(patches[0, chosen[0]]))
    assert mask.all()


def test_another_base_model_is_refused(tmp_path):
    model, tokenizer = make_model("llama")
    make_llm("llama", seed=9).save_pretrained(tmp_path / "other")
    model.settings.llm_fingerprint = fingerprint(model.llm)
    model.llm.requires_grad_(False)
    model.save(tmp_path / "final_model", tokenizer)
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        load_vlm(tmp_path / "final_model", llm_name=str(tmp_path / "other"))


def test_fingerprint_tells_models_apart_and_survives_bfloat16():
    llm = make_llm("llama")
    assert fingerprint(llm) != fingerprint(make_llm("llama", seed=1))
    assert fingerprint(llm) == fingerprint(llm.to(torch.bfloat16))


def test_sample_without_answer_has_no_labels():
    _, tokenizer = make_model()
    assert set(make_sample(tokenizer, "", 3)["labels"]) == {IGNORED_LABEL}
