"""A model of slide tokens is given a new slide through both encoders: what the two commands of stage 0 would make."""

import json

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from inference import app, generate
from inference.app_routes import create_app
from inference.job_queue import Job
from inference.slide_folder import SlideFolder
from inference.slide_tokens import load_encoders
from longnet import LongNet
from slide_encoders import save_slide_encoder
from slide_features import read_slide_features
from slide_reports import describe_features
from stage0_tiling import encode, encode_slides
from stage0_tiling.encoding import encode_slide
from tests.slides import DrawnSlide
from tests.test_app import HOSTS, ask, key_of, wait_for
from tests.test_inference import save_model
from vlm_settings import VLMSettings


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def out(corpus, tmp_path_factory):
    """A slide, its tile features, a slide encoder, and its slide tokens by the two commands."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        DrawnSlide(width=768, height=512).write(out / "one.tiff")
        flags = ["--tile_size", 64, "--mpp", 1, "--overlap", 16, "--encoder", corpus.encoder, "--output_dir", out]
        assert encode.main([str(flag) for flag in ["--slides", out / "one.tiff", *flags]]) == 0
        torch.manual_seed(0)
        longnet = LongNet(24, 32, depth=2, num_heads=8, feed_forward_width=48, segment_lengths=[4, 8], dilations=[1, 2])
        for parameter in longnet.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_slide_encoder(longnet, out / "longnet")
        for tokens in ("slide", "all"):
            flags = ["--features_dir", out / "features", "--output_dir", out, "--tokens", tokens]
            assert encode_slides.main([str(flag) for flag in [*flags, "--slide_encoder", out / "longnet"]]) == 0
    return out


@pytest.mark.parametrize("folder", ["features", "slide_features_longnet", "slide_features_longnet_all"])
def test_a_new_slide_becomes_what_the_commands_make_of_it(folder, out):
    stored = out / folder / "one.h5"
    settings = VLMSettings(llm_name="tiny", **describe_features(stored))
    encoder, finish = load_encoders(settings, "cpu")
    made, expected = finish(encode_slide(out / "one.tiff", encoder, **settings.tiling)), read_slide_features(stored)
    np.testing.assert_allclose(made.features, expected.features, rtol=2e-3, atol=2e-3)  # half precision
    np.testing.assert_array_equal(made.coords, expected.coords)
    assert (made.encoder, made.encoder_fingerprint, made.um_per_px) == (
        expected.encoder,
        expected.encoder_fingerprint,
        expected.um_per_px,
    )


def test_the_report_of_a_slide_is_that_of_its_slide_tokens(corpus, out, tmp_path, monkeypatch, capsys):
    stored = out / "slide_features_longnet_all" / "one.h5"
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(stored))

    def report(*flags):
        words = ["generate.py", "--model", folder, "--max_new_tokens", 6, "--num_beams", 1, *flags]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        assert generate.main() == 0
        return capsys.readouterr().out

    expected = report("--features", stored)
    assert report("--slide", out / "one.tiff") == expected and len(expected) > 1
    assert report("--slide", out / "one.tiff", "--vision_model_name", corpus.encoder) == expected

    settings = json.loads((folder / "vlm.json").read_text())
    (folder / "vlm.json").write_text(json.dumps(settings | {"encoder_fingerprint": "of-others"}))
    with pytest.raises(ValueError, match="their weights are not those .*give --features, or name the right ones"):
        report("--slide", out / "one.tiff")


def test_the_page_reads_a_slide_through_both_encoders(corpus, out, tmp_path, monkeypatch, capsys):
    stored = out / "slide_features_longnet_all" / "one.h5"
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(stored))
    flags = ["--model", folder, "--slides", out, "--max_new_tokens", 6, "--num_beams", 1]
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, flags)])
    writer = app.open_writer(app.parse_arguments(), VLMSettings.read(folder))
    written = writer.write(Job("x", tmp_path / "job"), out / "one.tiff")
    flags = ["--model", folder, "--features", stored, "--max_new_tokens", 6, "--num_beams", 1]
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, flags)])
    assert generate.main() == 0
    assert capsys.readouterr().out == written["report"] + "\n"


def test_tokens_of_the_whole_slide_are_no_evidence(corpus, out, tmp_path, monkeypatch):
    stored = out / "slide_features_longnet" / "one.h5"
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(stored))
    flags = ["--model", folder, "--features", stored, "--evidence", tmp_path / "e"]
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, flags)])
    with pytest.raises(ValueError, match="tokens of the whole slide"):
        generate.main()


def test_the_page_works_for_tokens_of_the_whole_slide_and_says_why_it_has_no_evidence(
    corpus, out, tmp_path, monkeypatch, capsys
):
    stored = out / "slide_features_longnet" / "one.h5"
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(stored))
    decoding = ["--max_new_tokens", 6, "--num_beams", 1]
    words = ["app.py", "--model", folder, "--slides", out, *decoding]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    writer = app.open_writer(app.parse_arguments(), VLMSettings.read(folder))
    with TestClient(create_app(SlideFolder(out, 10**9), writer, {}, HOSTS), base_url="http://localhost") as client:
        outline = client.get(f"/api/slides/{key_of(client)}/outline").json()
        jobs = [ask(client, question).json()["id"] for question in (None, "Which organ?")]
        report, answer = (wait_for(client, job, "done", "failed")["result"] for job in jobs)
        files = {name: client.get(f"/api/jobs/{jobs[0]}/files/{name}") for name in ("report.txt", "evidence.json")}
    assert report["num_tiles"] == len(outline["tiles"]) > 4
    assert "slide as a whole" in report["no_evidence"] == writer.no_evidence == answer["no_evidence"]
    assert "".join(line["text"] for line in report["lines"][1:]).split() == report["report"].split()
    assert files["report.txt"].text == report["report"] + "\n" and files["evidence.json"].status_code == 404
    assert answer["question"] == "Which organ?" and answer["report"]
    monkeypatch.setattr(
        "sys.argv", [str(w) for w in ["generate.py", "--model", folder, "--features", stored, *decoding]]
    )
    assert generate.main() == 0
    assert capsys.readouterr().out == report["report"] + "\n"
