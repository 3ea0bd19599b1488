"""The oracle: a router namespace whose kernel tracks, one packet at a time.

A packet is written into a TUN device of the namespace. With a single queue and no batching that write is
synchronous: when it returns, the packet has gone through defragmentation, tracking, forwarding and confirmation,
and everything that the kernel says about it waits in our sockets:

- nft rules behind the tracking hook put `ct state` and `ct direction` into the packet mark and log it (NFLOG group
  PRE) with its payload, which is the packet as nf_conntrack saw it: reassembled, cut to its IP length. No log means
  that the IP stack or the defragmentation kept the packet: nobody saw it.
- a second log (group POST) shortly before the confirm hook (POSTROUTING and LOCAL_IN) says that the packet got there.
- the entry is read with a ctnetlink GET by tuple, which evicts an expired one like any lookup.

The namespace has no name: it lives as long as the file descriptors of its Router and cannot be left behind. The
router never speaks: everything in its OUTPUT chain is dropped before it is tracked.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self

from conntrackd import const
from tests.differential.packets import ROUTER_ADDRESSES

CLIENT: Final = 0  # a packet's side: which of the two devices it enters by
SERVER: Final = 1
DEVICES: Final = ("inside", "outside")

PRE: Final = 1
POST: Final = 2
_REPLY: Final = 8
# What a packet's mark says, as ctinfo. The kernel has no reasons for INVALID: any of ours will do.
_CTINFO: Final = {
    1: const.IP_CT_NEW,
    1 | _REPLY: const.IP_CT_NEW,
    2: const.IP_CT_ESTABLISHED,
    2 | _REPLY: const.IP_CT_ESTABLISHED_REPLY,
    3: const.IP_CT_RELATED,
    3 | _REPLY: const.IP_CT_RELATED_REPLY,
    4: const.INVALID,
    5: const.IP_CT_UNTRACKED,
}
# Logs what enters by our devices: once tracked, and again just before it is confirmed, with its mark.
LOGGING: Final = f"""
table inet logging {{
  chain pre {{ type filter hook prerouting priority -198; iifname {{ {", ".join(DEVICES)} }} log group {PRE}; }}
  chain post {{ type filter hook postrouting priority 1000; iifname {{ {", ".join(DEVICES)} }} log group {POST}; }}
  chain local_in {{ type filter hook input priority 1000; iifname {{ {", ".join(DEVICES)} }} log group {POST}; }}
  chain local_out {{ type filter hook output priority -400; drop; }}
}}
"""
TRACKING: Final = f"""
table inet oracle {{
  chain pre {{
    type filter hook prerouting priority -199;
    ct state new meta mark set 1
    ct state established meta mark set 2
    ct state related meta mark set 3
    ct state invalid meta mark set 4
    ct state untracked meta mark set 5
    ct direction reply meta mark set meta mark or {_REPLY}
  }}
}}
"""
_SETTINGS: Final = {
    "net/ipv4/ip_forward": 1,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/conf/all/accept_local": 1,
    "net/ipv4/ipfrag_time": 1,
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv6/conf/default/addr_gen_mode": 1,  # no link-local address, so no neighbour or router discovery
    "net/netfilter/nf_conntrack_frag6_timeout": 1,
}
_RECEIVE: Final = 1 << 17

# --- netlink (linux/netlink.h, nfnetlink.h, nfnetlink_log.h, nfnetlink_conntrack.h) -----------------------------
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_NETLINK_NETFILTER: Final = 12
_REQUEST: Final = 1
_ACK: Final = 4
_DUMP: Final = 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_CT: Final = 1 << 8
_CT_GET: Final = _CT | 1
_CT_DELETE: Final = _CT | 2
_CT_GET_STATS_CPU: Final = _CT | 4
_ULOG_CONFIG: Final = (4 << 8) | 1
_NESTED: Final = 0x8000
_HEADER: Final = struct.Struct("=IHHII")
_NFGEN: Final = struct.Struct(">BBH")
_ATTR: Final = struct.Struct("=HH")

# TCP and SCTP carry their state in CTA_PROTOINFO, each in its own nest.
_PROTOINFO_TCP: Final = 1
_PROTOINFO_STATE: Final = 1
# CTA_STATS_* as conntrack -S names them.
_STATS: Final = {
    2: "found",
    4: "invalid",
    8: "insert",
    9: "insert_failed",
    10: "drop",
    11: "early_drop",
    12: "error",
    13: "search_restart",
    14: "clash_resolve",
    15: "chaintoolong",
}


class Logged(NamedTuple):
    """One NFLOG message: its group, the mark of the packet, the packet if the group copies it."""

    group: int
    mark: int
    data: bytes


class Passage(NamedTuple):
    """What became of one packet: the datagram that was tracked (None: never seen), its ctinfo, whether it left."""

    data: bytes | None
    ctinfo: int
    left: bool


class Entry(NamedTuple):
    """One connection of the kernel's table; state None where the protocol has none, timeout in whole seconds."""

    orig: bytes
    status: int
    state: int | None
    inner: tuple[int, ...]  # what ctnetlink tells of the protocol: TCP's scales and flags, SCTP's tags; by direction
    timeout: int
    packets_orig: int
    bytes_orig: int
    packets_reply: int
    bytes_reply: int


