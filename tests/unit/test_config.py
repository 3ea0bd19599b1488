import argparse
import json
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from conntrackd import config
from conntrackd.cli import check
from conntrackd.config import Config, ConfigError, ConfigErrors
from conntrackd.core.sysctl import Sysctl
from conntrackd.mistakes import any_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config" / "conntrackd.toml"
REFERENCE = ROOT / "docs" / "config.md"


def parse(text: str) -> Config:
    return config.parse(text.encode(), "test.toml")


def errors_of(text: str) -> list[ConfigError]:
    with pytest.raises(ConfigErrors) as raised:
        parse(text)
    return raised.value.errors


def pointed_at(text: str) -> tuple[str, str, str]:
    """Return what the only error of a text points at, its message and its hint."""
    (error,) = errors_of(text)
    assert error.source == text.split("\n")[error.line - 1]
    return error.source[error.column - 1 : error.end_column - 1], error.message, error.hint


def rule(text: str) -> str:
    return f'version = 1\n[zones]\nlan = {{ interfaces = "eth1" }}\n[[rule]]\nname = "r"\naction = "drop"\n{text}\n'


# --- What is right ---------------------------------------------------------------------------------------------


def test_the_shortest_file_is_a_closed_firewall() -> None:
    least = parse("version = 1")
    assert least.queue.numbers == (0, 1)
    assert not least.queue.bypass
    assert least.queue.mark_mask == 0xFC000000
    assert least.exception.internal_error == "drop"
    assert least.policy.model_dump() == {
        "default": "drop",
        "input": "drop",
        "output": "accept",
        "invalid": "drop",
        "fragment": "drop",
        "related": "accept",
        "log_denied": False,
        "log_limit": (10, 1000),
        "reject_limit": (100, 1000),
    }
    assert not least.reload.rejudge
    assert least.rule == ()
    assert sysctls(least.sysctl()) == sysctls(Sysctl())


def sysctls(sysctl: Sysctl) -> dict[str, int]:
    return {name: getattr(sysctl, name) for name in dir(sysctl) if not name.startswith("_")}


def test_one_value_stands_for_a_list_of_one() -> None:
    one = parse(rule('from = "lan"\nprotocol = "tcp"\nport = 22\nsource = "10.0.0.0/8"'))
    several = parse(rule('from = ["lan"]\nprotocol = ["tcp"]\nport = [22]\nsource = ["10.0.0.0/8"]'))
    assert one.model_dump() == several.model_dump()
    (only,) = one.rule
    assert (only.from_, only.to) == (("lan",), ("any",))
    assert (only.protocol, only.port) == ((6,), ((22, 22),))
    assert only.source == ((False, ip_network("10.0.0.0/8"), ""),)


@pytest.mark.parametrize(
    ("written", "read"),
    [("80", (80, 80)), ('"80"', (80, 80)), ('"8000-8080"', (8000, 8080)), ("0", (0, 0)), ("65535", (65535, 65535))],
)
def test_port(written: str, read: tuple[int, int]) -> None:
    assert parse(rule(f'protocol = "tcp"\nport = {written}')).rule[0].port == (read,)


@pytest.mark.parametrize(
    ("protocol", "written", "read"),
    [
        ('["icmp", "icmpv6"]', '"echo-request"', ((1, 8), (58, 128))),
        ('"icmp"', '"echo-request"', ((1, 8),)),
        ('"icmpv6"', '"echo-request"', ((58, 128),)),
        ('"icmp"', "13", ((1, 13),)),
    ],
)
def test_icmp_type(protocol: str, written: str, read: tuple[tuple[int, int], ...]) -> None:
    assert parse(rule(f"protocol = {protocol}\nicmp_type = {written}")).rule[0].icmp_type == (read,)


@pytest.mark.parametrize(
    ("written", "milliseconds"),
    [
        ("7", 7000),
        ('"500ms"', 500),
        ('"120s"', 120_000),
        ('"30m"', 1_800_000),
        ('"2h"', 7_200_000),
        ('"5d"', 432_000_000),
        ('"5 d"', 432_000_000),
    ],
)
def test_timeouts_are_milliseconds(written: str, milliseconds: int) -> None:
    sysctl = parse(f"version = 1\n[conntrack]\nudp_timeout = {written}").sysctl()
    assert sysctl.udp_timeout == milliseconds
    assert sysctl.udp_timeout_stream == Sysctl().udp_timeout_stream


