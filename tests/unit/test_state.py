"""The snapshot's file: written beside the packets and replaced as a whole, set aside when it is no good."""

import os
import select
import socket
import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from conntrackd import api
from conntrackd.config import Config, parse
from conntrackd.daemon import simulate
from conntrackd.daemon.deputy import appoint
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.notify import Notify
from conntrackd.daemon.snapshot import MAGIC, START, VERSION, check
from conntrackd.daemon.state import State
from conntrackd.daemon.statefile import KEPT_ASIDE, NAME, WriteDisk
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset
from tests.lab.network import wait_until
from tests.unit.craft import START_MS, udp
from tests.unit.test_hooks import Router
from tests.unit.test_snapshot import POLICY, firewall, frozen, links


def no_manager() -> Notify:
    """The service manager where there is none."""
    notify = Notify({})
    notify.close()
    return notify


class Daemon:
    """The part of a daemon that keeps state, and its clock."""

    def __init__(self, directory: Path, policy: str = POLICY, write: WriteDisk = os.write) -> None:
        config = self.config(directory, policy)
        self.router = Router(POLICY)
        self.router.fw = self.fw = firewall(policy)
        self.here = links()
        self.generations = Generations(config, "test.toml", self.fw, self.here, no_manager())
        self.state = State(config, self.fw, self.here, self.generations, START_MS, write)
        self.state.open()
        self.state.restore()

    def config(self, directory: Path, policy: str) -> Config:
        return parse(f'{policy}\n[state]\ndirectory = "{directory}"\n'.encode(), "test.toml")

    def status(self) -> api.StateStatus:
        status = self.state.status()
        assert status is not None
        return status

    def begin(self) -> None:
        self.state.now_ms += 30_000
        self.state.tick()

    def go_on(self) -> None:
        """Turn the loop until no snapshot is being made."""

        def turn() -> bool:
            self.state.now_ms += 1
            if self.state.busy():
                self.state.turn()
            return not self.state.busy()

        wait_until(turn, "the snapshot is written", pause_s=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def daemon(directory: Path) -> Daemon:
    return Daemon(directory)


def test_it_is_written_once_in_a_period(directory: Path, daemon: Daemon) -> None:
    daemon.router.cross(udp(b"x"))
    daemon.state.now_ms += 29_999
    daemon.state.tick()
    assert not daemon.state.busy()
    daemon.state.now_ms += 1
    daemon.state.tick()
    daemon.go_on()
    status = daemon.status()
    assert (status.taken, status.failed, status.flows, status.error) == (1, 0, 1, None)
    path = directory / NAME
    assert status.bytes == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert os.listdir(directory) == [NAME]
    with path.open("rb") as file:
        assert check(file).generation == 1
    daemon.state.tick()
    assert not daemon.state.busy()


def test_the_next_start_goes_on(directory: Path, daemon: Daemon) -> None:
    daemon.router.cross(udp(b"x"))
    daemon.generations.resume(7, daemon.generations.fingerprint)
    daemon.state.last()
    daemon.state.close()
    after = Daemon(directory)
    assert after.status().restored == after.fw.net.table.count == 1
    assert after.fw.ruleset.generation == 7


def test_another_configuration_is_another_generation(directory: Path, daemon: Daemon) -> None:
    daemon.router.cross(udp(b"x"))
    daemon.state.last()
    daemon.state.close()
    after = Daemon(directory, POLICY.replace('"out"', '"in"') + "\n[reload]\nrejudge = true\n")
    assert after.fw.ruleset.generation == 2
    assert after.fw.rejudging
    (ct,) = after.fw.net.table.connections()
    assert ct.rule == "out"
    after.generations.turn()
    assert ct.rule == "in"
    assert not after.fw.rejudging


def test_what_is_there_stays_until_the_new_one_is_whole(directory: Path, daemon: Daemon) -> None:
    (directory / NAME).write_bytes(b"old")
    daemon.begin()
    for _ in range(5):
        daemon.state.turn()
    assert (directory / NAME).read_bytes() == b"old"
    daemon.go_on()
    assert (directory / NAME).read_bytes().startswith(MAGIC)


def test_a_full_disk_leaves_what_is_there_until_there_is_room(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulate.SWITCH, "1")
    daemon = Daemon(directory)
    daemon.router.cross(udp(b"x"))
    daemon.state.last()
    daemon.state.close()
    before = (directory / NAME).read_bytes()

    daemon = Daemon(directory, write=simulate.parts("disk:1:2").write_disk)
    with capture_logs() as lines:
        for failed in 1, 2:
            daemon.begin()
            daemon.go_on()
            status = daemon.status()
            assert (status.taken, status.failed, status.error) == (0, failed, "No space left on device")
            assert [problem.name for problem in daemon.state.problems()] == ["snapshot_failed"]
            assert os.listdir(directory) == [NAME]
            assert (directory / NAME).read_bytes() == before
        daemon.begin()
        daemon.go_on()
    assert (daemon.status().taken, daemon.status().failed, daemon.status().error) == (1, 2, None)
    assert list(daemon.state.problems()) == []
    assert [line["event"] for line in lines] == ["snapshot_failed", "snapshot_written_again"]
    with (directory / NAME).open("rb") as file:
        check(file)


def test_a_stop_ends_the_one_that_is_being_made(directory: Path, daemon: Daemon) -> None:
    daemon.begin()
    daemon.router.now_ms = daemon.state.now_ms
    daemon.router.cross(udp(b"x"))
    daemon.state.last()
    assert daemon.status().taken == 1
    assert os.listdir(directory) == [NAME]
    daemon.state.close()
    assert Daemon(directory).status().restored == 1


def test_what_cannot_be_written_is_said_once(directory: Path, daemon: Daemon) -> None:
    (directory / f"{NAME}.new").mkdir()  # as good a reason as a full disk (tests/netns/test_state.py has that)
    with capture_logs() as logs:
        for _ in range(2):
            daemon.begin()
            daemon.go_on()
    assert daemon.status().failed == 2
    assert daemon.status().error
    assert [line["event"] for line in logs] == ["snapshot_failed"]
    (directory / f"{NAME}.new").rmdir()
    with capture_logs() as logs:
        daemon.begin()
        daemon.go_on()
    assert [line["event"] for line in logs] == ["snapshot_written_again"]
    assert (daemon.status().taken, daemon.status().error) == (1, None)


def test_no_link_is_followed(directory: Path, daemon: Daemon, tmp_path: Path) -> None:
    (directory / f"{NAME}.new").symlink_to(tmp_path / "elsewhere")
    daemon.begin()
    daemon.go_on()
    assert daemon.status().failed == 1
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_directory_the_daemon_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        daemon = Daemon(tmp_path / "file" / "state")
    assert [line["event"] for line in logs] == ["snapshot_failed"]
    assert daemon.status().error == "Not a directory"
    daemon.begin()
    daemon.state.last()
    assert daemon.status().taken == 0


def test_the_directory_is_of_one_daemon(directory: Path, daemon: Daemon) -> None:
    second = Daemon(directory)
    assert second.status().error == "another conntrackd has it"
    daemon.state.close()
    third = Daemon(directory)
    assert third.status().error is None


def test_nothing_is_kept_where_that_is_wanted() -> None:
    config = parse(b'version = 1\n[state]\ndirectory = ""\n', "test.toml")
    fw = Firewall(firewall().net, compile_ruleset(config, 1))
    state = State(config, fw, links(), Generations(config, "test.toml", fw, links(), no_manager()), START_MS)
    state.open()
    state.restore()
    state.now_ms += 100_000
    state.tick()
    state.last()
    assert not state.busy()
    assert state.status() is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no snapshot of conntrackd"),
        (b"\x7fELF" + bytes(100), "it is no snapshot of conntrackd"),
        (START.pack(MAGIC, VERSION + 3), f"it was written by a newer conntrackd (format {VERSION + 3}, this one reads"),
        (frozen(firewall(), START_MS)[:-5], "it is torn at byte "),
    ],
    ids=["empty", "foreign", "newer", "torn"],
)
def test_what_is_no_good_is_set_aside(directory: Path, content: bytes, reason: str) -> None:
    directory.mkdir()
    (directory / NAME).write_bytes(content)
    with capture_logs() as logs:
        daemon = Daemon(directory)
    (line,) = logs
    assert line["event"] == "snapshot_set_aside"
    assert line["reason"].startswith(reason)
    assert Path(line["kept_as"]).read_bytes() == content
    assert daemon.fw.net.table.count == 0
    assert daemon.status().restored is None
    (problem,) = daemon.state.problems()
    assert (problem.name, line["kept_as"] in problem.message) == ("snapshot_set_aside", True)
    Path(line["kept_as"]).unlink()
    assert not list(daemon.state.problems())


