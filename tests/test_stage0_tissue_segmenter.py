"""Segmentation networks for tissue, in the forms that users have them."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from encoders import load_encoder
from inference.generate import check_input
from slide_features import read_slide_coords
from stage0_tiling import tile as stage0_tile
from stage0_tiling.encoding import encode_slide
from stage0_tiling.segmenter import BATCH_SIZE, PRESETS, _build, load_segmenter, segment
from stage0_tiling.slide import Slide
from stage0_tiling.tissue import find_tissue
from stage0_tiling.tissue_sources import TissueSources
from tests.conftest import run_command
from tests.slides import DrawnSlide
from vlm_settings import VLMSettings

PLAIN = {"tile_size": 64, "mean": [0, 0, 0], "std": [1, 1, 1]}
UNET = {
    "architecture": "smp:Unet",
    "kwargs": {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8], "classes": 2},
}


class Chroma(torch.nn.Module):
    """One class: tissue has colour."""

    def forward(self, pixels):
        return 400 * (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) - 10 / 255)


class HalfSize(torch.nn.Module):
    """Three classes in a dict, at half the size of the input: glass, dark tissue and other tissue."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        chroma = torch.nn.functional.avg_pool2d(pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True), 2)
        dark = torch.nn.functional.avg_pool2d(1 - pixels.mean(1, keepdim=True), 2)
        tissue = 400 * (chroma - 10 / 255)
        return {"out": torch.cat([0 * chroma, tissue.masked_fill(dark < 0.3, -100), tissue], 1)}


class Local(torch.nn.Module):
    """One class: tissue is where 15 x 15 pixels are dark on average."""

    def forward(self, pixels):
        means = torch.nn.functional.avg_pool2d(pixels[:, 1:2], 15, stride=1, padding=7, count_include_pad=False)
        return 100 * (0.8 - means)


def write_script(folder, network, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(folder / "net.pt"))
    (folder / "net.json").write_text(json.dumps(PLAIN | settings))
    return folder / "net.pt"


def write_weights(folder, **settings):
    torch.manual_seed(0)
    stated = PLAIN | UNET | settings
    network = _build(type(PRESETS["hest"])(**stated))
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "unet.safetensors")
    (folder / "unet.json").write_text(json.dumps(stated))
    return folder / "unet.safetensors", network


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "s.tiff"
    DrawnSlide(width=1024, height=768).write(path)
    return path


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def segment_file(slide_path, network_path, preset=None):
    with Slide(slide_path) as slide:
        return segment(slide, slide.pixel_size(), load_segmenter(network_path, preset))


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (Chroma(), {"mpp": 4.0}),
        (Chroma(), {"mpp": 1.0}),  # finer than the thumbnail: tiles shrink
        (HalfSize(), {"mpp": 2.0, "tissue_classes": [1, 2]}),
        (Chroma(), {"mpp": 16.0}),  # coarser, and one tile is larger than the slide
    ],
)
def test_a_script_that_tells_colour_finds_what_otsu_finds(network, settings, drawn, tmp_path):
    found = segment_file(drawn, write_script(tmp_path, network, **settings))
    with Slide(drawn) as slide:
        usual = find_tissue(slide, slide.pixel_size())
    assert found.mask.shape == usual.mask.shape and (found.scale_x, found.scale_y) == (usual.scale_x, usual.scale_y)
    assert iou(found.mask, usual.mask) > (0.93 if settings["mpp"] < 16 else 0.85)


