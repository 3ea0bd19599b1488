"""Failures on purpose are for tests only, and each is asked for by its name."""

import errno
import os

import pytest

from conntrackd.daemon import simulate
from conntrackd.daemon.clock import Clock
from conntrackd.daemon.mmsg import Inbox
from conntrackd.daemon.simulate import KINDS, SimulateError, parts
from conntrackd.hooks import pre_routing


def test_nothing_fails_unless_asked_for() -> None:
    real = parts(None)
    assert (real.track, real.inbox, real.write, real.clock) == (pre_routing, Inbox, os.write, Clock)


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
        "clock": {"clock", "track"},
    }.get(kind, {"track"})  # fmt: skip


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
