"""The slides of a run on a Ray cluster: tiled by its CPUs, encoded by actors, one for each of its GPUs.

The process that starts the run claims the slides and records them, as it does without Ray. Where a worker or a whole
machine dies, its slides go to others; a slide whose worker died twice is recorded as failed.
"""

import importlib.util
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stage0_tiling.run_table import MAX_DEATHS, SlideState
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.slide_run import ProcessDied, SlideRun, Taken

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

CPUS_PER_ACTOR = 2  # on a cluster without GPUs
AHEAD = 2  # slides in work or tiled, beside those that are encoded
PATIENCE_S = 60.0
CONNECT_S = 10.0  # for a cluster to accept a connection
RESTART_S = 1.0

logger = logging.getLogger("stage0_tiling")


def check_ray(local_cache: str | None, num_actors: int) -> None:
    """Refuse what does not go with Ray, before work.

    Raises:
        ValueError: if Ray is not installed, or flags contradict it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--engine ray needs Ray: pip install -e '.[ray]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--engine ray starts its own processes: run it with python, or accelerate with one process")
    if local_cache is not None:
        raise ValueError("--local_cache is not for --engine ray, whose machines read slides where they lie")
    if num_actors < 0:
        raise ValueError(f"--ray_actors {num_actors}: expected 0 or more")


def encode_on_ray(
    run: SlideRun,
    tile: Callable[[SlideEntry], SlideState | None],
    encode: Callable[..., SlideState],
    encoders: list[str],
    loading: dict[str, Any],
    made_by: dict[str, dict[str, Any]],
    address: str | None,
    num_actors: int,
) -> None:
    """Do all slides of a run that no other process does, on a Ray cluster.

    Args:
        run: of which this process holds the claims.
        tile: first part of a slide's work, as `SlideRun.do` takes it; all arguments must be picklable.
        encode: second part, which is given `encoders` too.
        encoders: names or folders, which every machine must be able to load.
        loading: further arguments of `load_tile_encoders`.
        made_by: what makes the features, by the folder that they go to; fingerprints must be the same everywhere.
        address: of a running cluster; None takes that of RAY_ADDRESS, else one of this machine, else starts one.
        num_actors: processes with an encoder; 0 means one per GPU, or one per two CPUs where there is no GPU.

    Raises:
        ValueError: if there is no cluster at the address, or no process could load the encoder.
    """
    if not run.missing:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _check_reachable(address or os.environ.get("RAY_ADDRESS"))
    try:
        logging.getLogger("ray").setLevel(logging.WARNING)
        ray.init(address, include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--ray_address {address}: {str(error).splitlines()[0]}") from error
    try:
        resources = ray.cluster_resources()
        num_gpus = int(resources.get("GPU", 0))
        num_actors = num_actors or num_gpus or max(1, int(resources.get("CPU", 1)) // CPUS_PER_ACTOR)
        # encoders on CPUs reserve these and tiling none: when machines are lost, one must not keep the other waiting
        on_gpus, on_cpus = {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1}
        start = ray.remote(max_restarts=-1, scheduling_strategy="SPREAD", **(on_gpus if num_gpus else on_cpus))
        actors = [start(EncoderActor).remote(encoders, loading, made_by, encode) for _ in range(num_actors)]
        with run.working():
            cluster = _Cluster(run, tile, actors, tiling_cpus=1 if num_gpus else 0)
            cluster.work(run.take(), num_ahead=num_actors + AHEAD)
            while cluster.work(run.take(after_deaths=True), num_ahead=1):
                pass
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Refuse an address at which nothing listens: Ray itself tries again and again for many minutes."""
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not (host and port.isdecimal()):
        return  # auto, local, ray://host:port, or nothing: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ray_address {address}: no Ray cluster answers there ({error})") from error


class EncoderActor:
    """A process of the cluster that holds the encoders."""

    def __init__(
        self,
        encoders: list[str],
        loading: dict[str, Any],
        made_by: dict[str, dict[str, Any]],
        encode: Callable[..., SlideState],
    ):
        """Load the encoders, onto the GPU that Ray gives to this process, if it gives one."""
        import torch

        from stage0_tiling.tile_encoder import load_tile_encoders

        loaded = load_tile_encoders(encoders, torch.device("cuda" if torch.cuda.is_available() else "cpu"), **loading)
        for name, encoder in loaded.items():
            if encoder.fingerprint != made_by[name]["fingerprint"]:
                where = os.uname().nodename
                raise ValueError(f"{encoder.name} has other weights on {where} than where the run was started")
        self._encode = partial(encode, encoders=loaded)

    def wake(self) -> None:
        """Return when the encoder is loaded."""

    def encode(self, entry: SlideEntry, state: SlideState | None) -> SlideState:
        """Encode a tiled slide and return what to record; `state` is what tiling it has just given, if it was tiled.

        A file server may tell this machine for a minute yet that the slide has no state.
        """
        return _timed(partial(self._encode, entry, state=state))