@pytest.mark.parametrize(("written", "number"), [("0", 0), ("1", 1), ("false", 0), ("true", 1)])
def test_switches(written: str, number: int) -> None:
    assert parse(f"version = 1\n[conntrack]\ntcp_loose = {written}").sysctl().tcp_loose == number


def test_counts() -> None:
    assert parse("version = 1\n[conntrack]\nmax = 1_000").sysctl().max == 1000


def test_every_sysctl_of_the_tracker_can_be_set() -> None:
    lines = [f"{name} = 1" for name in sysctls(Sysctl())]
    changed = sysctls(parse("\n".join(["version = 1", "[conntrack]", *lines])).sysctl())
    assert set(changed.values()) == {1, 1000}


def test_sysctls_that_the_file_does_not_name_are_not_in_the_configuration() -> None:
    assert parse('version = 1\n[conntrack]\nmax = 5\nudp_timeout = "1m"').conntrack == {
        "max": 5,
        "udp_timeout": 60_000,
    }


def test_lines_may_end_as_on_windows() -> None:
    (error,) = errors_of("version = 1\r\nfoo = 1\r\n")
    assert (error.line, error.source) == (2, "foo = 1")


# --- What is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        # Keys and types.
        ("", "", "the key 'version' is missing", ""),
        ("version = 2", "2", "version 2 is too large (expected at most 1)", ""),
        ("version = true", "true", "'version' cannot be true (expected a whole number)", ""),
        (
            "version = 1\nfoo = 1",
            "foo",
            f"unknown key 'foo' (expected {any_of(sorted(Config.model_fields))})",
            "",
        ),
        ("version = 1\n[polices]", "polices", "unknown key 'polices'", "did you mean 'policy'?"),
        ("version = 1\nqueue = [1]", "[1]", "'queue' cannot be a list (expected a table)", ""),
        (
            "version = 1\n[rule]",
            "[rule]",
            "'rule' cannot be a table (expected a list of tables, each headed by [[rule]])",
            "",
        ),
        # [queue] and [rules].
        (
            'version = 1\nqueue.bypass = "yes"',
            '"yes"',
            "'bypass' cannot be 'yes' (expected true or false)",
            "",
        ),
        (
            "version = 1\nqueue.numbers = [3, 3]",
            "[3, 3]",
            "both queues have the same number",
            "prerouting and postrouting need a queue each",
        ),
        ("version = 1\nqueue.numbers = 3", "3", "'numbers' lists too few (expected at least 2)", ""),
        (
            "version = 1\nqueue.numbers = [1, 2, 3]",
            "[1, 2, 3]",
            "'numbers' lists too many (expected at most 2)",
            "",
        ),
        (
            "version = 1\nqueue.numbers = [0, 65536]",
            "65536",
            "numbers 65536 is too large (expected at most 65535)",
            "",
        ),
        (
            "version = 1\nqueue.mark_mask = 0xf8000000",
            "0xf8000000",
            "mark_mask 0xf8000000 has 5 bits set (expected at least 6)",
            "the default is 0xfc000000",
        ),
        (
            "version = 1\nqueue.mark_mask = 0x1fc000000",
            "0x1fc000000",
            "mark_mask 8522825728 is too large (expected at most 4294967295)",
            "",
        ),
        (
            "version = 1\nqueue.max_length = 0",
            "0",
            "max_length 0 is too small (expected at least 1)",
            "",
        ),
        (
            'version = 1\n[rules]\niptables = "iptables-legcy"',
            '"iptables-legcy"',
            "unknown iptables 'iptables-legcy' (expected iptables, iptables-legacy or iptables-nft)",
            "did you mean 'iptables-legacy'?",
        ),
        (
            'version = 1\n[rules]\nwatch_every = "500ms"',
            '"500ms"',
            "that is more often than the daemon can look",
            "once a second is the most",
        ),
        (
            "version = 1\nqueue.socket_buffer = 0x1" + 4000 * "0",
            "0x1" + 4000 * "0",
            "socket_buffer a huge number is too large (expected at most 1073741824)",
            "",
        ),
        # [conntrack].
        (
            "version = 1\n[conntrack]\ntcp_timeout_estblished = 1",
            "tcp_timeout_estblished",
            "unknown key 'tcp_timeout_estblished'",
            "did you mean 'tcp_timeout_established'?",
        ),
        (
            "version = 1\n[conntrack]\nnf_conntrack_udp_timeout_stream = 1",
            "nf_conntrack_udp_timeout_stream",
            "unknown key 'nf_conntrack_udp_timeout_stream'",
            "did you mean 'udp_timeout_stream'?",
        ),
        (
            'version = 1\n[conntrack]\nudp_timeout = "5 days"',
            '"5 days"',
            "'5 days' is no time (expected seconds or as '500ms', '120s', '30m', '2h', '5d')",
            "",
        ),
        (
            "version = 1\n[conntrack]\nudp_timeout = 1.5",
            "1.5",
            "1.5 is no time (expected seconds or as '500ms', '120s', '30m', '2h', '5d')",
            "",
        ),
        (
            "version = 1\n[conntrack]\nudp_timeout = true",
            "true",
            "true is no time (expected seconds or as '500ms', '120s', '30m', '2h', '5d')",
            "",
        ),
        (
            "version = 1\n[conntrack]\nudp_timeout = 0",
            "0",
            "a timeout of 0 would end connections at once (expected more than 0)",
            "",
        ),
        (
            "version = 1\n[conntrack]\ntcp_loose = 2",
            "2",
            "2 is no switch (expected 0, 1, false or true)",
            "",
        ),
        ("version = 1\n[conntrack]\nmax = -1", "-1", "max -1 is too small (expected at least 0)", ""),
        (
            "version = 1\n[conntrack]\nmax = true",
            "true",
            "'max' cannot be true (expected a whole number)",
            "",
        ),
        # [zones].
        (
            'version = 1\n[zones]\nself = { interfaces = "eth1" }',
            "self",
            "zone 'self' is built in and cannot be defined",
            "choose another name",
        ),
        (
            'version = 1\n[zones.any]\ninterfaces = "eth1"',
            "any",
            "zone 'any' is built in and cannot be defined",
            "choose another name",
        ),
        (
            'version = 1\n[zones]\n"l n" = { interfaces = "eth1" }',
            '"l n"',
            "'l n' is no name (expected up to 63 letters, digits, '-', '_' or '.')",
            "",
        ),
        (
            "version = 1\n[zones]\nlan = {}",
            "{}",
            "the zone does not say where it is",
            "add interfaces = ['eth1'] or sources = ['10.0.0.0/8']",
        ),
        (
            'version = 1\n[zones]\nlan = { interface = "eth1", interfaces = "eth2" }',
            "interface",
            "unknown key 'interface'",
            "did you mean 'interfaces'?",
        ),
        (
            'version = 1\n[zones]\nlan = { interfaces = ["eth1", "e*th"] }',
            '"e*th"',
            "'e*th' is no interface (expected a name as eth1 or a beginning as veth*)",
            "",
        ),
        (
            'version = 1\n[zones]\nlan = { interfaces = ["eth1", "veth+"] }',
            '"veth+"',
            "'veth+' is no interface (expected a name as eth1 or a beginning as veth*)",
            "did you mean 'veth*'?",
        ),
        (
            'version = 1\n[zones]\nlan = { interfaces = "a-very-long-name" }',
            '"a-very-long-name"',
            "'a-very-long-name' is no interface (expected a name as eth1 or a beginning as veth*)",
            "",
        ),
        (
            'version = 1\n[zones]\nlan = { interfaces = "a*" }\nwan = { interfaces = ["b*", "a*"] }',
            '"a*"',
            "interface 'a*' already belongs to a zone",
            "an interface is in one zone only",
        ),
        # [policy].
        (
            'version = 1\npolicy = { default = "dorp" }',
            '"dorp"',
            "unknown default 'dorp' (expected accept, drop or reject)",
            "did you mean 'drop'?",
        ),
        # [[rule]].
        ('version = 1\n[[rule]]\nname = "r"', "[[rule]]", "the key 'action' is missing", ""),
        (rule('form = "lan"'), "form", "unknown key 'form'", "did you mean 'from'?"),
        (
            rule('from = "LAN"'),
            '"LAN"',
            "unknown zone 'LAN' (expected lan, self or any)",
            "did you mean 'lan'?",
        ),
        (
            rule('to = ["lan", "wan"]'),
            '"wan"',
            "unknown zone 'wan' (expected lan, self or any)",
            "did you mean 'lan'?",
        ),
        (rule("to = []"), "[]", "'to' lists too few (expected at least 1)", ""),
        (rule("to = 3"), "3", "'to' cannot be 3 (expected text in quotes)", ""),
        (
            rule('protocol = "tpc"'),
            '"tpc"',
            "unknown protocol 'tpc' (expected gre, icmp, icmpv6, sctp, tcp, udp, udplite or a number from 0 to 255)",
            "did you mean 'tcp'?",
        ),
        (
            rule("protocol = 256"),
            "256",
            "unknown protocol 256 (expected gre, icmp, icmpv6, sctp, tcp, udp, udplite or a number from 0 to 255)",
            "",
        ),
        (
            rule('source = ["10.0.0.0/8", "10.1.2.3/8"]'),
            '"10.1.2.3/8"',
            "'10.1.2.3/8' has bits set behind its prefix",
            "did you mean '10.0.0.0/8'?",
        ),
        (
            rule('destination = "2001:db8::1/64"'),
            '"2001:db8::1/64"',
            "'2001:db8::1/64' has bits set behind its prefix",
            "did you mean '2001:db8::/64'?",
        ),
        (
            rule('destination = "fe80::1%eth0"'),
            '"fe80::1%eth0"',
            "'fe80::1%eth0' is no address or network (expected as '192.0.2.1', '10.0.0.0/8' or '2001:db8::/32')",
            "",
        ),
        (
            rule("source = 10"),
            "10",
            "10 is no address or network (expected as '192.0.2.1', '10.0.0.0/8' or '2001:db8::/32')",
            "",
        ),
        (
            rule("port = 80"),
            "80",
            "'port' needs a protocol that has it (expected tcp, udp, sctp or udplite)",
            "add protocol = 'tcp'",
        ),
        (
            rule('protocol = ["tcp", "icmp"]\nport = 80'),
            "80",
            "'port' needs a protocol that has it (expected tcp, udp, sctp or udplite)",
            "",
        ),
        (
            rule('protocol = "tcp"\nport = ["80", 65536]'),
            "65536",
            "port 65536 is out of range (expected 0 to 65535)",
            "",
        ),
        (
            rule('protocol = "tcp"\nport = "https"'),
            '"https"',
            "'https' is no port (expected a number or a range as '8000-8080')",
            "",
        ),
        (
            rule('protocol = "tcp"\nport = "90-80"'),
            '"90-80"',
            "port range '90-80' is backwards",
            "did you mean '80-90'?",
        ),
        (
            rule('icmp_type = "echo-request"'),
            '"echo-request"',
            "'icmp_type' needs a protocol that has it (expected icmp or icmpv6)",
            "add protocol = 'icmp'",
        ),
        (
            rule('protocol = "icmpv6"\nicmp_type = "echo-reqest"'),
            '"echo-reqest"',
            "unknown ICMP type 'echo-reqest' (expected echo-request, node-information-query or a number from 0 to 255)",
            "did you mean 'echo-request'?",
        ),
        (
            rule('[[rule]]\nname = "r"\naction = "drop"'),
            '"r"',
            "rule name 'r' is used twice",
            "give each rule its own name",
        ),
        (
            'version = 1\n[[rule]]\nname = "default-input"\naction = "drop"',
            '"default-input"',
            "rule name 'default-input' is built in",
            "choose another name",
        ),
    ],
)
def test_mistake(text: str, place: str, message: str, hint: str) -> None:
    assert pointed_at(text) == (place, message, hint)


