"""The control socket: answers stream, and no client can hold the loop or fill the memory."""

import json
import os
import selectors
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from conntrackd.api import RequestError
from conntrackd.daemon import control
from conntrackd.daemon.control import Asked, Control, ControlError


class Row(msgspec.Struct):
    number: int
    filling: str = "x" * 100


class Server:
    """A control socket whose loop turns when the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made = 0  # rows
        self.ready = False
        self.selector = selectors.DefaultSelector()
        self.control = Control(str(path), self.selector, self.answer)

    def answer(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        if asked.command == "broken":
            return self.broken()
        if asked.command == "late":
            return self.late()
        if asked.command == "refused":
            raise RequestError(f"Not for {asked.args['whom']}, user {asked.uid}.")
        return self.rows(int(asked.command)) if asked.command.isdecimal() else None

    def late(self) -> Iterator[msgspec.Struct | None]:
        """A row, and another one when `ready` is set."""
        yield Row(1)
        while not self.ready:
            yield None
        yield Row(2)

    def rows(self, count: int) -> Iterator[msgspec.Struct]:
        for number in range(count):
            self.made += 1
            yield Row(number)

    def broken(self) -> Iterator[msgspec.Struct]:
        yield Row(1)
        raise ZeroDivisionError

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        ready = self.selector.select(0)
        for key, events in ready:
            key.data(events)
        return bool(ready)

    def client(self, text: bytes) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect(str(self.path))
        client.send(text)
        return client

    def answer_to(self, text: bytes) -> list[dict[str, object]]:
        """The whole answer, the daemon's closing included."""
        with self.client(text) as client:
            got = b""
            while True:
                self.turn()
                try:
                    part = client.recv(1 << 16)
                except BlockingIOError:
                    continue
                if not part:
                    return [json.loads(line) for line in got.splitlines()]
                got += part


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "run" / "control.sock")
    yield server
    server.control.close()
    server.selector.close()


def request(command: str) -> bytes:
    return json.dumps({"v": 1, "command": command}).encode() + b"\n"


def test_rows_that_come_later_keep_nobody_busy(server: Server) -> None:
    client = server.client(request("late"))
    while not server.control.waits():
        assert server.turn()
    # The first row is there; while the second is not, the loop has nothing to do.
    assert [json.loads(line) for line in client.recv(1000).splitlines()][1]["number"] == 1
    assert not server.turn()
    server.control.resume()
    assert server.turn()
    assert server.control.waits()
    # It is not a client that hangs.
    server.control.now_ms += control.PATIENCE_MS + 1
    server.control.resume()
    server.control.tick()
    server.ready = True
    server.turn()
    assert not server.control.waits()
    assert [json.loads(line) for line in client.recv(1000).splitlines()][1] == {"end": True, "count": 2}
    client.close()


def test_a_client_may_leave_while_it_waits(server: Server) -> None:
    client = server.client(request("late"))
    while not server.control.waits():
        assert server.turn()
    client.close()
    server.ready = True
    server.control.resume()
    assert server.turn()
    assert not server.turn()
    assert not server.control.waits()


def test_a_refusal_says_why_and_to_whom(server: Server) -> None:
    line = json.dumps({"v": 1, "command": "refused", "args": {"whom": "you"}}).encode() + b"\n"
    assert server.answer_to(line) == [{"v": 1, "ok": False, "error": f"Not for you, user {os.getuid()}."}]


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_rows_between_head_and_end(server: Server, count: int) -> None:
    head, *rows, end = server.answer_to(request(str(count)))
    assert head == {"v": 1, "ok": True}
    assert [row["number"] for row in rows] == list(range(count))
    assert end == {"end": True, "count": count}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"hello\n", "not understood"),
        (b"\n", "not understood"),
        (b'{"v": 1}\n', "`command`"),
        (b'{"v": "1", "command": "1"}\n', "`int`"),
        (b'{"v": 2, "command": "1"}\n', "version 1"),
        (request("fly"), "'fly'"),
        (b"x" * (control.REQUEST_MAX + 1), "longer than"),
        (b'{"v": 1, "command": "' + b"[" * 60000 + b'"}\n', "knows no command"),
        (b"[" * 60000 + b"\n", "not understood"),
    ],
)
def test_refused_with_a_sentence(server: Server, monkeypatch: pytest.MonkeyPatch, text: bytes, says: str) -> None:
    monkeypatch.setattr(control, "REQUEST_MAX_ADMIN", control.REQUEST_MAX)
    (head,) = server.answer_to(text)
    assert head["ok"] is False
    assert says in str(head["error"])
    assert server.answer_to(request("1"))[0]["ok"]


def test_request_in_pieces(server: Server) -> None:
    text = request("2")
    client = server.client(text[:5])
    while server.turn():
        pass
    client.send(text[5:])
    while server.turn():
        pass
    assert client.recv(1 << 16).count(b"\n") == 4
    client.close()


def test_rows_are_made_as_they_are_taken(server: Server) -> None:
    """A client that does not read gets what the socket and our small buffer hold, of a million rows."""
    with server.client(request("1000000")) as client:
        while server.turn():
            pass
        made = server.made
        assert made < 10_000
        while not client.recv(1 << 20) or server.made == made:
            server.turn()
        assert server.made < made + 10_000


def test_one_turn_makes_few_rows(server: Server) -> None:
    clients = [server.client(request("1000000")) for _ in range(8)]
    while server.made == 0:
        server.turn()
    before = server.made
    server.turn()
    assert server.made - before <= control.ROWS_PER_TURN
    for client in clients:
        client.close()


