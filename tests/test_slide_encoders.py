import argparse
import errno
import json
import math
import os
import subprocess
import sys

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import slide_encoders
from encoders import load_encoder
from longnet import LongNet, attend, attend_plainly, dilated_attention, sincos_positions
from slide_encoders import GatedAttention, TilePool, check_tokens, load_slide_encoder, save_slide_encoder, tile_cells
from slide_features import read_slide_features, write_slide_features
from stage0_tiling import encode_slides, full_disk
from stage0_tiling.claims import Claims
from stage0_tiling.slide_tokens import encoders_named
from tests.conftest import ROOT, environment, run_command

BRANCHES = ((4, 1), (8, 2), (16, 4))
ABOUT = {"mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 512, "min_tissue": 0.1}


def small_longnet(seed=0, **arguments):
    torch.manual_seed(seed)
    sizes = {"input_width": 12, "width": 64, "depth": 3, "num_heads": 16, "feed_forward_width": 96}
    sizes |= {"segment_lengths": [s for s, _ in BRANCHES], "dilations": [r for _, r in BRANCHES]}
    longnet = LongNet(**(sizes | arguments)).eval()
    for parameter in longnet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return longnet


def slide(num_tiles=11, width=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    cells = torch.stack([torch.arange(num_tiles) % 4, torch.arange(num_tiles) // 4], dim=-1)
    return torch.randn(1, num_tiles, width, generator=rng), cells[None]


def slow_dilated_attention(query, key, value, branches):
    """The definition, token by token and head by head in float64: (N, H, C); merging weights carry no gradient."""
    num_tokens, num_heads, width = query.shape
    mixed = []
    for i in range(num_tokens):
        for head in range(num_heads):
            outs, sums = [], []
            for segment_length, dilation in branches:
                segment_length = min(segment_length, num_tokens)
                offset = head // math.ceil(num_heads / dilation)
                first = i // segment_length * segment_length
                if (i - first) % dilation != offset:
                    continue
                places = range(first + offset, first + math.ceil(segment_length / dilation) * dilation, dilation)
                real = [j for j in places if j < min(first + segment_length, num_tokens)]
                scores = (key[real, head] @ query[i, head] / math.sqrt(width)).exp()
                total = scores.sum() + (len(places) - len(real))  # keys of zero have weight e^0 and value 0
                outs.append(scores @ value[real, head] / total)
                sums.append(total.detach())
            mixed.append(sum(out * (part / sum(sums)) for out, part in zip(outs, sums, strict=True)))
    return torch.stack(mixed).unflatten(0, (num_tokens, num_heads))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 21), st.sampled_from([1, 2, 3, 4, 6]), st.data())
def test_dilated_attention_is_the_definition(num_tokens, num_heads, data):
    more = data.draw(st.lists(st.tuples(st.integers(1, 24), st.integers(1, 5)), max_size=3))
    branches = ((data.draw(st.integers(1, 24)), 1), *more)
    rng = torch.Generator().manual_seed(num_tokens)
    query, key, value = torch.randn(3, 1, num_tokens, num_heads, 8, generator=rng)
    expected = slow_dilated_attention(query[0].double(), key[0].double(), value[0].double(), branches)
    torch.testing.assert_close(dilated_attention(query, key, value, branches)[0], expected.float())


def test_gradients_of_dilated_attention_are_those_of_the_definition():
    ours = torch.randn(3, 1, 19, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    towards = torch.randn(19, 4, 8, generator=torch.Generator().manual_seed(1))
    (dilated_attention(*ours, BRANCHES)[0] * towards).sum().backward()
    (slow_dilated_attention(*theirs[:, 0], BRANCHES) * towards).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_with_denominators_is_plain_attention(dtype, tolerance):
    query, key, value = torch.randn(3, 2, 3, 70, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, plain in zip(attend(query, key, value), attend_plainly(query, key, value), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(attend(query, key, value)[0], F.scaled_dot_product_attention(query, key, value))


@torch.inference_mode()
@pytest.mark.parametrize("num_tiles", [1, 2, 7, 40])
def test_longnet_is_what_its_paper_describes(num_tiles):
    longnet = small_longnet()
    weights = {key: value.double() for key, value in longnet.state_dict().items()}
    features, cells = slide(num_tiles)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    hidden = linear(features[0].double(), "patch_embed.proj") + sincos_positions(cells[0], 64).double()
    hidden = torch.cat([weights["cls_token"][0], hidden])
    states = [hidden]
    for layer in (f"encoder.layers.{i}" for i in range(3)):
        normed = norm(hidden, f"{layer}.self_attn_layer_norm")
        heads = [linear(normed, f"{layer}.self_attn.{part}_proj").unflatten(-1, (16, 4)) for part in "qkv"]
        mixed = slow_dilated_attention(*heads, BRANCHES).flatten(-2)
        hidden = hidden + linear(norm(mixed, f"{layer}.self_attn.inner_attn_ln"), f"{layer}.self_attn.out_proj")
        inner = F.gelu(linear(norm(hidden, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        hidden = hidden + linear(norm(inner, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
        states.append(hidden)
    closed = norm(hidden, "encoder.layer_norm")

    def compare(tokens, expected):
        torch.testing.assert_close(longnet(features, cells, tokens=tokens)[0], expected.float(), rtol=1e-4, atol=1e-4)

    compare("slide", norm(closed[:1], "norm", 1e-6))
    compare("all", norm(closed[1:], "norm", 1e-6))
    compare("layers", torch.stack([norm(state[0], "norm", 1e-6) for state in states]))
    longnet.pooling = "mean"
    compare("slide", norm(closed[1:].mean(0, keepdim=True), "norm", 1e-6))


def test_the_published_size_names_and_segments():
    with torch.device("meta"):
        longnet = LongNet()
    shapes = {key: tuple(value.shape) for key, value in longnet.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 86_330_880
    layer = "encoder.layers.11"
    assert shapes["cls_token"] == (1, 1, 768) and shapes["patch_embed.proj.weight"] == (768, 1536)
    for name, shape in {
        f"{layer}.self_attn.k_proj.weight": (768, 768),
        f"{layer}.self_attn.inner_attn_ln.weight": (768,),
        f"{layer}.self_attn_layer_norm.bias": (768,),
        f"{layer}.ffn.fc1.weight": (3072, 768),
        f"{layer}.ffn.ffn_layernorm.weight": (3072,),
        f"{layer}.final_layer_norm.weight": (768,),
        "encoder.layer_norm.weight": (768,),
        "norm.weight": (768,),
    }.items():
        assert shapes[name] == shape
    assert longnet.encoder["layers"][0].self_attn.branches == tuple(
        zip((2 ** np.linspace(10, 20, 5)).astype(int).tolist(), (1, 2, 4, 8, 16), strict=True)
    )


def test_positions_equal_the_published_table_and_go_beyond_it():
    side, width = 30, 32
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=0).reshape(2, -1)  # first axis runs fastest
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    angles = [np.outer(axis, omega) for axis in places]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    rows = cells[:, 0] * side + cells[:, 1]  # where the original looks a tile at (x, y) up
    torch.testing.assert_close(sincos_positions(cells, width), torch.from_numpy(table)[rows].float())
    far = sincos_positions(torch.tensor([[10**6, 5], [10**6 + 1, 5], [10**6, 6], [0, 10**9 + 6]]), width)
    assert far.isfinite().all() and torch.cdist(far, far).fill_diagonal_(9).min() > 0.1


@torch.inference_mode()
def test_huge_coordinates():
    longnet = small_longnet()
    features, cells = slide()
    far = longnet(features, cells + torch.tensor([5_000, 80_000]))
    assert far.isfinite().all() and not torch.allclose(far, longnet(features, cells), atol=1e-3)


def test_cells_are_the_same_at_every_resolution():
    cells = torch.tensor([[0, 0], [3, 1], [1999, 70_000]])
    for side in (256, 512, 517, 1035):
        assert torch.equal(tile_cells(cells * side, side), cells)
        assert torch.equal(tile_cells(cells * side + side - 1, side), cells)
    assert torch.equal(tile_cells(torch.tensor([[-1, 256]]), 256), torch.tensor([[-1, 1]]))


ENCODERS = {
    "mean": lambda: TilePool("mean"),
    "max": lambda: TilePool("max"),
    "abmil": lambda: GatedAttention(12, 20, attention_width=8, num_tokens=3).eval(),
    "longnet": small_longnet,
}


@torch.inference_mode()
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_and_neighbours_change_nothing(name):
    encoder = ENCODERS[name]()
    slides = [slide(n, seed=n) for n in (11, 1, 30)]
    features, cells = torch.full((3, 30, 12), torch.nan), torch.full((3, 30, 2), -7)
    tile_mask = torch.zeros(3, 30, dtype=torch.bool)
    for row, (own_features, own_cells) in enumerate(slides):
        n = own_features.shape[1]
        features[row, :n], cells[row, :n], tile_mask[row, :n] = own_features[0], own_cells[0], True
    features = torch.where(tile_mask[..., None], features, 1e4)
    together = encoder(features, cells, tile_mask)
    for row, own in enumerate(slides):
        torch.testing.assert_close(together[row], encoder(*own)[0], rtol=1e-5, atol=1e-5)
    assert together.shape == (3, {"abmil": 3}.get(name, 1), encoder.width or 12)
    if name == "longnet":
        every = encoder(features, cells, tile_mask, tokens="all")
        assert every.shape == (3, 30, 64) and not every[1, 1:].any()
        torch.testing.assert_close(every[0, :11], encoder(*slides[0], tokens="all")[0])
    with pytest.raises(ValueError, match="without tiles"):
        encoder(features, cells, torch.zeros_like(tile_mask))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mean", "max", "abmil"])
def test_pooling_does_not_see_the_order_of_tiles(name):
    encoder, (features, cells) = ENCODERS[name](), slide()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(features[:, order], cells[:, order]), encoder(features, cells))
    with pytest.raises(ValueError, match="slide tokens only"):
        encoder(features, cells, tokens="all")


@torch.inference_mode()
def test_mean_and_maximum():
    features, cells = slide()
    torch.testing.assert_close(TilePool("mean")(features.half(), cells)[0, 0], features[0].half().float().mean(0))
    torch.testing.assert_close(TilePool("max")(features, cells)[0, 0], features[0].amax(0))


@pytest.mark.parametrize("name", ["abmil", "longnet"])
def test_gradients_reach_every_weight(name):
    encoder, (features, cells) = ENCODERS[name]().train(), slide()
    torch.manual_seed(0)
    features.requires_grad_()
    encoder(features, cells).square().sum().backward()
    assert features.grad[0].abs().sum(-1).all()
    without = {key for key, weights in encoder.named_parameters() if weights.grad is None or not weights.grad.any()}
    assert without <= {"attention_c.bias"}  # softmax does not see it


def clam_weights(first, seed=0):
    """A checkpoint of CLAM_MB with 2 classes, its attention network at place `first` of the sequence."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"attention_net.0": (20, 12), "classifiers.0": (1, 20), "instance_classifiers.1": (2, 20)}
    net = f"attention_net.{first}"
    shapes |= {f"{net}.attention_a.0": (8, 20), f"{net}.attention_b.0": (8, 20), f"{net}.attention_c": (2, 8)}
    weights = {f"{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0], generator=rng) for name, shape in shapes.items()}


@torch.inference_mode()
@pytest.mark.parametrize("first", [2, 3])
def test_attention_of_clam(first, tmp_path):
    weights = clam_weights(first)
    torch.save(weights, tmp_path / "s_0_checkpoint.pt")
    encoder, (features, cells) = load_slide_encoder(tmp_path / "s_0_checkpoint.pt"), slide()
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    tiles = linear(features[0], "attention_net.0").clamp(min=0)
    gated = linear(tiles, f"attention_net.{first}.attention_a.0").tanh()
    gated = gated * linear(tiles, f"attention_net.{first}.attention_b.0").sigmoid()
    attention = linear(gated, f"attention_net.{first}.attention_c").T.softmax(-1)
    torch.testing.assert_close(encoder.attention(features)[0], attention)
    torch.testing.assert_close(encoder(features, cells)[0], attention @ tiles)


def published_longnet(path):
    """A small LongNet as its authors store theirs, with what pretraining leaves behind; returns the model."""
    longnet = small_longnet()
    weights = longnet.state_dict() | {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(2, 2)}
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    return longnet


@torch.inference_mode()
def test_gigapath_loads_from_its_published_layout(tmp_path, monkeypatch):
    longnet = published_longnet(tmp_path / "slide_encoder.pth")
    asked = []

    def download(*what):
        asked.append(what)
        return str(tmp_path / "slide_encoder.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    encoder = load_slide_encoder("gigapath")
    assert asked == [("prov-gigapath/prov-gigapath", "slide_encoder.pth")] and encoder.name == "gigapath"
    assert (encoder.input_width, encoder.width, encoder.arguments["feed_forward_width"]) == (12, 64, 96)
    assert encoder.encoder["layers"][0].self_attn.branches[-1] == (1048576, 16) and not encoder.training
    for key, weights in longnet.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], weights)


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_a_saved_slide_encoder_opens_with_equal_outputs(name, tmp_path):
    encoder, (features, cells) = ENCODERS[name](), slide()
    save_slide_encoder(encoder, tmp_path / "encoder")
    again = load_slide_encoder(tmp_path / "encoder")
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {"config.json", "model.safetensors"}
    torch.testing.assert_close(again(features, cells), encoder(features, cells))
    assert slide_encoders.slide_fingerprint(again) == slide_encoders.slide_fingerprint(encoder)
    assert again.name == str(tmp_path / "encoder") and not again.training
    for parameter in again.parameters():
        parameter.add_(1)
        assert slide_encoders.slide_fingerprint(again) != slide_encoders.slide_fingerprint(encoder)


def test_fingerprints_tell_settings_apart():
    prints = {slide_encoders.slide_fingerprint(TilePool(kind)) for kind in ("mean", "max")}
    prints |= {slide_encoders.slide_fingerprint(small_longnet(pooling=kind)) for kind in ("mean", "class")}
    assert len(prints) == 4


def test_slide_encoders_that_cannot_be_opened_are_refused_in_one_line(tmp_path, monkeypatch):
    def refuse(name, kind, message):
        with pytest.raises(kind, match=message) as caught:
            load_slide_encoder(name)
        assert "\n" not in str(caught.value)

    refuse("gigapaht", ValueError, "unknown slide encoder gigapaht: expected mean, max, gigapath")
    refuse("abmil", ValueError, "abmil has no published weights")
    refuse(tmp_path / "absent.pt", FileNotFoundError, "no such file")
    refuse(tmp_path, FileNotFoundError, r"no config\.json")
    (tmp_path / "text.pt").write_text("not weights")
    refuse(tmp_path / "text.pt", ValueError, "cannot be read as weights")
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pt")
    refuse(tmp_path / "other.pt", ValueError, "neither Prov-GigaPath's LongNet nor an attention network of CLAM")
    ungated = {key: value for key, value in clam_weights(2).items() if "attention_b" not in key}
    torch.save(ungated, tmp_path / "ungated.pt")
    refuse(tmp_path / "ungated.pt", ValueError, "without a gate")
    weights = small_longnet().state_dict()
    torch.save(weights | {"surprise": torch.zeros(1)}, tmp_path / "more.pt")
    refuse(tmp_path / "more.pt", ValueError, "has unknown 1 weights, e.g. surprise")
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "less.pt")
    refuse(tmp_path / "less.pt", ValueError, "lacks 1 weights, e.g. norm.bias")
    save_slide_encoder(TilePool("mean"), tmp_path / "mean")
    (tmp_path / "mean" / "config.json").write_text(json.dumps({"slide_encoder": "else"}))
    refuse(tmp_path / "mean", ValueError, "names slide encoder else")

    def gate(*_):
        response = httpx.Response(403, request=httpx.Request("GET", "https://x"))
        raise hub_errors.GatedRepoError("403", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gate)
    refuse("gigapath", PermissionError, "slide encoder gigapath is gated: accept .*prov-gigapath/prov-gigapath .*login")
    with pytest.raises(ValueError, match="multiple of 4 and of its 16 heads"):
        LongNet(width=72)
    with pytest.raises(ValueError, match="must hold 1"):
        LongNet(segment_lengths=(8, 16), dilations=(2, 4))


# ---- the command


def write_tiles(folder, slide_id, num_tiles=9, width=12, seed=0, **more):
    rng = np.random.default_rng(seed)
    coords = rng.permutation(np.stack([np.arange(num_tiles) % 4, np.arange(num_tiles) // 4], axis=1)) * 512
    features = rng.normal(size=(num_tiles, width)).astype(np.float16)
    about = ABOUT | {"encoder": "tiny", "encoder_fingerprint": "abc", "level0_mpp": 0.25} | more
    write_slide_features(folder / f"{slide_id}.h5", features, coords, name=slide_id, **about)
    return features, coords


def encode(folder, *more, slide_encoder="mean", status=0):
    flags = ["--features_dir", folder / "features", "--output_dir", folder, "--slide_encoder", slide_encoder, *more]
    assert encode_slides.main([str(flag) for flag in flags]) == status


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_encode_slides_writes_feature_files_of_slide_tokens(tmp_path):
    features, coords = write_tiles(tmp_path / "features", "a.b")
    encode(tmp_path)
    made = read_slide_features(tmp_path / "slide_features_mean" / "a.b.h5")
    np.testing.assert_allclose(made.features, features.astype(np.float32).mean(0, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(made.coords, np.rint(coords.mean(0, keepdims=True)))
    assert made.features.dtype == np.float32 and made.encoder == "tiny + mean"
    assert made.encoder_fingerprint.startswith("abc-") and (made.mpp, made.min_tissue) == (0.5, 0.1)
    with pytest.raises(ValueError, match=r"tiny \+ mean are a tile encoder and a slide encoder"):
        load_encoder(made.encoder)


@torch.inference_mode()
def test_tokens_of_a_longnet(tmp_path):
    features, coords = write_tiles(tmp_path / "features", "a")
    save_slide_encoder(small_longnet(), tmp_path / "mine")
    raster = np.lexsort((coords[:, 0], coords[:, 1]))
    batch = torch.from_numpy(features[raster])[None].float(), torch.from_numpy(coords[raster] // 512)[None]
    for tokens, suffix, shape in (("slide", "", (1, 64)), ("layers", "_layers", (4, 64)), ("all", "_all", (9, 64))):
        encode(tmp_path, "--tokens", tokens, slide_encoder=tmp_path / "mine")
        made = read_slide_features(tmp_path / f"slide_features_mine{suffix}" / "a.h5")
        expected = small_longnet()(*batch, tokens=tokens)[0].numpy()
        np.testing.assert_allclose(made.features, expected, rtol=2e-3, atol=2e-3 if tokens == "all" else 1e-5)
        assert made.features.shape == shape
        assert encoders_named(made.encoder) == ("tiny", str(tmp_path / "mine"), tokens)
    np.testing.assert_array_equal(made.coords, coords[raster])


def test_slide_tokens_say_how_their_tiles_were_made(tmp_path):
    making = {"icc": True, "stain_normalizer": "macenko", "tissue_method": "hsv", "max_pen": 0.2}
    write_tiles(tmp_path / "features", "a", more_making=making)
    encode(tmp_path)
    made = read_slide_features(tmp_path / "slide_features_mean" / "a.h5")
    assert made.making == read_slide_features(tmp_path / "features" / "a.h5").making
    assert {name: made.making[name] for name in making} == making


def test_a_second_run_does_what_is_missing_broken_or_older_than_its_tiles(tmp_path):
    for slide_id in "abcd":
        write_tiles(tmp_path / "features", slide_id)
    encode(tmp_path)
    made = {path.stem: path for path in (tmp_path / "slide_features_mean").iterdir()}
    before = {slide_id: path.read_bytes() for slide_id, path in made.items()}
    made["b"].unlink()
    made["c"].write_bytes(b"cut short")
    (made["a"].parent / ".c.h5.123.partial").write_bytes(b"half")
    changed, _ = write_tiles(tmp_path / "features", "d", seed=1)
    stamp = made["a"].stat().st_mtime_ns
    encode(tmp_path)
    assert made["a"].stat().st_mtime_ns == stamp and set(made["a"].parent.iterdir()) == set(made.values())
    again = {slide_id: read_slide_features(path).features for slide_id, path in made.items()}
    np.testing.assert_array_equal(again["b"], again["a"])
    np.testing.assert_array_equal(again["c"], again["a"])
    np.testing.assert_allclose(again["d"][0], changed.astype(np.float32).mean(0), rtol=1e-5)
    assert made["a"].read_bytes() == before["a"]


def test_a_second_process_shares_the_slides_and_leaves_what_the_first_is_writing(tmp_path, monkeypatch, caplog):
    for slide_id in "abc":
        write_tiles(tmp_path / "features", slide_id)
    folder = tmp_path / "slide_features_mean"
    folder.mkdir()
    writing = folder / ".b.h5.12ab.partial"
    writing.write_bytes(b"half")
    with Claims(tmp_path / "claims" / folder.name) as other:
        assert other.take("b")
        encode(tmp_path)
        assert writing.exists() and sorted(path.stem for path in folder.glob("*.h5")) == ["a", "c"]
        assert "2 done, 0 failed, 1 done or in work elsewhere" in caplog.text
        with pytest.raises(ValueError, match="--overwrite: b is in work"):
            encode(tmp_path, "--overwrite")
    encode(tmp_path)
    assert not writing.exists() and len(list(folder.iterdir())) == 3

    def dies(*_, **__):
        raise MemoryError

    monkeypatch.setattr(encode_slides, "encode_features", dies)
    encode(tmp_path, "--overwrite", status=1)
    assert not list(folder.iterdir()) and "failed: c: MemoryError" in caplog.text


def test_a_full_disk_ends_the_command_and_the_next_one_goes_on(tmp_path, monkeypatch, caplog):
    for slide_id in "abcd":
        write_tiles(tmp_path / "features", slide_id)
    write = encode_slides.write_tokens

    def full_at_b(path, *how):
        if path.stem == "b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *how)

    with monkeypatch.context() as patched:
        patched.setattr(encode_slides, "write_tokens", full_at_b)
        patched.setattr(full_disk, "FREE_BYTES", 1 << 62)
        encode(tmp_path, status=1)
    folder = tmp_path / "slide_features_mean"
    assert "1 done, 1 failed, 2 not done; see" in caplog.text
    assert f"failed: b: no space left in {folder}; free some, then run again" in caplog.text
    assert [path.stem for path in folder.iterdir()] == ["a"] and not list((tmp_path / "claims" / folder.name).iterdir())
    encode(tmp_path)
    assert sorted(path.stem for path in folder.iterdir()) == list("abcd")


def test_a_slide_that_kills_its_process_twice_is_given_up(tmp_path, caplog):
    for slide_id in "ab":
        write_tiles(tmp_path / "features", slide_id)
    script = (
        "import os, sys; from stage0_tiling.claims import Claims\n"
        "claims = Claims(sys.argv[1]); claims.folder.mkdir(parents=True, exist_ok=True)\n"
        "claims.take('a', after_deaths=True); os._exit(9)"
    )
    for _ in range(2):
        claims = str(tmp_path / "claims" / "slide_features_mean")
        subprocess.run([sys.executable, "-c", script, claims], cwd=ROOT, env=environment(), check=False)
    encode(tmp_path, status=1)
    assert "failed: a: the process that worked on it died 2 times" in caplog.text
    assert [path.stem for path in (tmp_path / "slide_features_mean").iterdir()] == ["b"]


def test_slide_tokens_of_two_encoders_of_one_name_do_not_mix(tmp_path):
    for slide_id in "ab":
        write_tiles(tmp_path / "features", slide_id)
    for name in ("one", "two"):
        save_slide_encoder(small_longnet(seed=len(name) + (name == "two")), tmp_path / name / "mine")
    encode(tmp_path, slide_encoder=tmp_path / "one" / "mine")
    (tmp_path / "features" / "b.h5").rename(tmp_path / "b.h5")
    (tmp_path / "features" / "a.h5").rename(tmp_path / "features" / "c.h5")
    for more in ((), ("--overwrite",)):
        with pytest.raises(
            ValueError, match="slide_features_mine holds features of encoder .*one/mine, not .*two/mine"
        ):
            encode(tmp_path, *more, slide_encoder=tmp_path / "two" / "mine")


def test_one_bad_file_costs_itself(tmp_path, caplog):
    write_tiles(tmp_path / "features", "good")
    (tmp_path / "features" / "bad.h5").write_bytes(b"not a feature file")
    encode(tmp_path, status=1)
    assert [path.name for path in (tmp_path / "slide_features_mean").iterdir()] == ["good.h5"]
    assert any("failed: bad: " in record.message for record in caplog.records)


def test_files_that_state_nothing_of_their_tiles(tmp_path):
    (tmp_path / "features").mkdir()
    torch.save(torch.arange(12.0).reshape(4, 3), tmp_path / "features" / "a.pt")
    encode(tmp_path, "--mpp", "0.25", "--tile_size", "512")
    made = read_slide_features(tmp_path / "slide_features_mean" / "a.h5")
    assert made.features.tolist() == [[4.5, 5.5, 6.5]] and made.encoder == "unknown + mean"
    assert (made.mpp, made.tile_size, made.patch_size_level0) == (0.25, 512, 256)  # the spacing of made-up positions


def test_what_does_not_fit_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="--features_dir"):
        encode(tmp_path)
    (tmp_path / "features").mkdir()
    with pytest.raises(ValueError, match="no feature file in it"):
        encode(tmp_path)
    write_tiles(tmp_path / "features", "a", width=7)
    save_slide_encoder(small_longnet(), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"takes features of width 12, not 7 \(of encoder tiny\)"):
        encode(tmp_path, slide_encoder=tmp_path / "mine")
    encode(tmp_path)
    made = tmp_path / "slide_features_mean" / "a.h5"
    made.unlink()
    write_tiles(made.parent, "a", encoder="else + mean")
    with pytest.raises(ValueError, match=r"a.h5 in .* is of else \+ mean \(abc\), not of tiny \+ mean .*--overwrite"):
        encode(tmp_path)
    encode(tmp_path, "--overwrite")
    assert read_slide_features(made).encoder == "tiny + mean"


def test_the_command(tmp_path):
    write_tiles(tmp_path / "features", "a")
    (tmp_path / "features" / "b.h5").write_bytes(b"not a feature file")
    command = ("stage0_tiling/encode_slides.py", "--features_dir", tmp_path / "features", "--output_dir", tmp_path)
    done = run_command(*command, "--slide_encoder", "max", processes=2, status=1)
    assert read_slide_features(tmp_path / "slide_features_max" / "a.h5").features.shape == (1, 12)
    assert done.stderr.count("1 done, 1 failed; see ") == 1 == done.stderr.count("failed: b: ") and not done.stdout


def test_the_documentation_names_every_slide_encoder():
    text = (ROOT / "docs" / "encoders.md").read_text()
    for word in (
        "encode_slides.py",
        "`mean`",
        "`max`",
        "`gigapath`",
        "CLAM",
        "save_slide_encoder",
        "arxiv.org/abs/1802",
    ):
        assert word in text, word


def test_tokens_that_an_encoder_does_not_give_are_refused_before_work():
    with pytest.raises(ValueError, match="slide encoder mean gives slide tokens only, not tokens all: use LongNet"):
        check_tokens(load_slide_encoder("mean"), "all")
