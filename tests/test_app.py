"""The page over HTTP: only the folder's slides, only their pyramids, one job after another; and what it refuses."""

import asyncio
import errno
import io
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from encoders import load_encoder
from inference import app as app_command
from inference import evidence
from inference.answers import Answering
from inference.app_routes import create_app
from inference.decoding import Decoding
from inference.deep_zoom import OpenSlides, ZoomedSlide
from inference.job_queue import MAX_WAITING, Job, JobQueue
from inference.report_writer import ReportWriter
from inference.slide_folder import NotAccepted, SlideFolder, parse_size
from stage0_tiling.encoding import encode_slide
from stage0_tiling.slide import Slide, SlideError
from tests.conftest import ROOT, command, environment, heed_interrupts
from tests.mirax_slides import write_mirax_slide
from tests.slides import DrawnSlide
from tests.test_inference import save_model
from vlm_loading import load_vlm

HOSTS = {"127.0.0.1", "localhost", "::1"}
OURS = {"X-SlideScribe": "page"}
TILING = {"tile_size": 64, "mpp": 2.0, "overlap": 0, "min_tissue": 0.3}
RED = np.full((256, 256, 3), (250, 10, 10), np.uint8)


class PatientWriter:
    """Stands in for the model: each job waits until the test lets it go."""

    def __init__(self):
        self.go, self.order = threading.Semaphore(0), []

    def write(self, job: Job, path: Path, question: str | None) -> dict:
        job.progress("Writing the report")
        while not self.go.acquire(timeout=0.01):
            job.progress("Writing the report")
        self.order.append(question)
        if question == "refuse":
            raise ValueError("one\nline")
        if question == "break":
            raise KeyError("a fault of ours")
        return {"answer": question, "slide": path.name, "lines": [], "slides": [{"slide_id": path.stem}]}

    def plan(self, path: Path) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "one.tiff"
    DrawnSlide(width=1100, height=900, num_levels=2).write(path)
    return path


@pytest.fixture
def folder(slide, tmp_path) -> Path:
    """Slides with odd names and below the folder, and much that must not be shown."""
    root = tmp_path / "slides"
    (root / "below").mkdir(parents=True)
    for name in ("one.tiff", "a b#1?%2e ü<i>.tiff", "below/two.tiff"):
        shutil.copy(slide, root / name)
    (root / "inside.tiff").symlink_to("one.tiff")
    shutil.copy(slide, tmp_path / "secret.tiff")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(slide, tmp_path / "elsewhere" / "secret2.tiff")
    (root / "out.tiff").symlink_to(tmp_path / "secret.tiff")
    (root / "out_folder").symlink_to(tmp_path / "elsewhere")
    (root / "broken.tiff").symlink_to("nowhere.tiff")
    (root / "circle.tiff").symlink_to("circle.tiff")
    shutil.copy(slide, root / ".hidden.tiff")
    Image.fromarray(RED).save(root / "label.png")
    (root / "notes.txt").write_text("private")
    return root


@pytest.fixture
def served(folder):
    """A client of a page whose model is patient, and its writer."""
    writer = PatientWriter()
    app = create_app(SlideFolder(folder, 2_000_000), writer, {"model": "tiny"}, HOSTS)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client, writer


def key_of(client, name: str = "one.tiff") -> str:
    return next(slide["key"] for slide in client.get("/api/slides").json() if slide["name"] == name)


def wait_for(client, job_id: str, *states: str) -> dict:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = client.get(f"/api/jobs/{job_id}").json()
        if job["state"] in states:
            return job
        time.sleep(0.01)
    raise AssertionError(job)


# Who may ask


def test_the_page_and_its_files_are_served_with_their_headers(served):
    client, _ = served
    page = client.get("/")
    assert page.status_code == 200 and "SlideScribe" in page.text
    for file in re.findall(r'(?:href|src)="(/page/[^"]+)"', page.text):
        answer = client.get(file)
        assert answer.status_code == 200, file
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    licence = client.get("/page/openseadragon.LICENSE.txt").text
    assert "Redistributions" in licence and "OpenSeadragon" in licence
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "....//app.py"):
        assert client.get(f"/page/{name}").status_code == 404
    assert not re.search(r"https?://", page.text), "nothing is loaded from elsewhere"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:8000", "[::2]"])