def test_tiles_join_without_seams(drawn, tmp_path):
    """In overlapping tiles a network finds what it finds on the whole slide at once."""
    path = write_script(tmp_path, Local(), mpp=1.0, tile_size=128)
    with Slide(drawn) as slide:
        pixel_size = slide.pixel_size()
        whole = slide.read_whole(512, 384)
        found = segment(slide, pixel_size, load_segmenter(path))
    with torch.inference_mode():
        pixels = torch.from_numpy(whole).permute(2, 0, 1)[None].float() / 255
        exact = torch.jit.load(path)(pixels).sigmoid()[0, 0].numpy() >= 0.5
    exact = cv2.resize(exact.astype(np.float32), found.mask.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
    assert 0.1 < exact.mean() < 0.9
    assert (exact == found.mask).mean() > 0.97, "but for groups and holes too small to keep"


def test_weights_with_an_architecture(drawn, tmp_path):
    path, network = write_weights(tmp_path, mpp=8.0, tile_size=96)
    with Slide(drawn) as slide:
        found = segment(slide, slide.pixel_size(), load_segmenter(path))
        side = 96 * 8 * 2
        tile = slide.read_region(0, 0, side, side, (96, 96))
    with torch.inference_mode():
        probability = network.eval()(torch.from_numpy(tile).permute(2, 0, 1)[None] / 255).softmax(1)[0, 1].numpy()
    exact = cv2.resize(probability[:48, :64], found.mask.shape[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    assert (exact == found.mask).mean() > 0.95
    with torch.no_grad():
        network.segmentation_head[0].bias += torch.tensor([-50.0, 50.0])
    save_file(network.state_dict(), path)
    load_segmenter.__globals__["_load"].cache_clear()
    assert segment_file(drawn, path).mask.all()


def test_memory_holds_a_batch_of_tiles_whatever_the_slide(drawn, tmp_path):
    segmenter = load_segmenter(write_script(tmp_path, Chroma(), mpp=1.0))
    seen = []
    watched = replace(segmenter, network=lambda pixels: seen.append(pixels.shape) or segmenter.network(pixels))
    with Slide(drawn) as slide:
        segment(slide, slide.pixel_size(), watched)
    assert len(seen) > 5 and max(shape[0] for shape in seen) == BATCH_SIZE


def test_published_checkpoints_load_by_their_preset(tmp_path):
    grandqc = _build(PRESETS["grandqc-tissue"])
    assert sum(values.numel() for values in grandqc.parameters()) == 6_569_726
    torch.save(grandqc.state_dict(), tmp_path / "Tissue_Detection_MPP10.pth")
    loaded = load_segmenter(tmp_path / "Tissue_Detection_MPP10.pth", "grandqc-tissue")
    assert loaded.settings.mpp == 10 and loaded.settings.tissue_classes == (0,)
    assert loaded.name.startswith("Tissue_Detection_MPP10#")
    hest = _build(PRESETS["hest"]).half().state_dict()
    published = {f"model.{key}": value for key, value in hest.items()}
    published["model.aux_classifier.0.weight"] = torch.zeros(1)
    torch.save({"state_dict": published, "epoch": 3}, tmp_path / "deeplabv3_seg_v4.ckpt")
    loaded = load_segmenter(tmp_path / "deeplabv3_seg_v4.ckpt", "hest")
    assert loaded.settings.mpp == 1 and loaded.network.classifier[4].out_channels == 2
    with pytest.raises(ValueError, match="cannot be loaded .*weights missing"):
        load_segmenter(tmp_path / "deeplabv3_seg_v4.ckpt", "grandqc-tissue")


def test_the_command_segments_and_keeps_networks_apart(drawn, tmp_path):
    script, out = write_script(tmp_path, Chroma(), mpp=4.0), tmp_path / "out"
    common = ("--slides", drawn, "--tile_size", 64, "--mpp", 1.0, "--output_dir")
    run_command("stage0_tiling/tile.py", *common, out, "--segmenter", script)
    assert stage0_tile.main([str(word) for word in (*common, tmp_path / "usual")]) == 0
    ours, usual = (read_slide_coords(folder / "coords" / "s.h5").coords for folder in (out, tmp_path / "usual"))
    both = {tuple(xy) for xy in ours.tolist()} & {tuple(xy) for xy in usual.tolist()}
    assert len(both) > 0.9 * len(usual) and len(both) > 0.9 * len(ours)
    stored = json.loads((out / "state" / "s.json").read_text())["tiling"]["segmenter"]
    assert stored.startswith("net#") and str(tmp_path) not in stored
    weights, _ = write_weights(tmp_path / "other", mpp=8.0)
    arguments = [str(word) for word in (*common, out, "--segmenter", weights)]
    with pytest.raises(ValueError, match="tiled with --segmenter net#.*, not --segmenter unet#"):
        stage0_tile.main(arguments)
    assert stage0_tile.main([*arguments[:-2], "--segmenter", str(weights), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, ("net.pt",), "no such file"),
        ({"net.pt": b"x"}, ("net.pt",), "net.json must lie beside it"),
        ({"net.pt": b"x", "net.json": b"{"}, ("net.pt",), "net.json does not describe a network"),
        ({"net.pt": b"x", "net.json": b'{"mpp": 1, "tiles": 3}'}, ("net.pt",), "does not describe a network .*tiles"),
        ({"net.pt": b"x", "net.json": b'{"mpp": -1}'}, ("net.pt",), "mpp -1"),
        ({"net.pt": b"x", "net.json": b"[1]"}, ("net.pt",), "net.json .*it holds a list; expected an object such as"),
        ({"net.pt": b"x", "net.json": b"{}"}, ("net.pt",), "net.json does not describe a network .it lacks mpp"),
        ({"net.pt": b"x", "net.json": b'{"mpp": 1, "mean": [1]}'}, ("net.pt",), "mean.1: Field required"),
        ({"net.pt": b"x", "net.json": b'{"mpp": "ten"}'}, ("net.pt",), "mpp: Input should be a valid number"),
        ({"net.json": b"[1]"}, ("net.json",), "net.json: name the weights, .pt or .safetensors, that it lies beside"),
        ({"net.pt": b"x", "net.json": b'{"mpp": 1}'}, ("net.pt",), "cannot be loaded"),
        ({"n.safetensors": b"x", "n.json": b'{"mpp": 1, "architecture": "smp:X"}'}, ("n.safetensors",), "smp:X"),
        ({"net.pth": b"x"}, ("net.pth", "--segmenter_preset", "hest"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(files, flags, message, drawn, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    common = ["--slides", str(drawn), "--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError), match=message) as refused:
        stage0_tile.main([*common, "--segmenter", str(tmp_path / flags[0]), *flags[1:]])
    assert "--segmenter" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_preset_without_its_checkpoint_is_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match="say with --segmenter where"):
        stage0_tile.main(
            ["--slides", str(drawn), "--output_dir", str(tmp_path), "--segmenter_preset", "grandqc-tissue"]
        )


def test_a_new_slide_is_segmented_as_those_of_training_or_refused(drawn, tmp_path):
    script = write_script(tmp_path, Local(), mpp=4.0)
    arguments = ["--slides", drawn, "--output_dir", tmp_path / "out", "--tile_size", 64, "--mpp", 1, "--icc"]
    assert stage0_tile.main([str(word) for word in (*arguments, "--segmenter", script)]) == 0
    planned = read_slide_coords(tmp_path / "out" / "coords" / "s.h5").coords
    name = load_segmenter(script).name
    model_args = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 8, "num_heads": 1}
    encoder = load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=model_args)
    tiling = {"tile_size": 64, "mpp": 1.0, "segmenter": name}
    with pytest.raises(ValueError, match=f"the network {name}: say with --segmenter where it lies"):
        encode_slide(drawn, encoder, **tiling)
    found = encode_slide(drawn, encoder, **tiling, sources=TissueSources(segmenter=script))
    np.testing.assert_array_equal(found.coords, planned)
    assert found.more_making["segmenter"] == name
    assert len(planned) != len(encode_slide(drawn, encoder, tile_size=64, mpp=1.0).coords), "otsu finds others"

    given = SimpleNamespace(segmenter=None, segmenter_preset=None, slide=[str(drawn)], features=None, image=None)
    given.assume_mpp, given.evidence, given.chat, model = None, None, False, VLMSettings("llm", 8, tiling=tiling)
    with pytest.raises(ValueError, match="say with --segmenter where it lies"):
        check_input(given, model)
    given.segmenter = str(script)
    check_input(given, model)
    with pytest.raises(ValueError, match="to be found without a network"):
        check_input(given, replace(model, tiling={}))
    given.segmenter = str(write_weights(tmp_path / "other", mpp=8.0)[0])
    with pytest.raises(ValueError, match=f"is the network unet#.*, not {name}"):
        check_input(given, model)
