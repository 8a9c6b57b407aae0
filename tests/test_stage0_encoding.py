"""Encoding: several encoders in one reading, batches that do not fit, formats, stains, what inference inherits."""

import csv
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchstain.numpy.normalizers import NumpyMacenkoNormalizer, NumpyReinhardNormalizer

from encoders import load_encoder
from slide_features import read_slide_features, write_slide_features
from slide_reports import describe_features, making_of, read_records, with_inputs
from stage0_tiling import encode as stage0_encode
from stage0_tiling import tile as stage0_tile
from stage0_tiling.encoding import encode_slide, encode_slide_with
from stage0_tiling.plan import TilingSettings
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.stain import StainError, fit_stains, read_stain_target
from stage0_tiling.tile_encoder import TileEncoder, find_shortcut, name_folders
from tests.slides import DrawnSlide
from vlm_settings import VLMSettings

TILING = TilingSettings(tile_size=64, mpp=1.0)
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}  # float16, and sums that a batch of another shape does in another order


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "one.tiff"
    DrawnSlide(width=1024, height=768, num_levels=2).write(path)
    return path


def make_encoder(seed=0, img_size=32, **more):
    torch.manual_seed(seed)
    model_args = {"img_size": img_size, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2, **more}
    return load_encoder("vit_tiny_patch16_224", pretrained=False, model_args=model_args)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three encoders of different sizes of image and width."""
    root = tmp_path_factory.mktemp("encoders")
    make_encoder(0).save_pretrained(root / "first")
    make_encoder(1, img_size=64).save_pretrained(root / "second one")
    make_encoder(2, embed_dim=16).save_pretrained(root / "third")
    return [root / name for name in ("first", "second one", "third")]


def encode(slide, out, encoders, *more, status=0):
    flags = ["--slides", slide, "--output_dir", out, "--batch_size", 7, "--tile_size", 64, "--mpp", 1.0]
    flags += ["--num_workers", 2, "--encoder", *encoders, *more]
    assert stage0_encode.main([str(flag) for flag in flags]) == status


@pytest.fixture
def reads(monkeypatch):
    """Positions of all tiles that are read."""
    read, seen = Slide.read_region, []

    def counted(self, x, y, width, height, size):
        seen.append((x, y))
        return read(self, x, y, width, height, size)

    monkeypatch.setattr(Slide, "read_region", counted)
    return seen


def test_several_encoders_read_each_tile_once_and_only_what_is_missing_is_made(slide, folders, tmp_path, reads, caplog):
    first, second, third = folders
    out = tmp_path / "out"
    encode(slide, out, [first, second])
    made = [out / name / "one.h5" for name in ("features_first", "features_second_one")]
    num_tiles = len(read_slide_features(made[0]).coords)
    assert len(reads) == num_tiles == len(set(reads)) > 15
    for path, folder in zip(made, (first, second), strict=True):
        alone = encode_slide(slide, load_encoder(folder), tile_size=64, mpp=1.0, batch_size=7)
        stored = read_slide_features(path)
        np.testing.assert_allclose(stored.features, alone.features, **ROUNDING)
        assert stored.encoder == str(folder) and stored.encoder_fingerprint == alone.encoder_fingerprint

    kept = made[0].stat().st_mtime_ns
    made[1].unlink()
    reads.clear()
    encode(slide, out, [first, second, third])
    assert len(reads) == num_tiles and made[1].is_file() and made[0].stat().st_mtime_ns == kept
    assert read_slide_features(out / "features_third" / "one.h5").features.shape == (num_tiles, 16)
    encode(slide, out, [third, first])
    assert len(reads) == num_tiles and "1 slide, 0 of them to encode" in caplog.text

    make_encoder(5).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="features_first holds features of encoder .*first, not .*first.*--overwrite"):
        encode(slide, out, [tmp_path / "first", third])
    encode(slide, out, [tmp_path / "first", third], "--overwrite")
    assert not made[1].exists()


def test_folders_are_named_alike_whatever_their_order():
    def named(name, preset=None):
        return SimpleNamespace(name=name, preset=preset and SimpleNamespace(name=preset))

    a, b, c = named("/a/enc"), named("/b/Enc"), named("hf-hub:org/x y@main", preset="uni2-h")
    assert name_folders([a]) == ["features"]
    assert name_folders([c, a, named("hf-hub:org/Some:model")]) == ["features_uni2-h", "features_enc", "features_model"]
    first, second = name_folders([a, b])
    assert first != second and first.casefold() != second.casefold() and name_folders([b, c, a])[::2] == [second, first]
    with pytest.raises(ValueError, match="/a/enc is given twice"):
        name_folders([a, c, a])


def test_state_of_an_earlier_version_is_taken_over(slide, folders, tmp_path, caplog):
    encode(slide, tmp_path, folders[:1])
    path = tmp_path / "state" / "one.json"
    state = json.loads(path.read_text())
    made_by = state.pop("encoded")["features"]
    path.write_text(json.dumps(state | {"encoder": made_by["encoder"], "encoder_fingerprint": made_by["fingerprint"]}))
    encode(slide, tmp_path, folders[:1])
    assert "1 slide, 0 of them to encode" in caplog.text
    with pytest.raises(ValueError, match="holds features of encoder .*first, not .*third"):
        encode(slide, tmp_path, folders[2:])


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".zarr.zip"])
def test_formats_are_found_by_records_and_torn_files_are_made_again(slide, folders, tmp_path, suffix, caplog):
    how = {".h5": "h5", ".pt": "pt", ".zarr.zip": "zarr"}[suffix]
    encode(slide, tmp_path, folders[:1], "--format", how)
    path = tmp_path / "features" / f"one{suffix}"
    whole = read_slide_features(path)
    alone = encode_slide(slide, load_encoder(folders[0]), tile_size=64, mpp=1.0, batch_size=7)
    np.testing.assert_allclose(whole.features, alone.features, **ROUNDING)
    np.testing.assert_array_equal(whole.coords, alone.coords)
    assert whole.making == alone.making and whole.encoder_fingerprint == alone.encoder_fingerprint
    (tmp_path / "a.json").write_text(json.dumps([{"id": "one.tiff", "report": "Benign."}]))
    records = read_records(tmp_path / "a.json", features_dir=tmp_path / "features")
    usable, problems = with_inputs(records)
    assert [record.inputs for record in usable] == [(path,)] and not problems

    path.write_bytes(path.read_bytes()[:-50])
    encode(slide, tmp_path, folders[:1], "--format", how)
    assert "1 slide, 1 of them to encode" in caplog.text
    assert read_slide_features(path).features.tobytes() == whole.features.tobytes()
    about = {"name": "one", "encoder": "e", "mpp": 1, "tile_size": 64, "overlap": 0, "patch_size_level0": 128}
    write_slide_features(path, whole.features[:5], whole.coords[:5], **about)
    folder = RunFolder(tmp_path)
    assert not folder.is_encoded(folder.read_state("one"), suffix=suffix)


def short_of_memory(encoder, most, error=torch.OutOfMemoryError):
    """Let the forward pass of an encoder fail above `most` tiles; the sizes that were tried."""
    encode_tiles, tried = encoder.encode_tiles, []

    def limited(pixels):
        tried.append(len(pixels))
        if len(pixels) > most:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12345 bytes.")
        return encode_tiles(pixels)

    encoder.encode_tiles = limited
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_batch_that_does_not_fit_is_halved_for_good(slide, caplog, error):
    expected = encode_slide(slide, make_encoder(), batch_size=16, tile_size=64, mpp=1.0)
    encoder = make_encoder()
    tried = short_of_memory(encoder, 5, error)
    through = TileEncoder(encoder, tile_size=64, batch_size=16)
    for _ in range(2):
        with Slide(slide) as opened:
            (found,) = encode_slide_with(opened, [through], TILING, expected.coords)
        np.testing.assert_allclose(found.features, expected.features, **ROUNDING)
    assert tried[:3] == [16, 8, 4] and max(tried[3:]) == 4 == through.batch_size
    assert caplog.text.count("batches of 16 tiles do not fit the memory of cpu; going on with 4") == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(slide):
    encoder = make_encoder()
    encoder.encode_tiles = lambda pixels: pixels @ pixels[:, :, :3]
    with pytest.raises(RuntimeError, match="size of tensor|[Ee]xpected|match"):
        encode_slide(slide, encoder, tile_size=64, mpp=1.0)


def test_a_tile_that_does_not_fit_alone_costs_its_slide(slide, folders, tmp_path, monkeypatch):
    encoder = load_encoder(folders[0])
    short_of_memory(encoder, 0)
    with pytest.raises(SlideError, match="not even one tile fits the memory of cpu with encoder .*first"):
        encode_slide(slide, encoder, tile_size=64, mpp=1.0)
    monkeypatch.setattr("stage0_tiling.tile_encoder.load_encoder", lambda name: encoder)
    encode(slide, tmp_path, folders[:1], status=1)
    assert "not even one tile fits" in RunFolder(tmp_path).read_state("one").row.error
    assert not (tmp_path / "features").exists()


def transformers_encoder(tmp_path):
    from transformers import CLIPImageProcessor, ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    return load_encoder(tmp_path)


@pytest.mark.parametrize(("tile_size", "is_short"), [(32, True), (48, True), (20, True), (8, False)])
def test_the_shortcut_through_the_transform_is_equal(tile_size, is_short):
    encoder = make_encoder()
    through = TileEncoder(encoder, tile_size=tile_size)
    tiles = np.random.default_rng(0).integers(0, 256, (3, tile_size, tile_size, 3), dtype=np.uint8)
    expected = torch.stack([encoder.transform(Image.fromarray(tile)) for tile in tiles])
    prepared = through.prepare(torch.from_numpy(tiles))
    assert (prepared.dtype == torch.uint8) == is_short
    assert (through._normalise(prepared) - expected).abs().max() <= 1e-6


def test_a_processor_of_transformers_is_short_cut_only_where_nothing_is_resized(tmp_path):
    encoder = transformers_encoder(tmp_path)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    expected = torch.stack([encoder.transform(Image.fromarray(tile.numpy())) for tile in tiles])
    through = TileEncoder(encoder, tile_size=32)
    assert through.prepare(tiles).dtype == torch.uint8
    assert (through._normalise(through.prepare(tiles)) - expected).abs().max() <= 1e-6
    assert find_shortcut(encoder, 48) is None


def test_a_transform_that_does_more_than_normalise_is_not_short_cut(slide):
    plain, odd = make_encoder(), make_encoder()
    resize = odd._transform
    odd._transform = lambda image: resize(image.rotate(90))
    assert find_shortcut(plain, 64) is not None and find_shortcut(odd, 64) is None
    turned = encode_slide(slide, odd, tile_size=64, mpp=1.0).features
    assert not np.allclose(turned, encode_slide(slide, plain, tile_size=64, mpp=1.0).features, atol=0.01)


def test_a_compiled_encoder_sees_one_shape(slide, monkeypatch):
    compiled, shapes = [], []

    def compile_eagerly(forward, dynamic):
        compiled.append(dynamic)

        def run(pixels):
            shapes.append(len(pixels))
            return forward(pixels)

        return run

    expected = encode_slide(slide, make_encoder(), tile_size=64, mpp=1.0, batch_size=7)
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    through = TileEncoder(make_encoder(), tile_size=64, batch_size=7, compiled=True)
    with Slide(slide) as opened:
        (found,) = encode_slide_with(opened, [through], TILING, expected.coords)
    assert compiled == [False] and set(shapes) == {7} and len(found.coords) % 7
    np.testing.assert_allclose(found.features, expected.features, **ROUNDING)


def stained_picture(seed=0, side=128):
    """Two stains in varying amounts, and some background."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(1.5, 0.35, (2, side * side))
    density = np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]]) @ amounts
    return np.clip(240 * np.exp(-density).T, 0, 255).astype(np.uint8).reshape(side, side, 3)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_stains_of_one_picture_are_normalised_as_torchstain_does(tmp_path, method):
    picture, reference = stained_picture(0), stained_picture(1) // 2 + 60
    Image.fromarray(reference).save(tmp_path / "reference.png")
    target = read_stain_target(method, tmp_path / "reference.png")
    found = fit_stains(method, target, picture[None])(picture)
    if method == "macenko":
        library = NumpyMacenkoNormalizer()
        library.fit(reference)
        expected, _, _ = library.normalize(picture, stains=False)
        by_default = fit_stains(method, read_stain_target(method, None), picture[None])(picture)
        default, _, _ = NumpyMacenkoNormalizer().normalize(picture, stains=False)
        assert np.abs(by_default.astype(int) - default).max() <= 1
    else:
        library = NumpyReinhardNormalizer()
        library.fit(reference)
        expected = library.normalize(picture)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and np.abs(found.astype(int) - picture).mean() > 5


