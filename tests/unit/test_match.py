from ipaddress import ip_address
from pathlib import Path

import pytest

from conntrackd import config
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.match import in_traffic, judge, log_matches, untracked
from conntrackd.policy.ruleset import INVALID, NEW, RELATED, Ruleset

EXAMPLE = Path(__file__).parents[2] / "config" / "conntrackd.toml"
SELF, WAN, LAN, WLAN, OTHER = 0, 2, 3, 4, 5
TCP, UDP, ICMP, ICMPV6, SCTP = 6, 17, 1, 58, 132


def packet(protonum: int, source: str, destination: str, dport: int) -> bytes:
    addresses = ip_address(source).packed + ip_address(destination).packed
    return bytes((protonum,)) + addresses + (40000).to_bytes(2, "big") + dport.to_bytes(2, "big")


def ping(protonum: int, source: str, destination: str, icmp_type: int) -> bytes:
    return packet(protonum, source, destination, icmp_type << 8)


@pytest.fixture
def example() -> Ruleset:
    compiled = compile_ruleset(config.load(EXAMPLE), 1)
    compiled.set_links({1: "lo", WAN: "eth0", LAN: "eth1", WLAN: "wlan0", OTHER: "wg0"})
    return compiled


HOST, ROUTER, WORLD = "192.168.1.7", "192.168.1.1", "198.51.100.9"
HOST6, ROUTER6, WORLD6 = "2001:db8:1::7", "2001:db8:1::1", "2001:db8:ffff::9"


@pytest.mark.parametrize(
    ("tuple_", "iif", "oif", "name", "accept"),
    [
        # lan to the internet: everything.
        (packet(TCP, HOST, WORLD, 443), LAN, WAN, "lan-to-internet", True),
        (packet(UDP, HOST6, WORLD6, 53), WLAN, WAN, "lan-to-internet", True),
        (packet(SCTP, HOST, WORLD, 1), LAN, WAN, "lan-to-internet", True),
        # The internet to lan: nothing, not even ping.
        (packet(TCP, WORLD, HOST, 22), WAN, LAN, "default-forward", False),
        (packet(UDP, WORLD6, HOST6, 53), WAN, WLAN, "default-forward", False),
        (ping(ICMP, WORLD, HOST, 8), WAN, LAN, "default-forward", False),
        # To the router from lan: SSH, DNS, DHCP.
        (packet(TCP, HOST, ROUTER, 22), LAN, SELF, "ssh-from-lan", True),
        (packet(TCP, HOST6, ROUTER6, 22), WLAN, SELF, "ssh-from-lan", True),
        (packet(UDP, HOST, ROUTER, 53), LAN, SELF, "dns-from-lan", True),
        (packet(TCP, HOST, ROUTER, 53), LAN, SELF, "dns-from-lan", True),
        (packet(UDP, "0.0.0.0", "255.255.255.255", 67), LAN, SELF, "dhcp-from-lan", True),
        (packet(UDP, "fe80::7", "ff02::1:2", 547), LAN, SELF, "dhcp-from-lan", True),
        (packet(TCP, HOST, ROUTER, 80), LAN, SELF, "default-input", False),
        (packet(UDP, HOST, ROUTER, 22), LAN, SELF, "default-input", False),
        # To the router from the internet: ping and the DHCPv6 answer only.
        (packet(TCP, WORLD, ROUTER, 22), WAN, SELF, "default-input", False),
        (ping(ICMP, WORLD, ROUTER, 8), WAN, SELF, "ping", True),
        (ping(ICMPV6, WORLD6, ROUTER6, 128), WAN, SELF, "ping", True),
        (ping(ICMP, WORLD, ROUTER, 13), WAN, SELF, "default-input", False),
        (ping(ICMPV6, WORLD6, ROUTER6, 139), WAN, SELF, "default-input", False),
        (packet(UDP, "fe80::1", "fe80::2", 546), WAN, SELF, "dhcpv6-from-provider", True),
        (packet(UDP, WORLD6, ROUTER6, 546), WAN, SELF, "default-input", False),
        # From the router: everything.
        (packet(TCP, ROUTER, WORLD, 443), SELF, WAN, "default-output", True),
        (packet(TCP, ROUTER, HOST, 443), SELF, LAN, "default-output", True),
        # An interface without a zone is in "any" only.
        (ping(ICMP, WORLD, ROUTER, 8), OTHER, SELF, "ping", True),
        (packet(TCP, WORLD, ROUTER, 22), OTHER, SELF, "default-input", False),
        (packet(TCP, HOST, WORLD, 443), LAN, OTHER, "default-forward", False),
        # One that nobody has announced too.
        (packet(TCP, HOST, WORLD, 443), 99, WAN, "default-forward", False),
    ],
)
def test_the_example_decides_as_its_comments_say(
    example: Ruleset, tuple_: bytes, iif: int, oif: int, name: str, accept: bool
) -> None:
    rule = judge(example, NEW, tuple_, iif, oif, 0)
    assert (rule.name, rule.accept) == (name, accept)


