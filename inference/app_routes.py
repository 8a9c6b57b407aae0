"""What the page asks for over HTTP. Everything it shows of a slide comes from the slide's pyramid.

GET  /                                     the page, and its files below /page/
GET  /api/about                            model, limits of uploads
GET  /api/slides                           the folder; 304 where it is as it was
PUT  /api/uploads/<file name>              add a slide, its bytes as the body
GET  /api/slides/<key>                     size, um/px
GET  /api/slides/<key>/thumbnail.jpg
GET  /api/slides/<key>/zoom/<level>/<column>_<row>.jpg
GET  /api/slides/<key>/outline             tissue and tiles
POST /api/jobs                             {"slide": key, "version": text or null, "question": text or null}: a report
                                           or an answer
GET  /api/jobs/<id>                        how far it is; its result
DELETE /api/jobs/<id>                      give it up
GET  /api/jobs/<id>/files/<name>           report.txt, evidence.geojson, evidence.json, line_1.png, line_1_1.png

Pictures and outlines take ?v=<version of the slide>, and are refused with 409 where the file is another by now: so
nothing of one slide is shown as a part of another, whatever the browser keeps.
"""

import hashlib
import json
import logging
import re
import threading
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from inference.deep_zoom import TILE_PX, OpenSlides
from inference.job_queue import Job, JobQueue, QueueFull
from inference.report_writer import outline
from inference.slide_folder import UPLOAD_SUFFIXES, FolderSlide, NotAccepted, SlideFolder
from stage0_tiling.pixel_size import SlideError
from stage0_tiling.slide import Slide

PAGE = Path(__file__).parent / "page"
LONGEST_QUESTION = 2000  # characters
LONGEST_BODY = 64 * 1024  # bytes of what is asked as JSON; uploads have their own limit
OUTLINES_KEPT = 32
THUMBNAILS_KEPT = 1024  # of some 10 kB
THUMBNAILS_AT_ONCE = 2  # a long list of them leaves the slide in view its share
OUR_HEADER = "x-slidescribe"  # no form and no other site's script can send it without being allowed to
# The page loads nothing from elsewhere, and nobody may put it into a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """What the routes need of `inference.report_writer.ReportWriter`."""

    def write(self, job: Job, path: Path, question: str | None) -> dict[str, Any]: ...
    def plan(self, path: Path) -> Any: ...


class Asked(BaseModel):
    """The body of POST /api/jobs."""

    slide: str = Field(max_length=64)
    version: str | None = Field(default=None, max_length=64)
    question: str | None = Field(default=None, max_length=LONGEST_QUESTION)


def create_app(
    folder: SlideFolder,
    writer: Writer,
    about: dict[str, Any],
    allowed_hosts: set[str],
    assume_mpp: float | None = None,
) -> FastAPI:
    """The application: one folder, one writer, one line of jobs.

    Args:
        folder: of slides.
        writer: writes reports; only the thread of the jobs uses its model.
        about: what the page says of the model.
        allowed_hosts: names under which the page may be asked for, without port. Others are refused, or a site whose
            name points at this machine could read the slides through the user's browser.
        assume_mpp: um per level-0 pixel of slides that state none or a wrong one.
    """
    queue, opened = JobQueue(), OpenSlides()

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        queue.close()

    app = FastAPI(title="SlideScribe", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.queue = queue
    _guard(app, allowed_hosts)
    _add_slides(app, folder, opened, assume_mpp)
    _add_outlines(app, folder, writer)
    _add_jobs(app, folder, queue, writer)

    @app.get("/api/about")
    def say_about() -> dict[str, Any]:
        return {**about, "max_upload": folder.max_upload, "upload_suffixes": sorted(UPLOAD_SUFFIXES)}

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _guard(app: FastAPI, allowed_hosts: set[str]) -> None:
    """Refuse other hosts' names and other sites' requests; give every answer its headers; errors are one line."""

    @app.middleware("http")
    async def check(request: Request, go_on):
        refusal = _refusal(request, allowed_hosts)
        response = JSONResponse({"error": refusal[1]}, refusal[0]) if refusal else await go_on(request)
        response.headers.update({k: v for k, v in HEADERS.items() if k.lower() not in response.headers})
        return response

    @app.exception_handler(NotAccepted)
    async def not_accepted(_: Request, error: NotAccepted) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status, headers={"Connection": "close"})

    @app.exception_handler(SlideError)
    async def unreadable(_: Request, error: SlideError) -> JSONResponse:
        words = str(error).encode(errors="replace").decode()  # it names the file, which may be no UTF-8
        return JSONResponse({"error": words}, 422)

    @app.exception_handler(FileNotFoundError)
    async def taken_away(_: Request, error: FileNotFoundError) -> JSONResponse:  # between looking for it and opening it
        return JSONResponse({"error": "no such slide in the folder"}, 404)

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"error": "the request holds no JSON"}, 422)
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:  # an upload broke off; nobody reads this
        return JSONResponse({"error": "the connection broke off"}, 400)

    @app.exception_handler(AnyHTTPException)  # of routes that are not there, too
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)


