"""A stand-in for the Hugging Face hub: one data set, spoken to by the real client over HTTP. It can misbehave."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "org/slides"
LFS_FROM_BYTES = 30_000  # the hub's own limit is 10 MB


class HubServer:
    """The hub in a thread.

    files: content by path in the data set
    commits: the paths that each commit added
    uploads: SHA-256 of every file that was sent to the large file storage, in order
    mischief: what happens to the next commits: "refuse" (status 500) or "hang up" (committed, without an answer)
    poison: paths whose commits are always refused
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.uploads: list[str] = []
        self.storage: dict[str, bytes] = {}
        self.mischief: list[str] = []
        self.poison: set[str] = set()
        self.on_upload: Callable[[int], None] = lambda number: None
        self.on_commit: Callable[[int], None] = lambda number: None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def describe(self, path: str) -> dict:
        content = self.files[path]
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if len(content) >= LFS_FROM_BYTES:
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entry["oid"] = git_sha1(sha256.encode())
        return entry


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/datasets/{REPO}/tree/main"):
            self._answer([self.hub.describe(name) for name in sorted(self.hub.files)])
        elif path.startswith(f"/datasets/{REPO}/resolve/main/"):
            self._send_file(path.partition("/resolve/main/")[2])
        elif re.fullmatch(f"/api/datasets/{REPO}(/revision/main)?", path):
            self._answer({"id": REPO, "sha": "0" * 40, "siblings": []})
        else:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_PUT(self) -> None:  # noqa: N802
        content = self._body()
        oid = self.path.rpartition("/")[2]
        with self.hub.lock:
            assert hashlib.sha256(content).hexdigest() == oid
            self.hub.storage[oid] = content
            self.hub.uploads.append(oid)
            number = len(self.hub.uploads)
        self.hub.on_upload(number)
        self._answer({})

    def do_POST(self) -> None:  # noqa: N802
        body, path = self._body(), urlsplit(self.path).path
        if path == f"/api/datasets/{REPO}/preupload/main":
            files = json.loads(body)["files"]
            kinds = {each["path"]: "lfs" if each["size"] >= LFS_FROM_BYTES else "regular" for each in files}
            self._answer({"files": [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds.items()]})
        elif path == f"/api/datasets/{REPO}/paths-info/main":
            wanted = parse_qs(body.decode())["paths"]
            self._answer([self.hub.describe(each) for each in wanted if each in self.hub.files])
        elif path == f"/datasets/{REPO}.git/info/lfs/objects/batch":
            self._answer({"transfer": "basic", "objects": [self._lfs(each) for each in json.loads(body)["objects"]]})
        elif path == f"/api/datasets/{REPO}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"no {path}"}, 404)

    def _lfs(self, item: dict) -> dict:
        if item["oid"] in self.hub.storage:
            return item
        return item | {"actions": {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}"}}}

    def _commit(self, lines: list[dict]) -> None:
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.storage[value["oid"]]
        mischief = self.hub.mischief.pop(0) if self.hub.mischief else None
        if mischief == "refuse" or self.hub.poison & set(added):
            self._answer({"error": "the hub is tired"}, 500)
            return
        with self.hub.lock:
            self.hub.files.update(added)
            self.hub.commits.append(sorted(added))
        self.hub.on_commit(len(self.hub.commits))
        if mischief == "hang up":
            self.close_connection = True
            return
        self._answer({"commitUrl": f"{self.hub.url}/datasets/{REPO}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _send_file(self, name: str) -> None:
        content, status, headers = self.hub.files[name], 200, {"ETag": f'"{git_sha1(self.hub.files[name])}"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._reply(content, status, headers)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            blocks = []
            while size := int(self.rfile.readline(), 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(blocks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _reply(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
