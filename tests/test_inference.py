"""generate.py and predict.py: output forms, resumption, failures, several processes."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT, command, environment, heed_interrupts, run_command

GENERATE, PREDICT = "inference/generate.py", "inference/predict.py"


def save_model(folder, corpus, **settings):
    """Save a model with random projector weights, the same each time, on the corpus's language model."""
    import torch

    from language_model import choose_placeholder, fingerprint, load_llm
    from slide_reports import Prompt
    from slide_vlm import SlideVLM
    from tests.tiny_models import make_tokenizer
    from vlm_settings import VLMSettings

    llm = load_llm(str(corpus.llm)).requires_grad_(False)
    tokenizer = make_tokenizer()
    settings = VLMSettings(
        llm_name=str(corpus.llm),
        llm_fingerprint=fingerprint(llm),
        num_visual_tokens=8,
        placeholder_id=choose_placeholder(llm),
        prompt=vars(Prompt.for_tokenizer(tokenizer)),
        question="Write the report.",
        **settings,
    )
    torch.manual_seed(5)  # its answers are of one line and end at no stop before --max_new_tokens
    SlideVLM(llm, settings).save(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    from tests.tiny_models import PATCH_WIDTH

    return save_model(tmp_path_factory.mktemp("model") / "final_model", corpus, patch_width=PATCH_WIDTH)


def predict_flags(corpus, model, output, **changes):
    flags = {
        "--model": model,
        "--test_json": corpus.reports,
        "--features_dir": corpus.features,
        "--output": output,
        "--max_new_tokens": 6,
        "--num_beams": 2,
    } | changes
    return [PREDICT, *(word for pair in flags.items() for word in pair)]


@pytest.fixture(scope="module")
def predictions(corpus, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("predictions") / "p.json"
    run_command(*predict_flags(corpus, model, output))
    return output


def test_predictions_are_the_submission_form_in_order(corpus, predictions):
    rows, records = json.loads(predictions.read_text()), json.loads(corpus.reports.read_text())
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert all(set(row) == {"id", "report"} for row in rows)
    assert sorted(path.name for path in predictions.parent.iterdir()) == ["p.json", "p.json.run.json"]


def test_generate_prints_the_same_report_alone_on_stdout(corpus, model, predictions):
    expected = json.loads(predictions.read_text())[0]
    features = corpus.features / expected["id"].replace(".tiff", ".h5")
    flags = ["--model", model, "--features", features, "--max_new_tokens", 6, "--num_beams", 2]
    assert run_command(GENERATE, *flags).stdout == expected["report"] + "\n"
    details = json.loads(run_command(GENERATE, *flags, "--json", "--question", "Which organ?").stdout)
    probabilities = {"mean_token_probability", "min_token_probability", "probability", "num_tokens", "tokens"}
    about = {"id", "report", "question", "beam_score", "num_patches", "seconds", "cut_off"}
    assert set(details) == about | probabilities
    assert details["question"] == "Which organ?"


def test_killed_prediction_goes_on_and_ends_alike_on_two_processes(corpus, model, predictions, tmp_path):
    output = tmp_path / "p.json"
    flags = predict_flags(corpus, model, output, **{"--batch_size": 1, "--max_new_tokens": 6})
    journal = tmp_path / "p.json.progress" / "process_0.jsonl"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*flags), cwd=ROOT, env=environment(), **quiet)
    while process.poll() is None and not (journal.exists() and len(journal.read_text().splitlines()) >= 3):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    answered = len(journal.read_text().splitlines())
    with journal.open("a") as file:
        file.write('{"index": 5, "id"')  # a line cut short by the kill
    done = run_command(*flags, processes=2)
    assert answered < 22
    assert json.loads(output.read_text()) == json.loads(predictions.read_text())
    assert "22 of 22" in done.stderr
    assert "answered before" in run_command(*flags).stderr


