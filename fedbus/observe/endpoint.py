"""A few read-only pages over HTTP, served from threads of their own: they answer whatever the event loop does."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self, TypeAlias
from urllib.parse import urlsplit

from fedbus.errors import ConfigError

_MOST_AT_ONCE: Final = 16
_PATIENCE_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a request is answered with."""

    status: int
    content_type: str
    body: bytes


Pages: TypeAlias = Mapping[str, Callable[[], Page]]
"""Path to what makes the page, called in the thread of the request."""


def parse_address(text: str) -> tuple[str, int]:
    """The host and port that "[HOST:]PORT" names; the host is 127.0.0.1 where it is left out.

    An IPv6 host stands in brackets; port 0 takes a free one. Raises `ConfigError`.
    """
    host, colon, port = text.rpartition(":")
    if not colon:
        host = "127.0.0.1"
    is_bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if is_bracketed else host
    if not host or (":" in host) != is_bracketed or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(
            f"an address to serve metrics at looks like 9100, 0.0.0.0:9100 or [::]:9100, not like {text[:80]!r}"
        )
    return host, int(port)


class Endpoint:
    """Serves `pages` at `address` ("[HOST:]PORT") for the time of the context.

    Raises `ConfigError` where the address cannot be had.
    """

    def __init__(self, address: str, pages: Pages) -> None:
        host, port = parse_address(address)
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._server = _server_of(family, pages)(place[:2], _Handler)
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigError(
                f"metrics cannot be served at {address[:80]}: {reason}. Give --metrics another [HOST:]PORT"
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="fedbus-metrics", daemon=True
        )

    @property
    def url(self) -> str:
        """Where it is, without a path."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = False
    request_queue_size = 64
    pages: Pages

    def __init__(self, *args: Any) -> None:
        self._room = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__(*args)

    def server_bind(self) -> None:
        """As any TCP server: HTTPServer would ask the name service for the name of the host."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more than there is room for is turned away: whoever keeps connections open gets no thread for each."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A time for the whole of it: whoever sends a byte now and then would keep a place for ever.
        deadline = threading.Timer(_PATIENCE_S, _hang_up, (request,))
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up before the answer is nobody's error, and a page that fails has been answered with 500."""


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended just now
        request.shutdown(socket.SHUT_RDWR)


def _server_of(family: int, pages: Pages) -> type[_Server]:
    return type("_ServerOfPages", (_Server,), {"address_family": family, "pages": pages})


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_S
    server_version = "fedbus"
    sys_version = ""

    def do_GET(self) -> None:
        make = self.server.pages.get(urlsplit(self.path).path)
        if make is None:
            known = " ".join(self.server.pages)
            self._answer(Page(status=404, content_type="text/plain", body=f"there is: {known}\n".encode()))
            return
        try:
            page = make()
        except Exception as exc:  # noqa: BLE001  # said to whoever asks; the process itself goes on
            page = Page(status=500, content_type="text/plain", body=f"{type(exc).__name__}: {exc}\n".encode())
        self._answer(page)

    do_HEAD = do_GET

    def _answer(self, page: Page) -> None:
        with contextlib.suppress(OSError):
            self.send_response(page.status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a scrape every few seconds is no news."""