def test_other_hosts_are_refused(served, host):
    client, _ = served
    assert client.get("/api/slides", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"])
def test_loopback_by_any_name_is_served(served, host):
    client, _ = served
    assert client.get("/api/slides", headers={"host": host}).status_code == 200


def test_what_changes_something_needs_the_header_that_other_sites_cannot_send(served, slide):
    client, _ = served
    body = {"slide": key_of(client), "question": None}
    assert client.post("/api/jobs", json=body).status_code == 403
    assert client.put("/api/uploads/new.tiff", content=slide.read_bytes()).status_code == 403
    assert client.delete("/api/jobs/any").status_code == 403
    assert "access-control-allow-origin" not in client.options("/api/jobs").headers


# The folder


def test_only_slides_of_the_folder_are_listed(served):
    client, _ = served
    names = [slide["name"] for slide in client.get("/api/slides").json()]
    assert names == sorted(["one.tiff", "inside.tiff", "below/two.tiff", "a b#1?%2e ü<i>.tiff"], key=str.lower)
    for name in names:
        answer = client.get(f"/api/slides/{key_of(client, name)}").json()
        assert (answer["width"], answer["height"], answer["mpp"]) == (1100, 900, pytest.approx(0.5))


@pytest.mark.parametrize(
    "key", ["one.tiff", "..", "../secret.tiff", "..%2fsecret.tiff", "%2fetc%2fpasswd", "0" * 20, "%00", "notes.txt"]
)
def test_slides_are_found_by_their_keys_alone(served, key):
    client, _ = served
    for path in ("", "/thumbnail.jpg", "/zoom/0/0_0.jpg", "/outline"):
        assert client.get(f"/api/slides/{key}{path}").status_code == 404
    assert client.post("/api/jobs", json={"slide": key[:64]}, headers=OURS).status_code == 404


def test_a_listed_slide_that_becomes_a_link_out_is_no_longer_shown(served, folder):
    client, _ = served
    key = key_of(client)
    (folder / "inside.tiff").unlink()
    (folder / "one.tiff").unlink()
    (folder / "one.tiff").symlink_to(folder.parent / "secret.tiff")
    assert client.get(f"/api/slides/{key}").status_code == 404
    assert client.get(f"/api/slides/{key}/thumbnail.jpg").status_code == 404


def test_a_slide_that_is_taken_away_while_it_is_asked_for_is_one_line(served, folder, monkeypatch):
    client, _ = served
    key, find = key_of(client), SlideFolder.find

    def find_and_lose(self, key):
        found = find(self, key)
        found.path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(SlideFolder, "find", find_and_lose)
    answer = client.get(f"/api/slides/{key}")
    assert answer.status_code == 404 and answer.json() == {"error": "no such slide in the folder"}
    monkeypatch.undo()
    assert client.get(f"/api/slides/{key}/outline").status_code == 404


def test_a_slide_that_cannot_be_opened_is_one_line(served, folder):
    client, _ = served
    (folder / "cut.tiff").write_bytes((folder / "one.tiff").read_bytes()[:900])
    answer = client.get(f"/api/slides/{key_of(client, 'cut.tiff')}")
    assert answer.status_code == 422 and "cut.tiff" in answer.json()["error"]
    assert str(folder) not in answer.text


# Pixels


def test_deep_zoom_shows_the_slide(served, slide):
    client, _ = served
    key = key_of(client)
    about = client.get(f"/api/slides/{key}").json()
    assert 2 ** about["max_level"] >= 1100 > 2 ** (about["max_level"] - 1)
    answer = client.get(f"/api/slides/{key}/zoom/{about['max_level']}/1_2.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    tile = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    with Slide(slide) as opened:
        expected = opened.read_region(253, 507, 256, 256, (256, 256))
        whole = opened.read_whole(550, 450)
    assert tile.shape == (256, 256, 3) and np.abs(tile - expected).mean() < 3
    half = client.get(f"/api/slides/{key}/zoom/{about['max_level'] - 1}/0_0.jpg")
    assert np.abs(np.asarray(Image.open(io.BytesIO(half.content))).astype(int) - whole[:255, :255]).mean() < 4
    assert Image.open(io.BytesIO(client.get(f"/api/slides/{key}/zoom/0/0_0.jpg").content)).size == (1, 1)
    for wrong in ("99/0_0", "11/9_0", "-1/0_0", "11/-1_0"):
        assert client.get(f"/api/slides/{key}/zoom/{wrong}.jpg").status_code == 404
    assert client.get(f"/api/slides/{key}/zoom/a/0_0.jpg").status_code == 422
    thumbnail = Image.open(io.BytesIO(client.get(f"/api/slides/{key}/thumbnail.jpg").content))
    assert thumbnail.size == (320, 262) and not thumbnail.getexif()


def test_no_label_is_ever_served(served, folder, monkeypatch):
    """A MIRAX slide whose label is red, and whose .mrxs file is itself a picture of the label."""
    client, _ = served
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    picture = np.full((512, 512, 3), (150, 90, 160), np.uint8)
    write_mirax_slide(folder / "m.mrxs", picture, 0.5, images=(8, 8), first=(2, 2), label=RED)
    key = key_of(client, "m.mrxs")
    top = client.get(f"/api/slides/{key}").json()["max_level"]
    tiles = [(level, x, y) for level in (top, top - 2, 3) for x in range(9) for y in range(9)]
    answers = [client.get(f"/api/slides/{key}/zoom/{level}/{x}_{y}.jpg") for level, x, y in tiles]
    answers.append(client.get(f"/api/slides/{key}/thumbnail.jpg"))
    pictures = [np.asarray(Image.open(io.BytesIO(a.content))).astype(int) for a in answers if a.status_code == 200]
    assert len(pictures) > 60
    assert max((p[..., 0] - p[..., 1]).max() for p in pictures) < 100  # of the label's red, 240
    # Without its folder the .mrxs is nothing but that picture, and is not opened as one.
    shutil.rmtree(folder / "m")
    (folder / "m.mrxs").touch()
    assert client.get(f"/api/slides/{key}").status_code == 422
    assert client.get(f"/api/slides/{key}/thumbnail.jpg").status_code == 422


def test_slides_in_use_stay_open_and_idle_ones_are_closed(folder):
    opened = OpenSlides(limit=1)
    one, two = folder / "one.tiff", folder / "below" / "two.tiff"
    with opened.borrow(one) as first, opened.borrow(two) as second:
        assert first.tile(0, 0, 0) and second.tile(0, 0, 0)
        with opened.borrow(one) as again:
            assert again is first
    with opened.borrow(two) as kept:
        assert kept.tile(0, 0, 0)
    assert len(opened._slides) == 1
    assert isinstance(kept, ZoomedSlide)


# Uploads


def upload(client, name: str, content, **more):
    return client.put(f"/api/uploads/{name}", content=content, headers=OURS, **more)


def test_an_upload_is_opened_and_only_then_listed(served, slide, folder):
    client, _ = served
    before = sorted(path.name for path in folder.iterdir())
    answer = upload(client, "N%C3%A4w%20slide.TIFF", slide.read_bytes())
    assert answer.status_code == 201 and answer.json()["name"] == "Näw slide.TIFF"
    assert (folder / "Näw slide.TIFF").read_bytes() == slide.read_bytes()
    assert client.get(f"/api/slides/{answer.json()['key']}").json()["width"] == 1100
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "Näw slide.TIFF"])
    assert upload(client, "N%C3%A4w%20slide.TIFF", slide.read_bytes()).status_code == 409
    assert upload(client, "broken.tiff", slide.read_bytes()).status_code == 409  # the name of a broken link


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        ("report.pdf", b"x", 415, "one file"),
        ("x.mrxs", b"x", 415, "one file"),
        ("label.png", b"x", 415, "one file"),
        ("noextension", b"x", 415, "one file"),
        (".hidden2.tiff", b"x", 400, "name"),
        ("a%0Ab.tiff", b"x", 400, "name"),
        ("a%5Cb.tiff", b"x", 400, "name"),
        ("a%E2%80%AEb.tiff", b"x", 400, "name"),
        ("%20.tiff", b"x", 400, "name"),
        ("x" * 240 + ".tiff", b"x", 400, "name"),
        ("big.tiff", b"x" * 2_000_001, 413, "allowed"),
        ("text.tiff", b"this is no slide", 422, "this file"),
        ("empty.svs", b"", 422, "this file"),
    ],
)
def test_uploads_that_are_refused(served, folder, name, content, status, message):
    client, _ = served
    before = sorted(folder.rglob("*"))
    answer = upload(client, name, content)
    assert answer.status_code == status and message in answer.json()["error"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("..%2Fx.tiff", 404),
        ("%2Ftmp%2Fx.tiff", 404),
        ("below%2Fx.tiff", 404),
        ("../x.tiff", 413),  # on its way to a request that takes no file, by the client itself
        ("%2E%2E/x.tiff", 404),
    ],
)
def test_uploads_lead_nowhere_else(served, slide, folder, name, status):
    client, _ = served
    before = sorted(folder.parent.rglob("*"))
    assert upload(client, name, slide.read_bytes()).status_code == status
    assert sorted(folder.parent.rglob("*")) == before


