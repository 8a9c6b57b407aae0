"""Upload of a model with its card to a stand-in for the hub, and a model opened by its hub name."""

import json
import sys
from contextlib import contextmanager

import pytest
import yaml

from inference import push_to_hub
from inference.loading import model_folder
from inference.model_card import model_card, public_name, without_folders
from tests.hub_server import REPO, HubServer, _Handler
from vlm_settings import VLMSettings

METRICS = {
    "bleu_4": 0.25,
    "rouge_l": 0.6,
    "exact_match": 0.1,
    "n": 40,
    "references_seen_in_training": 38,
    "num_patients": 30,
    "predictions_verbatim_from_training": 0.5,
    "intervals_95": {"rouge_l": [0.55, 0.65]},  # the names are those of score.py's metrics.json
    "mistakes": {"by_kind": {"wrong organ": 2}, "cases_affected": 2, "share_affected": 0.05},
    "fields": {"organ": {"n": 40, "accuracy": 0.95, "accuracy_95": [0.9, 1.0]}, "who_grade": {"n": 0}},
    "baselines": {"constant": {"bleu_4": 0.05, "rouge_l": 0.2, "exact_match": 0.0}},
}


class ModelHandler(_Handler):
    """The hub's paths of models, answered as those of the stand-in's data set."""

    def handle_path(self) -> None:
        for name in (f"/api/models/{REPO}", f"/{REPO}.git/", f"/{REPO}/resolve/"):
            if self.path.startswith(name):
                rest = self.path.removeprefix("/api/models")
                self.path = ("/api/datasets" if rest != self.path else "/datasets") + rest
        self.path = self.path.replace(f"/{'0' * 40}", "/main")

    def do_GET(self) -> None:  # noqa: N802
        self.handle_path()
        super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        self.handle_path()
        if self.path in ("/api/repos/create", "/api/validate-yaml"):
            self._body()
            self._answer({"url": f"{self.hub.url}/{REPO}", "id": REPO})
            return
        super().do_POST()

    def _reply(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        super()._reply(content, status, headers | {"X-Repo-Commit": "0" * 40})


@contextmanager
def model_hub(monkeypatch, cache):
    from huggingface_hub import constants

    with HubServer() as hub:
        hub._server.RequestHandlerClass = type("Handler", (ModelHandler,), {"hub": hub})
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def make_folder(folder):
    (folder / "projector").mkdir(parents=True)
    (folder / "projector" / "model.safetensors").write_bytes(b"w" * 50_000)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/llm"}))
    (folder / "projector" / "notes.pkl").write_bytes(b"never uploaded")
    settings = VLMSettings("/home/me/llm", 12, encoder="uni2-h", tiling={"tile_size": 256, "mpp": 0.5})
    settings.training = {"train_json": "/home/me/hospital/reports.json", "learning_rate": 1e-4}
    settings.write(folder)
    (folder.parent / "run.json").write_text(json.dumps({"train_records": 700, "val_records": 70}))
    return folder


def run_here(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, flags)])
    return push_to_hub.main()


def test_model_goes_to_the_hub_with_its_card_and_comes_back_by_name(monkeypatch, tmp_path, capsys):
    folder = make_folder(tmp_path / "run" / "final_model")
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps(METRICS))
    assert run_here(monkeypatch, "--model", folder, "--metrics", metrics, "--dry_run") == 0
    card = (folder / "README.md").read_text()
    assert (
        "--model ORG/NAME --slide X.svs --llm_name LANGUAGE_MODEL\n" in card
        and "Its language model (llm) lay in" in card
    )
    (folder / "README.md").write_text(card + "\nMended by hand.\n")
    with model_hub(monkeypatch, tmp_path / "cache") as hub:
        assert run_here(monkeypatch, "--model", folder, "--repo_id", REPO) == 0
        assert "stays as it is; --overwrite" in capsys.readouterr().err
        assert sorted(hub.files) == [
            "README.md",
            "adapter/adapter_config.json",
            "projector/model.safetensors",
            "vlm.json",
        ]
        assert len(hub.commits) == 1 and hub.files["README.md"].decode().endswith("Mended by hand.\n")
        assert not any(b"/home/me" in content for content in hub.files.values())
        assert f"--model {REPO} --slide".encode() in hub.files["README.md"]
        hub.files["modeling_evil.py"] = hub.files["projector/x.bin"] = b"never fetched"
        found = model_folder(REPO)
        assert VLMSettings.read(found).llm_name == "llm"
        fetched = {name for name in hub.files if (tmp_path / found / name).is_file()}
        assert fetched == set(hub.files) - {"modeling_evil.py", "projector/x.bin"}
        del hub.files["vlm.json"]
        with pytest.raises(FileNotFoundError, match="no model of SlideScribe|neither a folder"):
            model_folder("org/nothing")


