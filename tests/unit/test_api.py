"""The client of the control socket: whole answers, or a sentence."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from conntrackd import api
from tests.unit.served import served


class Row(msgspec.Struct):
    text: str


def test_rows_arrive_as_they_were_sent(tmp_path: Path) -> None:
    # An answer many times as big as any buffer on the way.
    with served(tmp_path / "s", lambda asked: iter(Row(f"{asked.command} {n}" * 20) for n in range(20_000))):
        rows = list(api.request(str(tmp_path / "s"), "list"))
    assert len(rows) == 20_000
    assert msgspec.json.decode(rows[-1], type=Row).text == "list 19999" * 20


def test_refusal_is_an_error(tmp_path: Path) -> None:
    with served(tmp_path / "s", lambda _: None), pytest.raises(api.RequestError, match="knows no command 'fly'"):
        list(api.request(str(tmp_path / "s"), "fly"))


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(api.DaemonNotRunningError, match="not running"):
        list(api.request(str(tmp_path / "s"), "flows"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(api.DaemonNotRunningError, match="not running"):
        list(api.request(str(tmp_path / "s"), "flows"))


@contextmanager
def says(path: Path, text: bytes) -> Iterator[None]:
    """A server that says this to its one client and closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(text)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "without an answer"),
        (b"220 ready\n", "not conntrackd"),
        (b'{"v":1,"ok":true}\n', "middle of its answer"),
        (b'{"v":1,"ok":true}\n{"text":"one"}\n{"te', "middle of its answer"),
    ],
)
def test_broken_answers(tmp_path: Path, text: bytes, sentence: str) -> None:
    with says(tmp_path / "s", text), pytest.raises(api.RequestError, match=sentence):
        list(api.request(str(tmp_path / "s"), "flows"))


def test_which_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONNTRACKD_SOCKET", raising=False)
    assert api.socket_path(None) == "/run/conntrackd/control.sock"
    monkeypatch.setenv("CONNTRACKD_SOCKET", "/env")
    assert api.socket_path(None) == "/env"
    assert api.socket_path("/given") == "/given"
