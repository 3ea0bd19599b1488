"""Rings of connections, linked through the connections themselves: to enter, to leave and to move cost the same
however long the ring is.

A connection may stand in two rings at once: in one by activity (the least recently seen at the front), and in one of
what is due in the same second. A ring has a head, which is no connection; the head's neighbours are the front and the
back. A connection that is in no ring points at none, and so nothing dead is kept alive by a living one.
"""

from conntrackd.core.conn import Conn


def activity_ring() -> Conn:
    """Make an empty ring by activity: its head."""
    head = Conn(b"", b"", 0, 0)
    head.older = head.newer = head
    return head


def enter_activity(head: Conn, ct: Conn) -> None:
    """Put a connection at the back: it is the one seen last."""
    last = head.older
    assert last is not None
    assert ct.newer is None
    ct.older = last
    ct.newer = head
    last.newer = ct
    head.older = ct


def leave_activity(ct: Conn) -> None:
    """Take a connection out of its ring by activity, if it is in one."""
    older, newer = ct.older, ct.newer
    if older is None or newer is None:
        return
    older.newer = newer
    newer.older = older
    ct.older = ct.newer = None


def due_ring() -> Conn:
    """Make an empty ring of connections that are due together: its head."""
    head = Conn(b"", b"", 0, 0)
    head.earlier = head.later = head
    return head


def enter_due(head: Conn, ct: Conn) -> None:
    """Put a connection at the back."""
    last = head.earlier
    assert last is not None
    assert ct.later is None
    ct.earlier = last
    ct.later = head
    last.later = ct
    head.earlier = ct


def leave_due(ct: Conn) -> None:
    """Take a connection out of the ring of what is due with it, if it is in one."""
    earlier, later = ct.earlier, ct.later
    if earlier is None or later is None:
        return
    earlier.later = later
    later.earlier = earlier
    ct.earlier = ct.later = None
