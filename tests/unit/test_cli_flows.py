"""`flows`, `flow`, `count` and `kill` as scripts and people meet them, on connections that a real tracker has."""

import io
import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from conntrackd.cli.flowtable import GROUP_SORTS, GROUPS, SORTS
from conntrackd.cli.main import main
from conntrackd.daemon.control import Asked
from tests.differential.packets import ACK, SYN
from tests.unit import craft
from tests.unit.answering import LAN, WAN, Lab
from tests.unit.served import served
from tests.unit.test_cli import CONNTRACKD, conntrackd


class Table(Lab):
    """Three datagrams to one port, one of them big; TCP that was answered, 9 s old; a ping."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)
        self.asked: list[Asked] = []
        self.send(craft.tcp(SYN, 1))
        self.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
        self.wait(9)
        for port, size in (1003, 10), (1001, 900), (1002, 20):
            self.send(craft.udp(b"x" * size, sport=port, dport=53))
        self.send(craft.icmp(8))

    def answer(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        self.asked.append(asked)
        return self.flow_answers.rows(asked)

    def call(self, *words: str) -> tuple[int, str, str]:
        """Run a command, here in this process: its exit code, and what it prints on stdout and stderr."""
        out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr("sys.argv", ["conntrackd", *words, "--socket", self.path])
            try:
                code = main()
            except SystemExit as left:
                code = int(str(left.code))
        return code, out.buffer.getvalue().decode(), err.getvalue()

    def run(self, *words: str) -> str:
        """What a command prints; it must succeed and say nothing else."""
        code, out, err = self.call(*words)
        assert (code, err) == (0, "")
        return out

    def ids(self, *words: str) -> list[int]:
        return [json.loads(line)["id"] for line in self.run("flows", *words, "-o", "jsonl").splitlines()]


TCP, BIG = 1, 3
DATAGRAMS = {2, 3, 4}
PING = 5


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    made = Table(tmp_path / "s")
    with capture_logs(), served(tmp_path / "s", made.answer):  # a log that nobody catches is written on stdout
        yield made


def on_a_terminal(*words: str, say: str = "", **env: str) -> tuple[int, str]:
    """Run a command on a terminal and type something: its exit code and what the terminal shows."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    command = subprocess.Popen(
        [CONNTRACKD, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"} | env
    )
    os.close(theirs)
    os.write(ours, say.encode())
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end has closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return command.wait(60), shown.decode()


# --- flows --------------------------------------------------------------------------------------------------------


def test_filter_in_one_word_or_in_many(table: Table) -> None:
    assert {*table.ids("udp and src port 1001-1002")} == {*table.ids("udp", "and", "src", "port", "1001-1002")}
    assert table.asked[-1].args == {"filter": "udp and src port 1001-1002"}
    assert [*table.ids("state", "SYN_RECV")] == [TCP]
    assert table.ids("sctp") == []


@pytest.mark.parametrize("command", ["flows", "count", "kill", "events"])
def test_a_wrong_filter_is_a_mistake_in_usage_and_nobody_is_asked(table: Table, command: str) -> None:
    code, out, err = table.call(command, "tcp and", "prot 80")
    assert (code, out) == (2, "")
    assert err == (
        "The filter is not understood: 'prot' is not a condition; did you mean 'proto'?\n"
        "  tcp and prot 80\n"
        "          ^^^^\n"
    )  # fmt: skip
    assert table.asked == []


def test_a_wrong_filter_is_a_mistake_also_without_a_daemon(tmp_path: Path) -> None:
    assert conntrackd("flows", "tcpp", "--socket", str(tmp_path / "none")).returncode == 2
    assert conntrackd("flows", "tcp", "--socket", str(tmp_path / "none")).returncode == 3


def test_order_and_number(table: Table) -> None:
    assert table.ids("--sort", "bytes", "-n", "1") == [BIG]
    assert table.ids("--sort", "age")[0] == TCP
    assert table.ids("udp", "--sort", "src") == [3, 4, 2]  # by address, then port
    assert table.ids("udp", "--sort", "src", "--reverse", "-n", "2") == [2, 4]
    assert table.ids("--sort", "id") == [1, 2, 3, 4, 5]
    assert len(table.ids("-n", "2")) == 2
    for key in SORTS:
        assert sorted(table.ids("--sort", key)) == [1, 2, 3, 4, 5]
        assert len(table.ids("--sort", key, "-n", "3")) == 3


def test_groups(table: Table) -> None:
    lines = table.run("flows", "--by", "service").splitlines()
    assert [line.split() for line in lines] == [
        ["SERVICE", "FLOWS", "PACKETS", "BYTES"],
        ["udp/53", "3", "3", str(3 * 28 + 930)],
        ["icmp/8", "1", "1", "28"],
        ["tcp/80", "1", "2", "80"],
    ]
    rows = json.loads(table.run("flows", "--by", "state", "--sort", "packets", "-o", "json"))
    assert rows == [
        {"by": "state", "key": "-", "count": 4, "packets": 4, "bytes": 3 * 28 + 930 + 28},
        {"by": "state", "key": "SYN_RECV", "count": 1, "packets": 2, "bytes": 80},
    ]
    for by in GROUPS:
        for sort in GROUP_SORTS:
            rows = json.loads(table.run("flows", "--by", by, "--sort", sort, "-o", "json"))
            assert sum(row["count"] for row in rows) == 5
    assert json.loads(table.run("flows", "tcp", "--by", "src", "-n", "1", "-o", "jsonl"))["key"] == "10.0.0.5"


