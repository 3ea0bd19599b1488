"""`conntrackd ct`: what it asks of the daemon, and what it says itself. The formats are in test_ctformat.py."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conntrackd import api
from conntrackd.daemon.control import QUIET, Asked
from tests.unit.client import conntrackd_here
from tests.unit.served import served
from tests.unit.test_cli import CONNTRACKD, conntrackd, flow, ping

TRANSLATED = flow(
    3, reply=api.Direction(src="192.0.2.80", dst="198.51.100.1", sport=80, dport=61000, packets=0, bytes=0)
)
LABELLED = flow(4, labels=["vpn", "7"])
FLOWS = [flow(1), ping(), TRANSLATED, LABELLED]


class Daemon:
    """Answers with FLOWS whatever the filter is, and remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked: list[tuple[str, str]] = []
        self.flows = FLOWS
        self.changes: list[dict[str, Any]] = []

    def answer(self, asked: Asked) -> Iterator[msgspec.Struct] | None:
        self.asked.append((asked.command, asked.args.get("filter", "")))
        if asked.command == "flows":
            return iter(self.flows)
        if asked.command == "label" and asked.args["action"] == "list":
            return iter([api.Label("web", 1), api.Label("mail", 2), api.Label("vpn", 3)])
        if asked.command in ("kill", "label"):
            text = asked.args["filter"]
            self.changes.append({**asked.args, "filter": ""})
            ids = {int(word) for word in text.removeprefix("id ").split(",")} if text.startswith("id ") else None
            return iter([each for each in self.flows if ids is None or each.id in ids])
        if asked.command == "events":
            lost = api.Lost(count=7)
            event = api.Event(type="NEW", time="2026-01-02T03:04:05.678+00:00", changes=[], reason=None, flow=flow(1))
            return iter([lost, event, QUIET])
        return None

    def ct(self, *words: str) -> tuple[int, list[str], str]:
        self.asked.clear()
        done = conntrackd_here("ct", *words, "--socket", self.path)
        return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    this = Daemon(tmp_path / "s")
    with served(tmp_path / "s", this.answer):
        yield this


@pytest.mark.parametrize(
    ("words", "filter_"),
    [
        ("-L", ""),
        ("-L -p tcp --dport 443 --state ESTABLISHED", "proto 6 and dst port 443 and state ESTABLISHED"),
        ("-L -s 10.0.0.5 -d 192.0.2.0/24 -f ipv4", "ipv4 and src host 10.0.0.5 and dst net 192.0.2.0/24"),
        ("-L -s 10.0.0.77/8", "ipv4 and src net 10.0.0.0/8"),
        ("-L -r fd00::80 -q fd00::5", "ipv6 and reply src host fd00::80 and reply dst host fd00::5"),
        ("-L -u ASSURED,!EXPECTED -m 0x10/0xff", "status ASSURED and not status EXPECTED and mark 16/255"),
        ("-L -u UNREPLIED -w 7 -i 3", "status UNREPLIED and zone 7 and id 3"),
        ("-L -u seen,!unrep,UNSET", "status SEEN_REPLY and not status UNREPLIED"),
        ("-L -p ICMPv6", "proto 58"),
        ("-L -f ipv4 -l web,vpn -l mail", "ipv4 and label 1 and label 3 and label 2"),
        ("-L -p udp --reply-port-src 53 --reply-port-dst 010", "proto 17 and reply src port 53 and reply dst port 8"),
    ],
)
def test_what_the_daemon_can_choose_it_is_asked_to(daemon: Daemon, words: str, filter_: str) -> None:
    code, lines, said = daemon.ct(*words.split())
    before = [("label", "")] if "label" in filter_ else []  # which there are
    assert (code, daemon.asked, len(lines)) == (0, [*before, ("flows", filter_)], len(FLOWS))
    assert said == f"conntrack v1.4.7 (conntrack-tools): {len(FLOWS)} flow entries have been shown.\n"


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("-n", [3]),
        ("-j", [3]),
        ("-g", []),
        ("--src-nat 198.51.100.1", [3]),
        ("-n 198.51.100.1:61000", [3]),
        ("-n 198.51.100.1:61001", []),
        ("-n 198.51.100.2", []),
        ("-n [fd00::1]:61000", []),
        ("-p icmpv6 --icmpv6-type 128", [2]),
        ("-p icmpv6 --icmpv6-id 8", []),
        ("-s 10.9.0.5 --mask-src 255.0.255.255", [1, 3, 4]),
        ("-m 3/1", []),
    ],
)
def test_the_rest_is_chosen_here(daemon: Daemon, words: str, ids: list[int]) -> None:
    if words.startswith("-s"):
        daemon.flows = [each for each in FLOWS if each.family == "ipv4"]  # the filter says so
    _, lines, _ = daemon.ct("-L", *words.split(), "-o", "id")
    assert [int(line.rpartition("id=")[2]) for line in lines] == ids