def test_hung_client_is_closed(server: Server) -> None:
    idle, stuck = server.client(b""), server.client(request("1000000"))
    while server.turn():
        pass
    server.control.now_ms += control.PATIENCE_MS
    server.control.tick()
    with pytest.raises(BlockingIOError):
        idle.recv(1)
    server.control.now_ms += 1
    server.control.tick()
    assert idle.recv(1) == b""
    while stuck.recv(1 << 20):
        pass  # ends only if the daemon closed
    for client in idle, stuck:
        client.close()


def test_client_that_leaves_early(server: Server) -> None:
    client = server.client(request("1000000"))
    server.turn()
    server.turn()
    client.close()
    while server.turn():
        pass
    assert server.made < 10_000
    assert server.answer_to(request("1"))[0]["ok"]


def test_clients_have_a_number(server: Server) -> None:
    clients = [server.client(b"") for _ in range(control.CLIENTS_MAX)]
    while server.turn():
        pass
    (head,) = server.answer_to(b"")
    assert "32 clients" in str(head["error"])
    clients.pop().close()
    while server.turn():
        pass
    assert server.answer_to(request("1"))[0]["ok"]
    for client in clients:
        client.close()


def test_our_own_failure_ends_the_client_only(server: Server) -> None:
    with capture_logs() as logs:
        assert server.answer_to(request("broken")) == []
    assert [entry["event"] for entry in logs] == ["control_failed"]
    assert server.answer_to(request("1"))[0]["ok"]


def test_open_to_root_and_group_only(server: Server) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o660


def test_second_daemon_is_refused(server: Server) -> None:
    with pytest.raises(ControlError, match=r"Another conntrackd \(process \d+\) already serves .*control.sock"):
        Control(str(server.path), server.selector, server.answer)
    assert server.answer_to(request("1"))[0]["ok"]


def test_closing_takes_the_socket_away_and_frees_the_path(tmp_path: Path) -> None:
    for _ in range(2):
        server = Server(tmp_path / "control.sock")
        server.control.close()
        server.selector.close()
        assert not server.path.exists()


def test_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    server = Server(path)
    assert server.answer_to(request("1"))[0]["ok"]
    server.control.close()
    server.selector.close()


@pytest.mark.parametrize("name", ["file", "x" * 120])
def test_no_socket_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    sentence = pytest.raises(ControlError, match=r"^The control socket .* can't be made: .*\.$")
    with selectors.DefaultSelector() as selector, sentence:
        Control(str(tmp_path / name), selector, lambda _: None)
    assert (tmp_path / "file").read_text() == "precious"


# --- Answers that go on as things happen ------------------------------------------------------------------------


class News(Server):
    """A server with a command whose rows come when the test says so."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.news: list[Row] = []
        self.listeners = 0

    def answer(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        return self.listen() if asked.command == "news" else super().answer(asked)

    def listen(self) -> Iterator[msgspec.Struct | None]:
        self.listeners += 1
        try:
            at = 0
            while True:
                if at < len(self.news):
                    at += 1
                    yield self.news[at - 1]
                else:
                    yield control.QUIET
        finally:
            self.listeners -= 1

    def happens(self, *numbers: int, filling: str = "") -> None:
        self.news += [Row(number, filling) for number in numbers]
        self.control.wake()


@pytest.fixture
def news(tmp_path: Path) -> Iterator[News]:
    made = News(tmp_path / "control.sock")
    yield made
    made.control.close()
    made.selector.close()


def heard(client: socket.socket) -> list[int]:
    """The numbers that have come since the last time; the client must have whole lines."""
    data = b""
    while True:
        try:
            chunk = client.recv(1 << 20)
        except BlockingIOError:
            break
        assert chunk, "the server closed"
        data += chunk
    rows = [json.loads(line) for line in data.splitlines()]
    return [row["number"] for row in rows if "number" in row]


def settle(server: Server) -> None:
    while server.turn():
        pass


def test_a_listener_hears_what_happens_when_it_happens(news: News) -> None:
    client = news.client(b'{"v":1,"command":"news"}\n')
    settle(news)
    assert (heard(client), news.listeners) == ([], 1)
    news.happens(1, 2)
    settle(news)
    assert heard(client) == [1, 2]
    assert not news.turn()  # and the loop sleeps meanwhile
    news.control.wake()  # for nothing
    settle(news)
    news.happens(*range(3, 100))
    settle(news)
    assert heard(client) == list(range(3, 100))
    client.close()
    settle(news)
    assert news.listeners == 0


def test_a_listener_may_be_silent_for_ever_and_a_slow_one_may_not(news: News) -> None:
    client = news.client(b'{"v":1,"command":"news"}\n')
    settle(news)
    news.control.now_ms += 10 * control.PATIENCE_MS
    news.control.tick()
    assert news.listeners == 1
    news.happens(*range(100), filling="x" * 100_000)  # more than its socket holds
    for _ in range(1000):
        news.turn()
    news.control.now_ms += control.PATIENCE_MS + 1
    news.control.tick()
    assert news.listeners == 0
    client.close()


def test_a_listener_takes_a_bounded_share_of_a_turn(news: News) -> None:
    client = news.client(b'{"v":1,"command":"news"}\n')
    settle(news)
    news.happens(*range(1000))
    news.turn()
    assert len(heard(client)) <= control.ROWS_PER_TURN_OF_LISTENERS
    client.close()