def test_the_rule_that_the_example_offers_works() -> None:
    text = EXAMPLE.read_text()
    offered = text[text.index("# [[rule]]") :].replace("# ", "")
    compiled = compile_ruleset(config.parse((text + offered).encode(), "test.toml"), 1)
    compiled.set_links({WAN: "eth0", LAN: "eth1"})
    assert judge(compiled, NEW, packet(TCP, WORLD, "192.168.1.10", 443), WAN, LAN, 0).name == "web-server"
    assert judge(compiled, NEW, packet(TCP, WORLD6, "2001:db8:1::10", 80), WAN, LAN, 0).accept
    assert not judge(compiled, NEW, packet(TCP, WORLD, "192.168.1.10", 22), WAN, LAN, 0).accept
    assert not judge(compiled, NEW, packet(TCP, WORLD, "192.168.1.11", 443), WAN, LAN, 0).accept


def test_the_first_rule_that_matches_decides() -> None:
    text = """
    version = 1
    [[rule]]
    name = "first"
    source = "10.0.0.1"
    action = "drop"
    [[rule]]
    name = "second"
    source = "10.0.0.0/8"
    action = "accept"
    [[rule]]
    name = "third"
    source = "10.0.0.2"
    action = "drop"
    """
    compiled = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    assert judge(compiled, NEW, packet(TCP, "10.0.0.1", WORLD, 80), 1, 2, 0).name == "first"
    assert judge(compiled, NEW, packet(TCP, "10.0.0.2", WORLD, 80), 1, 2, 0).name == "second"


def test_hits_are_counted(example: Ruleset) -> None:
    for _ in range(3):
        judge(example, NEW, packet(TCP, HOST, WORLD, 443), LAN, WAN, 0)
    judge(example, NEW, packet(TCP, WORLD, HOST, 443), WAN, LAN, 0)
    assert {rule.name: rule.hits for rule in example.rules if rule.hits} == {
        "lan-to-internet": 3,
        "default-forward": 1,
    }


def test_any_means_the_router_too() -> None:
    text = 'version = 1\n[[rule]]\nname = "all"\nfrom = "any"\nto = "any"\naction = "accept"'
    compiled = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    for iif, oif in ((SELF, WAN), (WAN, SELF), (WAN, LAN), (SELF, SELF)):
        assert judge(compiled, NEW, packet(TCP, HOST, WORLD, 1), iif, oif, 0).name == "all"


def test_in_traffic() -> None:
    traffic = [TCP, 22, 22, TCP, 80, 90, UDP, 0, 65535]
    assert [port for port in range(100) if in_traffic(traffic, TCP, port)] == [22, *range(80, 91)]
    assert in_traffic(traffic, UDP, 7)
    assert not in_traffic(traffic, SCTP, 22)


# --- Each key of a rule -----------------------------------------------------------------------------------------

ZONED = """
version = 1
[zones]
lan = { interfaces = "eth1" }
guests = { interfaces = "eth1", sources = ["192.168.9.0/24", "2001:db8:9::/48"] }
vpn = { sources = "10.8.0.0/16" }
dmz = { interfaces = "eth1", sources = "192.168.9.128/25" }
[sets.blocked]
addresses = ["198.51.100.0/24", "2001:db8:bad::/48"]
"""


def compiled(text: str) -> Ruleset:
    built = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    built.set_links({WAN: "eth0", LAN: "eth1"})
    return built


def deciding(text: str, tuple_: bytes, iif: int = LAN, oif: int = WAN, now_ms: int = 0) -> str:
    return judge(compiled(ZONED + text), NEW, tuple_, iif, oif, now_ms).name


