"""Where tracking meets policy: a router between a LAN (interface 1) and the internet (interface 2)."""

import pytest

from conntrackd.config import parse
from conntrackd.const import (
    CTINFO_NAMES,
    DROP,
    INVALID_BAD_CHECKSUM,
    INVALID_FRAGMENT,
    INVALID_TCP_NEW,
    IP_CT_NEW,
    IP_CT_RELATED_REPLY,
    IPS_CONFIRMED,
    IPS_EXPECTED,
    MARK_ESTABLISHED,
    MARK_INVALID,
    MARK_NEW,
    MARK_RELATED,
    MARK_REPLY,
    MARK_UNCONFIRMED,
    MARK_UNTRACKED,
    NF_INET_LOCAL_IN,
    NF_INET_LOCAL_OUT,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
    STRESSED_TABLE_FULL,
)
from conntrackd.core.conntrack import conntrack_in
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import get_tuple
from conntrackd.hooks import DROPS_MAX, Firewall, is_revoked, post_routing, pre_routing, still_allowed
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential import packets
from tests.differential.packets import ACK, RST, SYN
from tests.unit.craft import CLIENT, SERVER, START_MS, error, gre, icmpv6, tcp, udp

LAN, WAN = 1, 2

POLICY = """\
version = 1

[zones]
lan = { interfaces = ["eth1"] }
wan = { interfaces = ["eth0"] }

[[rule]]
name = "out"
from = "lan"
to = "wan"
action = "accept"

[[rule]]
name = "ssh"
from = "lan"
to = "self"
protocol = "tcp"
port = 22
action = "accept"
"""


class Router:
    """A firewall with two interfaces and a clock; packets cross it from hook to hook."""

    def __init__(self, policy: str = POLICY) -> None:
        config = parse(policy.encode(), "test.toml")
        rules = compile_ruleset(config, 1)
        rules.set_links({LAN: "eth1", WAN: "eth0"})
        self.fw = Firewall(Conntrack(config.sysctl()), rules)
        self.table = self.fw.net.table
        self.now_ms = START_MS

    def enter(self, data: bytes, iif: int = LAN) -> int:
        hook = NF_INET_PRE_ROUTING if iif else NF_INET_LOCAL_OUT
        return pre_routing(self.fw, data, hook, iif, self.now_ms)

    def leave(self, data: bytes, mark: int, iif: int = LAN, oif: int = WAN) -> int:
        hook = NF_INET_POST_ROUTING if oif else NF_INET_LOCAL_IN
        return post_routing(self.fw, data, mark, hook, iif, oif, self.now_ms)

    def cross(self, data: bytes, iif: int = LAN, oif: int = WAN) -> int:
        """Both hooks, the second as the edge's rules have it: for marks that say unconfirmed or nothing."""
        mark = self.enter(data, iif)
        if mark == DROP or not mark & MARK_UNCONFIRMED:
            return mark
        return self.leave(data, mark, iif, oif)

    def reasons(self) -> list[str]:
        return [entry[1] for entry in self.fw.drops]


@pytest.fixture
def router() -> Router:
    return Router()


# --- The marks --------------------------------------------------------------------------------------------------


def test_marks_of_a_connections_packets(router: Router) -> None:
    assert router.enter(tcp(SYN)) == MARK_NEW | MARK_UNCONFIRMED
    assert router.leave(tcp(SYN), MARK_NEW | MARK_UNCONFIRMED) == MARK_NEW
    assert router.enter(tcp(SYN)) == MARK_NEW  # confirmed: it need not cross the second hook again
    assert router.enter(tcp(SYN | ACK, 0, 1, back=True), WAN) == MARK_ESTABLISHED | MARK_REPLY
    assert router.enter(tcp(ACK, 1, 1)) == MARK_ESTABLISHED


def test_mark_of_an_error_is_related_with_its_direction(router: Router) -> None:
    router.cross(udp(b"x"))
    assert router.enter(error(udp(b"x")), WAN) == MARK_RELATED | MARK_REPLY
    assert router.enter(error(udp(b"y", back=True))) == MARK_RELATED


