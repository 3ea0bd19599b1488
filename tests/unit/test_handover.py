"""What passes to the next process, and what is made of what the process before has left."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conntrackd import api
from conntrackd.daemon import deputy, handover
from conntrackd.daemon.control import Asked
from conntrackd.daemon.handover import Restart
from tests.lab.network import wait_until

AS_ROOT = Asked("restart", {}, 1, 0)


def test_heirlooms_are_read_once_and_go_no_further() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    environ = {handover.ENV: f"queue-0={reading} state=99999 lock=nonsense", "HOME": "/"}
    assert handover.heirlooms(environ) == {"queue-0": reading}
    assert environ == {"HOME": "/"}
    assert not os.get_inheritable(reading)
    assert handover.heirlooms(environ) == {}
    os.close(reading)
    os.close(writing)


def test_the_next_program_gets_the_descriptors_and_signals_wait_for_it(tmp_path: Path) -> None:
    """Exec for real, in a process of its own: the same command line begins anew."""
    program = tmp_path / "program.py"
    program.write_text("""
import os, signal, sys
from conntrackd.daemon import deputy, handover
found = handover.heirlooms()
if found:
    os.kill(os.getpid(), signal.SIGTERM)  # a stop in the middle of it
    signal.signal(signal.SIGTERM, lambda *_: print("and was told to stop", flush=True))
    print(sys.argv[1], os.read(found["pipe"], 100).decode(), os.environ["EXTRA"], flush=True)
    handover.accept_signals()
else:
    reading, writing = os.pipe()
    os.write(writing, b"left behind")
    handover.become_next({"pipe": reading}, {"EXTRA": "told"})
""")
    done = subprocess.run([sys.executable, str(program), "word"], capture_output=True, text=True, check=True)
    assert done.stdout == "word left behind told\nand was told to stop\n"


def test_what_cannot_be_begun_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert handover.become_next({"pipe": reading}, {}) == "No such file or directory"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    assert fcntl.fcntl(reading, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(reading)
    os.close(writing)


def rehearsed(monkeypatch: pytest.MonkeyPatch, program: str) -> tuple[Restart, api.Restart]:
    """A restart whose new process is this program, and what its client is told."""
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", program])
    restart = Restart()
    rows = restart.rows(AS_ROOT)
    assert rows is not None
    assert next(rows) is None

    def over() -> api.Restart | None:
        restart.now_ms += 1
        restart.turn()
        return next(rows)

    return restart, wait_until(over, "the rehearsal is over")  # type: ignore[return-value]


def test_it_is_due_when_the_rehearsal_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    restart, told = rehearsed(monkeypatch, "import sys; assert sys.argv[-1] == '--rehearse'")
    assert told.ok
    assert restart.busy()
    assert restart.due(clients_wait=False)
    assert not restart.due(clients_wait=True)
    restart.now_ms += handover.FAREWELL_MS + 1
    assert restart.due(clients_wait=True)
    restart.failed("because")
    assert not restart.busy()


def test_it_is_refused_when_the_rehearsal_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    restart, told = rehearsed(monkeypatch, "raise SystemExit('no such rule')")
    assert not told.ok
    assert told.message == "The new process can't start, so this one goes on:\nno such rule"
    assert not restart.busy()
    assert not restart.due(clients_wait=False)


def test_a_rehearsal_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "REHEARSAL_S", 0.1)
    _, told = rehearsed(monkeypatch, "import time; time.sleep(1000)")
    assert told.message.endswith("it did not come to an end within 0.1 s")


def test_it_takes_the_right_to_change_things() -> None:
    with pytest.raises(api.RequestError, match="needs root"):
        Restart().rows(Asked("restart", {}, 1, 12345))
    assert Restart().rows(Asked("status", {}, 1, 0)) is None


@pytest.mark.parametrize("lacking", ["memory", "descriptors", "a process file"])
def test_without_what_a_deputy_needs_there_is_none(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if lacking == "memory":
        monkeypatch.setattr(deputy, "available", lambda: 1 << 20)
    elif lacking == "descriptors":
        monkeypatch.setattr(socket, "socketpair", none_left)
    else:
        monkeypatch.setattr(os, "pidfd_open", none_left)
    ended, noted = os.pipe()

    def stand_in(sock: socket.socket) -> None:
        os.write(noted, sock.recv(1) or b"nobody there")

    assert deputy.appoint(stand_in, os.fork) is None
    os.close(noted)
    assert os.read(ended, 100) == (b"nobody there" if lacking == "a process file" else b"")
    os.close(ended)