def test_an_upload_of_unstated_size_is_cut_off(served, folder):
    client, _ = served
    before, sent = sorted(folder.iterdir()), []

    def chunks():
        for _ in range(100):
            sent.append(1)
            yield b"x" * 100_000

    assert upload(client, "big.tiff", chunks()).status_code == 413
    assert sorted(folder.iterdir()) == before


def test_an_upload_that_breaks_off_or_meets_a_full_disk_leaves_nothing(folder, monkeypatch):
    slides = SlideFolder(folder, 10**9)
    before = sorted(folder.iterdir())

    async def half():
        yield b"x" * 100

    with pytest.raises(NotAccepted, match="100 of 200 bytes"):
        asyncio.run(slides.receive("half.tiff", 200, half()))
    monkeypatch.setattr(SlideFolder, "_free_bytes", lambda self: 10)
    with pytest.raises(NotAccepted, match="too full"):
        slides.check_upload("x.tiff", 11)
    assert sorted(folder.iterdir()) == before


def test_an_upload_whose_sender_leaves_is_no_fault_of_ours(served, folder):
    client, _ = served
    told = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(told)

    async def send(message):
        pass

    headers = [(b"host", b"localhost"), (b"x-slidescribe", b"1"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "PUT", "path": "/api/uploads/new.tiff", "headers": headers, "query_string": b""}
    asyncio.run(client.app(scope, receive, send))  # raises nothing
    assert not [path for path in folder.iterdir() if path.name.startswith(".upload") or path.name == "new.tiff"]


def test_what_is_not_there_is_said_as_all_errors_are(served):
    client, _ = served
    answer = client.get("/api/nothing")
    assert answer.status_code == 404 and answer.json() == {"error": "Not Found"}


def test_uploads_take_no_name_from_another_where_hard_links_are_missing(served, slide, folder, monkeypatch):
    client, _ = served

    def link(source, target):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr("inference.slide_folder.os.link", link)
    assert upload(client, "new.tiff", slide.read_bytes()).status_code == 201
    assert (folder / "new.tiff").read_bytes() == slide.read_bytes()
    # Two uploads of one name at the same time both pass the check.
    monkeypatch.setattr(SlideFolder, "check_upload", lambda self, name, size: self.root / name)
    assert upload(client, "one.tiff", slide.read_bytes() + b"x").status_code == 409
    assert (folder / "one.tiff").read_bytes() == slide.read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"), [("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("1000", 1000), ("1.5KB", 1500)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@given(st.text(max_size=8))
def test_sizes_are_positive_or_refused(text):
    try:
        assert parse_size(text) >= 1
    except ValueError as error:
        assert "--max_upload" in str(error)


# Jobs


def ask(client, question: str | None = None, name: str = "one.tiff"):
    return client.post("/api/jobs", json={"slide": key_of(client, name), "question": question}, headers=OURS)


def test_two_users_are_queued_and_not_mixed(served):
    client, writer = served
    first, second, third = (
        ask(client, q, n).json() for q, n in (("a", "one.tiff"), ("b", "below/two.tiff"), ("c", "one.tiff"))
    )
    wait_for(client, first["id"], "running")
    assert [client.get(f"/api/jobs/{job['id']}").json()["before"] for job in (first, second, third)] == [0, 1, 2]
    writer.go.release(3)
    results = [wait_for(client, job["id"], "done")["result"] for job in (third, second, first)]
    assert [(r["answer"], r["slide"]) for r in results] == [("c", "one.tiff"), ("b", "two.tiff"), ("a", "one.tiff")]
    assert writer.order == ["a", "b", "c"]
    assert len({first["id"], second["id"], third["id"]}) == 3 and len(first["id"]) >= 20


def test_jobs_can_be_given_up(served):
    client, writer = served
    running, waiting, last = (ask(client, q).json()["id"] for q in "abc")
    wait_for(client, running, "running")
    assert client.delete(f"/api/jobs/{waiting}", headers=OURS).json()["state"] == "cancelled"
    client.delete(f"/api/jobs/{running}", headers=OURS)
    wait_for(client, running, "cancelled")
    writer.go.release()
    assert wait_for(client, last, "done")["result"]["answer"] == "c" and writer.order == ["c"]


def test_a_job_that_fails_is_one_line_and_the_next_goes_on(served):
    client, writer = served
    jobs = [ask(client, q).json()["id"] for q in ("refuse", "break", "fine")]
    writer.go.release(3)
    refused, broken = (wait_for(client, job, "failed") for job in jobs[:2])
    assert refused["error"] == "one line" and "should not" in broken["error"] and "KeyError" not in broken["error"]
    assert wait_for(client, jobs[2], "done")["result"]["answer"] == "fine"


def test_the_line_has_an_end(served):
    client, _ = served
    answers = [ask(client, "q").status_code for _ in range(MAX_WAITING + 3)]
    assert answers[:MAX_WAITING] == [202] * MAX_WAITING and answers[-1] == 503


def test_questions_and_files_that_are_refused(served):
    client, writer = served
    key = key_of(client)
    for body in ({"slide": key, "question": "x" * 2001}, {"slide": 5}, {}):
        answer = client.post("/api/jobs", json=body, headers=OURS)
        assert answer.status_code == 422 and isinstance(answer.json()["error"], str)
    cut = client.post("/api/jobs", content='{"slide":', headers=OURS | {"Content-Type": "application/json"})
    assert cut.status_code == 422 and cut.json() == {"error": "the request holds no JSON"}
    assert client.get("/api/jobs/unknown").status_code == 404
    job = ask(client, "a").json()["id"]
    assert client.get(f"/api/jobs/{job}/files/report.txt").status_code == 404
    writer.go.release()
    wait_for(client, job, "done")
    for name in ("..%2Freport.txt", "../../etc/passwd", "evidence", "nothing.png"):
        assert client.get(f"/api/jobs/{job}/files/{name}").status_code == 404


def test_old_results_and_their_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("inference.job_queue.MAX_KEPT", 2)
    queue = JobQueue()

    def work(job: Job) -> None:
        job.folder.mkdir()

    jobs = []
    for _ in range(5):
        jobs.append(queue.submit(work))
        while jobs[-1].state != "done":
            time.sleep(0.002)
    assert [path.name for path in queue.folder.iterdir()].count(jobs[0].id) == 0
    assert (queue.folder / jobs[-1].id).is_dir()
    with pytest.raises(KeyError):
        queue.find(jobs[0].id)
    queue.close()
    assert not queue.folder.exists()


# With a model


@pytest.fixture(scope="module")
def model_folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final_model"
    encoder = load_encoder(str(corpus.encoder))
    about = {"encoder": str(corpus.encoder), "encoder_fingerprint": encoder.fingerprint(), "tiling": TILING}
    return save_model(folder, corpus, patch_width=encoder.width, **about)


@pytest.fixture(scope="module")
def writer(corpus, model_folder) -> ReportWriter:
    model, tokenizer = load_vlm(model_folder)
    answering = Answering(Decoding(num_beams=2, max_new_tokens=10))
    return ReportWriter(model, tokenizer, load_encoder(str(corpus.encoder)), answering=answering, num_workers=1)


def test_report_question_evidence_and_files(folder, writer, monkeypatch):
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    encoded = []

    def counted(*args, **settings):
        encoded.append(1)
        return encode_slide(*args, **settings)

    monkeypatch.setattr("inference.report_writer.encode_slide", counted)
    app = create_app(SlideFolder(folder, 10**9), writer, {"model": "tiny"}, HOSTS)
    with TestClient(app, base_url="http://localhost") as client:
        outline = client.get(f"/api/slides/{key_of(client)}/outline").json()
        assert len(outline["tiles"]) > 4 and outline["tile_width"] == 256 and len(outline["tissue"]) >= 1
        job = ask(client).json()["id"]
        result = wait_for(client, job, "done", "failed")["result"]
        assert result["num_tiles"] == len(outline["tiles"])
        slide = result["slides"][0]
        assert len(slide["coords"]) == min(8, len(outline["tiles"])) == len(slide["maps"][result["method"]][0])
        assert all(corner in outline["tiles"] for corner in slide["coords"])
        assert client.get(f"/api/jobs/{job}/files/report.txt").text == result["report"] + "\n"
        assert client.get(f"/api/jobs/{job}/files/evidence.json").json()["report"] == result["report"]
        assert client.get(f"/api/jobs/{job}/files/evidence.geojson").json()["type"] == "FeatureCollection"
        for line in result["lines"]:
            names = [f"{line['name']}.png", *(f"{line['name']}_{tile['rank']}.png" for tile in line["top_tiles"])]
            for name in names:
                Image.open(io.BytesIO(client.get(f"/api/jobs/{job}/files/{name}").content)).verify()
        other = wait_for(client, ask(client, " Which organ? ").json()["id"], "done", "failed")["result"]
        assert other["question"] == "Which organ?" and len(encoded) == 1, "the same tiles are not encoded twice"
    assert not app.state.queue.folder.exists()


def test_a_question_that_is_cut_is_said(folder, writer, model_folder, monkeypatch, capsys):
    from inference import generate

    long = "Which organ, and which grade? " * 60
    result = writer.write(Job("x", folder.parent / "job"), folder / "one.tiff", long)
    assert result["unread_question_tokens"] > 100
    told = writer.write(Job("x", folder.parent / "job2"), folder / "one.tiff", "Which organ?")
    assert "unread_question_tokens" not in told
    flags = ["--model", model_folder, "--slide", folder / "one.tiff", "--num_beams", 1, "--max_new_tokens", 3]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--question", long])
    assert generate.main() == 0
    assert f"not its last {result['unread_question_tokens']}" in capsys.readouterr().err


def test_the_report_is_that_of_generate(folder, writer, model_folder, monkeypatch, capsys):
    from inference import generate

    job = Job("x", folder.parent / "job")
    result = writer.write(job, folder / "one.tiff")
    flags = ["--model", model_folder, "--slide", folder / "one.tiff", "--num_beams", 2, "--max_new_tokens", 10]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    assert generate.main() == 0
    assert capsys.readouterr().out == result["report"] + "\n"


def test_a_blank_slide_fails_with_the_reason(folder, writer):
    DrawnSlide(width=600, height=600, num_levels=1, pieces=()).write(folder / "blank.tiff")
    app = create_app(SlideFolder(folder, 10**9), writer, {"model": "tiny"}, HOSTS)
    with TestClient(app, base_url="http://localhost") as client:
        assert "no tissue" in client.get(f"/api/slides/{key_of(client, 'blank.tiff')}/outline").json()["error"]
        job = wait_for(client, ask(client, None, "blank.tiff").json()["id"], "done", "failed")
        assert job["state"] == "failed" and "no tissue" in job["error"]


def test_a_slide_that_was_removed_meanwhile_is_said_without_its_folder(folder, writer):
    with pytest.raises(SlideError, match=r"^gone\.tiff: is no longer in the folder$"):
        writer.write(Job("x", folder.parent / "job"), folder / "gone.tiff")


# The command


def test_the_command_serves_loopback_and_ends_on_an_interrupt(folder, model_folder):
    flags = ["--model", model_folder, "--slides", folder, "--port", 0]
    process = subprocess.Popen(
        command("inference/app.py", *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), process.stderr.read()
        with urllib.request.urlopen(f"{address}/api/slides", timeout=60) as answer:
            assert b"one.tiff" in answer.read()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--slides": "nowhere"}, "no such folder"),
        ({"--max_upload": "lots"}, "--max_upload"),
        ({"--port": 70000}, "--port 70000"),
        ({"--assume_mpp": -1}, "--assume_mpp -1"),
        ({"--model": "nowhere"}, "vlm.json"),
        ({"--host": "203.0.113.1"}, "--host 203.0.113.1"),
    ],
)
def test_the_command_refuses(folder, model_folder, monkeypatch, change, message):
    flags = {"--model": model_folder, "--slides": folder, "--port": 0} | change
    monkeypatch.setattr(sys, "argv", ["app.py", *(str(word) for pair in flags.items() for word in pair)])
    with pytest.raises((ValueError, OSError), match=message):
        app_command.main()


