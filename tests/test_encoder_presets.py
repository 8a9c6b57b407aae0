import dataclasses
import json
import logging
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch
import transformers
from huggingface_hub import errors as hub_errors
from PIL import Image
from torch import nn

import encoder_presets
import encoders
import stage0_tiling.encode as stage0_encode
from encoder_presets import PRESETS, find_preset
from encoders import load_encoder
from tests.conftest import ROOT
from tests.slides import DrawnSlide

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56}
SMALL_TOWER = SMALL | {"pooled_width": 32, "img_size": 64}
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6)}
SMALL_TRANSFORMERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
# Side of a patch and number of class and register tokens, as the model cards describe the architecture.
PUBLISHED_TOKENS = {
    "uni": (16, 1),
    "uni2-h": (14, 9),
    "virchow": (14, 1),
    "virchow2": (14, 5),
    "prov-gigapath": (16, 1),
    "h-optimus-0": (14, 5),
    "h-optimus-1": (14, 5),
    "h0-mini": (14, 5),
    "hibou-b": (14, 5),
    "hibou-l": (14, 5),
    "phikon": (16, 1),
    "phikon-v2": (16, 1),
    "midnight-12k": (14, 1),
    "openmidnight": (14, 5),
    "gpfm": (14, 1),
    "conch": (16, 1),
    "conch-v1.5": (16, 1),
    "ctranspath": (32, 0),
    "keep": (16, 1),
    "kaiko-vits8": (8, 1),
    "kaiko-vits16": (16, 1),
    "kaiko-vitb8": (8, 1),
    "kaiko-vitb16": (16, 1),
    "kaiko-vitl14": (14, 5),
    "lunit-vits8": (8, 1),
    "lunit-vits16": (16, 1),
    "plip": (32, 1),
    "quiltnet-b-32": (32, 1),
    "quiltnet-b-16": (16, 1),
    "vit_so400m_patch14_siglip_384.webli": (14, 0),
    "vit_base_patch16_siglip_512.v2_webli": (16, 0),
    "vit_so400m_patch14_siglip_378.v2_webli": (14, 0),
    "vit_base_patch16_clip_224.openai": (16, 1),
    "vit_large_patch14_clip_224.openai": (14, 1),
    "vit_base_patch14_dinov2.lvd142m": (14, 1),
    "vit_large_patch14_dinov2.lvd142m": (14, 1),
    "vit_base_patch16_dinov3.lvd1689m": (16, 5),
    "vit_large_patch16_dinov3.lvd1689m": (16, 5),
    "resnet50.a1_in1k": (32, 0),
    "resnet50.tv_in1k": (32, 0),
}
PATHOLOGY = [preset for preset in PRESETS if not preset.is_timm_name]