def test_labels_have_the_names_of_the_configuration_or_those_of_a_file(daemon: Daemon, tmp_path: Path) -> None:
    def shown(*words: str) -> list[str]:
        _, lines, _ = daemon.ct("-L", "-o", "labels", *words)
        return [word for line in lines for word in line.split() if word.startswith("labels=")]

    assert shown() == ["labels=vpn"]
    (tmp_path / "labels").write_text("1 web\n3 tunnel\n7 seven\n")
    file = ("--labelmap", str(tmp_path / "labels"))
    assert shown(*file) == ["labels=tunnel,seven"]
    assert shown("-l", "tunnel", *file) == ["labels=tunnel,seven"]
    assert daemon.asked == [("label", ""), ("flows", "label 3")]
    assert "unknown label 'vpn'" in daemon.ct("-L", "-l", "vpn", *file)[2]
    assert daemon.ct("-L", "-o", "labels", "--labelmap", "/nowhere")[2].startswith("nfct_labelmap_new: No such file")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("--label-add vpn", {"action": "add", "labels": ["3"]}),
        ("--label-add vpn,web --label-add mail", {"action": "add", "labels": ["3", "1", "2"]}),
        ("--label-del vpn", {"action": "del", "labels": ["3"]}),
        ("--label-del", {"action": "del", "labels": []}),
    ],
)
def test_update_changes_labels(daemon: Daemon, words: str, change: dict[str, Any]) -> None:
    code, lines, said = daemon.ct("-U", "-s", "10.0.0.5", *words.split())
    assert (code, len(lines), daemon.asked[-1]) == (0, 4, ("label", "ipv4 and src host 10.0.0.5"))
    assert daemon.changes == [change | {"filter": ""}]
    assert said == "conntrack v1.4.7 (conntrack-tools): 4 flow entries have been updated.\n"
    assert daemon.ct("-U", "-n", *words.split())[:1] == (0,)
    assert daemon.asked[-2:] == [("flows", ""), ("label", "id 3")]
    assert daemon.ct("-U", "-g", *words.split())[:2] == (1, [])


def test_deletion_asks_the_daemon_once_where_it_can(daemon: Daemon) -> None:
    code, lines, said = daemon.ct("-D", "-s", "10.0.0.5")
    assert (code, daemon.asked, len(lines)) == (0, [("kill", "ipv4 and src host 10.0.0.5")], len(FLOWS))
    assert said == "conntrack v1.4.7 (conntrack-tools): 4 flow entries have been deleted.\n"
    assert daemon.ct("-D")[0] == 0
    assert daemon.asked == [("kill", "all")]
    assert daemon.ct("-F", "-f", "ipv6") == (
        0, [], "conntrack v1.4.7 (conntrack-tools): connection tracking table has been emptied.\n",
    )  # fmt: skip
    assert daemon.asked == [("kill", "ipv6")]


