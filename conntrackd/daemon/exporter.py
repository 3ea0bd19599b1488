"""The endpoint for Prometheus: `GET /metrics` over HTTP/1.1, one request per connection, in the loop of the packets.

In the loop and not in a thread: a thread that writes text asks for the interpreter after every system call of the
loop, and the loop waits each time until it lets go. Here the text is made in slices, half a millisecond each and one at
most, between the packets of two turns: 10,000 rules and 100,000 connections are a thousand slices.

No scraper can hold the packets up or fill the memory: all who ask within a second get the same text, making it takes a
fifth of the time at most, a request has a size, clients a number, and each a few seconds from first byte to last.
"""

import selectors
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import structlog

CLIENTS_MAX: Final = 8
BACKLOG: Final = 16
REQUEST_MAX: Final = 8192
SEND_MAX: Final = 1 << 16  # in one turn
PATIENCE_MS: Final = 10_000
FRESH_MS: Final = 1_000
REST: Final = 4  # a text that took so long is good for this many times as long
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

log = structlog.get_logger()


class ExporterError(Exception):
    """The endpoint can't be opened; the text is one sentence for the operator."""


class _Client:
    def __init__(self, connection: socket.socket, now_ms: int) -> None:
        self.connection = connection
        self.since_ms = now_ms
        self.input = bytearray()
        self.asked = False  # its request is complete
        self.output = memoryview(b"")  # what is left to send; empty until the text is there


class Exporter:
    """The listening socket and its clients; `make` yields the text in pieces, some of them empty."""

    def __init__(
        self, endpoint: tuple[str, int], selector: selectors.BaseSelector, make: Callable[[], Iterator[bytes]]
    ) -> None:
        self.now_ms = 0  # set by the loop whenever it wakes
        self._selector = selector
        self._make = make
        self._clients: list[_Client] = []
        self._text = memoryview(b"")  # the whole response, shared by all who ask
        self._fresh_ms = -1  # until when the text is good
        self._pieces: Iterator[bytes] | None = None  # of the text that is being made
        self._made: list[bytes] = []
        self._begun_ms = 0
        self._listener = _listen(endpoint)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it left again, or we are out of descriptors: it may come again
        connection.setblocking(False)
        if len(self._clients) >= CLIENTS_MAX:
            # Who has asked is served; of those that have not, the one that has been silent longest goes.
            silent = [client for client in self._clients if not client.asked]
            if not silent:
                connection.close()
                return
            self._close(silent[0])
        client = _Client(connection, self.now_ms)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, client))

    def _serve(self, client: _Client, _events: int) -> None:
        """Do what can be done for a client now; errors on its side end it and nothing else."""
        try:
            if client.asked:
                self._write(client)
            else:
                self._read(client)
        except BlockingIOError:
            pass  # not ready after all
        except OSError:
            self._close(client)
        except Exception:
            log.exception("metrics_failed")
            self._pieces = None
            self._close(client)

    def _read(self, client: _Client) -> None:
        data = client.connection.recv(REQUEST_MAX)
        if not data:
            self._close(client)
            return
        client.input += data
        head, end, _ = client.input.partition(b"\r\n\r\n")
        if not end and len(client.input) < REQUEST_MAX:
            return
        words = bytes(head).split(b"\r\n")[0].split(b" ")
        if not end or len(words) != 3:
            client.output = _response("400 Bad Request", b"This is no request of HTTP, or a very long one.\n")
        elif words[0] != b"GET":
            client.output = _response("405 Method Not Allowed", b"Only GET is answered.\n")
        elif words[1].partition(b"?")[0] != b"/metrics":
            client.output = _response("404 Not Found", b"The metrics are at /metrics.\n")
        client.input.clear()
        client.asked = True
        self._selector.modify(client.connection, selectors.EVENT_WRITE, partial(self._serve, client))

    def _write(self, client: _Client) -> None:
        if not client.output:
            if not self._go_on(client):
                return
            client.output = self._text
        sent = client.connection.send(client.output[:SEND_MAX])
        client.output = client.output[sent:]
        if not client.output:
            self._close(client)

    def _go_on(self, client: _Client) -> bool:
        """Make a slice of the text, once in a turn of the loop; say whether there is one that is fresh."""
        if self.now_ms < self._fresh_ms:
            return True
        if client is not next(each for each in self._clients if each.asked and not each.output):
            return False  # another one's turn
        if self._pieces is None:
            self._pieces, self._made, self._begun_ms = self._make(), [], self.now_ms
        piece = next(self._pieces, None)
        if piece is not None:
            self._made.append(piece)
            return False
        self._text = _response("200 OK", b"".join(self._made), CONTENT_TYPE)
        self._pieces = None
        self._made.clear()
        self._fresh_ms = self.now_ms + max(FRESH_MS, (self.now_ms - self._begun_ms) * REST)
        return True

    def _close(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()
        if not any(each.asked and not each.output for each in self._clients):
            self._pieces = None  # nobody waits for it, and the next who asks wants no old one

    def tick(self) -> None:
        """Close the clients that hang; to be called about once a second."""
        for client in list(self._clients):
            if self.now_ms - client.since_ms > PATIENCE_MS:
                self._close(client)

    def close(self) -> None:
        """End all clients, and stop listening."""
        for client in list(self._clients):
            self._close(client)
        self._selector.unregister(self._listener)
        self._listener.close()


def _response(status: str, body: bytes, kind: str = "text/plain") -> memoryview:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return memoryview(head.encode() + body)


def _listen(endpoint: tuple[str, int]) -> socket.socket:
    address, port = endpoint
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(endpoint)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ExporterError(f"[metrics] can't listen on {address} port {port}: {error.strerror or error}.") from error
    return listener
