"""The example configurations: they are right, without a warning, and decide as their comments say."""

from pathlib import Path

import pytest

from conntrackd import config
from conntrackd.lint import lint
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.explain import explain, parse

CONFIG = Path(__file__).parents[2] / "config"
EXAMPLES = [CONFIG / "conntrackd.toml", *sorted((CONFIG / "examples").glob("*.toml"))]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_no_warning(file: Path) -> None:
    assert lint(config.load(file), here=False) == []


@pytest.mark.parametrize(
    ("example", "packet", "decides", "action"),
    [
        ("home-router", "tcp 192.168.1.7 > 198.51.100.9:443 in lan out wan", "lan-to-internet", "accept"),
        ("home-router", "tcp 192.168.1.7 > 198.51.100.9:21 in lan out wan", "ftp", "accept"),
        ("home-router", "tcp 192.168.2.7 > 198.51.100.9:443 in guests out wan", "guests-to-internet", "accept"),
        ("home-router", "tcp 192.168.2.7 > 192.168.1.7:445 in guests out lan", "default-forward", "drop"),
        ("home-router", "tcp 192.168.2.7 > 192.168.2.1:22 in guests out self", "default-input", "drop"),
        ("home-router", "udp 192.168.2.7 > 192.168.2.1:53 in guests out self", "router-for-guests", "accept"),
        ("home-router", "tcp 192.168.1.7 > 192.168.1.1:22 in lan out self", "router-for-lan", "accept"),
        ("home-router", "tcp 203.0.113.5 > 198.51.100.1:22 in wan out self", "default-input", "drop"),
        ("home-router", "icmp 203.0.113.5 > 198.51.100.1 in wan out self", "ping", "accept"),
        ("home-router", "udp 203.0.113.5 > 192.168.1.20:3074 in wan out lan", "console", "accept"),
        ("home-router", "udp 203.0.113.5 > 192.168.1.21:3074 in wan out lan", "default-forward", "drop"),
        ("home-router", "udp [fe80::1] > [fe80::2]:546 in wan out self", "dhcpv6-from-provider", "accept"),
        ("server", "tcp 198.51.100.7 > 203.0.113.1:22 in net out self", "ssh-admins", "accept"),
        ("server", "tcp 192.0.2.7 > 203.0.113.1:22 in net out self", "ssh", "accept"),
        ("server", "tcp 192.0.2.7 > 203.0.113.1:443 in net out self", "web", "accept"),
        ("server", "udp 192.0.2.7 > 203.0.113.1:443 in net out self", "web", "accept"),
        ("server", "tcp 192.0.2.7 > 203.0.113.1:3306 in net out self", "default-input", "drop"),
        ("server", "tcp 192.0.2.7 > 203.0.113.1:113 in net out self", "ident", "reject"),
        ("server", "udp 192.0.2.7 > 203.0.113.53:53 in net out self", "name-server", "notrack"),
        ("server", "udp 192.0.2.7 > 203.0.113.1:53 in net out self", "default-input", "drop"),
        ("server", "tcp 203.0.113.1 > 192.0.2.7:80 in self out net", "default-output", "accept"),
        ("office", "tcp 10.10.1.1 > 10.30.0.5:8443 in desks out servers", "erp", "accept"),
        ("office", "tcp 10.10.1.1 > 10.30.0.5:9011 in desks out servers", "default-forward", "reject"),
        ("office", "tcp 10.10.1.1 > 10.30.0.5:5432 in desks out servers", "database-behind-erp-only", "reject"),
        ("office", "tcp 10.10.1.1 > 10.10.200.9:631 in desks out printers", "print", "accept"),
        ("office", "tcp 10.10.200.9 > 1.1.1.1:443 in printers out internet", "printers-stay", "drop"),
        ("office", "tcp 10.20.0.1 > 203.0.113.9:5060 in phones out internet", "phones", "accept"),
        ("office", "udp 10.20.0.1 > 203.0.113.9:20000 in phones out internet", "phone-media", "accept"),
        ("office", "tcp 10.30.0.9 > 203.0.113.9:443 in servers out internet", "backup", "accept"),
        ("office", "tcp 10.30.0.5 > 203.0.113.9:443 in servers out internet", "updates", "accept"),
        ("office", "tcp 10.30.0.5 > 203.0.113.9:25 in servers out internet", "default-forward", "reject"),
        ("office", "tcp 10.40.0.5 > 10.10.1.1:445 in visitors out desks", "default-forward", "reject"),
        ("office", "tcp 10.40.0.5 > 203.0.113.9:443 in visitors out internet", "visitors", "accept"),
        ("office", "tcp 10.1.2.3 > 203.0.113.1:443 in internet out self", "spoofed", "drop"),
        ("office", "udp 203.0.113.9 > 203.0.113.1:51820 in internet out self", "vpn-in", "accept"),
        ("office", "tcp 203.0.113.9 > 203.0.113.1:22 in internet out self", "default-input", "drop"),
        ("office", "tcp 10.99.0.4 > 10.99.0.1:22 in vpn out self", "admin", "accept"),
    ],
)
def test_the_examples_decide_as_they_say(example: str, packet: str, decides: str, action: str) -> None:
    ruleset = compile_ruleset(config.load(CONFIG / "examples" / f"{example}.toml"), 1)
    parsed = parse(packet)
    steps = explain(ruleset, parsed, ruleset.zones[parsed.way_in], ruleset.zones[parsed.way_out], 0)
    assert (steps[-1].rule, steps[-1].action) == (decides, action)
    assert not any(step.matches for step in steps[:-1])