def rule(text: str) -> str:
    return f'[[rule]]\nname = "r"\naction = "accept"\n{text}\n'


@pytest.mark.parametrize(
    ("zone", "matching", "others"),
    [
        ("lan", ["192.168.1.7", "2001:db8:1::7"], ["192.168.9.7", "192.168.9.200", "10.8.0.1"]),
        ("guests", ["192.168.9.7", "2001:db8:9::7"], ["192.168.1.7", "192.168.9.200"]),
        ("dmz", ["192.168.9.200"], ["192.168.9.7"]),
        ("vpn", ["10.8.0.1"], ["192.168.1.7"]),
    ],
)
def test_zones_of_networks(zone: str, matching: list[str], others: list[str]) -> None:
    for address in matching + others:
        target = WORLD6 if ":" in address else WORLD
        expected = "r" if address in matching else "default-forward"
        assert deciding(rule(f'from = "{zone}"'), packet(TCP, address, target, 80)) == expected
        # Going there is being there.
        assert deciding(rule(f'to = "{zone}"'), packet(TCP, target, address, 80), WAN, LAN) == expected


def test_a_network_at_an_interface_is_nowhere_else() -> None:
    assert deciding(rule('from = "guests"'), packet(TCP, "192.168.9.7", WORLD, 80), WAN, LAN) == "default-forward"
    # A zone of networks alone is at every interface, also one that nobody has announced.
    for interface in (WAN, OTHER, 99):
        assert deciding(rule('from = "vpn"'), packet(TCP, "10.8.0.1", WORLD, 80), interface, LAN) == "r"
    assert deciding(rule('from = "vpn"'), packet(TCP, "10.8.0.1", WORLD, 80), SELF, WAN) == "default-output"


@pytest.mark.parametrize(
    ("text", "source", "matches"),
    [
        ('"!10.0.0.0/8"', "10.1.2.3", False),
        ('"!10.0.0.0/8"', "11.1.2.3", True),
        ('"!10.0.0.0/8"', "2001:db8::1", True),
        ('["10.0.0.0/8", "!10.1.0.0/16"]', "10.1.2.3", False),
        ('["10.0.0.0/8", "!10.1.0.0/16"]', "10.2.2.3", True),
        ('["10.0.0.0/8", "!10.1.0.0/16"]', "11.2.2.3", False),
        ('"@blocked"', "198.51.100.7", True),
        ('"@blocked"', "198.51.101.7", False),
        ('"@blocked"', "2001:db8:bad::7", True),
        ('"!@blocked"', "198.51.100.7", False),
        ('"!@blocked"', "2001:db8:1::7", True),
        ('["10.0.0.0/8", "@blocked", "!198.51.100.9"]', "198.51.100.7", True),
        ('["10.0.0.0/8", "@blocked", "!198.51.100.9"]', "198.51.100.9", False),
    ],
)
def test_sets_and_negation(text: str, source: str, matches: bool) -> None:
    target = WORLD6 if ":" in source else WORLD
    expected = "r" if matches else "default-forward"
    assert deciding(rule(f"source = {text}"), packet(TCP, source, target, 80)) == expected
    assert deciding(rule(f"destination = {text}"), packet(TCP, target, source, 80)) == expected


def test_a_set_changes_while_rules_use_it() -> None:
    built = compiled(ZONED + rule('source = "@blocked"'))
    blocked = built.sets["blocked"]
    blocked.size = 1

    def decides(source: str, now_ms: int) -> bool:
        return judge(built, NEW, packet(TCP, source, WORLD, 80), LAN, WAN, now_ms).name == "r"

    assert not decides("10.0.0.1", 0)
    assert blocked.add(False, 0x0A000000, 24, 5000, 1000)
    assert decides("10.0.0.1", 4999)
    assert not decides("10.0.0.1", 5000)
    # There is room again for what has ended, and only then.
    assert not blocked.add(False, 0x0B000000, 24, 9000, 4999)
    assert blocked.refused == 1
    assert blocked.add(False, 0x0B000000, 24, 9000, 5000)
    assert decides("11.0.0.1", 5000)
    assert blocked.remove(False, 0x0B000000, 24)
    assert not decides("11.0.0.1", 5000)
    assert not blocked.remove(False, 0x0B000000, 24)
    # What stands in the configuration is there for good.
    assert blocked.add(False, 0xC6336400, 24, 6000, 5000)
    assert decides("198.51.100.1", 7000)
    assert not blocked.remove(False, 0xC6336400, 24)


