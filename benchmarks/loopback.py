"""Bytes through the loopback interface by the plainest ways: a socket, and HTTP."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Blobs(BaseHTTPRequestHandler):
    """Bytes by name."""

    kept: dict[str, bytes] = {}
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.kept[self.path])

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def serve(port: int) -> None:
    """Keep bytes over HTTP, and take in whatever comes at the next port."""
    sink = socket.create_server(("127.0.0.1", port + 1))
    threading.Thread(target=_swallow, args=(sink,), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", port), Blobs).serve_forever()


def _swallow(sink: socket.socket) -> None:
    while True:
        one, _ = sink.accept()
        with one:
            while one.recv(1 << 20):
                pass
            one.sendall(b"!")


def by_socket(port: int, total: int) -> float:
    """Return the seconds that so many bytes take through one socket."""
    content = bytes(total)
    with socket.create_connection(("127.0.0.1", port + 1)) as one:
        began = time.perf_counter()
        one.sendall(content)
        one.shutdown(socket.SHUT_WR)
        one.recv(1)
        return time.perf_counter() - began


def by_http(port: int, size: int, sites: int) -> float:
    """Return the seconds of a round's way over HTTP: one up, all sites down and up at a time, all down again."""
    content = os.urandom(size)
    began = time.perf_counter()
    _http(port, "round", content)
    threads = [threading.Thread(target=lambda k=k: _http(port, f"{k}", _http(port, "round"))) for k in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(sites):
        _http(port, f"{k}")
    return time.perf_counter() - began


def _http(port: int, name: str, content: bytes | None = None) -> bytes:
    method = "GET" if content is None else "PUT"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", content, method=method)
    with urllib.request.urlopen(request) as response:
        return response.read()
