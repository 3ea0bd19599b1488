"""What the service manager is told: the test plays its part on a datagram socket."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conntrackd.daemon.notify import Notify, inherited


class Manager:
    """The socket that a service manager listens on."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(5.0)
        self.socket.bind(address)
        name = self.socket.getsockname()
        self.environ = {"NOTIFY_SOCKET": "@" + name[1:].decode() if isinstance(name, bytes) else name}

    def heard(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    # Binding to no name at all gives one of the abstract namespace that nobody else has.
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else "")
    yield manager
    manager.socket.close()


@pytest.fixture
def notify(manager: Manager) -> Iterator[Notify]:
    notify = Notify(manager.environ)
    yield notify
    notify.close()


def test_each_word_is_what_systemd_expects(manager: Manager, notify: Notify) -> None:
    notify.reloading()  # while we start is no word for it
    notify.reloaded("loaded")
    notify.ready("here we are")
    assert manager.heard() == ["READY=1", "STATUS=here we are"]
    notify.status("7 flows")
    assert manager.heard() == ["STATUS=7 flows"]
    notify.alive()
    assert manager.heard() == ["WATCHDOG=1"]
    notify.reloading()
    word, clock = manager.heard()
    assert word == "RELOADING=1"
    assert clock.removeprefix("MONOTONIC_USEC=").isdecimal()
    notify.reloaded("as before")
    assert manager.heard() == ["READY=1", "STATUS=as before"]
    notify.stopping()
    assert manager.heard()[0] == "STOPPING=1"
    notify.forget("queue")
    assert manager.heard() == ["FDSTOREREMOVE=1", "FDNAME=queue"]


def test_descriptors_arrive_with_their_name(manager: Manager, notify: Notify) -> None:
    left, right = socket.socketpair()
    with left, right:
        assert notify.store("pair", [left.fileno(), right.fileno()])
        said, fds, _, _ = socket.recv_fds(manager.socket, 4096, 4)
        assert said.decode().split("\n") == ["FDSTORE=1", "FDNAME=pair", "FDPOLL=0"]
        os.write(fds[0], b"hello")
        assert os.read(fds[1], 10) == b"hello"
        for fd in fds:
            os.close(fd)


def test_without_a_manager_nothing_is_sent_and_nothing_fails(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}):
        notify = Notify(environ)
        notify.ready("")
        notify.alive()
        assert not notify.store("name", [0])
        notify.close()
        notify.stopping()


def test_a_manager_that_does_not_listen_holds_nothing_up(manager: Manager, notify: Notify) -> None:
    sent = 0
    while notify.store("null", [manager.socket.fileno()]):
        sent += 1
        assert sent < 100_000
    notify.alive()
    manager.heard()
    assert notify.store("null", [manager.socket.fileno()])


def test_children_are_told_nothing(manager: Manager) -> None:
    environ = manager.environ | {"WATCHDOG_USEC": "10", "WATCHDOG_PID": "1", "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    Notify(environ).close()
    inherited(environ)
    assert environ == {}


@pytest.mark.parametrize(
    ("environ", "watchdog_ms"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "10000000"}, 5000),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5000),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({"WATCHDOG_USEC": "100"}, 1),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(environ: dict[str, str], watchdog_ms: int) -> None:
    notify = Notify(environ)
    assert notify.watchdog_ms == watchdog_ms
    notify.close()


INHERIT = """
import os
from conntrackd.daemon.notify import inherited
os.environ["LISTEN_PID"] = str(os.getpid())
found = inherited()
print(found, [os.get_inheritable(fd) for fds in found.values() for fd in fds], inherited())
"""


@pytest.mark.parametrize(
    ("count", "names", "found"),
    [
        ("2", "queue:queue", "{'queue': [3, 4]} [False, False] {}"),
        ("2", "queue:state", "{'queue': [3], 'state': [4]} [False, False] {}"),
        ("2", "", "{'': [3], 'unknown': [4]} [False, False] {}"),
        ("9", "queue", "{'queue': [3], 'unknown': [4]} [False, False] {}"),
        ("-1", "queue", "{} [] {}"),
        ("", "", "{} [] {}"),
    ],
)
def test_inherited_descriptors_have_names_and_end_with_us(count: str, names: str, found: str) -> None:
    """In a process of its own, whose descriptors 3 and 4 are these and 5 is none."""
    script = 'exec 3</dev/null 4</dev/null 5<&-; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", INHERIT],
        env=os.environ | {"LISTEN_FDS": count, "LISTEN_FDNAMES": names},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == found


def test_descriptors_for_another_process_are_not_ours() -> None:
    assert inherited({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "queue"}) == {}
