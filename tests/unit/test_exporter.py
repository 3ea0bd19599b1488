"""The endpoint for Prometheus by itself: what it answers, what it refuses, and that no client can hold it up."""

import selectors
import socket
from collections.abc import Iterator

import pytest

from conntrackd.daemon.exporter import CLIENTS_MAX, PATIENCE_MS, Exporter, ExporterError

PIECES = 20


class Lab:
    """An exporter, its clock and its loop."""

    def __init__(self) -> None:
        self.made = 0
        self.selector = selectors.DefaultSelector()
        self.exporter = Exporter(("127.0.0.1", 0), self.selector, self.text)
        self.sockets: list[socket.socket] = []

    def text(self) -> Iterator[bytes]:
        self.made += 1
        for number in range(PIECES):
            yield b"" if number % 2 else f"piece {self.made}\n".encode() * 5000

    def turn(self) -> None:
        """One turn of the loop."""
        for key, events in self.selector.select(0):
            key.data(events)

    def connect(self, request: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.exporter.address, timeout=10)
        self.sockets.append(made)
        made.sendall(request)
        for _ in range(3):
            self.turn()
        return made

    def answer(self, client: socket.socket) -> bytes:
        """What the client gets until the exporter closes."""
        client.setblocking(False)
        got = b""
        while True:
            self.turn()
            try:
                part = client.recv(1 << 16)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return got
            if not part:
                return got
            got += part

    def close(self) -> None:
        self.exporter.close()
        self.selector.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def get(path: str = "/metrics", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_a_scrape(lab: Lab) -> None:
    head, _, body = lab.answer(lab.connect(get())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert body == b"piece 1\n" * 5000 * (PIECES // 2)


def test_all_who_ask_within_a_second_get_the_same_text(lab: Lab) -> None:
    clients = [lab.connect(get()) for _ in range(3)]
    first, *others = [lab.answer(client) for client in clients]
    assert others == [first, first]
    assert lab.made == 1
    lab.exporter.now_ms = 1001
    assert lab.answer(lab.connect(get())) != first
    assert lab.made == 2


def test_a_text_that_takes_long_to_make_is_good_for_longer(lab: Lab) -> None:
    client = lab.connect(get())
    lab.exporter.now_ms = 3000
    lab.answer(client)
    lab.exporter.now_ms = 14000
    lab.answer(lab.connect(get()))
    assert lab.made == 1


def test_a_slice_is_made_per_turn_whoever_waits(lab: Lab) -> None:
    for _ in range(3):
        lab.connect(get())
    before = len(lab.exporter._made)
    lab.turn()
    assert len(lab.exporter._made) == before + 1


def test_an_old_text_that_nobody_waited_for_is_not_gone_on_with(lab: Lab) -> None:
    lab.connect(get())
    assert lab.made == 1
    lab.exporter.now_ms = PATIENCE_MS + 1
    lab.exporter.tick()
    assert b"piece 2" in lab.answer(lab.connect(get()))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/"), b"404 Not Found"),
        (get("/metrics?x=1"), b"200 OK"),
        (get(method="POST"), b"405 Method Not Allowed"),
        (b"hello\r\n\r\n", b"400 Bad Request"),
        (b"\0\xff \r\n\r\n", b"400 Bad Request"),
    ],
)
def test_requests(lab: Lab, request_: bytes, status: bytes) -> None:
    assert lab.answer(lab.connect(request_)).startswith(b"HTTP/1.1 " + status)


def test_a_request_without_an_end_is_ended(lab: Lab) -> None:
    client = lab.connect(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 4000)
    # What it sent and nobody read may cost it the answer.
    answer = lab.answer(client)
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert len(lab.selector.get_map()) == 1


def test_silent_clients_make_room(lab: Lab) -> None:
    silent = [lab.connect(b"GET /me") for _ in range(CLIENTS_MAX)]
    assert lab.answer(lab.connect(get())).startswith(b"HTTP/1.1 200 OK")
    assert lab.answer(silent[0]) == b""


def test_clients_that_have_asked_keep_their_place(lab: Lab) -> None:
    waiting = [lab.connect(get()) for _ in range(CLIENTS_MAX)]
    assert lab.answer(lab.connect()) == b""
    assert lab.answer(waiting[0]).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_does_not_read_is_closed_in_the_end(lab: Lab) -> None:
    lab.connect(get())
    for _ in range(100):
        lab.turn()
    lab.exporter.now_ms = PATIENCE_MS + 1
    lab.exporter.tick()
    assert len(lab.selector.get_map()) == 1  # the listener


def test_a_text_that_fails_ends_its_client_only(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise ValueError("a fault")

    lab.exporter._make = broken
    assert lab.answer(lab.connect(get())) == b""
    lab.exporter._make = lab.text
    assert lab.answer(lab.connect(get())).startswith(b"HTTP/1.1 200 OK")


def test_a_port_that_is_taken(lab: Lab) -> None:
    with pytest.raises(ExporterError, match=r"can't listen on 127\.0\.0\.1 port"):
        Exporter(lab.exporter.address, lab.selector, lab.text)