@pytest.fixture
def tile():
    """A tile with structure at several scales, larger than any input."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).resize((600, 600), Image.BICUBIC)
    noise = rng.integers(-20, 20, (600, 600, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def plain_transform(preset, tile):
    """The published transform, written out: resize the shorter side, crop the middle, normalise."""
    side = math.floor(preset.input_size / preset.crop_pct + 1e-6)
    resample = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[preset.interpolation]
    margin = round((side - preset.input_size) / 2)
    box = (margin, margin, margin + preset.input_size, margin + preset.input_size)
    pixels = np.asarray(tile.resize((side, side), resample).crop(box), dtype=np.float64) / 255
    return torch.from_numpy((pixels - preset.mean) / preset.std).permute(2, 0, 1).float()


def without_memory(build):
    """`build`, but what it makes has shapes only."""

    def build_on_meta(*arguments, **keywords):
        with torch.device("meta"):
            return build(*arguments, **keywords)

    return build_on_meta


def small(name, **more):
    """The preset's architecture, small and with random weights."""
    torch.manual_seed(0)
    preset = find_preset(name)
    own = {"conch_vit_base": SMALL_TOWER, "conch_vit_large": SMALL_TOWER, "keep_vit_large": SMALL_TOWER}
    own["swin_tiny_conv_stem"] = SMALL_SWIN
    sizes = SMALL_TRANSFORMERS if preset.library == "transformers" else own.get(preset.architecture, SMALL)
    return load_encoder(name, pretrained=False, model_args=sizes | more)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_architecture_and_transform_are_the_published_ones(preset, tile, monkeypatch):
    for module, function in ((timm, "create_model"), (encoders, "_transformers_model")):
        monkeypatch.setattr(module, function, without_memory(getattr(module, function)))
    encoder = load_encoder(preset.name, pretrained=False)
    num_parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    patch_px, num_prefix_tokens = PUBLISHED_TOKENS[preset.name]
    assert encoder.width == preset.width
    assert num_parameters == pytest.approx(preset.million_parameters * 1e6, rel=0.01)
    assert encoder.num_prefix_tokens == num_prefix_tokens
    assert encoder.patch_grid == (preset.input_size // patch_px,) * 2
    assert (encoder.image_size, encoder.mean, encoder.std) == (preset.input_size, preset.mean, preset.std)
    assert encoder.preset is preset
    # the image processor of transformers resizes a tensor, PIL an image: at most two grey levels apart
    difference = (encoder.transform(tile) - plain_transform(preset, tile)).abs() * torch.tensor(preset.std)[
        :, None, None
    ]
    assert difference.max() < (2.5 / 255 if preset.library == "transformers" else 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["virchow", "virchow2", "h0-mini"])
def test_class_and_mean_of_patch_tokens(name):
    encoder = small(name)
    pixels = torch.randn(2, 3, 56, 56)
    tokens = encoder.backbone.forward_features(pixels)
    num_registers = {"virchow": 0}.get(name, 4)
    expected = torch.cat([tokens[:, 0], tokens[:, 1 + num_registers :].mean(1)], dim=-1)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected, rtol=0, atol=0)
    assert expected.shape == (2, encoder.width) == (2, 96)
    assert encoder.encode_patches(pixels).shape == (2, 16, 48)


@torch.inference_mode()
def test_class_and_mean_of_patch_tokens_in_transformers():
    encoder = small("midnight-12k", use_swiglu_ffn=True)
    pixels = torch.randn(2, 3, 56, 56)
    tokens = encoder.backbone(pixel_values=pixels).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected, rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["uni", "uni2-h", "prov-gigapath", "h-optimus-1", "gpfm", "kaiko-vits16"])
def test_class_token(name):
    encoder = small(name, img_size=112)
    pixels = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(encoder.encode_tiles(pixels), encoder.backbone(pixels))
    torch.testing.assert_close(encoder.encode_tiles(pixels), encoder.backbone.forward_features(pixels)[:, 0])


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["virchow2", "quiltnet-b-32", "midnight-12k", "plip", "conch", "conch-v1.5", "ctranspath", "keep"]
)
def test_a_saved_preset_opens_with_equal_outputs(name, tmp_path, tile):
    encoder = small(name, image_size=224) if find_preset(name).library == "transformers" else small(name, img_size=224)
    encoder.save_pretrained(tmp_path / "encoder")
    again = load_encoder(tmp_path / "encoder")
    pixels = encoder.transform(tile)[None]
    torch.testing.assert_close(again.transform(tile)[None], pixels, rtol=0, atol=0)
    for key, weights in encoder.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[key], weights), key
    torch.testing.assert_close(again.encode_tiles(pixels), encoder.encode_tiles(pixels), rtol=1e-5, atol=1e-6)
    assert again.width == encoder.width and again.fingerprint() == encoder.fingerprint()