def test_missing_features_are_listed_and_the_rest_answered(corpus, model, tmp_path):
    records = json.loads(corpus.reports.read_text())[:3] + [{"id": "PIT_09_00001_01.tiff"}]
    (tmp_path / "t.json").write_text(json.dumps(records))
    flags = predict_flags(corpus, model, tmp_path / "p.json", **{"--test_json": tmp_path / "t.json"})
    done = run_command(*flags, "--details", status=1)
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["id"] for row in rows] == [record["id"] for record in records[:3]]
    probabilities = {"mean_token_probability", "min_token_probability", "probability"}
    assert set(rows[0]) == {"id", "report", "question", "beam_score", "seconds", "cut_off"} | probabilities
    assert "failed: PIT_09_00001_01.tiff" in done.stderr
    assert "3 of 4" in done.stderr


def test_output_of_other_flags_is_not_continued(corpus, model, predictions):
    done = run_command(*predict_flags(corpus, model, predictions, **{"--num_beams": 1}), status=2)
    assert "--overwrite" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slide", "missing.svs"], "missing.svs: no such file"),
        (["--slide", "."], ".: a folder; name slides of one case, or give it to predict.py as --slides"),
        ([], "exactly one of"),
        (["--image", ROOT / "README.md"], "was trained on slides"),
    ],
)
def test_generate_refuses_in_one_line(model, flags, message):
    done = run_command(GENERATE, "--model", model, *flags, status=2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_interrupted_prediction_says_so_and_leaves_with_130(corpus, model, tmp_path):
    many = tmp_path / "many.json"
    many.write_text(json.dumps(50 * json.loads(corpus.reports.read_text())))
    more = {"--batch_size": 1, "--max_new_tokens": 60, "--test_json": many}
    flags = predict_flags(corpus, model, tmp_path / "p.json", **more)
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    journal = tmp_path / "p.json.progress" / "process_0.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in stderr and "Traceback" not in stderr


def test_a_slide_its_features_and_its_record_give_the_same_report(corpus, tmp_path):
    from slide_reports import describe_features
    from tests.slides import DrawnSlide

    DrawnSlide().write(tmp_path / "slides" / "one.tiff")
    flags = ["--tile_size", 64, "--mpp", 1, "--overlap", 16, "--min_tissue", 0.3, "--encoder", corpus.encoder]
    flags += ["--stain_normalizer", "macenko"]
    out = tmp_path / "out"
    run_command("stage0_tiling/encode.py", "--slides", tmp_path / "slides", "--output_dir", out, *flags, processes=1)
    features = out / "features" / "one.h5"
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(features))
    (tmp_path / "t.json").write_text(json.dumps([{"id": "one.tiff"}]))
    shared = ["--model", folder, "--num_beams", 2, "--max_new_tokens", 12]
    slide = run_command(GENERATE, *shared, "--slide", tmp_path / "slides" / "one.tiff").stdout
    assert len(slide) > 1
    assert run_command(GENERATE, *shared, "--features", features).stdout == slide
    two = run_command(GENERATE, *shared, "--slide", *[tmp_path / "slides" / "one.tiff"] * 2).stdout
    assert run_command(GENERATE, *shared, "--features", features, features).stdout == two
    predict = [*shared, "--test_json", tmp_path / "t.json", "--features_dir", out / "features"]
    run_command(PREDICT, *predict, "--output", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())[0]["report"] + "\n" == slide

    # Another encoder under the same name, and a model that was retrained in place, are noticed.
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "projector" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "projector" / "model.safetensors")
    done = run_command(PREDICT, *predict, "--output", tmp_path / "p.json", status=2)
    assert "--overwrite" in done.stderr
    settings = json.loads((folder / "vlm.json").read_text())
    (folder / "vlm.json").write_text(json.dumps(settings | {"encoder_fingerprint": "of another"}))
    done = run_command(GENERATE, *shared, "--slide", tmp_path / "slides" / "one.tiff", status=2)
    assert "not those that this model was trained with" in done.stderr
