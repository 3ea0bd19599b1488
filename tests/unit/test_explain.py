"""Explain: a packet as people write it, and for each rule the first thing that is not true of it."""

import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from conntrackd import config
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.explain import ExplainError, explain, parse
from conntrackd.policy.match import judge

TEXT = """
version = 1
[zones]
lan = { interfaces = "eth1" }
wan = { interfaces = "eth0" }
[sets.blocked]
addresses = "203.0.113.0/24"
[[rule]]
name = "udp"
protocol = "udp"
action = "drop"
[[rule]]
name = "ports"
protocol = "tcp"
port = [22, "8000-8080"]
action = "drop"
[[rule]]
name = "zone"
from = ["wan", "self"]
action = "drop"
[[rule]]
name = "to"
to = "self"
action = "drop"
[[rule]]
name = "set"
destination = "@blocked"
action = "drop"
[[rule]]
name = "not"
source = "!10.0.0.5"
action = "drop"
[[rule]]
name = "address"
destination = ["192.0.2.1", "@blocked"]
action = "drop"
[[rule]]
name = "invalid"
state = "invalid"
action = "drop"
[[rule]]
name = "seen"
action = "log"
[[rule]]
name = "out"
limit = { new = "5/s" }
action = "accept"
[[rule]]
name = "behind"
action = "drop"
"""


def test_every_reason() -> None:
    ruleset = compile_ruleset(config.parse(TEXT.encode(), "test.toml"), 1)
    packet = parse("tcp 10.0.0.5:1234 > 1.1.1.1:443 in lan out wan")
    steps = explain(ruleset, packet, ruleset.zones["lan"], ruleset.zones["wan"], 0)
    assert [(step.rule, step.why) for step in steps] == [
        ("udp", "it is tcp, not udp"),
        ("ports", "its port is 443, not 22 or 8000-8080"),
        ("zone", "it comes from zone lan, not from the router itself or zone wan"),
        ("to", "it goes to zone wan, not to the router itself"),
        ("set", "its destination 1.1.1.1 is not in @blocked"),
        ("not", "its source 10.0.0.5 is excluded"),
        ("address", "its destination 1.1.1.1 is not in @blocked or among the rule's addresses"),
        ("invalid", "the packet is new, the rule is about invalid"),
        ("seen", "matches: logged, and the next rules are asked"),
        ("out", "matches, as long as its limits allow"),
    ]
    assert [step.matches for step in steps] == [False] * 8 + [True] * 2
    # It says what the packet would meet, and counts nothing.
    ruleset.set_links({1: "eth1", 2: "eth0"})
    assert ruleset.by_name["out"].hits == 0
    assert judge(ruleset, packet.state, packet.tuple_, 1, 2, 0).name == "out"


def test_the_defaults() -> None:
    ruleset = compile_ruleset(config.parse(b'version = 1\n[zones]\nlan = { interfaces = "eth1" }', "test.toml"), 1)
    lan, router = ruleset.zones["lan"], ruleset.zones["self"]
    for state, way_in, way_out, name in (
        ("new", lan, lan, "default-forward"),
        ("new", lan, router, "default-input"),
        ("new", router, lan, "default-output"),
        ("related", lan, lan, "default-related"),
        ("invalid", lan, 0, "default-invalid"),
    ):
        (step,) = explain(ruleset, parse(f"gre 10.0.0.1 > 10.0.0.2 state {state}"), way_in, way_out, 0)
        assert step.rule == name


@pytest.mark.parametrize(
    ("text", "protonum", "source", "target", "tail"),
    [
        ("tcp 10.0.0.5:1234 > 1.1.1.1:443", 6, "10.0.0.5", "1.1.1.1", [0x04, 0xD2, 0x01, 0xBB]),
        ("tcp 10.0.0.5:1234 1.1.1.1:443 in lan", 6, "10.0.0.5", "1.1.1.1", [0x04, 0xD2, 0x01, 0xBB]),
        ("udp 10.0.0.5>1.1.1.1:53 in lan", 17, "10.0.0.5", "1.1.1.1", [0x9C, 0x40, 0, 53]),
        ("tcp [2001:db8::1]:1 > [::1]:2 out self", 6, "2001:db8::1", "::1", [0, 1, 0, 2]),
        ("icmp 10.0.0.5 > 1.1.1.1", 1, "10.0.0.5", "1.1.1.1", [0, 1, 8, 0]),
        ("icmp 10.0.0.5 > 1.1.1.1 type 13 code 2", 1, "10.0.0.5", "1.1.1.1", [0, 1, 13, 2]),
        ("icmpv6 2001:db8::1 > ::1 type echo-request", 58, "2001:db8::1", "::1", [0, 1, 128, 0]),
        ("50 10.0.0.5 > 1.1.1.1", 50, "10.0.0.5", "1.1.1.1", [0, 0, 0, 0]),
    ],
)
def test_parse(text: str, protonum: int, source: str, target: str, tail: list[int]) -> None:
    expected = bytes((protonum,)) + ip_address(source).packed + ip_address(target).packed + bytes(tail)
    assert parse(text).tuple_ == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not understood"),
        ("tcp 10.0.0.5", "is not understood"),
        ("tcp 10.0.0.5 in lan", "is not understood"),
        ("tpc 10.0.0.5 > 1.1.1.1:1", r"; did you mean 'tcp'\?$"),
        ("tcp fd00::5 > fd00::1", r"Say which port: \[fd00::1\]:443\.$"),
        ("tcp 10.0.0.5 > 1.1.1.1", "Say which port"),
        ("tcp 10.0.0.5 > 1.1.1:1", "is no address"),
        ("tcp 10.0.0.5 > ::1", "different families"),
        ("tcp 10.0.0.5 > 1.1.1.1:99999", "out of range"),
        ("gre 10.0.0.5 > 1.1.1.1:5", "has no ports"),
        ("icmp 10.0.0.5 > 1.1.1.1 type fly", "has no type"),
        ("icmp 10.0.0.5 > 1.1.1.1 code fly", "is no code"),
        ("tcp 10.0.0.5 > 1.1.1.1:1 state established", "no state"),
        ("tcp 10.0.0.5 > 1.1.1.1:1 via eth0", "is not understood"),
    ],
)
def test_what_is_not_understood(text: str, says: str) -> None:
    with pytest.raises(ExplainError, match=says):
        parse(text)


def test_the_command_asks_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fw.toml"
    path.write_text(TEXT)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "conntrackd", "explain", "--config", str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("tcp 10.0.0.5:1234 > 1.1.1.1:443 in lan out wan")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "=> out (accept): matches, as long as its limits allow"
    assert done.stdout.splitlines()[0] == "   udp (drop): it is tcp, not udp"
    assert run("tcp", "10.0.0.5:1234", "1.1.1.1:443", "in", "lan", "out", "wan").stdout == done.stdout
    assert (run("tcp 10.0.0.5 > 1.1.1.1:443").returncode, run("x").returncode) == (2, 2)
