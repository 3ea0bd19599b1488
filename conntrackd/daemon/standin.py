"""A connection in place of one that a packet never got: filters are asked about it."""

from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import new_conn
from conntrackd.core.tuples import invert


def stand_in(key: bytes, iif: int, oif: int, rule: str, now_ms: int, zone: int = 0) -> Conn:
    """Make the connection that a packet with this tuple would have begun; the tracker does not know it."""
    ct = new_conn(key, invert(key) or key, now_ms)
    ct.zone = zone
    ct.iif = iif
    ct.oif = oif
    ct.rule = rule
    return ct
