"""What the page survives: odd names, pipes, replaced files, large bodies, other sites, many slides at once."""
# ruff: noqa: F811 - fixtures of another file, by name

import asyncio
import io
import json
import logging
import os
import random
import shutil
import threading
import time

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from inference import deep_zoom, slide_folder
from inference.app_routes import LONGEST_BODY, create_app
from inference.deep_zoom import OpenSlides
from inference.slide_folder import NotAccepted, SlideFolder
from stage0_tiling.slide import Slide, SlideError
from tests.slides import DrawnSlide, write_pyramid
from tests.test_app import HOSTS, OURS, PatientWriter, folder, key_of, served, slide  # noqa: F401
from tests.test_app import TestClient as Client


def test_a_name_that_is_no_utf8_spoils_only_itself(served, slide, folder):
    client, _ = served
    for name in (b"bad\xff.tiff", b"worse\xfe.tiff"):
        shutil.copy(slide, os.fsencode(folder) + b"/" + name)
    with open(os.fsencode(folder) + b"/worse\xfe.tiff", "wb") as file:
        file.write(b"no slide")
    names = [one["name"] for one in client.get("/api/slides").json()]
    assert {"one.tiff", "bad\ufffd.tiff", "worse\ufffd.tiff"} <= {*names}
    key = key_of(client, "bad\ufffd.tiff")
    assert client.get(f"/api/slides/{key}").json()["width"] == 1100
    assert client.get(f"/api/slides/{key}/thumbnail.jpg").status_code == 200
    answer = client.post("/api/jobs", json={"slide": key}, headers=OURS)
    assert answer.status_code == 422 and "rename" in answer.json()["error"]
    assert client.get(f"/api/slides/{key_of(client, 'worse' + chr(0xFFFD) + '.tiff')}").status_code == 422


def test_pipes_are_no_slides(served, folder):
    client, _ = served
    os.mkfifo(folder / "pipe.svs")
    (folder / "to_pipe.svs").symlink_to("pipe.svs")
    os.mkdir(folder / "folder.svs")
    names = {one["name"] for one in client.get("/api/slides").json()}
    assert "one.tiff" in names and names.isdisjoint({"pipe.svs", "to_pipe.svs", "folder.svs"})


def test_no_label_or_macro_image_of_an_svs_is_ever_served(served, folder):
    client, _ = served
    picture = np.full((600, 800, 3), (150, 90, 160), np.uint8)
    write_pyramid(folder / "labelled.svs", picture, 0.5, num_levels=2, aperio=True)
    with tifffile.TiffWriter(folder / "labelled.svs", append=True) as file:
        for name, kind in (("label", 1), ("macro", 9)):
            red = np.full((96, 128, 3), (250, 10, 10), np.uint8)
            file.write(
                red,
                photometric="rgb",
                description=f"Aperio Image Library\r\n{name} 128x96",
                metadata=None,
                subfiletype=kind,
            )
    with openslide.open_slide(folder / "labelled.svs") as opened:
        assert {"label", "macro"} <= {*opened.associated_images}
    key = key_of(client, "labelled.svs")
    about = client.get(f"/api/slides/{key}").json()
    assert (about["width"], about["height"]) == (800, 600)
    places = [(level, x, y) for level in range(about["max_level"] + 1) for x in range(4) for y in range(3)]
    answers = [client.get(f"/api/slides/{key}/zoom/{level}/{x}_{y}.jpg") for level, x, y in places]
    answers.append(client.get(f"/api/slides/{key}/thumbnail.jpg"))
    pictures = [np.asarray(Image.open(io.BytesIO(a.content))).astype(int) for a in answers if a.status_code == 200]
    assert len(pictures) > about["max_level"] + 12
    assert max((p[..., 0] - p[..., 1]).max() for p in pictures) < 100  # of the label's red, 240