def test_services() -> None:
    own = '[services]\ngame = ["udp/27000-27010", "icmp/echo-request", "gre"]\n'
    text = own + rule('service = ["game", "dns"]')
    for tuple_, matches in (
        (packet(UDP, HOST, WORLD, 27010), True),
        (packet(UDP, HOST, WORLD, 27011), False),
        (packet(TCP, HOST, WORLD, 27010), False),
        (packet(TCP, HOST, WORLD, 53), True),
        (packet(UDP, HOST6, WORLD6, 53), True),
        (ping(ICMP, HOST, WORLD, 8), True),
        (ping(ICMP, HOST, WORLD, 13), False),
        (packet(47, HOST, WORLD, 0), True),
    ):
        assert deciding(text, tuple_) == ("r" if matches else "default-forward")


def test_an_own_service_replaces_the_shipped_one() -> None:
    text = '[services]\nssh = "tcp/2222"\n' + rule('service = "ssh"')
    assert deciding(text, packet(TCP, HOST, WORLD, 2222)) == "r"
    assert deciding(text, packet(TCP, HOST, WORLD, 22)) == "default-forward"


def test_states_have_rules_of_their_own() -> None:
    built = compiled(
        ZONED
        + '[policy]\nrelated = "drop"\n'
        + rule('state = "related"\nfrom = "lan"')
        + rule('state = ["invalid", "new"]').replace('"r"', '"i"')
    )
    tuple_ = packet(TCP, HOST, WORLD, 80)
    assert judge(built, NEW, tuple_, LAN, WAN, 0).name == "i"
    assert judge(built, RELATED, tuple_, LAN, WAN, 0).name == "r"
    assert judge(built, INVALID, tuple_, LAN, 0, 0).name == "i"
    related = judge(built, RELATED, tuple_, WAN, LAN, 0)
    assert (related.name, related.accept) == ("default-related", False)


def test_rules_that_log_decide_nothing() -> None:
    text = ZONED + "".join(
        f'[[rule]]\nname = "{name}"\naction = "{action}"\n{more}\n'
        for name, action, more in [
            ("web", "log", 'service = "web"'),
            ("invalid", "log", 'state = "invalid"'),
            ("ssh", "log", 'service = "ssh"'),
            ("all", "accept", ""),
            ("late", "log", ""),
        ]
    )
    built = compiled(text)
    tuple_ = packet(TCP, HOST, WORLD, 443)
    decided = judge(built, NEW, tuple_, LAN, WAN, 0)
    assert decided.name == "all"
    assert [rule.name for rule in log_matches(built, NEW, tuple_, LAN, WAN, decided.order, 7)] == ["web"]
    assert (built.by_name["web"].hits, built.by_name["web"].last_hit_ms) == (1, 7)
    assert built.by_name["late"].hits == 0


def test_notrack_is_about_packets_and_their_answers() -> None:
    text = (
        ZONED
        + '[[rule]]\nname = "n"\naction = "notrack"\nfrom = "lan"\nservice = ["dns", "ping"]\n'
        + 'destination = ["198.51.100.9", "2001:db8:ffff::9"]\n'
    )
    built = compiled(text)
    question, answer = packet(UDP, HOST, WORLD, 53), bytearray(packet(UDP, WORLD, HOST, 40000))
    answer[-4:-2] = (53).to_bytes(2, "big")
    assert untracked(built, question, LAN, 0)
    assert not untracked(built, question, WAN, 0)  # from elsewhere
    assert untracked(built, bytes(answer), WAN, 0)
    assert not untracked(built, packet(UDP, WORLD, HOST, 40000), WAN, 0)
    assert untracked(built, ping(ICMPV6, HOST6, WORLD6, 128), LAN, 0)
    assert untracked(built, ping(ICMPV6, WORLD6, HOST6, 129), WAN, 0)
    assert not untracked(built, ping(ICMPV6, WORLD6, HOST6, 128), WAN, 0)
    assert built.by_name["n"].hits == 4
    # It is no rule about connections.
    assert judge(built, NEW, question, LAN, WAN, 0).name == "default-forward"
