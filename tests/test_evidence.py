"""What a report rests on: the maps against their definitions, the files, and the judge."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inference import evidence as ev
from inference import generate, judge_evidence, judging
from inference.evidence_files import (
    draw_legend,
    in_words,
    tiled_slide,
    tiled_slide_of_features,
    top_tiles,
    write_evidence,
)
from slide_features import SlideCoords, write_slide_features
from stage0_tiling.slide import Slide
from tests.conftest import run_command
from tests.slides import DrawnSlide
from tests.test_inference import save_model
from tests.tiny_models import PATCH_WIDTH, REPORTS, make_model, make_sample

LINES = "Lung, biopsy;\n  No evidence of malignancy. Mild inflammation (chronic). See note"
REDUCERS = ("none", "grid_pool", "adaptive_pool", "kmeans", "prumerge", "perceiver", "qformer", "prompt_topk")


def case(tokenizer, num_patches: int = 14, seed: int = 0) -> dict:
    """A prompt about a slide of some tiles, without an answer."""
    return make_sample(tokenizer, "", num_patches, seed=seed)


# Lines


def test_lines_are_the_lines_and_their_sentences():
    texts = [LINES[start:end] for start, end in ev.split_lines(LINES)]
    assert texts == ["Lung, biopsy;", "No evidence of malignancy.", "Mild inflammation (chronic).", "See note"]
    numbers = "1. Breast, 0.5 cm. Margins free; Gleason's score 7 (3+4)"
    assert [numbers[s:e] for s, e in ev.split_lines(numbers)] == ["1. Breast, 0.5 cm.", numbers[19:]]


@given(st.text(st.sampled_from("aB1.;) \n\t"), max_size=60))
def test_lines_hold_every_letter_once(report):
    spans = ev.split_lines(report)
    assert all(report[start:end] == report[start:end].strip() != "" for start, end in spans)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))
    assert sum(len(report[s:e].split()) for s, e in spans) == len(report.split())


def test_every_token_of_a_word_is_of_one_line():
    model, tokenizer = make_model()
    batch, spans = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
    answer = batch["labels"][0][batch["labels"][0] >= 0].tolist()
    assert spans[0].tokens.all() and len(spans[0].tokens) == len(answer)
    for span in spans[1:]:
        ids = [token for token, chosen in zip(answer, span.tokens.tolist(), strict=True) if chosen]
        assert tokenizer.decode(ids).strip() == LINES[span.start : span.end]
    assert torch.stack([span.tokens for span in spans[1:]]).sum(0).max() == 1


def test_what_cannot_be_explained_is_refused():
    model, tokenizer = make_model()
    for report, message in ((" \n", "empty"), ("word " * 600, "512 at most")):
        with pytest.raises(ValueError, match=message):
            ev.explain(model, tokenizer, case(tokenizer), report)
    model.settings.input_kind = "images"
    with pytest.raises(ValueError, match="images"):
        ev.explain(model, tokenizer, case(tokenizer), LINES)


# Maps


@pytest.mark.parametrize("reducer", REDUCERS)
def test_gradients_pass_through_every_reducer(reducer):
    """Against central differences of the log-probability along one direction, to 5 %: norms round to float32."""
    model, tokenizer = make_model("llama", token_reducer=reducer)
    batch, spans = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
    patches = batch["patch_tokens"]
    _, gradients = ev._gradients(model, batch, patches, spans)
    step, direction = 2e-3, gradients[0] / gradients[0].norm()

    @torch.no_grad()
    def log_probs(at):
        return -model(batch | {"patch_tokens": at}).double()

    change = log_probs(patches + step * direction) - log_probs(patches - step * direction)
    steepest = float(gradients[0].norm())
    for span, gradient in zip(spans, gradients, strict=True):
        slope = float(change[span.tokens].sum()) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, abs=0.05 * steepest)
    assert steepest > 0.02


def test_integrated_gradients_add_up_to_what_the_tiles_say(monkeypatch):
    model, tokenizer = make_model("llama")
    sample = case(tokenizer, 6)
    monkeypatch.setattr(ev, "PATH_STEPS", 60)
    found = ev.explain(model, tokenizer, sample, LINES, (ev.INTEGRATED,))
    batch, spans = ev.batch_with_report(model, tokenizer, [sample], LINES)
    patches = batch["patch_tokens"]
    mean = ev.mean_patches(patches, batch["patch_mask"])
    with torch.no_grad():
        change = model(batch | {"patch_tokens": mean}) - model(batch)
    for row, span in zip(found.maps[ev.INTEGRATED][0], spans, strict=True):
        assert row.sum() == pytest.approx(float(change[span.tokens].sum()), rel=0.03, abs=0.03)


def test_evidence_of_layers_in_8_bits_is_nearly_that_of_whole_ones():
    pytest.importorskip("bitsandbytes")
    from inference.quantized import quantize_llm

    (model, tokenizer), (small, _) = make_model("gemma3n"), make_model("gemma3n")
    quantize_llm(small.llm, "int8", "cpu")
    evidence = [ev.explain(vlm, tokenizer, case(tokenizer), LINES, (ev.GRADIENT,)) for vlm in (model, small)]
    plain, rough = (found.maps[ev.GRADIENT][0].ravel() for found in evidence)
    assert np.corrcoef(plain, rough)[0, 1] > 0.95


def test_evidence_is_found_without_compiled_layers():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model, tokenizer = make_model("llama")
    plain = ev.explain(model, tokenizer, case(tokenizer), LINES)
    for module in model.llm.modules():
        if type(module).__name__ == "LlamaMLP":
            module.compile(backend=refuse)
    compiled = ev.explain(model, tokenizer, case(tokenizer), LINES)
    np.testing.assert_array_equal(compiled.maps[ev.GRADIENT][0], plain.maps[ev.GRADIENT][0])
    with pytest.raises(Exception, match="compiled"):
        model(ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)[0])


def test_log_probabilities_are_the_models_own_and_no_weight_is_left_frozen():
    model, tokenizer = make_model()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    implementation = model.llm.config._attn_implementation
    found = ev.explain(model, tokenizer, case(tokenizer), LINES)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    assert all(p.grad is None for p in model.parameters())
    assert model.llm.config._attn_implementation == implementation
    batch, _ = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
    with torch.no_grad():
        nll = model(batch)
    assert found.whole.log_prob == pytest.approx(-float(nll.sum()), rel=1e-5)
    assert found.whole.num_tokens == len(nll) >= sum(line.num_tokens for line in found.lines)
    assert [line.text for line in found.lines] == [LINES[s:e] for s, e in ev.split_lines(LINES)]


@pytest.mark.parametrize("family", ["gemma3n", "gemma3", "llama"])
def test_rollout_is_its_plain_definition(family):
    model, tokenizer = make_model(family)
    batch, _ = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
    with torch.no_grad():
        inputs = model.embed(batch)
        rolled = ev._rollout(model, inputs)
        model.llm.set_attn_implementation("eager")
        positions = torch.arange(inputs["input_ids"].shape[1])[None]
        output = model.llm.get_decoder()(
            **inputs["conditioning"],
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            output_attentions=True,
            use_cache=False,
        )
    expected = np.eye(rolled.shape[0])
    for attention in output.attentions:
        heads = np.mean(attention[0].double().numpy(), axis=0)
        layer = 0.5 * heads + 0.5 * np.eye(len(heads))
        expected = (layer / layer.sum(1, keepdims=True)) @ expected
    assert np.allclose(rolled.numpy(), expected, atol=1e-5)
    assert np.allclose(rolled.sum(1), 1, atol=1e-5) and not np.triu(rolled.numpy(), 1).any()


def test_weights_of_visual_tokens_are_shared_out_by_what_they_are_made_of():
    for reducer in ("none", "grid_pool", "adaptive_pool", "kmeans"):
        model, tokenizer = make_model(token_reducer=reducer)
        batch, _ = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
        _, mask = ev._reduce(model, batch, batch["patch_tokens"])
        weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
        shared = ev.share_out(model, batch, weights)
        assert float(shared.sum()) == pytest.approx(float(weights.sum()), rel=1e-4), reducer
    model, tokenizer = make_model(num_visual_tokens=20)
    batch, _ = ev.batch_with_report(model, tokenizer, [case(tokenizer)], LINES)
    weights = torch.rand(1, 14)
    assert torch.allclose(ev.share_out(model, batch, weights), weights, atol=1e-5)


def test_each_slide_of_a_case_has_its_own_map():
    model, tokenizer = make_model(token_reducer="grid_pool")
    one, two = case(tokenizer, 14), case(tokenizer, 5, seed=1)
    from slide_reports import Prompt

    prompt = Prompt(**model.settings.prompt)
    sample = one | {"input_ids": prompt.question_ids(tokenizer, "Write the report.", 64, 2)}
    sample |= {name: one[name] + two[name] for name in ("patch_tokens", "coords")}
    sample["visual_budgets"] = torch.tensor([5, 3])
    found = ev.explain(model, tokenizer, sample, LINES)
    for maps in found.maps.values():
        assert [values.shape for values in maps] == [(5, 14), (5, 5)]
        assert all(np.isfinite(values).all() and values.any() for values in maps)


# Measures


def test_measures_are_their_plain_definitions():
    rng = np.random.default_rng(0)
    values, inside = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in values[inside] for b in values[~inside]]
    assert judging.auroc(values, inside) == pytest.approx(np.mean(pairs))
    assert judging.top_tile(np.array([0.0, 2.0, 2.0])) == 1
    assert judge_evidence.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert judging.area(np.ones(11)) == pytest.approx(1)


def test_deletion_begins_with_the_slide_and_ends_with_one_tile():
    model, tokenizer = make_model(num_visual_tokens=20)
    sample, order = case(tokenizer), np.random.default_rng(0).permutation(14)
    curve = judging.deletion_curves(model, tokenizer, sample, LINES, 2, [order])[0]
    for rows, expected in ((np.arange(14), curve[0]), (order[-1:], curve[-1])):
        part = judging.with_tiles(sample, torch.from_numpy(np.sort(rows)))
        line = ev.explain(model, tokenizer, part, LINES, ()).lines[1]
        assert line.log_prob / line.num_tokens == pytest.approx(expected, rel=1e-4)
    lost = judging.leave_one_out(model, tokenizer, sample, LINES, at_once=4)
    without = judging.with_tiles(sample, torch.tensor([t for t in range(14) if t != 3]))
    whole = ev.explain(model, tokenizer, sample, LINES, ()).whole.log_prob
    other = ev.explain(model, tokenizer, without, LINES, ()).whole.log_prob
    assert lost[0, 3] == pytest.approx(whole - other, abs=1e-3)


@pytest.mark.parametrize("suffix", [".png", ".geojson"])
def test_lesion_share_of_tiles(tmp_path, suffix):
    """A lesion of x 256 to 640 and y 0 to 256 on a slide of 1024 x 512 px, in tiles of 256 px."""
    path = tmp_path / f"one{suffix}"
    if suffix == ".png":
        mask = np.zeros((64, 128), np.uint8)
        mask[:32, 32:80] = 255
        cv2.imwrite(str(path), mask)
    else:
        path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(256, 0, 640, 256))))
    coords = np.array([[0, 0], [256, 0], [512, 0], [256, 256]])
    about = SlideCoords(coords, patch_size_level0=256, level0_width=1024, level0_height=512)
    assert judging.lesion_shares(path, about, coords).tolist() == pytest.approx([0, 1, 0.5, 0])
    with pytest.raises(ValueError, match="encode it anew"):
        judging.lesion_shares(path, SlideCoords(coords), coords)


# Files


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "one.tiff"
    DrawnSlide(width=1024, height=768, num_levels=2).write(path)
    return path


def test_files_of_a_slide(slide, tmp_path):
    model, tokenizer = make_model(num_visual_tokens=20)
    found = ev.explain(model, tokenizer, case(tokenizer, 12), LINES)
    out = tmp_path / "evidence"
    where = tiled_slide(slide, {"tile_size": 64, "mpp": 2.0, "overlap": None})
    assert (where.grid.tile_width, where.width, where.height) == (256, 1024, 768)
    write_evidence(out, found, [where], {"question": "Which?"})
    said = json.loads((out / "evidence.json").read_text())
    assert said["question"] == "Which?" and said["report"] == LINES and len(said["lines"]) == 5
    assert np.allclose(said["slides"][0]["maps"][ev.INTEGRATED], found.maps[ev.INTEGRATED][0], atol=1e-5)
    for line, values in zip(said["lines"], found.maps[ev.INTEGRATED][0], strict=True):
        tiles = [top["tile"] for top in line["top_tiles"]]
        assert tiles == np.argsort(-values, kind="stable")[: len(tiles)].tolist() and len(tiles) <= 5
        assert (out / "one" / f"{line['name']}.png").is_file()
    top = said["lines"][1]["top_tiles"][0]
    with Slide(slide) as opened, Image.open(out / top["picture"]) as picture:
        assert np.array_equal(np.asarray(picture), opened.read_region(top["x"], top["y"], 256, 256, (64, 64)))
    features = json.loads((out / "one" / "evidence.geojson").read_text())["features"]
    tiles = [f for f in features if f["properties"]["objectType"] == "tile"]
    assert [shapely.geometry.shape(f["geometry"]).bounds[:2] for f in tiles] == [tuple(c) for c in found.coords[0]]
    assert tiles[0]["properties"]["measurements"]["line 2: integrated_gradients"] == pytest.approx(
        found.maps[ev.INTEGRATED][0][2, 0]
    )
    assert len(features) - len(tiles) == sum(len(line["top_tiles"]) for line in said["lines"])

    # A shorter report takes the place of the whole result; a folder of something else stays as it is.
    write_evidence(out, ev.explain(model, tokenizer, case(tokenizer, 12), "Lung"), [where, where][:1], {})
    assert not (out / "one" / "line_2.png").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["evidence"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        write_evidence(tmp_path / "thesis", found, [where], {})


def evidence_of(*slides: list[float]) -> ev.Evidence:
    """Evidence of one line that was made up."""
    whole = ev.ReportLine("Lung", 0, 4, -1.0, 1)
    coords = [np.stack([np.arange(len(values)) * 256, np.zeros(len(values), int)], 1) for values in slides]
    maps = [np.array([values, values], np.float32) for values in slides]
    return ev.Evidence("Lung", whole, [whole], coords, {ev.INTEGRATED: maps})


def test_top_tiles_are_ranked_over_the_slides_of_a_case(slide, tmp_path):
    assert top_tiles(evidence_of([0.5, -1, 0.7, 0.0]), 0) == [(1, 0, 2), (2, 0, 0)]
    case_of_two = evidence_of([0.5, -1, 0.04], [0.9, 0.6])
    assert top_tiles(case_of_two, 1) == [(1, 1, 0), (2, 1, 1), (3, 0, 0)], "0.04 is next to nothing"
    where = tiled_slide(slide, {"tile_size": 64, "mpp": 2.0})
    write_evidence(tmp_path / "e", case_of_two, [where, where], {})
    line = json.loads((tmp_path / "e" / "evidence.json").read_text())["lines"][1]
    assert [(top["rank"], top["slide_id"]) for top in line["top_tiles"]] == [(1, "one (2)"), (2, "one (2)"), (3, "one")]
    assert all((tmp_path / "e" / top["picture"]).is_file() for top in line["top_tiles"])
    assert (line["strongest_evidence"], line["evidence_of_all_tiles"]) == pytest.approx((1, 1.04))
    features = json.loads((tmp_path / "e" / "one" / "evidence.geojson").read_text())["features"]
    marked = [f["properties"]["name"] for f in features if f["properties"]["objectType"] == "annotation"]
    assert marked == ["report, tile 3", "line 1, tile 3"]


def test_the_weight_of_the_colours_is_said():
    assert in_words(0.0044, 0.0125).startswith("All tiles together: 1.01 times as probable as with the slide's mean")
    assert [in_words(1, total).split()[3] for total in (-0.7, 3, 7.0, -6)] == ["0.50", "20", "1,097", "0.002"]
    assert "0.0044 in log-probability" in in_words(0.0044, 0.0125) and "e^-300" in in_words(5, -300.2)
    wide, narrow = (draw_legend(width, LINES, in_words(1, 2)) for width in (1400, 30))
    assert wide.shape == (66, 1400, 3) and narrow.shape == (66, 30, 3)
    assert (wide[35:] < 100).any(), "the weight stands below the words"
    greek, boxes = (draw_legend(600, text, "") for text in ("β ü ≥ µ", "\ue000 \ue001 \ue002 \ue003"))
    assert not np.array_equal(greek, boxes), "letters that reports have are no boxes"


def test_pictures_show_the_pyramid_and_never_label_or_macro(slide, tmp_path, monkeypatch):
    import openslide

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    model, tokenizer = make_model(num_visual_tokens=20)
    found = ev.explain(model, tokenizer, case(tokenizer, 9), LINES)
    write_evidence(tmp_path / "e", found, [tiled_slide(slide, {"tile_size": 64, "mpp": 2.0})], {})
    with Image.open(tmp_path / "e" / "one" / "report.png") as picture:
        drawn = np.asarray(picture)
    # The strongest tile is orange or blue; what lies outside all tiles is the slide, a little faded.
    row = found.maps[ev.INTEGRATED][0][0]
    x, y = found.coords[0][np.abs(row).argmax()] + 128
    red, _, blue = drawn[y + 40, x + 40].astype(int)
    assert (red > blue + 40) if row[np.abs(row).argmax()] > 0 else (blue > red + 40)
    with Slide(slide) as opened:
        plain = opened.read_whole(1024, 768)
    assert np.allclose(drawn[740, 1000].astype(int), 0.8 * plain[740, 1000] + 51, atol=2)


# Commands


@pytest.fixture(scope="module")
def model_folder(corpus, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "final_model", corpus, patch_width=PATCH_WIDTH)


def test_generate_writes_evidence_beside_the_report(corpus, model_folder, tmp_path, monkeypatch, capsys):
    features = sorted(corpus.features.iterdir())[0]
    flags = ["--model", model_folder, "--features", features, "--max_new_tokens", 6, "--num_beams", 1]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--evidence", str(tmp_path / "e")])
    assert generate.main() == 0
    said = json.loads((tmp_path / "e" / "evidence.json").read_text())
    assert capsys.readouterr().out == said["report"] + "\n"
    assert all(top["picture"] is None for line in said["lines"] for top in line["top_tiles"])
    where = tiled_slide_of_features(features)
    assert (where.slide_id, where.grid.tile_width) == (features.stem, 256)
    assert (tmp_path / "e" / features.stem / "report.png").is_file()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x.txt").touch()
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--evidence", str(tmp_path / "taken")])
    with pytest.raises(ValueError, match="holds something else"), monkeypatch.context() as unloaded:
        unloaded.setattr("inference.loading.open_model", None)  # refused before anything is loaded
        generate.main()
    more = ["--question", "Which organ?", "Which grade?", "--evidence", str(tmp_path / "asked")]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), *more])
    assert generate.main() == 0
    folders = sorted(path.name for path in (tmp_path / "asked").iterdir())
    assert folders == ["question_1", "question_2"]
    said = json.loads((tmp_path / "asked" / "question_2" / "evidence.json").read_text())
    assert said["question"] == "Which grade?" and said["report"] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(model_folder), "--image", str(features)])
    sys.argv += ["--evidence", "e"]
    with pytest.raises(ValueError, match="--evidence"):
        generate.main()


@pytest.fixture(scope="module")
def outlined(tmp_path_factory) -> Path:
    """Feature files of slides of 1024 x 1024 px in 16 tiles, and outlines of lesions: a quarter, all, one missing."""
    root, rng = tmp_path_factory.mktemp("outlined"), np.random.default_rng(0)
    coords = np.stack([np.arange(16) % 4, np.arange(16) // 4], 1) * 256
    (root / "lesions").mkdir()
    for number, side in enumerate((512, 512, 1024, 0)):
        about = {"mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
        sizes = {"level0_mpp": 0.5, "level0_width": 1024, "level0_height": 1024}
        write_slide_features(
            root / "features" / f"s{number}.h5",
            rng.normal(size=(16, PATCH_WIDTH)).astype(np.float32),
            coords,
            name=f"s{number}",
            encoder="made-up",
            **about,
            **sizes,
        )
        if side:
            lesion = shapely.geometry.mapping(shapely.box(0, 0, side, side))
            (root / "lesions" / f"s{number}.geojson").write_text(json.dumps(lesion))
    records = [{"id": f"s{number}.tiff", "report": REPORTS[number]} for number in range(4)]
    (root / "records.json").write_text(json.dumps(records))
    return root


def judge_flags(root: Path, model_folder: Path) -> list[str]:
    flags = {"--model": model_folder, "--test_json": root / "records.json", "--features_dir": root / "features"}
    flags |= {"--lesions_dir": root / "lesions"}
    return [str(word) for pair in flags.items() for word in pair]


def test_judge_prints_a_table_and_lists_what_it_could_not_judge(outlined, model_folder, tmp_path):
    done = run_command(
        "inference/judge_evidence.py",
        *judge_flags(outlined, model_folder),
        *("--output_dir", tmp_path, "--lines", "[0,2]"),
        status=1,
    )
    assert "failed: s3.tiff" in done.stderr and "Traceback" not in done.stderr
    judged = json.loads((tmp_path / "judged.json").read_text())
    assert {entry["line"] for entry in judged["table"]} == {0, 2}
    maps = {*ev.METHODS, "leave_one_out", "unlike_the_rest", "random"}
    assert {entry["map"] for entry in judged["table"]} == maps
    for entry in judged["table"]:
        assert entry["pointing_slides"] == 2 and entry["chance"] == pytest.approx(0.25)  # 2 of 8
        assert entry["deletion_curve"][0] == pytest.approx(entry["insertion_curve"][-1], rel=1e-4)
        assert done.stdout.partition("pointing: ")[0].count(entry["map"]) == 2
    assert "1 without a lesion, or nothing but lesion" in done.stdout and "which the one random map" in done.stdout
    assert "report: integrated_gradients points at the lesion" in done.stdout
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 600


def test_what_the_figures_say_is_not_more_than_they_show():
    def said(hits: int, blind: int, wins: int, slides: int = 40) -> str:
        pointing = {"pointing_slides": slides, "interval": judge_evidence.wilson(hits, slides), "chance": 0.18}
        maps = {ev.INTEGRATED: pointing, "unlike_the_rest": {"pointing": blind / slides}}
        lines = [
            {ev.INTEGRATED: {"deletion": -1.0}, "random": {"deletion": 0.0 if number < wins else -2.0}}
            for number in range(slides)
        ]
        return "; ".join(judge_evidence.readings(maps, lines))

    assert "above chance;" in said(32, 8, 38) and "proves nothing" not in said(32, 8, 38)
    assert "costs more" in said(32, 8, 38) and "38 of 40 slides" in said(32, 8, 38)
    assert "as often or more: this alone proves nothing" in said(32, 33, 38)
    assert "within the error of chance" in said(9, 33, 20)
    assert "below chance" in said(0, 0, 20) and "does not reliably cost more" in said(32, 8, 22)
    nothing = {ev.INTEGRATED: {"pointing_slides": 0}, "unlike_the_rest": {}}
    assert len(judge_evidence.readings(nothing, [{name: {"deletion": 0.0} for name in (ev.INTEGRATED, "random")}])) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--min_lesion", "0"], "--min_lesion"),
        (["--lesions_dir", "nowhere"], "--lesions_dir nowhere: no such folder"),
        (["--features_dir", "nowhere"], "nowhere"),
    ],
)
def test_judge_refuses(outlined, model_folder, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(sys, "argv", ["judge_evidence.py", *judge_flags(outlined, model_folder), *change])
    sys.argv += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError), match=message):
        judge_evidence.main()
    assert not (tmp_path / "out").exists()


def test_written_reports_are_judged_too(outlined, model_folder, tmp_path, monkeypatch, capsys):
    only = tmp_path / "one.json"
    only.write_text(json.dumps([{"id": "s0.tiff", "report": "x"}]))
    flags = judge_flags(outlined, model_folder)
    flags[flags.index(str(outlined / "records.json"))] = str(only)
    more = ["--text", "written", "--lines", "[0]", "--num_beams", "1", "--max_new_tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["judge_evidence.py", *flags, *more, "--output_dir", str(tmp_path / "out")])
    assert judge_evidence.main() == 0
    judged = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert judged["slides"][0]["text"] not in ("", "x") and "report" in capsys.readouterr().out


# Slides with a focus


def test_focal_slides_have_their_lesion_where_they_say():
    from demo.make_focal_slides import draw_focal_slide, healthy_tissue, lesion_cases
    from demo.reports import CASES

    assert {CASES[case].organ for case in lesion_cases()} == {case.organ for case in CASES}
    assert all(healthy_tissue(case.organ).nests == "none" for case in CASES)
    number = next(n for n in lesion_cases() if CASES[n].grade == "5")
    image, lesion = draw_focal_slide(number, np.random.default_rng([0, 3]))
    again, same = draw_focal_slide(number, np.random.default_rng([0, 3]))
    assert np.array_equal(image, again) and np.array_equal(lesion, same)
    assert (lesion.shape[0] * 8, lesion.shape[1] * 8) == image.shape[:2]
    assert 0.005 < lesion.mean() < 0.12
    small = cv2.resize(image, lesion.shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
    tissue = small[..., 0] - small[..., 1] > 20
    assert tissue[lesion > 0].mean() > 0.5
    dark = small.sum(2) < 380  # crowded nuclei of the solid tumour
    assert dark[lesion > 0].mean() > 2 * dark[tissue & (lesion == 0)].mean()