def test_a_slow_slide_does_not_hold_up_another(folder, monkeypatch):
    let_go, opened = threading.Event(), OpenSlides()

    class Slow(deep_zoom.ZoomedSlide):
        def __init__(self, path):
            if path.name == "two.tiff":
                assert let_go.wait(60)
            super().__init__(path)

    monkeypatch.setattr(deep_zoom, "ZoomedSlide", Slow)

    def open_slow():
        with opened.borrow(folder / "below" / "two.tiff") as zoomed:
            widths.append(zoomed.slide.width)

    widths: list[int] = []
    waiting = [threading.Thread(target=open_slow) for _ in range(2)]
    for thread in waiting:
        thread.start()
    with opened.borrow(folder / "one.tiff") as zoomed:
        assert zoomed.slide.width == 1100 and widths == []
    let_go.set()
    for thread in waiting:
        thread.join()
    assert widths == [1100, 1100]


def test_a_slide_that_does_not_open_is_not_kept(folder):
    opened = OpenSlides()
    (folder / "cut.tiff").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(SlideError), opened.borrow(folder / "cut.tiff"):
            pass
    assert not opened._slides


def test_a_replaced_slide_is_never_shown_as_the_one_before(served, folder):
    client, _ = served
    key = key_of(client)
    before = client.get(f"/api/slides/{key}").json()
    address = f"/api/slides/{key}/zoom/9/0_0.jpg"
    old = client.get(address, params={"v": before["version"]})
    assert old.status_code == 200 and "max-age" in old.headers["cache-control"]
    assert client.get(address).headers["cache-control"] == "no-store"
    DrawnSlide(width=600, height=500, num_levels=1, seed=5).write(folder / "next.tiff")
    os.replace(folder / "next.tiff", folder / "one.tiff")
    after = client.get(f"/api/slides/{key}").json()
    assert after["version"] != before["version"] and after["width"] == 600
    for path in ("zoom/9/0_0.jpg", "thumbnail.jpg", "outline"):
        refused = client.get(f"/api/slides/{key}/{path}", params={"v": before["version"]})
        assert refused.status_code == 409 and "open it again" in refused.json()["error"]
    answer = client.post("/api/jobs", json={"slide": key, "version": before["version"]}, headers=OURS)
    assert answer.status_code == 409
    thumbnail = client.get(f"/api/slides/{key}/thumbnail.jpg", params={"v": after["version"]})
    assert Image.open(io.BytesIO(thumbnail.content)).size == (320, 267)