def _refusal(request: Request, allowed_hosts: set[str]) -> tuple[int, str] | None:
    host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
    if host not in allowed_hosts:
        return 421, "this page is served to this machine only; start it with --allowed_hosts to use another name"
    if request.method in ("GET", "HEAD"):
        return None
    origin = request.headers.get("origin")
    is_ours = origin is None or _host_of(origin) in allowed_hosts
    if OUR_HEADER not in request.headers or not is_ours:
        return 403, "only the page itself may ask for this"
    if request.url.path.startswith("/api/uploads/"):
        return None
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not length.isdecimal() or int(length[:20]) > LONGEST_BODY:
        return 413, f"more than the {LONGEST_BODY // 1024} kB that a request may have"
    return None


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:  # "http://[": no address at all
        return None


def _add_slides(app: FastAPI, folder: SlideFolder, opened: OpenSlides, assume_mpp: float | None) -> None:
    thumbnails_at_once = threading.BoundedSemaphore(THUMBNAILS_AT_ONCE)

    @lru_cache(THUMBNAILS_KEPT)
    def thumbnail_of(path: Path, _version: str) -> bytes:
        with opened.borrow(path) as zoomed:
            return zoomed.thumbnail()

    @app.get("/api/slides")
    def slides(request: Request) -> Response:
        content = _json([_shown(slide) for slide in folder.list()])
        mark = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"ETag": mark, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="application/json", headers=headers)

    @app.put("/api/uploads/{name}", status_code=201)
    async def upload(name: str, request: Request) -> dict[str, Any]:
        stated = request.headers.get("content-length", "")
        return _shown(await folder.receive(name, int(stated) if stated.isdecimal() else None, request.stream()))

    @app.get("/api/slides/{key}")
    def slide(key: str) -> dict[str, Any]:
        found = _find(folder, key)
        with opened.borrow(found.path) as zoomed:
            return _shown(found) | {
                "width": zoomed.slide.width,
                "height": zoomed.slide.height,
                "objective": zoomed.slide.objective,
                "max_level": zoomed.max_level,
                "tile_px": TILE_PX,
                **_pixel_size(zoomed.slide, assume_mpp),
            }

    @app.get("/api/slides/{key}/thumbnail.jpg")
    def thumbnail(key: str, v: str | None = None) -> Response:
        found = _find(folder, key, v)
        with thumbnails_at_once:
            return _picture(thumbnail_of(found.path, found.version), is_lasting=bool(v))

    @app.get("/api/slides/{key}/zoom/{level}/{column}_{row}.jpg")
    def tile(key: str, level: int, column: int, row: int, v: str | None = None) -> Response:
        with opened.borrow(_find(folder, key, v).path) as zoomed:
            try:
                return _picture(zoomed.tile(level, column, row), is_lasting=bool(v))
            except SlideError:
                raise
            except ValueError as error:
                raise HTTPException(404, "no such part of the slide") from error


def _pixel_size(slide: Slide, assume_mpp: float | None) -> dict[str, Any]:
    """um per level-0 pixel as a report would take it, where from, and what the slide states."""
    stated = slide.stated_pixel_size()
    try:
        used = slide.pixel_size(assume_mpp)
    except SlideError:  # nothing that could be believed: its report will say so
        used = None
    return {
        "mpp": used.mpp if used else None,
        "mpp_source": used.source if used else None,
        "stated_mpp": stated.mpp if stated else None,
    }