@pytest.mark.parametrize(
    "words",
    [
        ("--sort", "fame"), ("--sort", "count"), ("--by", "src", "--sort", "age"), ("--by", "fame"), ("-n", "0"),
        ("-n", "-1"), ("-n", "x"), ("--watch", "0"), ("--watch", "x"), ("--watch", "-o", "json"), ("--watch", "nan"),
        ("--expected", "tcp"), ("--expected", "--by", "src"), ("-o", "yaml"),
    ],
)  # fmt: skip
def test_wrong_usage(table: Table, words: tuple[str, ...]) -> None:
    code, out, err = table.call("flows", *words)
    assert (code, out) == (2, "")
    assert "usage: conntrackd flows" in err
    assert table.asked == []


def test_watch_shows_it_again_and_again(table: Table) -> None:
    with subprocess.Popen(
        [CONNTRACKD, "flows", "udp", "--watch", "0.1", "--socket", table.path], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        shown = [watching.stdout.readline() for _ in range(15)]
        watching.terminate()
    assert [line.split()[0] for line in shown[1:5]] == ["PROTO", "udp", "udp", "udp"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d\n", shown[0])
    assert shown[5] == "\n"
    assert shown[7:11] == shown[1:5]


# --- Colour -------------------------------------------------------------------------------------------------------


def test_colour_only_on_a_terminal_that_wants_it(table: Table) -> None:
    code, shown = on_a_terminal("flows", "--socket", table.path)
    assert code == 0
    assert "\x1b[1mPROTO" in shown
    assert "\x1b[33mudp" in shown
    plain = re.sub(r"\x1b\[\d*m", "", shown).replace("\r", "")
    assert plain == table.run("flows")  # the columns do not move
    for env in {"NO_COLOR": "1"}, {"TERM": "dumb"}:
        assert "\x1b" not in on_a_terminal("flows", "--socket", table.path, **env)[1]
    assert "\x1b" not in table.run("flows")


# --- count, kill, flow --------------------------------------------------------------------------------------------


def test_count(table: Table) -> None:
    assert table.run("count") == "5\n"
    assert table.run("count", "udp") == "3\n"
    assert json.loads(table.run("count", "sctp", "-o", "json")) == {"count": 0}


def test_kill(table: Table) -> None:
    code, out, err = table.call("kill", "udp and src port 1001", "--dry-run")
    assert (code, err) == (0, "1 flow would be ended: nothing was changed.\n")
    assert [line.split()[0] for line in out.splitlines()] == ["PROTO", "udp"]
    assert table.run("count") == "5\n"
    code, out, err = table.call("kill", "udp", "-o", "json")
    assert (code, err) == (0, "3 flows ended.\n")
    assert {flow["id"] for flow in json.loads(out)} == DATAGRAMS
    code, out, err = table.call("kill", "udp", "-o", "json")
    assert (code, out, err) == (0, "[]\n", "0 flows ended.\n")
    assert table.run("count") == "2\n"


def test_kill_wants_a_filter(table: Table) -> None:
    assert table.call("kill")[0] == 2
    code, out, err = table.call("kill", "")
    assert (code, out) == (1, "")
    assert "The filter `all` is all of them" in err
    assert table.run("count") == "5\n"


def test_kill_asks_on_a_terminal(table: Table) -> None:
    code, shown = on_a_terminal("kill", "udp", "--socket", table.path, say="n\n")
    assert code == 1
    assert "End 3 flows? [y/N]" in shown
    assert "Nothing was changed." in shown
    assert table.run("count") == "5\n"
    code, shown = on_a_terminal("kill", "tcp", "--socket", table.path, say="y\n")
    assert (code, "1 flow ended." in shown) == (0, True)
    code, shown = on_a_terminal("kill", "udp", "--yes", "--socket", table.path)
    assert (code, "End 3" in shown) == (0, False)
    assert table.run("count") == "1\n"


def test_flow_for_people(table: Table) -> None:
    lines = table.run("flow", "1").splitlines()
    said = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert said["protocol"] == "tcp (6), ipv4"
    assert said["state"] == "SYN_RECV"
    assert said["orig"] == "10.0.0.5:40000 > 192.0.2.80:80: 1 packets, 40 bytes"
    assert said["admitted by"] == "rule out of generation 1"
    assert said["interfaces"] == "in lan0, out wan0"
    assert said["begun"].endswith(", 9s ago")
    assert said["ends"] == "in 51s"
    assert said["tcp orig"].startswith("end 2, may send to ")


def test_flow_for_programs(table: Table) -> None:
    made = json.loads(table.run("flow", "1", "-o", "json"))
    assert made["tcp"]["orig"] == {"end": 2, "max_end": 8194, "max_window": 8192, "scale": 0, "flags": []}
    (row,) = json.loads(table.run("flows", "tcp", "-o", "json"))
    assert row.items() <= made.items()
    assert "tcp" not in json.loads(table.run("flow", "5", "-o", "json"))
    code, out, err = table.call("flow", "77")
    assert (code, out, err) == (1, "", "There is no flow 77: it has ended, or never was.\n")
    assert table.call("flow", "x")[0] == 2
