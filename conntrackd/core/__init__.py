"""The conntrack core: no operating system, no clock, no policy, no I/O. Read conntrack.py first."""

from types import FunctionType


def compiled() -> bool:
    """Whether the packet path runs compiled by mypyc; if not, it is the same source in pure Python."""
    from conntrackd.core.conntrack import conntrack_in

    return not isinstance(conntrack_in, FunctionType)