def test_mark_of_an_expected_connection_is_related(router: Router) -> None:
    mark = router.enter(udp(back=True), WAN)
    ct = router.table.find_unconfirmed(get_tuple(udp(back=True), 0))
    assert ct is not None
    ct.status |= IPS_EXPECTED
    assert router.enter(udp(back=True), WAN) == MARK_RELATED | MARK_UNCONFIRMED
    # Nothing lets it in but that somebody inside asked for it.
    assert router.leave(udp(back=True), mark, WAN, LAN) == MARK_RELATED
    assert router.enter(udp(back=True), WAN) == MARK_RELATED


def test_neighbour_discovery_passes_untracked(router: Router) -> None:
    assert router.enter(icmpv6(135, rest=bytes(20)), WAN) == MARK_UNTRACKED


# --- What the packet's way through the router does to the table -------------------------------------------------


def test_packet_that_never_reaches_the_second_hook_is_not_in_the_table(router: Router) -> None:
    router.enter(udp())
    assert router.table.count == 0
    assert not list(router.table.connections())


def test_confirmed_connection_knows_its_interfaces_and_its_rule(router: Router) -> None:
    router.cross(udp())
    ct = router.table.find(get_tuple(udp(), 0), router.now_ms)
    assert ct is not None
    assert ct.status & IPS_CONFIRMED
    assert (ct.iif, ct.oif, ct.rule) == (LAN, WAN, "out")


def test_connection_that_the_policy_refuses_leaves_nothing_behind(router: Router) -> None:
    assert router.cross(udp(back=True), WAN, LAN) == DROP
    assert router.table.count == router.table.unconfirmed_count() == 0
    assert router.fw.drops == [(START_MS, "policy", "default-forward", get_tuple(udp(back=True), 0), WAN, LAN)]


def test_answer_passes_although_the_policy_refuses_its_direction(router: Router) -> None:
    router.cross(udp())
    assert router.enter(udp(back=True), WAN) == MARK_ESTABLISHED | MARK_REPLY


def test_interface_zero_is_the_router_itself(router: Router) -> None:
    assert router.cross(tcp(SYN, dport=22), LAN, 0) == MARK_NEW
    assert router.cross(tcp(SYN, dport=23), LAN, 0) == DROP
    assert router.fw.drops[-1][2] == "default-input"
    assert router.cross(udp(b"own"), 0, WAN) == MARK_NEW
    ct = router.table.find(get_tuple(udp(b"own"), 0), router.now_ms)
    assert ct is not None
    assert ct.rule == "default-output"


def test_clash_is_dropped_and_says_so(router: Router) -> None:
    first, second = tcp(SYN), tcp(SYN, back=True)
    policy = POLICY + '[[rule]]\nname = "in"\nfrom = "wan"\naction = "accept"\n'
    router = Router(policy)
    mark = router.enter(first)
    crossing = router.enter(second, WAN)
    assert router.leave(first, mark) == MARK_NEW
    assert router.leave(second, crossing, WAN, LAN) == DROP
    assert router.fw.drop_counts == {"insert_failed": 1}
    assert router.fw.drops[-1][2] == "in"


# --- Clobbered marks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", range(64))
def test_whatever_became_of_the_mark_a_new_connection_is_judged_and_confirmed(mark: int) -> None:
    router = Router()
    router.enter(udp())
    assert router.leave(udp(), mark) == MARK_NEW
    assert router.table.count == 1
    router.enter(udp(back=True, sport=7), WAN)
    assert router.leave(udp(back=True, sport=7), mark, WAN, LAN) == DROP
    assert router.table.count == 1


@pytest.mark.parametrize("mark", range(64))
def test_whatever_became_of_the_mark_an_established_packet_passes_with_its_own(mark: int) -> None:
    router = Router()
    router.cross(udp())
    assert router.leave(udp(), mark) == MARK_NEW
    assert router.leave(udp(back=True), mark, WAN, LAN) == MARK_ESTABLISHED | MARK_REPLY
    router.enter(udp(back=True), WAN)
    assert router.leave(udp(), mark) == MARK_ESTABLISHED


def test_packet_that_skipped_the_first_hook_is_tracked_at_the_second(router: Router) -> None:
    assert router.leave(udp(), 0) == MARK_NEW
    assert router.table.count == 1
    assert router.fw.net.stats.ctinfo[IP_CT_NEW] == 1
    assert router.leave(udp(back=True, sport=7), 0, WAN, LAN) == DROP
    assert router.leave(tcp(RST), 0) == DROP
    assert router.reasons() == ["policy", CTINFO_NAMES[INVALID_TCP_NEW]]