def _add_outlines(app: FastAPI, folder: SlideFolder, writer: Writer) -> None:
    one_at_a_time = threading.Lock()  # each reads a whole thumbnail

    @lru_cache(OUTLINES_KEPT)
    def outline_of(path: Path, _version: str) -> bytes:  # a tenth of the memory of its lists of numbers
        return _json(outline(writer.plan(path)))

    @app.get("/api/slides/{key}/outline")
    def tissue_and_tiles(key: str, v: str | None = None) -> Response:
        found = _find(folder, key, v)
        with one_at_a_time:
            return Response(outline_of(found.path, found.version), media_type="application/json")


def _add_jobs(app: FastAPI, folder: SlideFolder, queue: JobQueue, writer: Writer) -> None:
    @app.post("/api/jobs", status_code=202)
    def ask(asked: Asked) -> dict[str, Any]:
        slide = _find(folder, asked.slide, asked.version)
        if not slide.has_readable_name:
            raise HTTPException(422, "the file name of this slide is no UTF-8; rename it")
        question = (asked.question or "").strip() or None
        try:
            return _state(queue, queue.submit(lambda job: writer.write(job, slide.path, question)))
        except QueueFull as error:
            raise HTTPException(503, str(error)) from error

    @app.get("/api/jobs/{job_id}")
    def look(job_id: str) -> dict[str, Any]:
        return _state(queue, _find_job(queue, job_id))

    @app.delete("/api/jobs/{job_id}")
    def give_up(job_id: str) -> dict[str, Any]:
        job = _find_job(queue, job_id)
        queue.cancel(job)
        return _state(queue, job)

    @app.get("/api/jobs/{job_id}/files/{name}")
    def file(job_id: str, name: str) -> FileResponse:
        job = _find_job(queue, job_id)
        path = _result_files(job).get(name)
        if path is None or not path.is_file():
            raise HTTPException(404, "no such file")
        return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})


def _result_files(job: Job) -> dict[str, Path]:
    """Files of a finished job by the name that they are asked for by; a request names no path."""
    if job.state != "done":
        return {}
    files = {"report.txt": job.folder / "report.txt"}
    if "no_evidence" in job.result:
        return files
    slide = job.folder / "evidence" / job.result["slides"][0]["slide_id"]
    files["evidence.json"] = job.folder / "evidence" / "evidence.json"
    files["evidence.geojson"] = slide / "evidence.geojson"
    for line in job.result["lines"]:
        files[f"{line['name']}.png"] = slide / f"{line['name']}.png"
        for tile in line["top_tiles"]:
            name = f"{line['name']}_{tile['rank']}.png"
            files[name] = slide / "tiles" / name
    return files


def _state(queue: JobQueue, job: Job) -> dict[str, Any]:
    state = {name: getattr(job, name) for name in ("id", "state", "step", "done", "total", "error")}
    state["before"] = queue.position(job)
    return state | ({"result": job.result} if job.state == "done" else {})


def _shown(slide: FolderSlide) -> dict[str, Any]:
    return {"key": slide.key, "name": slide.name, "num_bytes": slide.num_bytes, "version": slide.version}


def _find(folder: SlideFolder, key: str, version: str | None = None) -> FolderSlide:
    try:
        found = folder.find(key)
    except KeyError as error:
        raise HTTPException(404, "no such slide in the folder") from error
    if version is not None and version != found.version:
        raise HTTPException(409, "another file has taken this slide's place; open it again")
    return found


def _find_job(queue: JobQueue, job_id: str) -> Job:
    try:
        return queue.find(job_id)
    except KeyError as error:
        raise HTTPException(404, "this report is gone; write it again") from error


def _picture(jpeg: bytes, *, is_lasting: bool) -> Response:
    """A picture that the browser may keep where its address names the version of the slide."""
    keep = "private, max-age=3600" if is_lasting else "no-store"
    return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": keep})


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
