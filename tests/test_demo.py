"""The demo's chain, launched small: every stage and the summary, not how good they are."""

import json

from tests.conftest import run_command

SMALL = ["--num_train", 6, "--num_test", 2, "--encoder_epochs", 1, "--llm_steps", 2]
SMALL += ["--stage1_epochs", 1, "--stage2_epochs", 1]


def test_every_stage_runs_and_the_summary_is_whole(tmp_path):
    out = tmp_path / "out"
    run_command("demo/run.py", "--output_dir", out, *SMALL)
    names = {
        "slides",
        "stage0",
        "evidence",
        "stage1",
        "stage2",
        "predictions.json",
        "contact_sheet.png",
        "summary.json",
    }
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "stage2" / "final_model" / "adapter").is_dir()
    summary = json.loads((out / "summary.json").read_text())
    scores = {"organ_accuracy", "exact_match", "rouge_l", "exact_match_shuffled_images", "exact_match_constant"}
    scores |= {"exact_match_organ_modal"}
    assert set(summary) == {"seconds", "n_test"} | scores | {f"stage1_{name}" for name in scores}
    page = (out / "stage2" / "scores" / "report.html").read_text()
    assert page.count('alt="slide of ') == 2 and page.count('alt="evidence of ') == 1
    assert "report of the nearest training slide" in page
    assert summary["n_test"] == 2 == len(json.loads((out / "predictions.json").read_text()))


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run_command("demo/run.py", "--output_dir", tmp_path, *SMALL, status=2)
    assert "not a demo" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "thesis.txt").exists()
