"""The command line as scripts and people meet it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from conntrackd import api
from conntrackd.daemon.control import Asked
from tests.unit.served import served

CONNTRACKD = Path(sys.executable).with_name("conntrackd")


def conntrackd(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CONNTRACKD_SOCKET"} | env
    return subprocess.run(
        [CONNTRACKD, *words], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def flow(number: int, **changes: object) -> api.Flow:
    orig = api.Direction(src="10.0.0.5", dst="192.0.2.80", sport=number, dport=80, packets=3, bytes=180)
    reply = api.Direction(src="192.0.2.80", dst="10.0.0.5", sport=80, dport=number, packets=0, bytes=0)
    this = api.Flow(
        id=number, family="ipv4", protocol="tcp", protonum=6, zone=0, state="SYN_SENT", status=["CONFIRMED"],
        timeout_seconds=119, age_seconds=1, orig=orig, reply=reply, mark=0, helper=None, master=None,
        rule="out", in_="lan0", out="wan0",
    )  # fmt: skip
    return msgspec.structs.replace(this, **changes)


def ping() -> api.Flow:
    return flow(
        2, family="ipv6", protocol="icmpv6", protonum=58, state=None, status=["SEEN_REPLY", "CONFIRMED"],
        orig=api.Direction(src="fd00::5", dst="fd00::80", type=128, code=0, id=7, packets=1, bytes=104),
        reply=api.Direction(src="fd00::80", dst="fd00::5", type=129, code=0, id=7, packets=1, bytes=104),
    )  # fmt: skip


def drop() -> api.Drop:
    return api.Drop(
        time="2026-01-02T03:04:05.678+00:00", reason="ip_header", rule=None, family=None, protocol=None,
        protonum=None, src=None, dst=None, in_="wan0", out=None,
    )  # fmt: skip


def answer(asked: Asked) -> Iterator[msgspec.Struct | None] | None:
    if asked.command == "flows":
        return iter([flow(1), ping(), flow(40000, orig=flow(1).orig, state="ESTABLISHED", status=["ASSURED"])])
    if asked.command == "drops":
        return iter([drop()])
    return None


@pytest.fixture
def control(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "control.sock"
    with served(path, answer):
        yield str(path)


def test_flow_table(control: str) -> None:
    done = conntrackd("flows", "--socket", control)
    assert done.returncode == 0
    assert done.stderr == ""
    header, syn, echo, third = done.stdout.splitlines()
    assert header.split() == [
        "PROTO", "STATE", "SOURCE", "DESTINATION", "FLAGS", "TIMEOUT", "PACKETS", "BYTES", "RULE",
    ]  # fmt: skip
    assert syn.split() == [
        "tcp", "SYN_SENT", "10.0.0.5:1", "192.0.2.80:80", "UNREPLIED", "1m59s", "3/0", "180/0", "out",
    ]  # fmt: skip
    assert echo.split()[:9] == ["icmpv6", "-", "fd00::5", "fd00::80", "type", "128", "code", "0", "id"]
    assert "UNREPLIED" not in echo
    assert "ASSURED,UNREPLIED" in third
    # Columns stand under their headers.
    assert {line.index("out") for line in (syn, echo, third)} == {header.index("RULE")}


def test_flows_as_json(control: str) -> None:
    lines = conntrackd("flows", "-o", "jsonl", "--socket", control).stdout.splitlines()
    array = json.loads(conntrackd("flows", "-o", "json", "--socket", control).stdout)
    assert array == [json.loads(line) for line in lines]
    assert [each["id"] for each in array] == [1, 2, 40000]
    assert array[1]["orig"] == {
        "src": "fd00::5", "dst": "fd00::80", "type": 128, "code": 0, "id": 7, "packets": 1, "bytes": 104,
    }  # fmt: skip


def test_empty_table(tmp_path: Path) -> None:
    with served(tmp_path / "s", lambda _: iter(())):
        socket = str(tmp_path / "s")
        assert conntrackd("flows", "-o", "json", "--socket", socket).stdout == "[]\n"
        assert conntrackd("flows", "-o", "jsonl", "--socket", socket).stdout == ""
        assert conntrackd("flows", "--socket", socket).stdout.split()[0] == "PROTO"


def test_drop_without_a_tuple(control: str) -> None:
    _, row = conntrackd("drops", "--socket", control, TZ="UTC").stdout.splitlines()
    assert row.split() == ["03:04:05.678", "ip_header", "-", "-", "-", "-", "wan0", "-"]


def test_socket_before_or_after_or_in_the_environment(control: str) -> None:
    expected = conntrackd("flows", "--socket", control).stdout
    assert conntrackd("--socket", control, "flows").stdout == expected
    assert conntrackd("flows", CONNTRACKD_SOCKET=control).stdout == expected
    assert conntrackd("flows", "--socket", control, CONNTRACKD_SOCKET="/nowhere").stdout == expected


def test_socket_at_every_place_of_a_command_with_actions(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    words = ("set", "add", "blocked", "192.0.2.1")
    for at in range(len(words) + 1):
        done = conntrackd(*words[:at], "--socket", path, *words[at:])
        assert (done.returncode, done.stdout) == (3, "")
        assert path in done.stderr
    assert conntrackd("completion", "bash", "--socket", path).stdout == conntrackd("completion", "bash").stdout


@pytest.mark.parametrize("command", ["status", "flows", "stats", "drops"])
def test_not_running(tmp_path: Path, command: str) -> None:
    done = conntrackd(command, "--socket", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "not running" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_refused_by_the_daemon(control: str) -> None:
    done = conntrackd("stats", "--socket", control)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "The daemon knows no command 'stats'.\n"


@pytest.mark.parametrize("words", [(), ("fly",), ("flows", "-o", "yaml"), ("rules", "flush")])
def test_usage(words: tuple[str, ...]) -> None:
    done = conntrackd(*words)
    assert done.returncode == 2
    assert "usage: conntrackd" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("statsu",), "argument COMMAND: there is no 'statsu'; did you mean 'stats'?"),
        (("flows", "--sort", "byts"), "argument --sort: there is no 'byts'; did you mean 'bytes'?"),
        (("xyzzy",), "invalid choice: 'xyzzy' (choose from 'run', "),
    ],
)
def test_a_word_that_is_nearly_right(words: tuple[str, ...], says: str) -> None:
    done = conntrackd(*words)
    assert done.returncode == 2
    assert says in done.stderr


def test_status_without_a_daemon_says_who_knows_of_the_packets(tmp_path: Path) -> None:
    done = conntrackd("--socket", str(tmp_path / "s"), "status")
    assert (done.returncode, done.stdout) == (3, "")
    assert "not running. `conntrackd doctor` says what becomes of packets." in done.stderr


def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    done = conntrackd("--socket", f"{tmp_path}/{'x' * 120}", "status")
    assert (done.returncode, "path too long" in done.stderr) == (1, True)


def test_version() -> None:
    done = conntrackd("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "conntrackd")


def test_help_names_every_command() -> None:
    text = conntrackd("--help").stdout
    for command in ("run", "check", "rules", "status", "flows", "stats", "drops"):
        assert f"    {command} " in text
        assert conntrackd(command, "--help").stdout.startswith(f"usage: conntrackd {command}")


@pytest.mark.parametrize("output", ["table", "json", "jsonl"])
def test_broken_pipe_is_silent(tmp_path: Path, output: str) -> None:
    """The reader leaves after one line of an answer that fills every buffer."""
    with served(tmp_path / "s", lambda _: (flow(number) for number in range(50_000))):
        done = subprocess.run(
            ["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash",
             CONNTRACKD, "flows", "-o", output, "--socket", tmp_path / "s"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("words", ["status", "flows", "drops", "trace", "rules", "top", "completion bash"])
def test_the_client_loads_little(words: str) -> None:
    """What the daemon and the configuration need takes longer to import than a client may take to answer."""
    code = (
        f"import sys; sys.argv = ['conntrackd', '--socket', '/nowhere', *{words.split()}];"
        "from conntrackd.cli.main import main; code = main(); print('\\n', code, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    code_, *modules = done.stdout.splitlines()[-1].split()
    assert code_ == ("0" if words.startswith("completion") else "3")
    heavy = {"pydantic", "structlog", "pyroute2", "scapy", "textual", "rich", "conntrackd.config", "conntrackd.core"}
    assert not heavy & set(modules)
