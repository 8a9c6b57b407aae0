"""A real FTP server in a thread, that can be told to misbehave, and that notes what was asked of it."""

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import DTPHandler, FTPHandler
from pyftpdlib.servers import FTPServer

logging.getLogger("pyftpdlib").setLevel(logging.CRITICAL)
USER, PASSWORD = "reader", "s3cret-word"


class FlakyServer:
    """An FTP server of a folder.

    drop_after: bytes after which a download of a file breaks off, by path; one entry is used up by each download
    refused: paths that cannot be downloaded
    listed: extra lines of a folder's listing, for names that no file can have
    without: commands that the server does not know
    asked: (path, offset) of every download, in order
    """

    def __init__(self, folder: Path, *, without: tuple[str, ...] = (), anonymous: bool = True) -> None:
        self.drop_after: dict[str, list[int]] = {}
        self.refused: set[str] = set()
        self.listed: list[str] = []
        self.asked: list[tuple[str, int]] = []
        self.num_bytes = 0
        self._alarm: tuple[int, Callable[[], None]] | None = None
        self._folder = folder
        authorizer = DummyAuthorizer()
        authorizer.add_user(USER, PASSWORD, str(folder), perm="elrd")
        if anonymous:
            authorizer.add_anonymous(str(folder))
        known = {name: value for name, value in FTPHandler.proto_cmds.items() if name not in without}
        members = {"authorizer": authorizer, "server_state": self, "proto_cmds": known, "use_sendfile": False}
        handler = type("Handler", (_Handler,), members | {"dtp_handler": _Data, "abstracted_fs": _Files})
        self._server = FTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.address[1]
        self.url = f"ftp://127.0.0.1:{self.port}"
        self.private_url = f"ftp://{USER}:{PASSWORD}@127.0.0.1:{self.port}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "FlakyServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._server.close_all()

    def call_after(self, num_bytes: int, alarm: Callable[[], None]) -> None:
        """Call `alarm` once, in the midst of a download, when `num_bytes` more bytes were sent."""
        self._alarm = (self.num_bytes + num_bytes, alarm)

    def count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self._alarm and self.num_bytes >= self._alarm[0]:
            _, alarm = self._alarm
            self._alarm = None
            alarm()

    def path_of(self, file: str) -> str:
        return Path(file).relative_to(self._folder).as_posix()

    def _serve(self) -> None:
        while not self._ended.is_set():
            self._server.ioloop.loop(timeout=0.02, blocking=False)


class _Data(DTPHandler):
    ac_out_buffer_size = 16384

    def __init__(self, sock: socket.socket, cmd_channel: FTPHandler) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        super().__init__(sock, cmd_channel)
        self._sent = 0

    def send(self, data: bytes) -> int:
        state = self.cmd_channel.server_state
        limit = getattr(self.cmd_channel, "drop_after", None)
        if limit is not None and self._sent >= limit:
            self.cmd_channel.close()  # both connections, as a server that dies
            raise ConnectionResetError
        sent = super().send(data)
        self._sent += sent
        state.count(sent)
        return sent


class _Files(AbstractedFS):
    def format_mlsx(self, basedir, listing, *args, **kwargs):
        yield from super().format_mlsx(basedir, listing, *args, **kwargs)
        for line in self.cmd_channel.server_state.listed:
            yield f"{line}\r\n".encode()


class _Handler(FTPHandler):
    auth_failed_timeout = 0

    def ftp_RETR(self, file: str) -> str | None:  # noqa: N802 (named by pyftpdlib)
        path = self.server_state.path_of(file)
        self.server_state.asked.append((path, self._restart_position))
        drops = self.server_state.drop_after.get(path)
        self.drop_after = drops.pop(0) if drops else None
        if path in self.server_state.refused:
            self.respond("550 Not for you.")
            return None
        return super().ftp_RETR(file)
