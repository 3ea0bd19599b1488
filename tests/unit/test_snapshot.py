"""What a snapshot holds comes back as it was, with the time in between deducted; what is no snapshot does not."""

import io
import random
from collections.abc import Iterable
from typing import Any

import pytest

from conntrackd.config import parse
from conntrackd.const import DROP, IPS_ASSURED, IPS_CONFIRMED, IPS_COUNTED, IPS_DYING
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import gc, set_labels
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import get_tuple
from conntrackd.daemon import deputy
from conntrackd.daemon.deputy import Ended
from conntrackd.daemon.links import FIRST_ABSENT, Links
from conntrackd.daemon.restore import Restored, Restoring
from conntrackd.daemon.snapshot import (
    BLOCK_MAX,
    CONNS,
    END,
    HEADER,
    MAGIC,
    START,
    TOTALS,
    VERSION,
    Freezing,
    Moment,
    SnapshotError,
    block,
    blocks,
    check,
)
from conntrackd.hooks import Firewall, still_allowed
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.sets import FOR_EVER
from tests.differential import packets
from tests.differential.packets import ACK, FIN, PSH, RST, SYN
from tests.fuzz.invariants import check_table
from tests.unit import craft
from tests.unit.craft import icmp, icmpv6, sctp, sctp_init, tcp, udp, udplite
from tests.unit.test_hooks import LAN, WAN, Router

POLICY = """
version = 1
[zones]
lan = { interfaces = ["eth1"] }
wan = { interfaces = ["eth0"] }
[sets.banned]
addresses = ["192.0.2.1"]
size = 3
[[rule]]
name = "ftp"
from = "lan"
protocol = "tcp"
port = 21
helper = "ftp"
action = "accept"
[[rule]]
name = "slow"
from = "lan"
protocol = "udp"
port = 5000
timeouts = { udp_timeout = "1h" }
action = "accept"
[[rule]]
name = "out"
from = "lan"
action = "accept"
"""
BOOT = "0f5c8a4e-7f4a-4b58-9a2b-1f2f3a4b5c6d"
WALL_MS = 1_700_000_000_000
LINKS = {LAN: "eth1", WAN: "eth0"}
NOT_NUMBERS = {"orig", "reply", "account", "master", "help", "older", "newer", "earlier", "later"}


def links(names: dict[int, str] = LINKS) -> Links:
    made = Links()
    made.close()
    made.names = dict(names)
    return made


def at(now_ms: int, wall_ms: int = WALL_MS, boot: str = BOOT) -> Moment:
    return Moment(now_ms, wall_ms, boot)


def firewall(policy: str = POLICY, generation: int = 1, **settings: int) -> Firewall:
    config = parse(policy.encode(), "test.toml")
    sysctl = config.sysctl()
    for name, value in settings.items():
        setattr(sysctl, name, value)
    rules = compile_ruleset(config, generation)
    rules.set_links(LINKS)
    net = Conntrack(sysctl)
    for rule in rules.rules:
        if rule.timeouts is not None:
            net.timeouts.append(rule.timeouts)
            rule.timeouts_number = len(net.timeouts)
    return Firewall(net, rules)


def frozen(fw: Firewall, now_ms: int, unconfirmed: bool = False, exact: bool = True) -> bytes:
    return b"".join(Freezing(fw, LINKS, at(now_ms), "config", exact).pieces(unconfirmed))


def thawed(data: bytes, fw: Firewall, now: Moment, names: dict[int, str] = LINKS) -> Restored:
    restored = Restoring(fw, links(names)).read(io.BytesIO(data), now)
    check_table(fw.net, now.mono_ms)
    return restored


def numbers(thing: object) -> dict[str, Any]:
    """What a connection is made of, compiled or not."""
    found = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
    return {name: value for name, value in found.items() if name not in NOT_NUMBERS and not callable(value)}


def conns(fw: Firewall) -> dict[bytes, Conn]:
    return {ct.orig: ct for ct in fw.net.table.connections()}