def serve_weights(monkeypatch, weights):
    """Stand in for the hub: every download gives `weights`; returns what was asked for."""
    asked = []

    def load(repository, filename=None, **_):
        asked.append((repository, filename))
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    return asked


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("virchow2", "paige-ai/Virchow2"),
        ("hf-hub:paige-ai/Virchow2", "paige-ai/Virchow2"),
        ("paige-ai/virchow2@abc", "paige-ai/Virchow2@abc"),
    ],
)
def test_every_name_of_a_preset_gives_its_settings(name, repository, monkeypatch):
    expected = small("virchow2")
    asked = serve_weights(monkeypatch, expected.backbone.state_dict())
    encoder = load_encoder(name, model_args=SMALL)
    assert asked == [(repository, None)] and encoder.name == f"hf-hub:{repository}"
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected.encode_tiles(pixels), rtol=0, atol=0)


@torch.inference_mode()
def test_openmidnight_loads_from_the_layout_of_dinov2(monkeypatch):
    expected = small("openmidnight")
    nn.init.normal_(expected.backbone.cls_token)
    ours = expected.backbone.state_dict()
    theirs = {"mask_token": torch.zeros(1, 48), "register_tokens": ours.pop("reg_token")}
    class_position = torch.randn(1, 1, 48)
    theirs["cls_token"] = ours.pop("cls_token") - class_position
    theirs["pos_embed"] = torch.cat([class_position, ours.pop("pos_embed")], dim=1)
    theirs |= {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in ours.items()}
    asked = serve_weights(monkeypatch, theirs)
    encoder = load_encoder("openmidnight", model_args=SMALL)
    assert asked == [("SophontAI/OpenMidnight", "teacher_checkpoint_load.pt")]
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected.encode_tiles(pixels))


