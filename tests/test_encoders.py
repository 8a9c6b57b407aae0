import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from encoders import load_encoder

SMALL_VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8))


def small_transformers_config(kind):
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vision |= dict(image_size=32, patch_size=8)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    return {
        "vit": lambda: transformers.ViTConfig(**vision),
        "dinov2": lambda: transformers.Dinov2Config(**vision),
        "registers": lambda: transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=4),
        "siglip": lambda: transformers.SiglipConfig(text_config=text, vision_config=vision),
        "clip": lambda: transformers.CLIPConfig(text_config=text, vision_config=vision),
    }[kind]()


@pytest.mark.parametrize(
    ("name", "model_args", "patch_grid"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT, (4, 4)),
        ("vit_small_patch14_reg4_dinov2", SMALL_VIT | {"img_size": 56}, (4, 4)),
        ("vit_base_patch16_siglip_224", SMALL_VIT, (4, 4)),
        ("resnet10t", {}, (6, 6)),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, (7, 7)),
        ("mobilenetv3_small_050", {}, (7, 7)),
    ],
)
@torch.inference_mode()
def test_timm_encoders(name, model_args, patch_grid, image):
    torch.manual_seed(0)
    encoder = load_encoder(name, pretrained=False, model_args=model_args)
    assert not encoder.training and encoder.patch_grid == patch_grid
    pixels = encoder.transform(image)
    assert pixels.shape == (3, encoder.image_size, encoder.image_size) and pixels.dtype == torch.float32
    batch = torch.stack([pixels, pixels.flip(-1)])
    tiles, patches = encoder.encode_tiles(batch), encoder.encode_patches(batch)
    assert tiles.shape == (2, encoder.width)
    assert patches.shape == (2, patch_grid[0] * patch_grid[1], encoder.patch_width)
    torch.testing.assert_close(tiles, encoder.backbone(batch))


@torch.inference_mode()
def test_patches_of_a_cnn_are_in_raster_order():
    encoder = load_encoder("resnet10t", pretrained=False)
    pixels = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    feature_map = encoder.backbone.forward_features(pixels)
    patches = encoder.encode_patches(pixels)
    torch.testing.assert_close(patches[0, 1 * 6 + 2], feature_map[0, :, 1, 2])


@torch.inference_mode()
def test_patches_of_a_vit_leave_out_class_and_register_tokens():
    encoder = load_encoder("vit_small_patch14_reg4_dinov2", pretrained=False, model_args=SMALL_VIT | {"img_size": 56})
    pixels = torch.randn(1, 3, 56, 56)
    assert encoder.num_prefix_tokens == 5
    torch.testing.assert_close(encoder.encode_patches(pixels), encoder.backbone.forward_features(pixels)[:, 5:])


@torch.inference_mode()
def test_saved_timm_encoder_opens_with_equal_outputs(tmp_path, image):
    encoder = load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=SMALL_VIT)
    encoder.save_pretrained(tmp_path / "encoder")
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {"config.json", "model.safetensors"}
    again = load_encoder(tmp_path / "encoder")
    pixels = encoder.transform(image)[None]
    torch.testing.assert_close(again.transform(image)[None], pixels, rtol=0, atol=0)
    torch.testing.assert_close(again.encode_tiles(pixels), encoder.encode_tiles(pixels), rtol=0, atol=0)
    torch.testing.assert_close(again.encode_patches(pixels), encoder.encode_patches(pixels), rtol=0, atol=0)
    assert again.fingerprint() == encoder.fingerprint()
    assert again.name == str(tmp_path / "encoder")
    with torch.no_grad():
        next(again.backbone.parameters()).add_(1)
    assert again.fingerprint() != encoder.fingerprint()


@torch.inference_mode()
def test_a_classifier_saved_by_timm_gives_its_features(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL_VIT).eval()
    timm.models.save_for_hf(model, tmp_path / "classifier", safe_serialization=True)
    encoder = load_encoder(tmp_path / "classifier")
    pixels = torch.randn(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected)


@pytest.mark.parametrize(
    ("kind", "num_prefix_tokens"), [("vit", 1), ("dinov2", 1), ("registers", 5), ("siglip", 0), ("clip", 1)]
)
@torch.inference_mode()
def test_transformers_encoders(kind, num_prefix_tokens, tmp_path, image):
    torch.manual_seed(0)
    config = small_transformers_config(kind)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path / "model"
    )
    encoder = load_encoder(tmp_path / "model")
    assert encoder.num_prefix_tokens == num_prefix_tokens and encoder.patch_grid == (4, 4) and encoder.width == 32
    pixels = encoder.transform(image)[None]
    assert pixels.shape == (1, 3, 32, 32) and pixels.abs().max() <= 1

    tower = getattr(model, "vision_model", model)
    hidden = tower(pixel_values=pixels)
    torch.testing.assert_close(encoder.encode_patches(pixels), hidden.last_hidden_state[:, num_prefix_tokens:])
    pooled = hidden.pooler_output if kind in ("siglip", "clip") else hidden.last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode_tiles(pixels), pooled)

    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved")
    # the kernels' rounding depends on how the weights lie in memory
    torch.testing.assert_close(again.encode_tiles(again.transform(image)[None]), pooled, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_encoder():
    encoder = load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=SMALL_VIT)
    encoder.encode_patches(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in encoder.backbone.patch_embed.parameters())


@pytest.mark.parametrize(
    ("file", "told"), [("model.safetensors", r"broken cannot be built: "), ("config.json", r"config\.json is no JSON")]
)
def test_a_truncated_file_of_an_encoder_is_told_by_its_folder(file, told, tmp_path):
    folder = tmp_path / "broken"
    load_encoder("resnet10t", pretrained=False).save_pretrained(folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:20])
    with pytest.raises(ValueError, match=told):
        load_encoder(str(folder))


def test_unknown_encoders_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"unknown encoder resnet55: did you mean .*resnet50"):
        load_encoder("resnet55")
    with pytest.raises(
        ValueError, match="resnet10t.nonsense has no published weights; resnet10t has resnet10t.c3_in1k"
    ):
        load_encoder("resnet10t.nonsense")
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"nothing": 1}))
    with pytest.raises(ValueError, match="neither `architecture`"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t"}))
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["resnet10t", "hf-hub:org/name", "org/name"])
def test_weights_out_of_reach(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=f"encoder {name} .*cannot be reached"):
        load_encoder(name)