@pytest.fixture
def busy() -> Router:
    """A router with a connection of every protocol, some of them with much behind them."""
    router = Router(POLICY)
    router.fw = firewall()
    router.table = router.fw.net.table
    cross = router.cross
    for family in (4, 6):
        cross(tcp(SYN, 100, family=family, options=bytes.fromhex("0402030301030307")))
        cross(tcp(SYN | ACK, 900, 101, back=True, family=family, options=bytes.fromhex("0402030301030302")), WAN, LAN)
        cross(tcp(ACK, 101, 901, family=family))
        cross(tcp(ACK | PSH, 101, 901, data=b"hello", family=family))
        cross(udp(b"question", family=family))
        cross(udp(b"answer", family=family, back=True), WAN, LAN)
        cross(
            sctp(0, packets.chunk(1, 0, sctp_init(7)), family=family)
            if family == 4
            else udp(b"slow", dport=5000, family=family)
        )
    cross(sctp(7, packets.chunk(2, 0, sctp_init(9)), back=True), WAN, LAN)
    cross(tcp(SYN, 5, dport=21))
    cross(tcp(SYN | ACK, 50, 6, dport=21, back=True), WAN, LAN)
    cross(tcp(ACK, 6, 51, dport=21))
    cross(tcp(ACK | PSH, 51, 6, dport=21, data=b"220 hello\r\n", back=True), WAN, LAN)
    cross(tcp(ACK | PSH, 6, 62, dport=21, data=b"PASV\r\n"))
    passive = b"227 Entering (192,0,2,80,4,1)\r\n"
    cross(tcp(ACK | PSH, 62, 12, dport=21, data=passive, back=True), WAN, LAN)
    cross(tcp(SYN, 1000, sport=41000, dport=1025))
    cross(tcp(ACK | PSH, 12, 62 + len(passive), dport=21, data=b"PASV\r\n"))
    again = b"227 Entering (192,0,2,80,4,2)\r\n"
    cross(tcp(ACK | PSH, 62 + len(passive), 18, dport=21, data=again, back=True), WAN, LAN)
    cross(tcp(SYN, 7, sport=42000))
    cross(tcp(SYN | ACK, 70, 8, sport=42000, back=True), WAN, LAN)
    cross(tcp(FIN | ACK, 8, 71, sport=42000))
    for packet in (icmp(8), icmpv6(128), udplite(b"x"), craft.gre(), craft.ip(89, b"ospf")):
        cross(packet)
    assert router.table.count == 14
    return router


def test_every_connection_comes_back_as_it_was(busy: Router) -> None:
    for mark, ct in enumerate(busy.table.connections(), 7):
        ct.mark = mark
        set_labels(busy.fw.net, ct, 1 << 127 | mark, busy.now_ms)
    fw = firewall()
    restored = thawed(frozen(busy.fw, busy.now_ms), fw, at(busy.now_ms))
    assert (restored.flows, restored.refused, restored.expired) == (14, 0, 0)
    before, after = conns(busy.fw), conns(fw)
    assert before.keys() == after.keys()
    for key, ct in before.items():
        assert numbers(after[key]) == numbers(ct)
        assert type(after[key]) is type(ct)
        assert fw.net.table.labels[ct.id] == busy.table.labels[ct.id]
        assert fw.ruleset.by_name[ct.rule].account is after[key].account
    assert {rule.name: rule.account.live for rule in fw.ruleset.rules} == {
        rule.name: rule.account.live for rule in busy.fw.ruleset.rules
    }
    assert fw.net.table.last_id == busy.table.last_id