def test_stains_are_the_slides_own_and_not_each_tiles(tmp_path):
    tiles = np.stack([stained_picture(seed, side=64) for seed in range(3)] + [np.full((64, 64, 3), 238, np.uint8)])
    normalize = fit_stains("macenko", "", tiles)
    together = normalize(tiles)
    np.testing.assert_array_equal(together, np.stack([normalize(tile) for tile in tiles]))
    assert together[3].min() > 225 and np.ptp(together[3].reshape(-1, 3), axis=0).max() == 0  # a blank tile stays blank
    np.testing.assert_array_equal(together, fit_stains("macenko", "", tiles)(tiles))


def test_what_cannot_be_normalised_is_refused(tmp_path):
    blank, gray = np.full((64, 64, 3), 240, np.uint8), np.arange(4096, dtype=np.uint8).reshape(64, 64, 1) // 2
    for method, picture in (("macenko", blank), ("macenko", gray.repeat(3, 2)), ("reinhard", blank)):
        with pytest.raises(StainError):
            fit_stains(method, "[1, 1, 1, 1, 1, 1]", picture)
    Image.fromarray(blank).save(tmp_path / "blank.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for method, image, message in (
        ("reinhard", None, "give --stain_target"),
        ("none", tmp_path / "blank.png", "without --stain_normalizer"),
        ("macenko", tmp_path / "no.png", "no.png: does not open as an image"),
        ("macenko", tmp_path / "absent.png", "absent.png: does not open"),
        ("macenko", tmp_path / "blank.png", "only 0 of 4096 sampled pixels are stained; take a picture full of tissue"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stain_target(method, image)


def test_stains_are_inherited_by_new_slides_and_never_mixed(slide, folders, tmp_path):
    Image.fromarray(stained_picture(1)).save(tmp_path / "target.png")
    stains = ("--stain_normalizer", "macenko", "--stain_target", tmp_path / "target.png")
    encode(slide, tmp_path / "stained", folders[:1], *stains)
    encode(slide, tmp_path / "plain", folders[:1])
    stained, plain = (tmp_path / name / "features" / "one.h5" for name in ("stained", "plain"))

    about = describe_features(stained)
    assert (
        about["tiling"]["stain_normalizer"] == "macenko"
        and "stain_normalizer" not in describe_features(plain)["tiling"]
    )
    model = load_encoder(folders[0])
    inherited = encode_slide(slide, model, batch_size=7, **about["tiling"])
    stored = read_slide_features(stained)
    np.testing.assert_allclose(inherited.features, stored.features, **ROUNDING)
    assert inherited.making == stored.making
    assert np.abs(stored.features - read_slide_features(plain).features).max() > 0.05

    (tmp_path / "a.json").write_text(json.dumps([{"id": "one", "report": "Benign."}]))
    records = read_records(tmp_path / "a.json", features_dir=plain.parent)
    settings = VLMSettings(llm_name="tiny", **about)
    _, (problem,) = with_inputs(records, making_of(settings))
    assert "was made with stain_normalizer none, not macenko; encode it like the others" in problem
    settings.tiling = {"tile_size": 64, "mpp": 1.0}  # of a model that was trained before stains could be normalised
    assert with_inputs(records, making_of(settings))[1] == []

    with pytest.raises(ValueError, match="made with --stain_normalizer macenko, not without --stain_norm.*--overwrite"):
        encode(slide, tmp_path / "stained", folders[:1])


def test_a_slide_without_stains_is_encoded_as_it_is(folders, tmp_path, caplog):
    DrawnSlide(width=512, height=512, num_levels=1, stain=(120, 120, 120), pieces=((0.5, 0.5, 0.3, 0.3, 0),)).write(
        tmp_path / "gray.tiff"
    )
    coords = np.array([[0, 0], [384, 0]])  # background alone
    settings = {"tile_size": 64, "mpp": 1.0, "coords": coords}
    model = load_encoder(folders[0])
    found = encode_slide(tmp_path / "gray.tiff", model, stain_normalizer="macenko", **settings)
    assert "gray.tiff: only 0 of" in caplog.text and "its 2 tiles stay as they are" in caplog.text
    plain = encode_slide(tmp_path / "gray.tiff", model, **settings)
    np.testing.assert_array_equal(found.features, plain.features)
    assert found.making == plain.making and found.making["stain_normalizer"] == "none", "what was done is what is said"
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_slide_without_stains_is_marked_in_the_table_and_its_file(folders, tmp_path):
    path, masks = tmp_path / "blank.tiff", tmp_path / "masks"
    DrawnSlide(width=256, height=256, num_levels=1, pieces=()).write(path)
    masks.mkdir()
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(masks / "blank.png")
    more = ("--masks", masks, "--stain_normalizer", "macenko")
    for _ in range(2):  # a second run finds nothing to do, though the file says other than the flags
        encode(path, tmp_path / "out", folders[:1], *more)
        with (tmp_path / "out" / "slides.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["status"] == "done"
        assert row["warning"] == "encoded with --stain_normalizer none, not macenko: its stains cannot be estimated"
        assert row["warning"] in (tmp_path / "out" / "index.html").read_text()
    features = tmp_path / "out" / "features" / "blank.h5"
    assert read_slide_features(features).making["stain_normalizer"] == "none"
    made = features.stat().st_mtime_ns
    encode(path, tmp_path / "out", folders[:1], *more)
    assert features.stat().st_mtime_ns == made


def test_a_tiled_slide_is_opened_once_and_its_reader_recorded(slide, folders, tmp_path, monkeypatch):
    common = ["--slides", str(slide), "--output_dir", str(tmp_path), "--tile_size", "64", "--mpp", "1"]
    assert stage0_tile.main(common) == 0
    assert RunFolder(tmp_path).read_state("one").reader == "tiff"
    opened, init = [], Slide.__init__
    monkeypatch.setattr(Slide, "__init__", lambda self, *a, **k: opened.append(a) or init(self, *a, **k))
    assert stage0_encode.main([*common, "--encoder", str(folders[0]), "--reader", "openslide"]) == 0
    assert len(opened) == 1 and RunFolder(tmp_path).read_state("one").reader == "openslide"


def test_an_encoder_that_fails_does_not_cost_the_work_of_the_others(slide, folders, tmp_path, monkeypatch):
    encode(slide, tmp_path, folders[:1] + folders[2:])
    first, third = (tmp_path / f"features_{name}" / "one.h5" for name in ("first", "third"))
    third.unlink()
    kept = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(TileEncoder, "encode", lambda *_: 1 / 0)
        encode(slide, tmp_path, folders[:1] + folders[2:], status=1)
    encode(slide, tmp_path, folders[:1] + folders[2:])
    assert third.is_file() and first.stat().st_mtime_ns == kept
    state = RunFolder(tmp_path).read_state("one")
    assert state.row.status == "done" and set(state.encoded) == {"features_first", "features_third"}

    third.unlink()
    coords = tmp_path / "coords" / "one.h5"
    coords.write_bytes(b"torn")  # what the features were made of is not known any more
    encode(slide, tmp_path, folders[:1] + folders[2:])
    assert third.is_file() and first.stat().st_mtime_ns != kept
