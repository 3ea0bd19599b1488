"""What holds whatever the packets were. Each function raises AssertionError if it does not."""

from conntrackd.const import CTINFO_NAMES, DROP, INVALID, IP_CT_UNTRACKED, IPS_ASSURED, IPS_CONFIRMED, IPS_DYING
from conntrackd.core.conn import Conn
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.sctp import SctpConn
from conntrackd.core.proto.tcp_conn import MASK, TcpConn, sides
from conntrackd.core.sysctl import TIMEOUTS
from conntrackd.core.table import Table, zone_key
from conntrackd.hooks import DROPS_MAX, Firewall


def check_answer(ctinfo: int, ct: Conn | None) -> None:
    """conntrack_in answers a ctinfo that has a name, and a connection exactly where the packet belongs to one."""
    assert ctinfo in CTINFO_NAMES, ctinfo
    assert (ct is None) == (ctinfo >= INVALID or ctinfo == IP_CT_UNTRACKED), (ctinfo, ct)


def check_mark(mark: int) -> None:
    """A hook answers DROP or six bits."""
    assert mark == DROP or 0 <= mark < 64, mark


def check_table(net: Conntrack, now_ms: int, lives: bool = True) -> None:
    """Counters add up, and the table holds each connection under its two tuples and nothing else.

    `lives`: and none lives longer than a timeout.
    """
    table = net.table
    assert net.stats.insert - net.stats.destroyed == table.count
    connections = list(table.connections())
    assert len(connections) == table.count
    assert sum(map(len, table.shards)) == sum(1 if ct.orig == ct.reply else 2 for ct in connections)
    check_rings(table, connections)
    for ct in connections:
        assert table.get(ct.orig, ct.zone) is table.get(ct.reply, ct.zone) is ct
        assert ct.status & (IPS_CONFIRMED | IPS_DYING) == IPS_CONFIRMED
        check_conn(net, ct)
        assert not lives or ct.expires_ms - now_ms <= longest_timeout(net)
    assert table.unconfirmed_count() <= net.sysctl.unconfirmed_max
    for unconfirmed in (table.unconfirmed, table.unconfirmed_old):
        for key, ct in unconfirmed.items():
            assert zone_key(ct.zone, ct.orig) == key
            assert ct.newer is ct.later is None
            assert not ct.status & (IPS_CONFIRMED | IPS_DYING)
            check_conn(net, ct)
            assert not lives or 0 < ct.expires_ms <= longest_timeout(net)  # relative until it is confirmed


def check_rings(table: Table, connections: list[Conn]) -> None:
    """Each connection stands once in the wheel, and in the ring of those that may be evicted in its turn."""
    due = [ct for slot in table.wheel for ct in ring(slot, later=True)]
    assert len(due) == len(connections)
    assert set(map(id, due)) == set(map(id, connections))
    for head, wanted in (
        (table.not_assured, [ct for ct in connections if not ct.status & IPS_ASSURED]),
        (table.closing, [ct for ct in connections if ct.status & IPS_ASSURED and ct.ending]),
    ):
        found = ring(head, later=False)
        assert len(found) == len(wanted)
        assert set(map(id, found)) == set(map(id, wanted))
        assert [ct.seen_ms for ct in found] == sorted(ct.seen_ms for ct in found)


def ring(head: Conn, later: bool) -> list[Conn]:
    """The connections of a ring in their order; both ways are the same."""
    found = []
    ct = head.later if later else head.newer
    while ct is not head:
        assert ct is not None
        found.append(ct)
        after = ct.later if later else ct.newer
        assert after is not None
        assert (after.earlier if later else after.older) is ct
        ct = after
    return found


def check_conn(net: Conntrack, ct: Conn) -> None:
    """A connection that is kept has a state, and its numbers fit their fields on the wire."""
    assert ct.packets_orig > 0 or ct.packets_reply > 0
    if isinstance(ct, TcpConn):
        assert 1 <= ct.state <= 9
        for peer in sides(ct):
            assert 0 <= peer.end <= MASK
            assert 0 <= peer.maxend <= MASK
            assert 0 <= peer.maxack <= MASK
            assert 0 <= peer.scale <= 14
            assert peer.maxwin >= 0
    elif isinstance(ct, SctpConn):
        assert 1 <= ct.state <= 8
        assert all(0 <= tag <= MASK for tag in ct.vtag)


def longest_timeout(net: Conntrack) -> int:
    return max(int(getattr(net.sysctl, name)) for name in TIMEOUTS)


def check_drops(fw: Firewall) -> None:
    """Every drop is counted, and the recent ones are bounded."""
    assert sum(fw.drop_counts.values()) == fw.drops_next
    assert len(fw.drops) == min(fw.drops_next, DROPS_MAX)