_UNSEEN: Final = Passage(None, -1, False)
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """Runs its body in a new network namespace and comes back."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET))
        try:
            yield
        finally:
            _check(_libc.setns(home, _CLONE_NEWNET))
    finally:
        os.close(home)


def _run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, check=True, input=text, text=True)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH", name.encode(), _IFF_TUN_NO_PI))
    _run("ip", "link", "set", name, "mtu", "65535", "txqueuelen", "2", "up")
    return fd


def _attr(kind: int, value: bytes) -> bytes:
    return _ATTR.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(message: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Where the values of the attributes between two offsets lie, by type."""
    found = {}
    while start + 4 <= end:
        length, kind = _ATTR.unpack_from(message, start)
        found[kind & 0x3FFF] = (start + 4, start + length)
        start += (length + 3) & ~3
    return found


def _message(kind: int, flags: int, family: int, resource: int, attributes: bytes) -> bytes:
    length = _HEADER.size + _NFGEN.size + len(attributes)
    return _HEADER.pack(length, kind, _REQUEST | flags, 0, 0) + _NFGEN.pack(family, 0, resource) + attributes


def _encode_tuple(key: bytes) -> tuple[int, bytes]:
    """Family and CTA_TUPLE_ORIG of a tuple in our form."""
    proto, size = key[0], (len(key) - 5) // 2
    saddr, daddr, ports = key[1 : 1 + size], key[1 + size : 1 + 2 * size], key[-4:]
    family, first = (socket.AF_INET, 1) if size == 4 else (socket.AF_INET6, 3)
    parts = _attr(1, bytes([proto]))
    if proto in (const.IPPROTO_ICMP, const.IPPROTO_ICMPV6):
        first_icmp = 4 if proto == const.IPPROTO_ICMP else 7
        parts += _attr(first_icmp, ports[0:2]) + _attr(first_icmp + 1, ports[2:3]) + _attr(first_icmp + 2, ports[3:4])
    else:
        parts += _attr(2, ports[0:2]) + _attr(3, ports[2:4])
    inner = _attr(1 | _NESTED, _attr(first, saddr) + _attr(first + 1, daddr)) + _attr(2 | _NESTED, parts)
    return family, _attr(1 | _NESTED, inner)


def decode_tuple(message: bytes, start: int, end: int) -> bytes:
    nests = attributes(message, start, end)
    address = attributes(message, *nests[1])
    proto = attributes(message, *nests[2])
    first = 1 if 1 in address else 3
    key = bytes(message[slice(*proto[1])]) + message[slice(*address[first])] + message[slice(*address[first + 1])]
    for first_icmp in (4, 7):
        if first_icmp in proto:
            return key + b"".join(message[slice(*proto[first_icmp + i])] for i in range(3))
    if 2 in proto:
        return key + message[slice(*proto[2])] + message[slice(*proto[3])]
    return key + bytes(4)


def _number(message: bytes, at: tuple[int, int]) -> int:
    return int.from_bytes(message[at[0] : at[1]], "big")


def _decode_entry(message: bytes, start: int, end: int) -> Entry:
    found = attributes(message, start + _HEADER.size + _NFGEN.size, end)
    state: int | None = None
    inner: tuple[int, ...] = ()
    if 4 in found:
        for kind, nest in attributes(message, *found[4]).items():
            proto = attributes(message, *nest)
            state = message[proto[_PROTOINFO_STATE][0]]
            if kind == _PROTOINFO_TCP:  # scale, scale, flags, flags (the last with a mask after them)
                inner = tuple(message[proto[each][0]] for each in (2, 3, 4, 5))
            else:
                inner = tuple(_number(message, proto[each]) for each in (2, 3))
    counts = []
    for direction in (9, 10):
        counters = attributes(message, *found[direction]) if direction in found else {}
        counts += [_number(message, counters[kind]) if kind in counters else 0 for kind in (1, 2)]
    return Entry(
        decode_tuple(message, *found[1]),
        _number(message, found[3]),
        state,
        inner,
        _number(message, found[7]) if 7 in found else -1,
        *counts,
    )


