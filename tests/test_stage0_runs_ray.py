"""Encoding on a Ray cluster of two machines, of which one is lost: what one plain process makes."""

import os
import shutil
import threading
import time
from collections import Counter

import pytest

from stage0_tiling import encode as stage0_encode
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide_work import encode_tiled
from tests import test_stage0_runs_encode as plain_runs
from tests.test_stage0_runs_encode import content, flags

SLOW_S = 0.1  # least time that encoding a slide takes

slides, encoder, plain = plain_runs.slides, plain_runs.encoder, plain_runs.plain
ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two machines, as far as Ray can tell, each with room for one encoder."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.second = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def encode(cluster, slides, folder, encoder, *more):
    num_actors = len(cluster.list_all_nodes())
    more = ("--engine", "ray", "--ray_address", cluster.address, "--ray_actors", num_actors, *more)
    return stage0_encode.main(flags(slides, folder, encoder, *more))


def watch(monkeypatch, log, wait_for):
    """Log which slide is encoded on which machine, wait for a machine to join in, and let a slide kill its process."""

    def watched(entry, folder, *args, **kwargs):
        import ray

        # as a file server may answer a machine that asked for the state of this slide before there was one
        folder.read_state = lambda slide_id: None

        with open(log, "a") as file:
            print(entry.slide_id, here := ray.get_runtime_context().get_node_id(), file=file)
        deadline = time.monotonic() + 60
        while (wait_for not in log.read_text() or here == wait_for) and time.monotonic() < deadline:
            time.sleep(0.02)
        if entry.slide_id == "slide_deadly":
            os.kill(os.getpid(), 9)
        time.sleep(SLOW_S)
        return encode_tiled(entry, folder, *args, **kwargs)

    log.touch()
    monkeypatch.setattr(stage0_encode, "encode_tiled", watched)


def test_a_lost_machine_and_a_deadly_slide_cost_no_other(
    cluster, slides, encoder, plain, tmp_path, monkeypatch, caplog
):
    log, own, out = tmp_path / "log", tmp_path / "slides", tmp_path / "out"
    own.mkdir()
    for slide in slides.iterdir():
        (own / slide.name).symlink_to(slide)
    shutil.copy(slides / "slide_0.tiff", own / "slide_deadly.tiff")
    watch(monkeypatch, log, wait_for=cluster.second.node_id)

    def lose():
        while not finished.is_set():
            if cluster.second.node_id in log.read_text():
                cluster.remove_node(cluster.second, allow_graceful=False)
                return
            time.sleep(0.02)

    finished = threading.Event()
    losing = threading.Thread(target=lose)
    losing.start()
    try:
        assert encode(cluster, own, out, encoder) == 1
    finally:
        finished.set()
        losing.join()
    assert "6 done, 0 empty, 1 failed" in caplog.text
    assert "failed: slide_deadly: the process that worked on it died 2 times" in caplog.text
    lines = [line.split() for line in log.read_text().splitlines()]
    lost = [name for name, node in lines if node == cluster.second.node_id]
    assert len(lost) == 1, "the machine was lost at its first slide"
    assert Counter(name for name, _ in lines) == Counter([*(p.stem for p in own.iterdir()), "slide_deadly", *lost])
    assert content(out)[0] == content(plain)[0]
    assert not list((out / "claims").iterdir())
    rows = [RunFolder(out).read_state(path.stem).row for path in slides.iterdir()]
    assert min(row.seconds for row in rows) > SLOW_S, "of the work, not of waiting for it"


def test_an_encoder_that_differs_elsewhere_is_refused(cluster, slides, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("encoders.ImageEncoder.fingerprint", lambda self: "other")
    with pytest.raises(ValueError, match="no process of the Ray cluster could load the encoder"):
        encode(cluster, slides, tmp_path / "out", encoder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--local_cache", "x"), "--local_cache is not for --engine ray"),
        (("--ray_actors", -1), "--ray_actors -1: expected 0 or more"),
    ],
)
def test_flags_that_do_not_go_with_ray_are_refused(slides, encoder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        stage0_encode.main(flags(slides, tmp_path / "out", encoder, "--engine", "ray", *more))


def test_without_ray_the_message_says_how_to_install_it(slides, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[ray\]'"):
        stage0_encode.main(flags(slides, tmp_path / "out", encoder, "--engine", "ray"))


def test_an_address_without_a_cluster_is_refused_at_once(slides, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray would try for many minutes"))
    more = ("--engine", "ray", "--ray_address", "127.0.0.1:1")
    with pytest.raises(ValueError, match=r"--ray_address 127\.0\.0\.1:1: no Ray cluster answers there"):
        stage0_encode.main(flags(slides, tmp_path, encoder, *more))