def test_models_of_images_are_refused(folder, corpus, tmp_path, monkeypatch):
    model = save_model(tmp_path / "m", corpus, patch_width=24, input_kind="images", encoder=str(corpus.encoder))
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(model), "--slides", str(folder), "--port", "0"])
    with pytest.raises(ValueError, match="trained on images"):
        app_command.main()


def short_of_memory(errors):
    """A function that fails as often as it has errors, and then never again."""

    def fail(*args, **settings):
        if errors:
            raise errors.pop(0)

    return fail


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def test_a_lack_of_memory_is_one_line_and_the_next_report_is_written(folder, writer, monkeypatch):
    fail, answer = short_of_memory(list(OUT_OF_MEMORY)), writer.answering.answer
    monkeypatch.setattr(Answering, "answer", lambda self, *args: fail() or answer(*args))
    app = create_app(SlideFolder(folder, 10**9), writer, {"model": "tiny"}, HOSTS)
    with TestClient(app, base_url="http://localhost") as client:
        jobs = [ask(client).json()["id"] for _ in range(len(OUT_OF_MEMORY) + 1)]
        for job in jobs[:-1]:
            error = wait_for(client, job, "done", "failed")["error"]
            assert error.startswith("the memory of cpu did not suffice while writing the report;")
            assert "--num_beams 1" in error and "alloc_cpu" not in error
        assert wait_for(client, jobs[-1], "done", "failed")["result"]["report"]


def test_a_report_is_not_lost_where_its_evidence_does_not_fit_the_memory(folder, writer, monkeypatch):
    fail = short_of_memory(list(OUT_OF_MEMORY))
    monkeypatch.setattr(evidence, "_integrated", lambda *args, found=evidence._integrated: fail() or found(*args))
    for number in range(len(OUT_OF_MEMORY)):
        result = writer.write(Job("x", folder.parent / f"job{number}"), folder / "one.tiff")
        assert result["report"] and "memory did not suffice" in result["no_evidence"]
        assert (folder.parent / f"job{number}" / "report.txt").read_text() == result["report"] + "\n"
    assert "no_evidence" not in writer.write(Job("x", folder.parent / "job"), folder / "one.tiff")


def test_other_faults_are_not_taken_for_a_lack_of_memory(folder, writer, monkeypatch):
    monkeypatch.setattr(Answering, "answer", lambda *_: short_of_memory([RuntimeError("shapes do not match")])())
    with pytest.raises(RuntimeError, match="shapes"):
        writer.write(Job("x", folder.parent / "job"), folder / "one.tiff")