@torch.inference_mode()
def test_quiltnet_loads_from_the_layout_of_openclip(monkeypatch):
    torch.manual_seed(0)
    width, blocks = 48, 2
    weights = {
        "visual.class_embedding": torch.randn(width),
        "visual.positional_embedding": torch.randn(5, width),
        "visual.conv1.weight": torch.randn(width, 3, 32, 32),
        "visual.proj": torch.randn(width, 512),
        "logit_scale": torch.ones([]),
    }
    for norm in ["ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(blocks) for j in (1, 2))]:
        weights |= {f"visual.{norm}.weight": torch.rand(width), f"visual.{norm}.bias": torch.randn(width)}
    for block in (f"visual.transformer.resblocks.{i}" for i in range(blocks)):
        for layer, shape in (
            ("attn.in_proj_", (3 * width, width)),
            ("attn.out_proj.", (width, width)),
            ("mlp.c_fc.", (4 * width, width)),
            ("mlp.c_proj.", (width, 4 * width)),
        ):
            weights |= {f"{block}.{layer}weight": torch.randn(shape) / 7, f"{block}.{layer}bias": torch.randn(shape[0])}
    asked = serve_weights(monkeypatch, weights)
    encoder = load_encoder("quiltnet", model_args=SMALL | {"img_size": 64})
    assert asked == [("wisdomik/QuiltNet-B-32", "open_clip_pytorch_model.bin")]
    pixels = torch.randn(2, 3, 64, 64)
    class_token = encoder.backbone.forward_features(pixels)[:, 0]
    torch.testing.assert_close(encoder.encode_tiles(pixels), class_token @ weights["visual.proj"])
    assert isinstance(encoder.backbone.blocks[0].mlp.act, nn.GELU)


def pooled_by_hand(weights, tokens, num_heads=8):
    """CONCH's head as its paper describes it, one image and one head after the other."""
    pooler = {key.removeprefix("attn_pool_contrast."): value for key, value in weights.items()}
    width = weights["ln_contrast.weight"].numel()
    norm = lambda x, name: nn.functional.layer_norm(x, x.shape[-1:], pooler[f"{name}.weight"], pooler[f"{name}.bias"])  # noqa: E731
    query = norm(pooler["query"], "ln_q") @ pooler["to_q.weight"].T
    pooled = []
    for image in norm(tokens, "ln_k"):
        key, value = (image @ pooler["to_kv.weight"].T).split(width, dim=-1)
        spans = [slice(i, i + width // num_heads) for i in range(0, width, width // num_heads)]
        read = [(query[:, s] @ key[:, s].T / (width // num_heads) ** 0.5).softmax(-1) @ value[:, s] for s in spans]
        pooled.append(torch.cat(read, dim=-1)[0] @ pooler["to_out.weight"].T)
    return norm(torch.stack(pooled), "ln_contrast")


@torch.inference_mode()
def test_conch_loads_from_its_published_layout(monkeypatch):
    expected = small("conch")
    for parameter in expected.backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = expected.backbone.state_dict()
    theirs = {f"visual.{key}": value for key, value in ours.items()}
    theirs |= {"visual.proj_contrast": torch.zeros(2), "visual.attn_pool_caption.query": torch.zeros(2)}
    theirs |= {"visual.ln_caption.bias": torch.zeros(2), "text.cls_emb": torch.zeros(2), "logit_scale": torch.ones([])}
    asked = serve_weights(monkeypatch, theirs)
    encoder = load_encoder("MahmoodLab/conch", model_args=SMALL_TOWER)
    assert asked == [("MahmoodLab/CONCH", "pytorch_model.bin")]
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected.encode_tiles(pixels))
    tokens = encoder.backbone.trunk.forward_features(pixels)
    torch.testing.assert_close(encoder.encode_tiles(pixels), pooled_by_hand(ours, tokens))
    assert encoder.encode_patches(pixels).shape == (2, 16, 48)


def cubic(grid, scale, side):
    """(rows, columns, D) sampled at (i + 0.5) / scale - 0.5 with the cubic kernel of a = -0.75, edges repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    sampling = torch.zeros(side, len(grid), dtype=torch.float64)
    for i in range(side):
        at = (i + 0.5) / scale - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            sampling[i, min(max(j, 0), len(grid) - 1)] += kernel(at - j)
    return torch.einsum("ir,jc,rcd->ijd", sampling, sampling, grid.double()).float()


@torch.inference_mode()
def test_conch_v15_stretches_its_positions_as_its_authors_do(monkeypatch):
    weights = small("conch-v1.5").backbone.state_dict()
    stored = torch.randn(1, 1 + 2 * 2, 48)
    asked = serve_weights(monkeypatch, weights | {"trunk.pos_embed": stored})
    encoder = load_encoder("conch_v15", model_args=SMALL_TOWER)
    assert asked == [("MahmoodLab/conchv1_5", "pytorch_model_vision.bin")]
    positions = encoder.backbone.trunk.pos_embed[0]
    torch.testing.assert_close(positions[0], stored[0, 0])
    expected = cubic(stored[0, 1:].unflatten(0, (2, 2)), 4.1 / 2, 4).flatten(0, 1)
    torch.testing.assert_close(positions[1:], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_ctranspath_loads_from_the_layout_of_its_authors(monkeypatch, tmp_path):
    expected = small("ctranspath")
    for name, buffer in expected.backbone.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
    ours = expected.backbone.state_dict()
    theirs = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for key, value in ours.items():  # they shrink at the end of a stage, timm at the start of the next
        stage = int(key.split(".")[1]) if key.startswith("layers.") else 0
        theirs[key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")] = value
    assert "layers.0.downsample.norm.weight" in theirs
    torch.save({"model": theirs}, tmp_path / "ctranspath.pth")
    asked = serve_weights(monkeypatch, {"model": theirs})
    encoder = load_encoder("ctranspath", model_args=SMALL_SWIN)
    assert asked == [("1aurent/swin_tiny_patch4_window7_224.CTransPath", None)]
    pixels = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected.encode_tiles(pixels))
    feature_map = encoder.backbone.forward_features(pixels)
    torch.testing.assert_close(encoder.encode_tiles(pixels), feature_map.mean((1, 2)))
    by_hand = load_encoder(f"ctranspath={tmp_path}/ctranspath.pth", model_args=SMALL_SWIN)
    torch.testing.assert_close(by_hand.encode_tiles(pixels), expected.encode_tiles(pixels))
    assert by_hand.preset is find_preset("ctranspath") and by_hand.fingerprint() == encoder.fingerprint()
    assert load_encoder(by_hand.name, model_args=SMALL_SWIN).name == by_hand.name


def test_files_of_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"model": {"patch_embed.proj.0.weight": torch.zeros(3, 3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="ctranspath=.*other.pth cannot be built: "):
        load_encoder(f"ctranspath={tmp_path}/other.pth", model_args=SMALL_SWIN)
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model_vision\.bin of https://huggingface\.co/MahmoodLab/conchv1_5"
    ):
        load_encoder(f"conch-v1.5={tmp_path}/absent.bin")
    with pytest.raises(ValueError, match="phikon takes no file of weights; give a folder"):
        load_encoder(f"phikon={tmp_path}/other.pth")


@torch.inference_mode()
def test_the_stem_of_ctranspath():
    stem = small("ctranspath").backbone.patch_embed
    weights, pixels = stem.state_dict(), torch.randn(2, 3, 32, 32)
    hidden = pixels
    for convolution, norm in ((0, 1), (3, 4)):
        hidden = nn.functional.conv2d(hidden, weights[f"proj.{convolution}.weight"], stride=2, padding=1)
        hidden = hidden / (1 + 1e-5) ** 0.5 * weights[f"proj.{norm}.weight"][:, None, None]
        hidden = (hidden + weights[f"proj.{norm}.bias"][:, None, None]).clamp(min=0)
    hidden = torch.einsum("bchw,dc->bhwd", hidden, weights["proj.6.weight"][:, :, 0, 0]) + weights["proj.6.bias"]
    expected = nn.functional.layer_norm(hidden, (24,), weights["norm.weight"], weights["norm.bias"])
    torch.testing.assert_close(stem(pixels), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_keep_loads_from_its_published_layout(monkeypatch):
    expected = small("keep")
    for parameter in expected.backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = {"text.embeddings.LayerNorm.bias": torch.zeros(2), "logit_scale": torch.ones([])}
    for key, value in expected.backbone.state_dict().items():
        theirs[key.replace(".gamma", ".weight")] = value
    asked = serve_weights(monkeypatch, theirs)
    encoder = load_encoder("keep", model_args=SMALL_TOWER)
    assert asked == [("Astaxanthin/KEEP", None)] and "visual.blocks.0.ls1.weight" in theirs
    pixels = torch.randn(2, 3, 64, 64)
    class_token = encoder.backbone.visual.forward_features(pixels)[:, 0]
    head = encoder.backbone.visual_head
    hidden = nn.functional.gelu(class_token @ head[0].weight.T + head[0].bias) @ head[2].weight.T + head[2].bias
    torch.testing.assert_close(encoder.encode_tiles(pixels), hidden / hidden.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected.encode_tiles(pixels))


def at(folder, name):
    """The preset `name` with a local folder in place of its repository."""
    return dataclasses.replace(find_preset(name), repository=str(folder))


def save_hibou(folder, without=()):
    """A small DINOv2 with registers whose configuration names other code, as Hibou's does; returns the model."""
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(**SMALL_TRANSFORMERS, patch_size=14)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    weights = {key: value for key, value in model.state_dict().items() if key not in without}
    model.save_pretrained(folder, state_dict=weights)
    theirs = json.loads((folder / "config.json").read_text())
    theirs |= {"model_type": "dinov2", "auto_map": {"AutoModel": "modeling_dinov2.Dinov2ModelWithRegisters"}}
    (folder / "config.json").write_text(json.dumps(theirs))
    return model


@torch.inference_mode()
def test_hibou_loads_without_the_code_of_its_repository(tmp_path):
    model = save_hibou(tmp_path / "hibou")
    encoder = encoders._build_transformers_preset(at(tmp_path / "hibou", "hibou-b"), "", True, {})
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(encoder.encode_tiles(pixels), model(pixel_values=pixels).pooler_output)


def test_weights_that_are_missing_are_refused(tmp_path):
    save_hibou(tmp_path / "hibou", without=("embeddings.register_tokens",))
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. embeddings\.register_tokens"):
        encoders._build_transformers_preset(at(tmp_path / "hibou", "hibou-b"), "", True, {})


@torch.inference_mode()
def test_plip_gives_the_image_features_of_clip(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = sizes | {"image_size": 224, "patch_size": 32}
    text = sizes | {"vocab_size": 64}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path / "plip")
    encoder = encoders._build_transformers_preset(at(tmp_path / "plip", "plip"), "", True, {})
    pixels = torch.randn(2, 3, 224, 224)
    vision_output = model.vision_model(pixel_values=pixels)
    expected = model.visual_projection(vision_output.pooler_output)
    torch.testing.assert_close(encoder.encode_tiles(pixels), expected)
    assert encoder.encode_patches(pixels).shape == (2, 49, 32)


def refusal(kind, status):
    """An error of the hub's client, as it is raised after an answer of the hub."""
    return kind(str(status), response=httpx.Response(status, request=httpx.Request("GET", "https://x")))


def not_cached(cause=None):
    """What the hub's client raises when it got no file from the hub and has none itself."""
    error = hub_errors.LocalEntryNotFoundError("a page of advice")
    error.__cause__ = cause
    return error


def refuse_weights(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)


GATE = (
    r"accept its licence \(cc-by-nc-nd-4\.0\) at https://huggingface\.co/paige-ai/Virchow2 .*`hf auth login`.* HF_TOKEN"
)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("virchow2", refusal(hub_errors.GatedRepoError, 403)),
        ("hf-hub:paige-ai/Virchow2", refusal(hub_errors.GatedRepoError, 401)),
        ("paige-ai/Virchow2@main", refusal(hub_errors.GatedRepoError, 403)),
        ("virchow2", refusal(hub_errors.RepositoryNotFoundError, 401)),
        ("virchow2", refusal(hub_errors.HfHubHTTPError, 403)),
        ("virchow2", not_cached(refusal(hub_errors.HfHubHTTPError, 403))),
        ("virchow2", not_cached(refusal(hub_errors.GatedRepoError, 403))),
    ],
)
def test_a_gated_model_says_how_to_get_it(name, error, monkeypatch):
    refuse_weights(monkeypatch, error)
    with pytest.raises(PermissionError, match=f"encoder {name} is gated: {GATE}") as caught:
        load_encoder(name, model_args=SMALL)
    assert "\n" not in str(caught.value)


def test_a_gated_model_that_is_not_cached_says_both(monkeypatch):
    refuse_weights(monkeypatch, not_cached(OSError("no network")))
    with pytest.raises(ConnectionError, match=f"hub cannot be reached: .*it is gated, .*{GATE}") as caught:
        load_encoder("virchow2", model_args=SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refusal(hub_errors.GatedRepoError, 403), PermissionError, "is gated: accept its licence at .*/org/name and"),
        (refusal(hub_errors.HfHubHTTPError, 403), PermissionError, "refuses encoder org/name to your token .*/tokens"),
        (
            refusal(hub_errors.RepositoryNotFoundError, 401),
            FileNotFoundError,
            "no encoder org/name: .*hf auth login",
        ),
        (refusal(hub_errors.RepositoryNotFoundError, 404), FileNotFoundError, "no encoder org/name"),
        (refusal(hub_errors.RemoteEntryNotFoundError, 404), FileNotFoundError, "no encoder org/name"),
        (refusal(hub_errors.HfHubHTTPError, 503), ConnectionError, "encoder org/name .*cannot be reached"),
        (not_cached(), ConnectionError, "encoder org/name .*model.safetensors$"),
    ],
)
def test_refusals_of_the_hub_become_one_line(error, kind, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(kind, match=message) as caught:
        load_encoder("org/name")
    assert "\n" not in str(caught.value)


def test_a_gated_model_of_transformers_says_so_too(monkeypatch):
    def refuse(*_, **__):
        raise OSError("a page of advice\nof transformers") from refusal(hub_errors.GatedRepoError, 403)

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", refuse)
    with pytest.raises(PermissionError, match=r"accept its licence \(apache-2\.0\) at https://huggingface\.co/histai/"):
        load_encoder("hibou-l")


@pytest.mark.parametrize("name", ["gpfm", "uni2-h", "phikon", "plip"])
def test_weights_out_of_reach(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    args = {} if find_preset(name).library == "transformers" else SMALL
    with pytest.raises(ConnectionError, match=f"encoder {name} .*cannot be reached"):
        load_encoder(name, model_args=args)


def test_names():
    assert find_preset("UNI_v1").name == "uni" and find_preset("hf_hub:MahmoodLab/uni@main").name == "uni"
    assert find_preset("histai/Hibou-l").name == "hibou-l" and find_preset("lunit").name == "lunit-vits8"
    assert find_preset("vit_tiny_patch16_224") is find_preset("resnet50") is find_preset("someone/uni") is None
    names = encoder_presets.preset_names()
    assert len(set(names)) == len(names) and not any(timm.is_model(name) for name in names)
    assert len({preset.repository.lower() for preset in PRESETS}) == len(PRESETS)
    with pytest.raises(ValueError, match="did you mean virchow2"):
        load_encoder("virchov2")


def test_a_folder_goes_before_a_preset_if_it_holds_an_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uni").mkdir()
    assert small("uni").preset is find_preset("uni")
    load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=SMALL).save_pretrained("uni")
    encoder = load_encoder("uni")
    assert encoder.preset is None and encoder.name == str(tmp_path / "uni")


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.is_timm_name], ids=lambda p: p.name)
def test_licences_of_timm(preset):
    assert timm.get_pretrained_cfg(preset.name).license == preset.licence