def test_a_bounded_number_is_kept_aside(directory: Path) -> None:
    directory.mkdir()
    for number in range(KEPT_ASIDE + 2):
        (directory / NAME).write_text(str(number))
        Daemon(directory).state.close()
    kept = {path.name: path.read_text() for path in directory.iterdir()}
    assert kept == {f"{NAME}.bad.{place}": str(KEPT_ASIDE + 2 - place) for place in range(1, KEPT_ASIDE + 1)}


def test_what_others_could_have_written_is_not_trusted(directory: Path, daemon: Daemon) -> None:
    daemon.state.last()
    daemon.state.close()
    (directory / NAME).chmod(0o622)
    with capture_logs() as logs:
        Daemon(directory).state.close()
    assert logs[0]["reason"] == "it may be written by others than its owner"
    os.mkfifo(directory / NAME)
    with capture_logs() as logs:
        Daemon(directory)
    assert logs[0]["reason"] == "it is no file"


def test_a_disk_that_hangs_holds_up_nothing_but_the_snapshot(
    directory: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread waits; the loop goes on, and gives it no more than a bounded amount."""
    monkeypatch.setattr("conntrackd.daemon.state.WAITING_MAX", 1)
    monkeypatch.setattr("conntrackd.daemon.state.LAST_S", 0.05)
    os.mkfifo(directory / f"{NAME}.new")  # opening it for writing waits for a reader
    for sport in range(3000):
        daemon.router.cross(udp(b"x", sport=sport))
    daemon.begin()
    for _ in range(200):
        daemon.state.now_ms += 1
        daemon.state.turn()
    daemon.begin()
    assert daemon.state.busy()
    assert daemon.status().taken == 0
    daemon.state.last()
    assert daemon.status().error == "the disk took more than 0.05 s"
    assert len((directory / f"{NAME}.new").read_bytes()) < 200_000
    daemon.go_on()
    assert daemon.status().failed == 2
    daemon.begin()
    daemon.go_on()
    assert (daemon.status().taken, daemon.status().flows) == (1, 3000)


def test_a_deputy_whose_table_did_not_arrive_is_sent_away(directory: Path, tmp_path: Path) -> None:
    """Two processes must not read the same queues."""

    def stand_in(sock: socket.socket) -> None:
        sock.send(b"!")
        while True:
            sock.recv(1)

    (tmp_path / "no state").write_bytes(b"nothing of ours")
    daemon = Daemon(directory)
    deputy = appoint(stand_in, os.fork)
    assert deputy is not None
    process = os.dup(deputy.fds()[1])
    assert not daemon.state.inherit(os.open(tmp_path / "no state", os.O_RDONLY), deputy)
    assert select.select([process], [], [], 10)[0], "it has not ended"
    os.close(process)
    daemon.state.close()
