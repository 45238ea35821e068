"""Real servers on loopback that misbehave on request: HTTP of our own, S3 by moto, a proxy that cuts connections."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE = 1 << 14  # bytes sent at a time


@dataclass
class HttpFiles:
    """A server of files in memory. Its `fault` sees every GET and says what goes wrong with it."""

    files: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[Get], None] = lambda get: None
    has_ranges: bool = True
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (method, name)
    starts: list[int] = field(default_factory=list)  # first byte asked for by each GET
    headers: list[dict[str, str]] = field(default_factory=list)
    num_bytes_sent: int = 0
    url: str = ""


@dataclass
class Get:
    """One GET; what a fault may change about the answer."""

    name: str
    number: int  # of this file's GETs: 1, 2, ...
    start: int  # first byte asked for
    body: bytes
    status: int = 200
    length: int = 0  # that the header claims
    cut_at: int | None = None  # bytes of the body after which the connection breaks
    stall_at: int | None = None  # ... after which nothing comes any more
    delay: float = 0.0  # seconds between two pieces


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that come at once


@contextmanager
def serve_http(files: dict[str, bytes] | None = None) -> Iterator[HttpFiles]:
    """Run an `HttpFiles` server."""
    state = HttpFiles(dict(files or {}))
    ended = threading.Event()
    server = _Server(("127.0.0.1", 0), _handler(state, ended))
    state.url = f"http://127.0.0.1:{server.server_port}/data"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(state: HttpFiles, ended: threading.Event) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._count()
            content = state.files.get(self._name())
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            number = self._count()
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            state.starts.append(start)
            content = state.files.get(self._name())
            if content is None:
                get = Get(self._name(), number, start, b"", status=404)
            elif asked and state.has_ranges:
                get = Get(self._name(), number, start, content[start:], status=206 if start < len(content) else 416)
            else:
                get = Get(self._name(), number, start, content)
            get.length = len(get.body)
            state.fault(get)
            self._send(get)

        def _send(self, get: Get) -> None:
            self.send_response(get.status)
            self.send_header("Content-Length", str(get.length))
            self.end_headers()
            stop = min(get.length, len(get.body))
            for first in range(0, stop, PIECE):
                last = min(first + PIECE, stop)
                for limit in (get.cut_at, get.stall_at):
                    last = last if limit is None else min(last, limit)
                with suppress(OSError):  # the client may be gone
                    self.wfile.write(get.body[first:last])
                    with lock:
                        state.num_bytes_sent += max(0, last - first)
                if get.stall_at is not None and last == get.stall_at:
                    ended.wait()
                if last == get.cut_at or last == get.stall_at:
                    break
                time.sleep(get.delay)
            if get.cut_at is not None or len(get.body) < get.length:
                self.close_connection = True

        def _name(self) -> str:
            return self.path.rpartition("/")[2]

        def _count(self) -> int:
            with lock:
                state.requests[self.command, self._name()] += 1
                state.headers.append(dict(self.headers))
                return state.requests[self.command, self._name()]

    return Handler


@contextmanager
def serve_s3() -> Iterator[str]:
    """Run moto's S3; gives its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@dataclass
class Proxy:
    """Passes TCP on to a server; of answers longer than `min_bytes`, the first `num_faults` go wrong."""

    url: str
    fault: str = "cut"  # the connection breaks; or "stall": it stays open and silent
    num_faults: int = 0
    after_bytes: int = 0  # of an answer
    num_done: int = 0


@contextmanager
def proxy_to(url: str) -> Iterator[Proxy]:
    """Run a `Proxy` in front of a server."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    lock = threading.Lock()
    ended = threading.Event()

    def accept() -> None:
        with suppress(OSError):  # closed: the end
            while True:
                client = listener.accept()[0]
                server = socket.create_connection((host, int(port)))
                threading.Thread(target=forward, args=(client, server), daemon=True).start()
                threading.Thread(target=answer, args=(server, client), daemon=True).start()

    def forward(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(PIECE):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def answer(server: socket.socket, client: socket.socket) -> None:
        num_bytes = 0  # of this connection
        with suppress(OSError), server, client:
            while data := server.recv(PIECE):
                num_bytes += len(data)
                if num_bytes > proxy.after_bytes > 0:
                    with lock:
                        goes_wrong = proxy.num_done < proxy.num_faults
                        proxy.num_done += goes_wrong
                    if goes_wrong and proxy.fault == "stall":
                        ended.wait()
                    if goes_wrong:
                        client.shutdown(socket.SHUT_RDWR)
                        return
                client.sendall(data)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