class Router:
    """A router namespace between two devices of ours, with nft `rules`. Built by a thread that is in there.

    `settings` are the sysctls under nf_conntrack_, without that prefix, timeouts in seconds.
    """

    def __init__(self, rules: str, settings: Mapping[str, int]) -> None:
        self._requests: dict[bytes, bytes] = {}
        with contextlib.ExitStack() as undo:
            self._log = undo.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER))
            self._ct = undo.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER))
            for path, value in {
                **_SETTINGS,
                **{f"net/netfilter/nf_conntrack_{name}": value for name, value in settings.items()},
            }.items():
                Path("/proc/sys", path).write_text(str(value))
            _run("nft", "-f", "-", text=rules)
            _run("ip", "link", "set", "lo", "up")
            self._tuns = [_tun(name) for name in DEVICES]
            for fd in self._tuns:
                undo.callback(os.close, fd)
            for address in ROUTER_ADDRESSES:
                _run("ip", "address", "add", address, "dev", "lo")
            for family in ("-4", "-6"):
                # Nobody reads the devices: what leaves is counted by the POST log and dropped by a full ring.
                _run("ip", family, "route", "add", "default", "dev", DEVICES[SERVER])
            for group, copy in ((PRE, 2), (POST, 1)):
                self._configure(group, _attr(1, b"\x01"))  # NFULNL_CFG_CMD_BIND
                self._configure(group, _attr(2, struct.pack(">IBB", 0xFFFF, copy, 0)) + _attr(5, struct.pack(">I", 1)))
            self._log.setblocking(False)
            self._undo = undo.pop_all()

    @classmethod
    def tracking(cls, settings: Mapping[str, int]) -> Self:
        """The oracle: in a namespace of its own."""
        with namespace():
            return cls(TRACKING + LOGGING, {"acct": 1, **settings})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _configure(self, group: int, attributes: bytes) -> None:
        self._log.send(_message(_ULOG_CONFIG, _ACK, socket.AF_UNSPEC, group, attributes))
        self._acknowledged(self._log)

    @staticmethod
    def _acknowledged(sock: socket.socket) -> None:
        answer = sock.recv(_RECEIVE)
        error = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if error:
            raise OSError(error, os.strerror(error))

    def forward(self, side: int, packet: bytes) -> Passage:
        """Sends one packet through the router; returns when the kernel is done with it."""
        if not self.send(side, packet):
            return _UNSEEN
        first = self.logged()
        if first is None:
            return _UNSEEN
        second = self.logged()
        assert first.group == PRE, "a packet reached POSTROUTING and not PREROUTING"
        assert second is None or second.group == POST, "one packet came through PREROUTING twice"
        return Passage(first.data, _CTINFO[first.mark], second is not None)

    def send(self, side: int, packet: bytes) -> bool:
        """Puts one packet into the device of its side; False if it has no IP version that the device would know."""
        try:
            os.write(self._tuns[side], packet)
        except OSError:
            return False
        return True

    def device(self, side: int) -> int:
        """The descriptor of the device of a side: what is read from it has left the router there."""
        return self._tuns[side]

    def logged(self, wait_s: float = 0) -> Logged | None:
        """The next log message, if there is one by then."""
        if wait_s and not select.select([self._log], [], [], wait_s)[0]:
            return None
        try:
            message = self._log.recv(_RECEIVE)
        except BlockingIOError:
            return None
        found = attributes(message, _HEADER.size + _NFGEN.size, _HEADER.unpack_from(message)[0])
        mark = _number(message, found[2]) if 2 in found else 0
        return Logged(message[19], mark, message[slice(*found[9])] if 9 in found else b"")

    def entry(self, key: bytes) -> Entry | None:
        """The entry that holds this tuple in either direction."""
        request = self._requests.get(key)
        if request is None:
            family, attributes = _encode_tuple(key)
            request = self._requests[key] = _message(_CT_GET, 0, family, 0, attributes)
        self._ct.send(request)
        message = self._ct.recv(_RECEIVE)
        length, kind = _HEADER.unpack_from(message)[:2]
        if kind == _NLMSG_ERROR:
            return None
        return _decode_entry(message, 0, length)

    def entries(self) -> dict[bytes, Entry]:
        """The whole table by original tuple."""
        entries = [_decode_entry(*where) for where in self.dump(_CT_GET)]
        return {entry.orig: entry for entry in entries}

    def stats(self) -> dict[str, int]:
        """The counters of `conntrack -S`, over all processors."""
        stats = dict.fromkeys(_STATS.values(), 0)
        for message, start, end in self.dump(_CT_GET_STATS_CPU):
            for kind, at in attributes(message, start + _HEADER.size + _NFGEN.size, end).items():
                if kind in _STATS:
                    stats[_STATS[kind]] += _number(message, at)
        return stats

    def dump(self, kind: int) -> Iterator[tuple[bytes, int, int]]:
        """Ask for everything of a kind: each message, as where it begins and ends in what was received."""
        self._ct.send(_message(kind, _DUMP, socket.AF_UNSPEC, 0, b""))
        while True:
            answer = self._ct.recv(_RECEIVE)
            start = 0
            while start < len(answer):
                length, answer_kind = _HEADER.unpack_from(answer, start)[:2]
                if answer_kind == _NLMSG_DONE:
                    return
                yield answer, start, start + length
                start += (length + 3) & ~3

    def flush(self) -> None:
        """Empties the table."""
        self._requests.clear()
        self._ct.send(_message(_CT_DELETE, _ACK, socket.AF_UNSPEC, 0, b""))
        self._acknowledged(self._ct)
