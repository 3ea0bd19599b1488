import pytest

from conntrackd import config
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.compile import inherit
from conntrackd.policy.ruleset import ACCEPT, DROP, NEW, NO_ZONE, SELF, Ruleset

TEXT = """
version = 1
[policy]
invalid = "accept"
related = "drop"
output = "drop"
[zones]
lan = { interfaces = ["eth1", "veth*", "veth-l*"] }
wan = { interfaces = ["eth*", "veth-lw"] }
[[rule]]
name = "one"
from = "lan"
to = ["wan", "self", "wan"]
protocol = ["tcp", 17]
port = [22, "80-90"]
source = ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"]
action = "accept"
[[rule]]
name = "two"
destination = "2001:db8::1"
action = "drop"
[[rule]]
name = "three"
from = ["lan", "any"]
to = "self"
protocol = ["icmp", "icmpv6"]
icmp_type = "echo-request"
action = "accept"
"""


@pytest.fixture
def compiled() -> Ruleset:
    return compile_ruleset(config.parse(TEXT.encode(), "test.toml"), 7)


def indexed(compiled: Ruleset, ipv6: bool) -> set[str]:
    """Name the rules that the index for new connections of a family holds."""
    columns = compiled.indexes[NEW * 2 + ipv6].columns
    entries = [entry for column in columns for entry in column.table.values()]
    lists = [rules for entry in entries for mask in entry.masks for rules in mask.table.values()]
    return {rule.name for rules in lists for rule in rules}


def test_what_the_hooks_ask(compiled: Ruleset) -> None:
    assert compiled.generation == 7
    assert compiled.default_invalid.accept
    assert not compiled.default_related.accept
    assert compiled.asks == [True, False, False]
    least = compile_ruleset(config.parse(b"version = 1", "test.toml"), 1)
    assert not least.default_invalid.accept
    assert least.default_related.accept
    assert least.asks == [False, False, False]


def test_rules_are_numbers(compiled: Ruleset) -> None:
    one, two, three, *defaults = compiled.rules
    assert (one.name, one.action, one.accept, one.hits) == ("one", ACCEPT, True, 0)
    assert one.traffic == [6, 22, 22, 6, 80, 90, 17, 22, 22, 17, 80, 90]
    assert one.from_zones == 1 << compiled.zones["lan"]
    assert one.to_zones == 1 << compiled.zones["wan"] | 1 << SELF
    assert three.from_zones == 0
    assert one.source is not None
    assert one.source.match(0xC0000201, False, 0)
    assert not one.source.match(0xC0000202, False, 0)
    assert one.source.match(0x20010DB8 << 96, True, 0)
    assert (two.ipv4, two.ipv6) == (False, True)
    assert (two.action, two.accept) == (DROP, False)
    assert three.traffic == [1, 8 << 8, 8 << 8 | 255, 58, 128 << 8, 128 << 8 | 255]
    assert [rule.name for rule in defaults] == list(config.RESERVED_RULES)
    assert [rule.accept for rule in defaults] == [False, False, False, False, True]


def test_a_rule_of_one_family_is_not_in_the_way_of_the_other(compiled: Ruleset) -> None:
    assert indexed(compiled, ipv6=False) == {"one", "three"}
    assert indexed(compiled, ipv6=True) == {"one", "two", "three"}


def test_a_rule_of_two_families_that_never_meet_is_nobodys_candidate() -> None:
    text = 'version = 1\n[[rule]]\nname = "r"\nsource = "10.0.0.0/8"\ndestination = "::1"\naction = "accept"'
    never = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    assert indexed(never, ipv6=False) == indexed(never, ipv6=True) == set()


def test_what_runs_on_when_the_policy_changes() -> None:
    text = """
    version = 1
    [sets.bad]
    addresses = "192.0.2.1"
    [[rule]]
    name = "kept"
    max_flows_per_src = 5
    limit = { new = "1/h", per = "src" }
    action = "accept"
    """
    before = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    kept = before.by_name["kept"]
    kept.hits, kept.flows, kept.last_hit_ms = 3, 2, 1000
    assert kept.rate is not None
    tuple_ = bytes((6, 10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2))
    assert kept.rate.take(tuple_, 0)
    before.sets["bad"].add(False, 0x0A000000, 8, 5000, 0)
    before.sets["bad"].add(False, 0x0B000000, 8, 1000, 0)

    changed = text.replace('"192.0.2.1"', '"192.0.2.2"') + '[[rule]]\nname = "new"\naction = "drop"\n'
    after = compile_ruleset(config.parse(changed.encode(), "test.toml"), 2)
    inherit(after, before, 2000)
    rule = after.by_name["kept"]
    assert (rule.hits, rule.flows, rule.last_hit_ms) == (3, 2, 1000)
    assert rule.account is kept.account
    assert rule.rate is not None
    assert not rule.rate.take(tuple_, 1000)  # the token of this hour is gone
    bad = after.sets["bad"]
    assert bad.added == {(False, 0x0A000000, 8): 5000}
    assert bad.ipv4.has(0xC0000202, 2000)
    assert not bad.ipv4.has(0xC0000201, 2000)
    assert after.by_name["new"].hits == 0


@pytest.mark.parametrize(
    ("name", "zone"),
    [
        ("eth1", "lan"),  # the full name before eth*
        ("eth10", "wan"),
        ("veth0", "lan"),
        ("veth", "lan"),
        ("veth-lw", "wan"),  # the full name before veth-l*
        ("veth-lwx", "lan"),
    ],
)
def test_interfaces_belong_to_zones(compiled: Ruleset, name: str, zone: str) -> None:
    compiled.set_links({5: name})
    assert compiled.zone_of == {0: SELF, 5: compiled.zones[zone]}


def test_links_come_go_and_are_renamed(compiled: Ruleset) -> None:
    assert compiled.zone_of == {0: SELF}
    compiled.set_links({2: "eth0", 3: "wg0"})
    assert compiled.zone_of == {0: SELF, 2: compiled.zones["wan"], 3: NO_ZONE}
    compiled.set_links({2: "eth1"})
    assert compiled.zone_of == {0: SELF, 2: compiled.zones["lan"]}


def test_a_lone_star_is_every_other_interface() -> None:
    text = 'version = 1\nzones = { lan = { interfaces = "eth1" }, rest = { interfaces = "*" } }'
    compiled = compile_ruleset(config.parse(text.encode(), "test.toml"), 1)
    compiled.set_links({1: "eth1", 2: "ppp0"})
    assert compiled.zone_of == {0: SELF, 1: compiled.zones["lan"], 2: compiled.zones["rest"]}