class _Cluster:
    """What is in work where. An actor has one slide at a time, so that its death is that slide's alone."""

    def __init__(self, run: SlideRun, tile: Callable, actors: list["ActorHandle"], tiling_cpus: int):
        import ray

        self._run = run
        remote = ray.remote(num_cpus=tiling_cpus, max_retries=MAX_DEATHS - 1, scheduling_strategy="SPREAD")
        self._tile = remote(lambda entry: _timed(partial(tile, entry))).remote
        self._idle: list[ActorHandle] = []
        self._waking: dict[ObjectRef, ActorHandle] = {actor.wake.remote(): actor for actor in actors}
        self._tiling: dict[ObjectRef, Taken] = {}
        self._tiled: deque[tuple[Taken, SlideState | None]] = deque()
        self._encoding: dict[ObjectRef, tuple[Taken, SlideState | None, ActorHandle]] = {}
        self._deaths: dict[str, int] = {}

    def work(self, slides: Iterator[Taken], num_ahead: int) -> int:
        """Do slides, at most `num_ahead` of them in work at a time, and count them."""
        import ray

        num_taken, are_left = 0, True
        while True:
            while are_left and len(self._tiling) + len(self._tiled) + len(self._encoding) < num_ahead:
                taken = next(slides, None)
                are_left = taken is not None
                if taken:
                    num_taken += 1
                    self._tiling[self._tile(taken.source)] = taken
            while self._tiled and self._idle:
                (taken, state), actor = self._tiled.popleft(), self._idle.pop()
                self._encoding[actor.encode.remote(taken.source, state)] = taken, state, actor
            if not (self._tiling or self._tiled or self._encoding):
                return num_taken
            ready, _ = ray.wait([*self._tiling, *self._encoding, *self._waking], timeout=PATIENCE_S)
            for ref in ready:
                self._heed(ref)
            if not ready and not self._idle and not self._encoding:
                logger.warning("waiting for a machine with room for the encoder to join the Ray cluster")

    def _heed(self, ref: "ObjectRef") -> None:
        if ref in self._waking:
            self._heed_woken(ref, self._waking.pop(ref))
        elif ref in self._tiling:
            tiled = partial(_result, ref, deaths=MAX_DEATHS)
            if taken := self._run.step(self._tiling.pop(ref), tiled, is_last=False):
                self._tiled.append((taken, tiled()))
        else:
            self._heed_encoded(ref, *self._encoding.pop(ref))

    def _heed_woken(self, ref: "ObjectRef", actor: "ActorHandle") -> None:
        from ray.exceptions import ActorUnavailableError, RayError

        try:
            _result(ref, deaths=1)
            self._idle.append(actor)
        except ProcessDied as died:
            if isinstance(died.__cause__, ActorUnavailableError):  # it is being started again
                time.sleep(RESTART_S)
                self._waking[actor.wake.remote()] = actor
                return
            cause = getattr(died.__cause__, "cause", None) or died.__cause__
            logger.error("an encoder of the Ray cluster is lost: %s", str(cause).strip().splitlines()[-1])
            if not (self._idle or self._encoding or self._waking):
                raise ValueError("no process of the Ray cluster could load the encoder") from died
        except RayError as error:
            raise ValueError(f"the Ray cluster cannot run the encoder: {error}") from error

    def _heed_encoded(self, ref: "ObjectRef", taken: Taken, tiled: SlideState | None, actor: "ActorHandle") -> None:
        deaths = self._deaths.get(taken.entry.slide_id, 0) + 1
        try:
            state = _result(ref, deaths=deaths)
        except ProcessDied as died:
            self._waking[actor.wake.remote()] = actor
            if deaths >= MAX_DEATHS:
                self._run.fail(taken, died)
                return
            self._deaths[taken.entry.slide_id] = deaths
            self._tiled.appendleft((taken, tiled))
            logger.warning("%s: the process that worked on it died; it is tried again", taken.entry.slide_id)
        except Exception as error:
            self._idle.append(actor)
            self._run.fail(taken, error)
        else:
            self._idle.append(actor)
            self._run.progress.tiles(state.row.n_tiles or 0)
            self._run.step(taken, lambda: state, is_last=True)


def _timed(work: Callable[[], SlideState | None]) -> SlideState | None:
    """Do a part of a slide's work and add its seconds: the process that records it has only waited."""
    started = time.perf_counter()
    state = work()
    if state is None:
        return None
    seconds = (state.row.seconds or 0.0) + time.perf_counter() - started
    return replace(state, row=replace(state.row, seconds=seconds))


def _result(ref: "ObjectRef", deaths: int) -> Any:
    """What a task or actor returned; what it raised is raised, and ProcessDied where its process is gone."""
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from None
    except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise ProcessDied(deaths) from error
