"""Warnings: what is probably not meant, and only that."""

from pathlib import Path

import pytest

from conntrackd import config
from conntrackd.lint import cuts_ssh, lint
from tests.unit.test_config import run_check

ZONES = 'version = 1\n[zones]\nlan = { interfaces = "eth1" }\nwan = { interfaces = "eth0" }\n'
SETS = '[sets.a]\naddresses = "10.1.0.0/16"\n[sets.b]\n'


def rules(*texts: str) -> str:
    return "".join(f'[[rule]]\nname = "r{n}"\n{text}\n' for n, text in enumerate(texts))


def warnings(text: str, here: bool = False) -> list[str]:
    return [warning.message for warning in lint(config.parse(text.encode(), "test.toml"), here)]


@pytest.mark.parametrize(
    ("first", "second", "covered"),
    [
        ('action = "drop"', 'action = "accept"', True),
        ('from = "lan"\naction = "drop"', 'from = "lan"\nservice = "web"\naction = "accept"', True),
        ('from = "lan"\naction = "drop"', 'from = ["lan", "wan"]\naction = "accept"', False),
        ('from = "lan"\naction = "drop"', 'action = "accept"', False),
        ('to = "self"\naction = "drop"', 'to = "self"\naction = "drop"', True),
        ('source = "10.0.0.0/8"\naction = "drop"', 'source = ["10.1.2.3", "10.2.0.0/16"]\naction = "accept"', True),
        ('source = "10.0.0.0/8"\naction = "drop"', 'source = ["10.1.2.3", "11.2.0.0/16"]\naction = "accept"', False),
        ('source = "10.0.0.0/8"\naction = "drop"', 'source = ["10.1.2.3", "2001:db8::1"]\naction = "accept"', False),
        ('source = "2001:db8::/32"\naction = "drop"', 'destination = "fe80::1"\naction = "accept"', False),
        ('service = "web"\naction = "drop"', 'protocol = "tcp"\nport = 443\naction = "accept"', True),
        ('service = "web"\naction = "drop"', 'protocol = "tcp"\nport = "443-444"\naction = "accept"', False),
        ('service = "web"\naction = "drop"', 'action = "accept"', False),
        ('source = "@a"\naction = "drop"', 'source = "@a"\nservice = "ssh"\naction = "accept"', True),
        ('source = "@a"\naction = "drop"', 'source = "10.1.2.3"\naction = "accept"', False),
        ('source = "!10.0.0.0/8"\naction = "drop"', 'source = "11.0.0.1"\naction = "accept"', False),
        ('state = "invalid"\naction = "drop"', 'action = "accept"', False),
        ('state = ["new", "invalid"]\naction = "drop"', 'action = "accept"', True),
        ('action = "log"', 'action = "accept"', False),
        ('action = "notrack"', 'action = "accept"', False),
    ],
)
def test_rules_behind_others(first: str, second: str, covered: bool) -> None:
    used = '[[rule]]\nname = "used"\nfrom = "wan"\nto = "lan"\nsource = ["@a", "@b"]\naction = "log"\n'
    text = ZONES + SETS + used + rules(first, second)
    expected = ["rule 'r1' is never reached: rule 'r0' decides about all that it matches"] if covered else []
    assert warnings(text) == expected


def test_a_rule_that_never_matches() -> None:
    text = rules('source = "10.0.0.0/8"\ndestination = "::1"\naction = "accept"')
    assert warnings("version = 1\n" + text) == [
        "rule 'r0' never matches: its source and its destination are of different families"
    ]


def test_what_nobody_uses() -> None:
    text = ZONES + SETS + '[services]\nown = "tcp/1"\n' + rules('from = "lan"\nsource = "@a"\naction = "accept"')
    assert warnings(text) == [
        "zone 'wan' is used by no rule",
        "set 'b' is used by no rule",
        "service 'own' is used by no rule",
    ]


def test_a_set_that_is_empty_for_ever() -> None:
    text = "version = 1\n[sets.s]\nsize = 0\n" + rules('source = "@s"\naction = "drop"')
    assert warnings(text) == ["set 's' is empty, and nothing can be added to it"]


def test_a_zone_without_an_interface_here() -> None:
    text = 'version = 1\n[zones]\na = { interfaces = ["lo", "none0"] }\nb = { interfaces = ["none2", "none1*"] }\n'
    text += 'c = { sources = "10.0.0.0/8" }\n' + rules('from = ["a", "b", "c"]\naction = "accept"')
    assert warnings(text) == []
    assert warnings(text, here=True) == ["zone 'b' is empty: this machine has no interface none2 or none1*"]


def test_a_big_ruleset_is_looked_through_in_no_time() -> None:
    text = rules(*(f'source = "10.{n >> 8}.{n & 255}.0/24"\naction = "drop"' for n in range(3000)))
    text += '[[rule]]\nname = "behind"\nsource = "10.3.7.9"\naction = "accept"\n'
    assert warnings("version = 1\n" + text) == [
        "rule 'behind' is never reached: rule 'r775' decides about all that it matches"
    ]


@pytest.mark.parametrize(
    ("rule", "cut"),
    [
        ('to = "self"\nservice = "ssh"\naction = "accept"', False),
        ('to = "self"\nservice = "web"\naction = "accept"', True),
        ('source = "127.0.0.1"\nservice = "ssh"\naction = "drop"', True),
    ],
)
def test_the_ssh_connection_one_is_on(monkeypatch: pytest.MonkeyPatch, rule: str, cut: bool) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 50000 127.0.0.1 22")
    sentence = cuts_ssh(config.parse(("version = 1\n" + rules(rule)).encode(), "test.toml"))
    assert sentence.startswith("This would cut the SSH connection that you are on, from 127.0.0.1") == cut
    for nonsense in ("", "x", "1 2 3 4", "127.0.0.1 5 ::1 22", "127.0.0.1 99999999 127.0.0.1 22"):
        monkeypatch.setenv("SSH_CONNECTION", nonsense)
        assert cuts_ssh(config.parse(b"version = 1", "test.toml")) == ""


def test_check_shows_warnings_and_strict_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fw.toml"
    path.write_text(ZONES + rules('from = "lan"\naction = "accept"'))
    assert run_check(str(path)) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}: ok, 2 zones, 1 rule\n"
    assert err.startswith(f"{path}:4:1: warning: zone 'wan' is used by no rule\n    4 | wan = ")
    assert run_check(str(path), "--strict") == 1
    assert run_check(str(path), "-o", "json") == 0
    assert '"kind": "warning"' in capsys.readouterr().out


def test_a_watch_without_rules_of_our_own() -> None:
    text = 'version = 1\n[rules]\nat_start = "leave"\n'
    assert warnings(text) == []
    assert warnings(text + 'watch = "off"\n') == []
    assert "nothing is watched" in warnings(text + 'watch = "warn"\n')[0]