def test_the_next_packets_are_judged_as_before(busy: Router) -> None:
    after = Router(POLICY)
    after.now_ms, after.fw = busy.now_ms, firewall()
    thawed(frozen(busy.fw, busy.now_ms), after.fw, at(busy.now_ms))
    for router in (busy, after):
        router.fw.net.stats.ctinfo[:] = [0] * len(router.fw.net.stats.ctinfo)
        router.cross(tcp(ACK | PSH, 106, 901, data=b"more"))
        router.cross(tcp(ACK, 500_000_000, 901))  # far outside the window, which scaling has made large
        router.cross(sctp(7, packets.chunk(10, 0, b"cookie")))
        router.cross(sctp(8, packets.chunk(0, 0, b"wrong tag")))
        router.cross(tcp(FIN | ACK, 71, 9, sport=42000, back=True), WAN, LAN)
    assert busy.fw.net.stats.ctinfo == after.fw.net.stats.ctinfo
    states = [{key: ct.state for key, ct in conns(router.fw).items()} for router in (busy, after)]
    assert states[0] == states[1]


def test_after_a_crash_numbers_are_taken_as_they_come(busy: Router) -> None:
    """Packets have passed that the snapshot does not know of: they must not make the next ones INVALID."""
    busy.cross(tcp(SYN, 9, sport=44000))
    after = Router(POLICY)
    after.now_ms, after.fw = busy.now_ms, firewall()
    restored = thawed(frozen(busy.fw, busy.now_ms, exact=False), after.fw, at(busy.now_ms))
    assert restored.stale == 3  # what was about to begin: that SYN, and two more
    far = 400_000_000
    assert after.cross(tcp(ACK | PSH, 901 + far, 106 + far, data=b"far on", back=True), WAN, LAN) != DROP
    assert after.cross(tcp(ACK, 106 + far, 907 + far)) != DROP
    assert after.cross(tcp(ACK | PSH, 106 + far, 907 + far, data=b"and on")) != DROP
    assert after.fw.net.stats.invalid() == busy.fw.net.stats.invalid()
    # What has not moved goes on, too.
    assert after.cross(tcp(ACK | PSH, 106, 901, data=b"more", family=6)) != DROP
    assert after.cross(tcp(ACK, 901, 110, back=True, family=6), WAN, LAN) != DROP


def test_a_helper_goes_on_where_it_was(busy: Router) -> None:
    after = Router(POLICY)
    after.now_ms, after.fw = busy.now_ms, firewall()
    restored = thawed(frozen(busy.fw, busy.now_ms), after.fw, at(busy.now_ms))
    assert restored.expectations == 1
    control = after.fw.net.table.get(get_tuple(tcp(SYN, dport=21), 0))
    data = after.fw.net.table.get(get_tuple(tcp(SYN, sport=41000, dport=1025), 0))
    assert control is not None
    assert data is not None
    assert data.master is control
    # The connection that was announced before comes after.
    after.cross(tcp(SYN, 1, sport=43000, dport=1026))
    expected = after.fw.net.table.get(get_tuple(tcp(SYN, sport=43000, dport=1026), 0))
    assert expected is not None
    assert expected.master is control
    # And what the server says next begins a line.
    said = 62 + 2 * len(b"227 Entering (192,0,2,80,4,1)\r\n")
    third = b"227 Entering (192,0,2,80,4,3)\r\n"
    after.cross(tcp(ACK | PSH, said, 18, dport=21, data=third, back=True), WAN, LAN)
    (announced,) = after.fw.net.table.expectations.by_id.values()
    assert announced.tuple.endswith(bytes((4, 3)))


@pytest.mark.parametrize(("name", "message"), [
    ("pptp", bytes((3, 2)) + b"\1\2\3\4" + bytes(26)), ("sip", bytes(8)), ("sane", b"\1"), ("ftp", b"\1" + bytes(12)),
])  # fmt: skip
def test_what_helpers_remember(name: str, message: bytes) -> None:
    from conntrackd.core.helpers import HELPERS

    info = HELPERS[name].new_help()
    assert info.thaw(message)
    assert info.freeze() == message
    assert not HELPERS[name].new_help().thaw(message[:-1])
    assert not HELPERS[name].new_help().thaw(message + b"\0" * 40)