def test_padding_behind_the_packet_is_not_read_at_the_second_hook_either(router: Router) -> None:
    # Version 1 of GRE without a key, too short to say what it carries; the padding says something impossible.
    header = bytes((0, 1, 8, 0))
    packet = packets.ipv4(CLIENT[4], SERVER[4], 47, header) + bytes(18)
    assert router.cross(packet) == MARK_NEW
    # Half of a UDP header, and in the padding the other half of one that is known.
    router.cross(udp())
    cut = packets.ipv4(CLIENT[4], SERVER[4], 17, udp()[20:22], length=22) + udp()[22:]
    assert router.leave(cut, 0) == DROP


# --- What is never tracked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("invalid", ["drop", "accept"])
def test_invalid_packets_follow_their_setting(invalid: str) -> None:
    router = Router(POLICY + f'[policy]\ninvalid = "{invalid}"\n')
    assert router.enter(udp(b"x", bad=True)) == (MARK_INVALID if invalid == "accept" else DROP)
    assert router.reasons() == ([] if invalid == "accept" else [CTINFO_NAMES[INVALID_BAD_CHECKSUM]])


@pytest.mark.parametrize("fragment", ["drop", "accept"])
def test_fragments_follow_a_setting_of_their_own(fragment: str) -> None:
    other = "drop" if fragment == "accept" else "accept"
    router = Router(POLICY + f'[policy]\nfragment = "{fragment}"\ninvalid = "{other}"\n')
    first = packets.fragments(udp(bytes(64)), [16], 7)[0]
    assert router.enter(first) == (MARK_INVALID if fragment == "accept" else DROP)
    assert router.reasons() == ([] if fragment == "accept" else [CTINFO_NAMES[INVALID_FRAGMENT]])


@pytest.mark.parametrize("related", ["drop", "accept"])
def test_related_packets_follow_their_setting(related: str) -> None:
    router = Router(POLICY + f'[policy]\nrelated = "{related}"\n')
    router.cross(udp(b"x"))
    assert router.enter(error(udp(b"x")), WAN) == (MARK_RELATED | MARK_REPLY if related == "accept" else DROP)
    dropped = [(START_MS, "related", "", get_tuple(error(udp(b"x")), 0), WAN, LAN)]
    assert router.fw.drops == ([] if related == "accept" else dropped)


def test_packet_of_a_full_table_is_dropped_also_where_invalid_ones_pass() -> None:
    router = Router(POLICY + '[policy]\ninvalid = "accept"\n[conntrack]\nmax = 1\n')
    router.cross(udp(sport=1))
    assert router.enter(udp(sport=2)) == DROP
    assert router.reasons() == [CTINFO_NAMES[STRESSED_TABLE_FULL]]


def test_checksums_of_the_routers_own_packets_are_not_verified(router: Router) -> None:
    assert router.enter(udp(b"x", bad=True), 0) == MARK_NEW | MARK_UNCONFIRMED


def test_checksum_that_the_edge_calls_verified_or_unfinished_is_not_verified(router: Router) -> None:
    assert router.enter(udp(b"x", bad=True)) == DROP
    router.fw.checksum = False
    assert router.enter(udp(b"x", bad=True)) == MARK_NEW | MARK_UNCONFIRMED


# --- Drops ------------------------------------------------------------------------------------------------------


def test_drop_of_a_packet_without_a_tuple_is_noted_without_one(router: Router) -> None:
    assert router.enter(b"\x45") == DROP
    assert router.fw.drops == [(START_MS, "ip_header", "", b"", LAN, 0)]


def test_recent_drops_are_bounded_and_the_newest_is_where_it_says(router: Router) -> None:
    for count in range(DROPS_MAX + 10):
        router.now_ms = START_MS + count
        router.enter(b"")
        assert router.fw.drops[(router.fw.drops_next - 1) % DROPS_MAX][0] == router.now_ms
    assert len(router.fw.drops) == DROPS_MAX
    assert min(entry[0] for entry in router.fw.drops) == START_MS + 10
    assert router.fw.drop_counts == {"ip_header": DROPS_MAX + 10}