@pytest.mark.parametrize(
    ("source", "line", "column", "message"),
    [
        (b"version = 1\nfoo = bar\n", 2, 7, "invalid value; text must stand in quotes"),
        (b"version = 1\n[zones\n", 2, 7, "expected ']' at the end of a table declaration"),
        (b"version = 1\nversion = 1\n", 2, 12, "cannot overwrite a value"),
        (b'version = 1\nfoo = "bar', 2, 11, "unterminated string"),
        (b"version = 1\n# \xc3\xbc\xff\n", 2, 4, "the text is not UTF-8"),
        (b"a = " + b"9" * 10_000, 1, 1, "a number has too many digits"),
        (b"a = " + b"[" * 100_000, 1, 1, "lists or tables are nested too deeply"),
    ],
)
def test_a_text_that_is_no_toml(source: bytes, line: int, column: int, message: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        config.parse(source, "test.toml")
    (error,) = raised.value.errors
    assert (error.line, error.column) == (line, column)
    assert str(error).splitlines()[0] == f"test.toml:{line}:{column}: error: {message}"


THREE_MISTAKES = """\
version = 1

[zones]
lan = { interfaces = ["eth1"] }

[[rule]]
name = "web"
from = "lna"
\tport = [80, 99999]
protocol = "tcp"
action = "acept"
"""


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    with pytest.raises(ConfigErrors) as raised:
        config.parse(THREE_MISTAKES.encode(), "fw.toml")
    assert str(raised.value) == (
        "fw.toml:8:8: error: unknown zone 'lna' (expected lan, self or any); did you mean 'lan'?\n"
        '    8 | from = "lna"\n'
        "      |        ^^^^^\n"
        "fw.toml:9:14: error: port 99999 is out of range (expected 0 to 65535)\n"
        "    9 | \tport = [80, 99999]\n"
        "      | \t            ^^^^^\n"
        "fw.toml:11:10: error: unknown action 'acept' (expected accept, drop, reject, log or notrack); "
        "did you mean 'accept'?\n"
        '   11 | action = "acept"\n'
        "      |          ^^^^^^^\n"
        "3 errors; nothing was changed"
    )


def test_one_mistake_is_one_error() -> None:
    with pytest.raises(ConfigErrors) as raised:
        parse("version = 3")
    assert str(raised.value).endswith("\n1 error; nothing was changed")


def test_a_wrong_protocol_is_not_blamed_on_the_port_too() -> None:
    (error,) = errors_of(rule('protocol = "tpc"\nport = 80'))
    assert "unknown protocol" in error.message


# --- The command -----------------------------------------------------------------------------------------------


def run_check(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    args = parser.parse_args(["check", *arguments])
    code = args.func(args)
    assert isinstance(code, int)
    return code


def test_check_of_a_good_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(str(EXAMPLE)) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{EXAMPLE}: ok, 2 zones, 6 rules\n", "")
    assert run_check("-o", "json", str(EXAMPLE)) == 0
    assert capsys.readouterr() == ("[]\n", "")


def test_check_of_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(THREE_MISTAKES)
    assert run_check(str(path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.findall(r":(\d+:\d+): error:", err) == ["8:8", "9:14", "11:10"]
    assert err.endswith("3 errors; nothing was changed\n")

    assert run_check(str(path), "-o", "json") == 2
    out, err = capsys.readouterr()
    assert err == ""
    printed: list[dict[str, Any]] = json.loads(out)
    assert len(printed) == 3
    assert printed[0] == {
        "kind": "error",
        "file": str(path),
        "line": 8,
        "column": 8,
        "end_column": 13,
        "message": "unknown zone 'lna' (expected lan, self or any)",
        "hint": "did you mean 'lan'?",
        "source": 'from = "lna"',
    }


def test_check_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.toml"
    assert run_check(str(missing)) == 2
    assert capsys.readouterr().err == (
        f"{missing}: error: the configuration cannot be read: No such file or directory\n"
    )
    assert run_check(str(tmp_path)) == 2
    assert capsys.readouterr().err == (f"{tmp_path}: error: the configuration cannot be read: Is a directory\n")


# --- The example and the reference -----------------------------------------------------------------------------


def test_the_example_shows_the_defaults() -> None:
    example = config.load(EXAMPLE)
    least = parse("version = 1")
    for section in ("queue", "rules", "policy", "exception", "reload"):
        assert getattr(example, section) == getattr(least, section)
        # Every key is there to be seen.
        assert getattr(example, section).model_fields_set == set(type(getattr(least, section)).model_fields)
    assert example.conntrack
    assert sysctls(example.sysctl()) == sysctls(Sysctl())


def test_the_reference_has_every_key() -> None:
    text = REFERENCE.read_text()
    models = (
        Config,
        config.Queue,
        config.Rules,
        config.Zone,
        config.Policy,
        config.Metrics,
        config.Rule,
        config.Conntrack,
    )
    for model in models:
        for name, field in model.model_fields.items():
            key = field.alias or name
            assert re.search(rf"`\[?\[?{key}\]?\]?`", text), f"docs/config.md does not name {key}"


def test_the_example_in_the_reference_is_right() -> None:
    examples = re.findall(r"```toml\n(.*?)```", REFERENCE.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        parse(example)


# --- More than one file ----------------------------------------------------------------------------------------


def test_files_of_sets(tmp_path: Path) -> None:
    main = tmp_path / "fw.toml"
    main.write_text('version = 1\n[sets.bad]\naddresses = "192.0.2.1"\nfile = "bad.txt"\n')
    (tmp_path / "bad.txt").write_text("# one a line\n10.0.0.0/8\n\n  2001:db8::/32 # with a comment\n10.0.0.1\r\n::1")
    addresses = config.load(main).addresses("bad")
    assert addresses.count() == 5
    assert addresses.ipv4 == {8: {10: 0}, 32: {0x0A000001: 0, 0xC0000201: 0}}
    assert addresses.ipv6 == {32: {0x20010DB8: 0}, 128: {1: 0}}


def test_mistakes_in_a_file_of_a_set(tmp_path: Path) -> None:
    main = tmp_path / "fw.toml"
    main.write_text('version = 1\n[sets.bad]\nfile = "bad.txt"\n[policy]\ninput = "deny"\n')
    lines = ["10.0.0.1", "  10.0.0.1/8", "hello # there", "10.0.0.0/33", "1.2.3.4/", "::1/x", "fe80::1%eth0"]
    (tmp_path / "bad.txt").write_text("\n".join(lines))
    with pytest.raises(ConfigErrors) as raised:
        config.load(main)
    assert [(Path(error.file).name, error.line, error.column) for error in raised.value.errors] == [
        ("fw.toml", 5, 9),
        *(("bad.txt", number, 3 if number == 2 else 1) for number in range(2, 8)),
    ]
    assert raised.value.errors[1].hint == "did you mean '10.0.0.0/8'?"
    assert raised.value.errors[2].source == "hello # there"
    # What is something else altogether is not listed line by line.
    (tmp_path / "bad.txt").write_text("x\n" * 1000)
    with pytest.raises(ConfigErrors) as raised:
        config.load(main)
    assert len(raised.value.errors) == 1 + config.SET_FILE_ERRORS


def test_a_conf_d_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    main, parts = tmp_path / "fw.toml", tmp_path / "conf.d"
    main.write_text("version = 1\n")
    parts.symlink_to(parts)
    with pytest.raises(ConfigErrors, match=r"conf\.d: error: the configuration cannot be read: Too many levels"):
        config.load(main)


def test_conf_d(tmp_path: Path) -> None:
    main = tmp_path / "fw.toml"
    main.write_text('version = 1\n[zones]\nlan = { interfaces = "eth1" }\n[[rule]]\nname = "a"\naction = "drop"\n')
    parts = tmp_path / "conf.d"
    parts.mkdir()
    (parts / "20.toml").write_text('[[rule]]\nname = "c"\nfrom = "wan"\nservice = "own"\naction = "drop"\n')
    (parts / "10.toml").write_text(
        '[zones]\nwan = { interfaces = "eth0" }\n[services]\nown = "tcp/1"\n[[rule]]\nname = "b"\naction = "drop"\n'
    )
    (parts / "ignored.txt").write_text("no TOML")
    whole = config.load(main)
    assert [rule.name for rule in whole.rule] == ["a", "b", "c"]
    assert list(whole.zones) == ["lan", "wan"]

    (parts / "30.toml").write_text(
        '[zones]\nlan = { interfaces = "eth5" }\n[polcy]\n[[rule]]\nname = "d"\naction = "x"\n'
    )
    (parts / "40.toml").write_text("sets = 5\nrule = {}\n")
    with pytest.raises(ConfigErrors) as raised:
        config.load(main)
    assert [(Path(error.file).name, error.line, error.message) for error in raised.value.errors] == [
        ("30.toml", 2, f"zones.lan is already defined in {main}"),
        ("30.toml", 3, "'polcy' does not belong in a file of conf.d (expected labels, rule, services, sets or zones)"),
        ("30.toml", 6, "unknown action 'x' (expected accept, drop, reject, log or notrack)"),
        ("40.toml", 1, "'sets' cannot be 5 (expected a table)"),
        ("40.toml", 2, "'rule' cannot be a table (expected a list of tables, each headed by [[rule]])"),
    ]
    (parts / "30.toml").write_text("x = ")
    with pytest.raises(ConfigErrors) as raised:
        config.load(main)
    assert [Path(error.file).name for error in raised.value.errors] == ["30.toml"]


def test_a_terminal_obeys_no_configuration() -> None:
    with pytest.raises(ConfigErrors) as caught:
        config.parse(b'version = 1\n[zones]\nlan = { interfaces = "\x1b[31m" }\n', "test.toml")
    assert "\x1b" not in str(caught.value)
    assert 'interfaces = "\ufffd[31m"' in str(caught.value)