# --- What has changed since ---------------------------------------------------------------------------------------


def master_id(ct: Conn) -> int:
    """The id of the connection that announced it, as long as that is there."""
    return ct.master.id if ct.master is not None and not ct.master.status & IPS_DYING else 0


class Successor:
    """A firewall that takes a table over as it is now, and later what became of it with the deputy."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.fw = firewall()
        self.since_ms = router.now_ms
        self.restoring = Restoring(self.fw, links())
        self.restoring.read(io.BytesIO(b"".join(self._freezing().base())), at(router.now_ms))
        self.ended = Ended(router.fw)

    def _freezing(self) -> Freezing:
        return Freezing(self.router.fw, LINKS, at(self.router.now_ms), "config", exact=True)

    def catch_up(self) -> Restored:
        self.ended.collect()
        changes = b"".join(self._freezing().changes(self.since_ms, iter(self.ended.rows)))
        restored = self.restoring.catch_up(io.BytesIO(changes), at(self.router.now_ms))
        check_table(self.fw.net, self.router.now_ms)
        return restored

    def check(self) -> None:
        """Both know the same: connections that live, what is expected, counters."""
        now_ms, left, right = self.router.now_ms, self.router.fw, self.fw
        before, after = (
            {(ct.zone, ct.orig): ct for ct in fw.net.table.connections() if ct.expires_ms > now_ms}
            for fw in (left, right)
        )
        assert before.keys() == after.keys()
        for key, ct in before.items():
            assert numbers(after[key]) == numbers(ct)
            assert master_id(after[key]) == master_id(ct)
        assert left.net.table.labels == right.net.table.labels
        assert left.net.table.last_id == right.net.table.last_id
        expected = [
            sorted(
                (expect.tuple, expect.mask, expect.expires_ms) for expect in fw.net.table.expectations.by_id.values()
            )
            for fw in (left, right)
        ]
        assert expected[0] == expected[1]
        unconfirmed = [{**fw.net.table.unconfirmed_old, **fw.net.table.unconfirmed}.keys() for fw in (left, right)]
        assert unconfirmed[0] == unconfirmed[1]
        assert left.net.stats.ctinfo == right.net.stats.ctinfo
        for one, other in zip(left.ruleset.rules, right.ruleset.rules, strict=True):
            assert (one.hits, one.flows) == (other.hits, other.flows)


def test_a_deputys_changes_are_caught_up_with(busy: Router) -> None:
    busy.now_ms += 1
    successor = Successor(busy)
    assert successor.fw.net.table.count == 14
    busy.now_ms += 1000
    busy.cross(udp(b"new", sport=1))  # what begins
    busy.enter(udp(b"on its way", sport=2))  # and has not left yet
    busy.cross(tcp(ACK | PSH, 106, 901, data=b"more"))  # goes on
    busy.cross(tcp(ACK | PSH, 62 + 31 + 31, 18, dport=21, data=b"226 done\r\n", back=True), WAN, LAN)
    question = busy.table.get(get_tuple(udp(b"question"), 0))
    assert question is not None
    busy.table.kill(question, busy.now_ms)  # ends
    ping = busy.table.get(get_tuple(icmp(8), 0))
    assert ping is not None
    busy.table.kill(ping, busy.now_ms)
    busy.cross(icmp(8))  # ends and begins anew
    again = busy.table.get(get_tuple(icmp(8), 0))
    assert again is not None
    set_labels(busy.fw.net, again, 5, busy.now_ms)
    busy.fw.ruleset.sets["banned"].add(False, 0xC0000207, 32, FOR_EVER, busy.now_ms)
    restored = successor.catch_up()
    assert successor.restoring.ended == 2
    assert restored.flows == 4
    assert restored.addresses == 1
    assert restored.expectations == 1
    assert successor.fw.net.table.count == busy.table.count
    successor.check()


@pytest.mark.parametrize("seed", [*range(20), random.SystemRandom().randrange(1 << 32)])
def test_whatever_a_deputy_does_is_caught_up_with(busy: Router, seed: int) -> None:
    dice = random.Random(seed)
    print(f"seed {seed}")
    anything(busy, dice)
    successor = Successor(busy)
    busy.now_ms += dice.choice((0, 1, 500))
    anything(busy, dice)
    successor.catch_up()
    successor.check()


def anything(router: Router, dice: random.Random) -> None:
    """Packets of a few connections in any order, some of which end by themselves, by force, or by time."""
    for _ in range(dice.randrange(200)):
        act = dice.randrange(20)
        port, back = dice.randrange(4), dice.random() < 0.5
        ways = (WAN, LAN) if back else (LAN, WAN)
        if act < 9:
            flags = dice.choice((SYN, SYN | ACK, ACK, ACK | PSH, FIN | ACK, RST | ACK))
            router.cross(tcp(flags, dice.randrange(4), dice.randrange(4), sport=port, back=back), *ways)
        elif act < 16:
            router.cross(udp(b"x", sport=port, back=back), *ways)
        elif act < 17:
            router.enter(udp(b"x", sport=10 + port))
        elif act < 19:
            flows = sorted(router.table.connections(), key=lambda ct: ct.id)
            if flows:
                router.table.kill(dice.choice(flows), router.now_ms)
        else:
            router.now_ms += dice.choice((1, 100, 40_000))
            gc(router.fw.net, router.now_ms)


def test_a_full_table_takes_what_began_in_the_place_of_what_ended(busy: Router) -> None:
    successor = Successor(busy)
    busy.fw.net.sysctl.max = successor.fw.net.sysctl.max = successor.restoring.limit = 14
    busy.now_ms += 5000
    for port in range(8):
        busy.cross(udp(b"new", sport=port))
    assert busy.table.count == 14
    assert successor.catch_up().refused == 0
    successor.check()


def test_without_the_changes_numbers_are_taken_as_they_come(busy: Router) -> None:
    successor = Successor(busy)
    successor.restoring.remain_behind()
    after = Router(POLICY)
    after.now_ms, after.fw = busy.now_ms, successor.fw
    far = 400_000_000
    assert after.cross(tcp(ACK | PSH, 901 + far, 106 + far, data=b"far on", back=True), WAN, LAN) != DROP
    assert after.cross(tcp(ACK, 106 + far, 907 + far)) != DROP


def test_who_goes_on_after_all_catches_up_with_its_own_deputy(busy: Router) -> None:
    """The daemon whose next program could not be begun: it knows what was there at the fork."""
    successor = Successor(busy)
    successor.restoring = Restoring(successor.fw, links())
    busy.now_ms += 1000
    busy.cross(tcp(ACK | PSH, 62 + 31 + 31, 18, dport=21, data=b"226 done\r\n", back=True), WAN, LAN)
    successor.catch_up()
    successor.check()


def test_a_deputy_that_missed_what_ended_says_so(busy: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deputy, "EVENTS_MAX", 2)
    successor = Successor(busy)
    for ct in list(busy.table.connections()):
        busy.table.kill(ct, busy.now_ms)
    with pytest.raises(OverflowError):
        successor.catch_up()


# --- Time ---------------------------------------------------------------------------------------------------------


def one_udp(now_ms: int) -> bytes:
    """A snapshot of one UDP question, which lives for 30 seconds."""
    router = Router(POLICY)
    router.fw, router.now_ms = firewall(), now_ms
    router.cross(udp(b"question"))
    return frozen(router.fw, now_ms)


def left_ms(fw: Firewall, now_ms: int) -> list[int]:
    return [ct.expires_ms - now_ms for ct in fw.net.table.connections()]


@pytest.mark.parametrize(
    ("now", "left", "backwards"),
    [
        (at(1_010_000), [20_000], False),
        (
            at(1_010_000, WALL_MS - 3_600_000),
            [20_000],
            False,
        ),  # of the same boot it is not asked
        (at(1_030_000), [], False),
        (at(5_000, WALL_MS + 12_000, "another"), [18_000], False),
        (at(5_000_000, WALL_MS + 12_000, "another"), [18_000], False),
        (at(5_000, WALL_MS + 30_000, "another"), [], False),
        (at(5_000, WALL_MS - 3_600_000, "another"), [30_000], True),
        (at(5_000, WALL_MS + 1_000, ""), [29_000], False),
    ],
    ids=[
        "same boot",
        "clock set",
        "expired",
        "reboot",
        "later uptime",
        "long reboot",
        "clock backwards",
        "boot unknown",
    ],
)
def test_elapsed_time_is_deducted(now: Moment, left: list[int], backwards: bool) -> None:
    fw = firewall()
    restored = thawed(one_udp(1_000_000), fw, now)
    assert left_ms(fw, now.mono_ms) == left
    assert restored.clock_backwards is backwards
    assert restored.expired == 1 - len(left)
    stats = fw.net.stats
    assert (stats.insert, stats.destroyed, sum(stats.closed)) == (1, 1 - len(left), 1 - len(left))


# --- What has changed meanwhile -----------------------------------------------------------------------------------


def test_interfaces_are_found_by_name() -> None:
    fw = firewall()
    data = one_udp(1000)
    thawed(data, fw, at(1000), {LAN: "eth0", WAN: "eth2", 9: "eth1"})
    (ct,) = fw.net.table.connections()
    assert (ct.iif, ct.oif) == (9, LAN)


def test_an_interface_that_is_not_there_keeps_its_name_and_zone() -> None:
    fw, gone = firewall(), links({WAN: "eth0"})
    Restoring(fw, gone).read(io.BytesIO(one_udp(1000)), at(1000))
    (ct,) = fw.net.table.connections()
    assert (ct.iif, ct.oif) == (FIRST_ABSENT, WAN)
    assert gone.interface(ct.iif) == "eth1"
    fw.ruleset.set_links(gone.absent | gone.names)
    assert fw.ruleset.zone_of[ct.iif] == fw.ruleset.zones["lan"]


def test_a_rule_that_is_gone_is_as_after_a_reload(busy: Router) -> None:
    """Its connections go on, and a policy that judges anew finds their new rule."""
    fw = firewall(POLICY.replace('"out"', '"outward"').replace('"ftp"\nfrom', '"files"\nfrom'), generation=2)
    thawed(frozen(busy.fw, busy.now_ms), fw, at(busy.now_ms))
    of_out = [ct for ct in fw.net.table.connections() if ct.rule == "out"]
    assert of_out
    assert fw.ruleset.by_name["outward"].account.live == 0
    for ct in of_out:
        assert still_allowed(fw, ct, busy.now_ms)
    assert {ct.rule for ct in of_out} == {"outward"}
    assert fw.ruleset.by_name["outward"].account.live == len(of_out)


def test_timeouts_are_those_of_the_rule_as_it_is_now(busy: Router) -> None:
    slow = get_tuple(udp(b"", dport=5000, family=6), 0)
    fw = firewall(POLICY.replace('timeouts = { udp_timeout = "1h" }', ""))
    thawed(frozen(busy.fw, busy.now_ms), fw, at(busy.now_ms))
    assert conns(busy.fw)[slow].timeouts == 1
    assert conns(fw)[slow].timeouts == 0


def test_limits_hold_and_the_most_recent_are_kept() -> None:
    router = Router(POLICY)
    router.fw = firewall()
    for sport in range(1, 11):
        router.cross(udp(b"x", sport=sport))
        router.now_ms += 10
    established = tcp(SYN, 100, sport=99)
    for packet, iif, oif in (
        (established, LAN, WAN),
        (tcp(SYN | ACK, 900, 101, sport=99, back=True), WAN, LAN),
        (tcp(ACK, 101, 901, sport=99), LAN, WAN),
    ):
        router.cross(packet, iif, oif)
    data = frozen(router.fw, router.now_ms)
    fw = firewall(max=4)
    restored = thawed(data, fw, at(router.now_ms))
    assert (restored.flows, restored.refused) == (4, 7)
    kept = conns(fw)
    assert get_tuple(established, 0) in kept
    assert {get_tuple(udp(b"x", sport=sport), 0) for sport in (8, 9, 10)} < kept.keys()

    fw = firewall(max_per_source=2)
    assert thawed(data, fw, at(router.now_ms)).flows == 2
    assert all(ct.status & IPS_COUNTED for ct in fw.net.table.connections())


def test_the_order_of_eviction_survives() -> None:
    router = Router(POLICY)
    router.fw = firewall()
    for sport in (5, 3, 9, 1):
        router.cross(udp(b"x", sport=sport))
        router.now_ms += 2000
    fw = firewall()
    thawed(frozen(router.fw, router.now_ms), fw, at(router.now_ms))
    for sport in (5, 3, 9, 1):
        victim = fw.net.table.victim(router.now_ms)
        assert victim is not None
        assert victim.orig == get_tuple(udp(b"x", sport=sport), 0)
        fw.net.table.evict(victim, router.now_ms)


# --- What else is kept --------------------------------------------------------------------------------------------


def test_addresses_counters_and_revocations(busy: Router) -> None:
    banned = busy.fw.ruleset.sets["banned"]
    for address, length, ends_ms in (
        (0xC0000200, 24, busy.now_ms + 5000),
        (0xC0000300, 24, busy.now_ms + 15_000),
        (5 << 64, 64, FOR_EVER),
    ):
        assert banned.add(length == 64, address, length, ends_ms, busy.now_ms)
    busy.fw.drop_counts["policy"] = 17
    busy.fw.revoked[get_tuple(udp(b"x", sport=1), 0)] = busy.now_ms + 100_000
    busy.fw.revoked[get_tuple(udp(b"x", sport=2, family=6), 0)] = busy.now_ms + 2_000
    fw = firewall()
    now = at(busy.now_ms + 10_000)
    assert thawed(frozen(busy.fw, busy.now_ms), fw, now).addresses == 2
    assert fw.ruleset.sets["banned"].added == {
        (False, 0xC0000300, 24): busy.now_ms + 15_000,
        (True, 5 << 64, 64): FOR_EVER,
    }
    assert fw.ruleset.sets["banned"].ipv4.has(0xC0000305, now.mono_ms)
    assert fw.revoked == {get_tuple(udp(b"x", sport=1), 0): busy.now_ms + 100_000}
    assert fw.drop_counts == {"policy": 17}
    before, after = busy.fw.ruleset.by_name["out"], fw.ruleset.by_name["out"]
    assert (after.hits, after.flows, after.last_hit_ms) == (before.hits, before.flows, before.last_hit_ms)
    assert after.hits > 0
    assert fw.net.stats.ctinfo == busy.fw.net.stats.ctinfo
    assert fw.net.stats.expect_create == busy.fw.net.stats.expect_create


def test_connections_that_are_not_confirmed_are_for_who_takes_over_at_once() -> None:
    router = Router(POLICY)
    router.fw = firewall()
    mark = router.enter(udp(b"x"))
    fw = firewall()
    thawed(frozen(router.fw, router.now_ms), fw, at(router.now_ms))
    assert fw.net.table.unconfirmed_count() == 0
    router.now_ms += 1000
    thawed(frozen(router.fw, router.now_ms, unconfirmed=True), fw, at(router.now_ms))
    held = fw.net.table.find_unconfirmed(get_tuple(udp(b"x"), 0))
    assert held is not None
    after = Router(POLICY)
    after.fw, after.now_ms = fw, router.now_ms
    after.leave(udp(b"x"), mark)
    assert held.status & IPS_CONFIRMED
    assert left_ms(fw, router.now_ms) == [30_000]


def test_many_come_back(busy: Router) -> None:
    """Enough for several blocks and names."""
    for number in range(3000):
        busy.cross(udp(b"x", sport=number, dport=7))
    data = frozen(busy.fw, busy.now_ms)
    assert sum(kind == CONNS for kind, _ in blocks(io.BytesIO(data))) >= 4
    fw = firewall()
    assert thawed(data, fw, at(busy.now_ms)).flows == 3014
    assert sum(not ct.status & IPS_ASSURED for ct in fw.net.table.connections()) > 3000


# --- What is no snapshot ------------------------------------------------------------------------------------------


def refusal(data: bytes) -> str:
    fw = firewall()
    with pytest.raises(SnapshotError) as refused:
        Restoring(fw, links()).read(io.BytesIO(data), at(1000))
    assert fw.net.table.count == 0
    return str(refused.value)


def test_what_is_torn_is_refused_wherever_it_is(busy: Router) -> None:
    data = frozen(busy.fw, busy.now_ms)
    for size in range(len(data)):
        with pytest.raises(SnapshotError):
            check(io.BytesIO(data[:size]))
    assert refusal(data[:-1])
    assert refusal(data + b"\0")


def test_every_bit_counts(busy: Router) -> None:
    data = frozen(busy.fw, busy.now_ms)
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        if 10 <= position < 14:
            continue  # room for later
        with pytest.raises(SnapshotError):
            check(io.BytesIO(changed))


def test_the_reasons(busy: Router) -> None:
    data = frozen(busy.fw, busy.now_ms)
    assert refusal(b"") == "is no snapshot of conntrackd"
    assert refusal(b"#!/bin/sh\nexit 1\n") == "is no snapshot of conntrackd"
    newer = START.pack(MAGIC, VERSION + 1) + data[START.size :]
    assert refusal(newer) == f"was written by a newer conntrackd (format {VERSION + 1}, this one reads {VERSION})"
    assert refusal(data[:-3]).startswith("is torn at byte ")
    assert refusal(sealed([])) == "is torn: it does not end where it should"
    assert refusal(sealed([(1, b"[]")])).startswith("has a head that is not understood: ")
    parts = list(blocks(io.BytesIO(data)))[:-1]
    assert refusal(sealed(reversed(parts))) == "is damaged: its blocks are out of order"
    assert refusal(START.pack(MAGIC, VERSION) + HEADER.pack(1, BLOCK_MAX + 1, 0)).startswith("is torn at byte ")


def sealed(parts: Iterable[tuple[int, bytes]]) -> bytes:
    """A snapshot of any blocks, whose checksums are right."""
    made = [block(kind, content) for kind, content in parts]
    return START.pack(MAGIC, VERSION) + b"".join(made) + block(END, len(made).to_bytes(8, "little"))


def test_wrong_content_with_the_right_checksum_is_left_out(busy: Router) -> None:
    parts = list(blocks(io.BytesIO(frozen(busy.fw, busy.now_ms))))[:-1]
    (rows,) = (content for kind, content in parts if kind == CONNS)
    for content in (rows[:-1], b"\xff" * 500, bytes(500), rows + rows):
        changed = [(kind, content if kind == CONNS else was) for kind, was in parts]
        fw = firewall()
        assert thawed(sealed(changed), fw, at(busy.now_ms)).flows <= 14
    changed = [(kind, b"[[[" if kind == TOTALS else was) for kind, was in parts]
    fw = firewall()
    Restoring(fw, links()).read(io.BytesIO(sealed(changed)), at(busy.now_ms))
    assert fw.net.table.count == 14


def test_only_the_head_is_needed_to_know_its_time(busy: Router) -> None:
    head = check(io.BytesIO(frozen(busy.fw, busy.now_ms)))
    assert (head.mono_ms, head.wall_ms, head.boot_id, head.generation) == (busy.now_ms, WALL_MS, BOOT, 1)