# --- The router's answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [error(udp(b"x")), tcp(RST | ACK, 0, 1, back=True)], ids=["time exceeded", "reset of a REJECT"]
)
def test_answer_of_the_router_to_what_it_does_not_let_through_is_related(router: Router, answer: bytes) -> None:
    router.enter(udp(b"x"))
    router.enter(tcp(SYN))
    assert router.enter(answer, iif=0) == MARK_RELATED | MARK_REPLY


@pytest.mark.parametrize(
    "packet",
    [error(udp(b"x", sport=1)), error(udp(b"x"), kind=8), tcp(ACK, 0, 1, back=True)],
    ids=["about something else", "a query that only looks like one", "no reset"],
)
def test_what_the_router_sends_besides_is_tracked(router: Router, packet: bytes) -> None:
    router.enter(udp(b"x"))
    router.enter(tcp(SYN))
    before = router.fw.net.stats.ctinfo[IP_CT_RELATED_REPLY]
    router.enter(packet, iif=0)
    assert router.fw.net.stats.ctinfo[IP_CT_RELATED_REPLY] == before


# --- Timeouts of a rule -----------------------------------------------------------------------------------------

HURRIED = """\
version = 1

[[rule]]
name = "hurried"
action = "accept"
timeouts = { gre_timeout = "7s", gre_timeout_stream = "9s", tcp_timeout_unacknowledged = "70s", udp_timeout = "8s" }
"""


@pytest.fixture
def hurried() -> Router:
    router = Router(HURRIED)
    rule = router.fw.ruleset.by_name["hurried"]
    assert rule.timeouts is not None
    router.fw.net.timeouts.append(rule.timeouts)
    rule.timeouts_number = 1
    return router


def left_ms(router: Router, data: bytes) -> int:
    ct = router.table.get(get_tuple(data, 0))
    assert ct is not None
    return ct.expires_ms - router.now_ms


def test_every_packet_of_gre_counts_by_the_timeouts_of_the_rule(hurried: Router) -> None:
    lives = []
    for back in False, False, True, True:
        hurried.cross(gre(back=back), *((WAN, LAN) if back else (LAN, WAN)))
        lives.append(left_ms(hurried, gre()))
    assert lives == [7_000, 7_000, 7_000, 9_000]


@pytest.mark.parametrize("win", [1000, 0])
def test_connection_picked_up_in_the_middle_does_not_live_as_an_established_one(hurried: Router, win: int) -> None:
    hurried.cross(tcp(ACK, 1, 1, win=win))
    assert left_ms(hurried, tcp(ACK)) == 70_000
    hurried.cross(tcp(ACK, 1, 1, win=win))
    assert left_ms(hurried, tcp(ACK)) == 70_000


def test_switches_of_the_tracker_count_for_connections_with_timeouts_of_their_own(hurried: Router) -> None:
    hurried.cross(tcp(SYN, 0))
    hurried.cross(tcp(SYN | ACK, 0, 1, back=True), WAN, LAN)
    hurried.cross(tcp(ACK, 1, 1))
    beyond = tcp(ACK, 100_000, 1)
    assert hurried.enter(beyond) == DROP
    settings = Sysctl()
    settings.tcp_be_liberal = 1
    hurried.fw.net.configure(settings)
    assert hurried.enter(beyond) == MARK_ESTABLISHED
    assert hurried.fw.net.timeouts[0].udp_timeout == 8_000


# --- A new policy -----------------------------------------------------------------------------------------------


def test_what_a_policy_ended_in_one_zone_is_not_held_against_its_twin_in_another(router: Router) -> None:
    router.cross(udp(b"x"))
    ct = router.table.get(get_tuple(udp(b"x"), 0))
    assert ct is not None
    forbids = compile_ruleset(parse(b"version = 1\n", "test.toml"), 2)
    forbids.set_links({LAN: "eth1", WAN: "eth0"})
    router.fw.ruleset = forbids
    assert not still_allowed(router.fw, ct, router.now_ms)
    for zone, revoked in (0, True), (7, False):
        again = conntrack_in(router.fw.net, udp(b"x"), True, router.now_ms, zone)[1]
        assert again is not None
        assert is_revoked(router.fw, again, router.now_ms) is revoked