def test_card_says_what_run_and_scores_say_and_no_folders():
    settings = VLMSettings(
        "google/gemma-3n-E2B-it", 12, encoder="/data/enc", training={"train_json": "/home/me/r.json"}
    )
    card = model_card(settings, {"train_records": 700}, METRICS, licence="apache-2.0")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "google/gemma-3n-E2B-it" and head["license"] == "apache-2.0"
    for said in ("0.600 [0.550, 0.650]", "| baseline: constant |", "38 of them", "700", "must not be used", "r.json"):
        assert said in card
    for said in (
        "40 references of 30 patients",
        "2 reports (5.0%)",
        "wrong organ 2",
        "| organ | 40 | 0.950 [0.900, 1.000]",
    ):
        assert said in card
    assert "who grade" not in card and "50% of the model's reports" in card
    assert "/home" not in card and "/data" not in card and "--vision_model_name ENCODER" in card
    bare = model_card(settings, {}, {}, licence=None)
    assert "None were given" in bare and "does not use the image" not in bare


def test_card_says_how_to_run_the_model_with_all_that_it_needs():
    settings = VLMSettings("/data/llm", 12, encoder="/a/b/tiles + /a/b/longnet:all")
    card = model_card(settings, {}, {}, licence=None, repo_id="org/name", parts=["projector"])
    assert "# name\n" in card and "/a/b" not in card and "ORG/NAME" not in card
    assert "--model org/name --slide X.svs --llm_name LANGUAGE_MODEL --vision_model_name ENCODER" in card
    assert "Its language model (llm) and its image encoder (tiles + longnet:all) lay in folders" in card
    whole = model_card(settings, {}, {}, licence=None, parts=["language_model", "encoder"])
    assert "--llm_name" not in whole and "--vision_model_name" not in whole
    hub = VLMSettings("google/gemma-3n-E2B-it", 12, encoder="uni2-h", input_kind="images")
    card = model_card(hub, {}, {}, licence=None, parts=["adapter"])
    assert "--model ORG/NAME --image X.png\n" in card and "base_model_relation: adapter" in card


def test_card_is_loud_where_the_image_is_not_used():
    blind = {"image_ablation": {"shuffled_over_right": 1.001, "uses_image": False}, "lowest_val_loss": 0.5}
    card = model_card(VLMSettings("llm", 12), blind, METRICS, licence=None)
    assert "**It does not use the image**" in card and "1.00 times that with its own" in card and "0.5000" in card


def test_paths_are_shortened_and_names_are_not():
    assert without_folders({"a": ["/x/y/z", "org/name", 3], "b": "text\n/x"}) == {
        "a": ["z", "org/name", 3],
        "b": "text\n/x",
    }
    kept = ["Which of grade 1/2/3 is it?", "</s></s>", "https://a.b/c/d", "and/or", "org/name", "{a}/{b}/c", 4, None]
    assert without_folders(kept) == kept
    paths = ["../ward 7/x", "runs/ward7/features", "~/x/y", "ward7/train.json", "/a/tiles + /b/longnet"]
    assert without_folders(paths) == ["x", "features", "y", "train.json", "tiles + longnet"]
    assert public_name("../secret/llm") == "a local folder (llm)" and public_name("org/name") == "org/name"
    assert model_folder("/no/such/folder") == "/no/such/folder"


def test_repository_is_needed_unless_dry(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--repo_id"):
        run_here(monkeypatch, "--model", tmp_path)