def test_the_list_is_sent_only_where_it_changed(served, slide, folder):
    client, _ = served
    first = client.get("/api/slides")
    again = client.get("/api/slides", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    shutil.copy(slide, folder / "come later.tiff")
    later = client.get("/api/slides", headers={"If-None-Match": first.headers["etag"]})
    assert later.status_code == 200 and "come later.tiff" in later.text


def test_what_the_folder_is_warned_of_is_said_once(folder, caplog):
    (folder / "unreadable.vsi").write_bytes(b"x")
    slides = SlideFolder(folder, 10**6)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            slides.list()
    assert sum("unreadable" in m or "left out" in m for m in caplog.messages) == 1


def test_thumbnails_are_made_once(served, monkeypatch):
    client, _ = served
    made = []
    thumbnail = deep_zoom.ZoomedSlide.thumbnail
    monkeypatch.setattr(deep_zoom.ZoomedSlide, "thumbnail", lambda self: made.append(1) or thumbnail(self))
    for _ in range(3):
        assert client.get(f"/api/slides/{key_of(client)}/thumbnail.jpg").status_code == 200
    assert made == [1]


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1.evil.example:8000", "null", "http://["])
def test_other_origins_are_refused_whatever_headers_they_send(served, origin):
    client, _ = served
    body = {"slide": key_of(client)}
    assert client.post("/api/jobs", json=body, headers=OURS | {"Origin": origin}).status_code == 403
    ours = client.post("/api/jobs", json=body, headers=OURS | {"Origin": "http://localhost:8000"})
    assert ours.status_code == 202


def test_bodies_that_are_no_upload_are_bounded(served):
    client, _ = served
    headers = OURS | {"Content-Type": "application/json"}
    long = json.dumps({"slide": "x", "question": "y" * LONGEST_BODY}).encode()
    assert client.post("/api/jobs", content=long, headers=headers).status_code == 413
    assert client.post("/api/jobs", content=iter([b"{}"]), headers=headers).status_code == 413, "of unstated size"
    assert client.post("/api/jobs", content=b"[" * 60_000, headers=headers).status_code in (400, 422)
    assert client.delete("/api/jobs/none", headers=OURS | {"Content-Length": "9" * 5000}).status_code == 413


@pytest.mark.parametrize(
    "place", ["9" * 30 + "/0_0", "9/" + "9" * 30 + "_0", "9/0_" + "9" * 5000, "-1/0_0", "%00/0_0", "1e3/0_0"]
)
def test_parts_that_no_slide_has_are_refused(served, place):
    client, _ = served
    answer = client.get(f"/api/slides/{key_of(client)}/zoom/{place}.jpg")
    assert answer.status_code in (404, 422) and list(answer.json()) == ["error"]


def test_a_disk_that_fills_during_an_upload_keeps_its_margin(folder, monkeypatch):
    slides = SlideFolder(folder, 10**9)
    before = sorted(folder.iterdir())
    monkeypatch.setattr(slide_folder, "BYTES_BETWEEN_LOOKS", 1000)
    free = iter([5000, 3000, -1])
    monkeypatch.setattr(SlideFolder, "_free_bytes", lambda self: next(free))

    async def chunks():
        for _ in range(100):
            yield b"x" * 1000

    with pytest.raises(NotAccepted, match="disk is full"):
        asyncio.run(slides.receive("new.tiff", None, chunks()))
    assert next(free, None) is None and sorted(folder.iterdir()) == before


def test_what_a_killed_page_left_of_an_upload_is_removed(folder):
    old, fresh = folder / ".upload-0a.tiff", folder / ".upload-0b.tiff"
    for path in (old, fresh):
        path.write_bytes(b"x")
    days_ago = time.time() - 3 * slide_folder.FORGOTTEN_S
    os.utime(old, (days_ago, days_ago))
    SlideFolder(folder, 10**6)
    assert not old.exists() and fresh.exists(), "of which another page may be in the midst"


def test_an_implausible_pixel_size_is_not_shown_as_if_it_were_true(tmp_path, monkeypatch):
    DrawnSlide(width=600, height=500, num_levels=1, mpp=352.8).write(tmp_path / "wrong.tiff")
    for assumed, expected in ((None, (None, None)), (0.5, (0.5, "assumed"))):
        app = create_app(SlideFolder(tmp_path, 10**6), PatientWriter(), {}, HOSTS, assumed)
        with Client(app, base_url="http://127.0.0.1") as client:
            about = client.get(f"/api/slides/{key_of(client, 'wrong.tiff')}").json()
        assert (about["mpp"], about["mpp_source"]) == expected
        assert about["stated_mpp"] == pytest.approx(352.8, rel=0.01)


def test_handles_stay_few_however_many_slides_are_looked_at_at_once(slide, tmp_path):
    for number in range(60):
        os.link(slide, tmp_path / f"{number}.tiff")
    app = create_app(SlideFolder(tmp_path, 10**6), PatientWriter(), {}, HOSTS)
    with Slide(slide) as opened:
        expected = opened.read_whole(9, 7).mean()
    wrong = []
    with Client(app, base_url="http://127.0.0.1") as client:
        keys = [one["key"] for one in client.get("/api/slides").json()]

        def look(seed: int) -> None:
            for key in random.Random(seed).sample(keys, 30):
                answer = client.get(f"/api/slides/{key}/zoom/4/0_0.jpg")
                mean = np.asarray(Image.open(io.BytesIO(answer.content))).mean()
                if answer.status_code != 200 or abs(mean - expected) > 5:
                    wrong.append((key, answer.status_code, mean))

        client.get(f"/api/slides/{keys[0]}")
        look(0)
        before = len(os.listdir("/proc/self/fd"))
        looking = [threading.Thread(target=look, args=(seed,)) for seed in range(8)]
        for thread in looking:
            thread.start()
        for thread in looking:
            thread.join()
        assert not wrong
        assert len(os.listdir("/proc/self/fd")) <= before + 4, "those that are idle were closed"