def test_deletion_of_what_a_filter_can_not_say_goes_by_number(daemon: Daemon) -> None:
    assert daemon.ct("-D", "-n")[:2][0] == 0
    assert daemon.asked == [("flows", ""), ("kill", "id 3")]
    assert daemon.ct("-D", "-g") == (1, [], "conntrack v1.4.7 (conntrack-tools): 0 flow entries have been deleted.\n")
    assert daemon.asked == [("flows", "")]
    # As many at a time as a filter may name.
    daemon.flows = [msgspec.structs.replace(TRANSLATED, id=number) for number in range(1, 1001)]
    code, lines, _ = daemon.ct("-D", "-n")
    assert (code, len(lines)) == (0, 1000)
    assert [command for command, _ in daemon.asked] == ["flows", "kill", "kill", "kill", "kill"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_events_until_a_signal_and_what_was_lost(daemon: Daemon, number: signal.Signals) -> None:
    words = [str(CONNTRACKD), "ct", "-E", "-e", "new,upd", "-o", "xml", "-p", "tcp", "--socket", daemon.path]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        head = [process.stdout.readline() for _ in range(3)]
        process.send_signal(number)
        rest, said = process.communicate(timeout=60)
    assert daemon.asked == [("events", "proto 6")]
    assert head[1] == "<conntrack>\n"
    assert head[2].startswith('<flow type="new"><meta direction="original">')
    assert (process.returncode, rest) == (0, "</conntrack>\n")
    assert said.splitlines() == [
        "WARNING: 7 events are missing here: they came faster than they were read",
        "conntrack v1.4.7 (conntrack-tools): 1 flow events have been shown.",
    ]


@pytest.mark.parametrize("option", ["-I", "-A", "-R -", "-L -z", "-L -t 5", "-L -c 1", "-L --orig-zone 1"])
def test_what_is_not_for_us_is_refused_with_a_reason(daemon: Daemon, option: str) -> None:
    code, lines, said = daemon.ct(*option.split())
    assert (code, lines, daemon.asked) == (2, [], [])
    assert "is not for conntrackd: " in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("-s 10.0.0.1", "You need to supply a command: -L, -G, -D, -U, -E, -C, -S or -F"),
        ("-U -s 10.0.0.1", "nothing but labels can be changed: you need to supply `--label-add' or `--label-del'"),
        ("-U --label-del -m 1", "Illegal option `--mark' with this command"),
        ("-L --label-add web", "Illegal option `--label-add' with this command"),
        ("-F -s 10.0.0.1", "Illegal option `--src' with this command"),
        ("-L dying", "`dying' is not listed: a connection is shown from its confirmation to its end"),
        ("-F expect", "Can't do --flush on expectations"),
        ("-L --dport 53", "`--dport' needs `-p tcp|udp|udplite|sctp'"),
        ("-D -p icmp --dport 53", "`--dport' needs `-p tcp|udp|udplite|sctp'"),
        ("-L -p tcp --dport 65536", "Invalid port `65536'"),
        ("-L -m x", "Invalid mark `x'"),
        ("-L -o save,id", "cannot combine save output with any other output type, use -o save only"),
        ("-L expect -o xml", "expectations have one format only: no -o with them"),
    ],
)
def test_wrong_options_change_nothing(daemon: Daemon, words: str, sentence: str) -> None:
    code, lines, said = daemon.ct(*words.split())
    assert (code, lines, daemon.asked) == (2, [], [])
    assert f"conntrack v1.4.7 (conntrack-tools): {sentence}" in said.splitlines()
    assert said.splitlines()[-1] == "Try `conntrackd ct --help' for more information."


@pytest.mark.parametrize("words", ["-L -l nothing", "-U --label-add vpn,nothing", "-U --label-del nothing"])
def test_unknown_labels_change_nothing(daemon: Daemon, words: str) -> None:
    code, lines, said = daemon.ct(*words.split())
    assert (code, lines, daemon.asked) == (2, [], [("label", "")])
    assert "conntrack v1.4.7 (conntrack-tools): unknown label 'nothing'" in said.splitlines()


def test_no_option_at_all_shows_the_help(daemon: Daemon) -> None:
    code, lines, said = daemon.ct()
    assert (code, said) == (0, "")
    assert lines[0].startswith("usage: conntrackd ct -L|-G|-D|-U|-E|-C|-S|-F ")


def test_not_running(tmp_path: Path) -> None:
    done = conntrackd("ct", "-L", "--socket", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "not running" in done.stderr


def test_flows_speaks_the_same_formats(daemon: Daemon) -> None:
    for output, option in (
        ("conntrack", []),
        ("extended", ["-o", "extended"]),
        ("save", ["-o", "save"]),
        ("xml", ["-o", "xml"]),
    ):
        _, lines, _ = daemon.ct("-L", *option)
        done = conntrackd_here("flows", "-o", output, "tcp", "and", "src", "port", "1", "--socket", daemon.path)
        assert (done.stdout.splitlines(), done.returncode, done.stderr) == (lines, 0, "")
        assert daemon.asked[-1] == ("flows", "tcp and src port 1")
    daemon.flows = []
    empty = conntrackd_here("flows", "-o", "xml", "--socket", daemon.path)
    assert empty.stdout == '<?xml version="1.0" encoding="utf-8"?>\n<conntrack>\n</conntrack>\n'
    assert daemon.ct("-L", "-o", "xml")[1] == []  # as the tool
    for words in ("--expected",), ("--by", "src"):
        assert conntrackd_here("flows", "-o", "save", *words, "--socket", daemon.path).returncode == 2