def test_tiles_unlike_those_of_training_get_one_line_of_advice():
    virchow2, gpfm, plip = (find_preset(name) for name in ("virchow2", "gpfm", "plip"))
    assert virchow2.tiling_advice(tile_size=224, mpp=0.5) is virchow2.tiling_advice(tile_size=224, mpp=2.0) is None
    assert find_preset("uni").tiling_advice(tile_size=256, mpp=0.5047) is None
    advice = find_preset("virchow").tiling_advice(tile_size=256, mpp=1.0)
    assert "224 px at 0.5 um/px, not 256 px at 1 um/px: consider --tile_size 224 --mpp 0.5" in advice
    assert virchow2.tiling_advice(tile_size=256, mpp=0.5).endswith("--tile_size 224")
    assert "512 px, not 224" in gpfm.tiling_advice(tile_size=224, mpp=0.5)
    assert gpfm.tiling_advice(tile_size=512, mpp=0.25) is plip.tiling_advice(tile_size=100, mpp=3) is None


def test_encode_gives_the_advice(tmp_path, monkeypatch, caplog):
    DrawnSlide(width=512, height=512, num_levels=1).write(tmp_path / "slide.tiff")
    encoder = small("virchow")
    monkeypatch.setattr(encoders, "load_encoder", lambda name: encoder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--slides", tmp_path / "slide.tiff", "--output_dir", tmp_path / "out", "--encoder", "virchow"]
    flags += ["--tile_size", "128", "--mpp", "1.0"]
    with caplog.at_level(logging.WARNING, logger="stage0_tiling"):
        assert stage0_encode.main([str(flag) for flag in flags]) == 0
    assert [r.message for r in caplog.records if "was trained on" in r.message] == [
        find_preset("virchow").tiling_advice(tile_size=128, mpp=1.0)
    ]


def test_the_documentation_is_up_to_date():
    assert encoder_presets.markdown_table() in (ROOT / "docs" / "encoders.md").read_text()
    assert set(PUBLISHED_TOKENS) == {preset.name for preset in PRESETS}
    for preset in PATHOLOGY:
        assert preset.sources and all(source.startswith("https://") for source in preset.sources)
    assert "docs/encoders.md" in Path(ROOT / "README.md").read_text()
