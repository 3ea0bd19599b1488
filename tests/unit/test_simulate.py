"""Failures on purpose are for tests only, and each is asked for by its name."""

import errno
import os
import re
from pathlib import Path

import pytest

from conntrackd.daemon import simulate
from conntrackd.daemon.clock import Clock
from conntrackd.daemon.mmsg import Inbox
from conntrackd.daemon.simulate import KINDS, SimulateError, parts
from conntrackd.hooks import pre_routing


def test_nothing_fails_unless_asked_for() -> None:
    real = parts(None)
    assert (real.track, real.inbox, real.clock) == (pre_routing, Inbox, Clock)
    assert (real.write, real.write_disk) == (os.write, os.write)


@pytest.mark.parametrize("value", ["", "0", "yes"])
def test_refused_without_the_switch(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(simulate.SWITCH, value)
    with pytest.raises(SimulateError, match=r"CONNTRACKD_TEST=1"):
        parts("exception:1")


@pytest.mark.parametrize("wrong", ["", "exception", "exception:", "exception:x", "exception:1:2", "slow:1", "flood:1"])
def test_refused_when_not_understood(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(simulate.SWITCH, "1")
    with pytest.raises(SimulateError, match=r"it takes one of exception:N, "):
        parts(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_one_part_fails_and_the_others_are_real(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv(simulate.SWITCH, "1")
    failing, real = parts(f"{kind}:1" + (":5" if ":" in KINDS[kind] else "")), parts(None)
    changed = {name for name, part in vars(failing).items() if part is not vars(real)[name]} - {"answer"}
    assert changed == {
        "enobufs": {"inbox"}, "verdict": {"write"}, "request": set(), "suspend": {"clock", "track"},
        "clock": {"clock", "track"}, "fork": {"fork"}, "disk": {"write_disk"},
    }.get(kind, {"track"})  # fmt: skip


def test_the_documentation_has_them_all() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    assert re.findall(r"^\| `(\w+):([\w:]+)` \|", text, re.MULTILINE) == list(KINDS.items())


def test_it_fails_at_its_turn_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulate.SWITCH, "1")
    write = parts("verdict:2").write
    null = os.open(os.devnull, os.O_WRONLY)
    assert write(null, b"1") == 1
    with pytest.raises(OSError, match="buffer space") as refused:
        write(null, b"2")
    assert refused.value.errno == errno.ENOBUFS
    assert write(null, b"3") == 1
    os.close(null)


def test_a_disk_fills_up_and_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulate.SWITCH, "1")
    write = parts("disk:2:2").write_disk
    null, data = os.open(os.devnull, os.O_WRONLY), memoryview(bytes(10))
    assert [write(null, data), write(null, data)] == [10, 5]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as refused:
            write(null, data)
        assert refused.value.errno == errno.ENOSPC
    assert write(null, data) == 10
    os.close(null)
