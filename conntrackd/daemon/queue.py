"""A netfilter queue: packets in, verdicts out.

NetfilterQueue binds the queue and sets it up. Its own receive loop is not used: it reads one packet per system call,
into a buffer of 4096 bytes that must hold the kernel's metadata as well (a longer message is lost together with its
place in the queue), and it hides whether a checksum is finished. Instead the messages are taken from its socket many
at a time (mmsg.py) and read here. A payload is never given back to the kernel; the true length of a packet that is
cut stands beside it.

Verdicts are not sent one by one either: they are collected, each with its own mark, and go out in one message when
the socket is empty or the budget of the turn is spent. The kernel carries them out in their order.
"""

import contextlib
import errno
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
from netfilterqueue import NetfilterQueue

from conntrackd.const import DROP, NF_ACCEPT, NF_DROP, NF_INET_LOCAL_OUT, NF_INET_PRE_ROUTING
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.mmsg import Inbox
from conntrackd.daemon.nfnetlink import (
    MARK_HEAD,
    NFQA_CAP_LEN,
    NFQA_IFINDEX_INDEV,
    NFQA_IFINDEX_OUTDEV,
    NFQA_MARK,
    NFQA_PACKET_HDR,
    NFQA_PAYLOAD,
    NFQA_SKB_CSUM_NOTVERIFIED,
    NFQA_SKB_INFO,
    NFQNL_MSG_PACKET,
    NLMSG_ERROR,
    PACKET_ID_AT,
    VERDICT,
    drop_up_to,
    native16,
    set_flags,
    settings,
    verdict_head,
)
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.wire.fields import u32

if TYPE_CHECKING:
    from conntrackd.daemon.trace import Tracing

COPY_RANGE: Final = 3900  # bytes of a packet: more would not fit NetfilterQueue's buffer if its loop ever ran
MESSAGE_MAX: Final = 4352  # a packet and what the kernel says about it
MESSAGES_AT_ONCE: Final = 64
# Packets in a turn of whoever reads the queues.
TRACK_BUDGET: Final = 64
CONFIRM_BUDGET: Final = 512
MESSAGE_HEADER: Final = 20  # nlmsghdr and nfgenmsg; attributes follow
# What the kernel charges the socket for a packet of common size, and half of what it charges for a big one; it grants
# twice what it is asked for.
SOCKET_BYTES_PER_PACKET: Final = 2304
SOCKET_BUFFER_MAX: Final = (1 << 30) - 1  # the kernel's own limit
SO_RCVBUFFORCE: Final = 33
SO_MEMINFO: Final = 55  # begins with the bytes in use and the limit
VERDICTS_AT_ONCE: Final = 1024  # in one message: more would not fit the kernel's default for a socket
LOG_PAUSE_MS: Final = 1000
# Of the calling thread: tests run queues in the network namespace of a thread.
PROC: Final = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
# Upper bounds of the latency histogram, in microseconds; one more count holds what is above.
LATENCY_BOUNDS_US: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)

log = structlog.get_logger()


class QueueError(Exception):
    """A queue can't be bound; the text is one sentence for the operator."""


class KernelQueue(NamedTuple):
    """What the kernel says about one bound queue; it alone knows of packets that never reached us."""

    portid: int
    waiting: int
    dropped_full: int
    dropped_socket: int
    last_id: int = 0  # of the packet that came last


class Queue:
    """One bound queue.

    `accept_on_error` is the verdict for a packet on which our own code failed; `now_ms` is set by the loop before each
    turn. `track` is hooks.pre_routing; it, `inbox` and `write` may be stand-ins that fail on purpose.
    """

    def __init__(
        self,
        number: int,
        fw: Firewall,
        mark: Mark,
        accept_on_error: bool,
        track: Callable[[Firewall, bytes, int, int, int, int], int] = pre_routing,
        inbox: Callable[[int, int], Inbox] = Inbox,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self.number = number
        self.max_length = 0  # packets that may wait, and bytes of them, as they were asked for
        self.wanted_buffer = 0
        self.now_ms = 0
        self.packets = 0
        self.message_bytes = 0  # of the messages that they came in
        self.dropped = 0
        self.errors = 0
        self.errors_accepted = 0  # of these: passed, as configured
        self.verdict_errors = 0  # verdicts that the kernel did not take
        self.overruns = 0  # times that the socket's buffer ran over; the kernel counts the packets
        self.latency = [0] * (len(LATENCY_BOUNDS_US) + 1)  # packets by time from the wake-up to the verdict
        self.latency_sum_us = 0  # the time of all of them
        self._fw = fw
        self._mark = mark
        self.accept_on_error = accept_on_error
        self._track = track
        self.tracing: Tracing | None = None  # watches what becomes of packets, while somebody wants to know
        self._logged_ms = -LOG_PAUSE_MS
        self._unlogged = 0
        self._nfqueue: NetfilterQueue | None = None
        self._fd = -1
        self._inbox = inbox(MESSAGES_AT_ONCE, MESSAGE_MAX)
        self._write = write
        self._head = verdict_head(number, VERDICT.size)
        self._verdicts: list[bytes] = []
        # There was no memory in the middle of so many messages: all that have no verdict yet are dropped.
        self._abandoned = 0

    def bind(self, max_length: int, socket_buffer: int, flags: int) -> None:
        """Bind the queue, `max_length` packets long; the buffer (bytes) holds as many. Raises QueueError.

        `flags` are nfnetlink's NFQA_CFG_F_*.
        """
        try:
            nfqueue = NetfilterQueue()
        except OSError as error:
            raise QueueError(
                f"Queue {self.number} can't be bound: it needs root (the capability CAP_NET_ADMIN) "
                "and a kernel with nfnetlink_queue."
            ) from error
        self._set_size(max_length, socket_buffer)
        with warnings.catch_warnings(record=True) as short:
            warnings.simplefilter("always")
            try:
                nfqueue.bind(
                    self.number,
                    _unused,
                    max_len=max_length,
                    range=COPY_RANGE,
                    sock_len=self.wanted_buffer,
                )
            except OSError as error:
                raise QueueError(self._why_not()) from error
        for warning in short:
            log.warning("queue_buffer_short", queue=self.number, detail=str(warning.message))
        self._nfqueue = nfqueue
        self._fd = nfqueue.get_fd()
        try:
            set_flags(self._fd, self.number, flags)
        except OSError as error:
            self.unbind()
            raise QueueError(f"Queue {self.number} can't be set up: {error.strerror}.") from error

    def adopt(self, fd: int, max_length: int, socket_buffer: int, flags: int, orderly: bool) -> bool:
        """Go on with the socket of the process before, and what waits there; False if the queue is not bound to it.

        A process that ended without order may have read packets and not judged them: nobody can any more, and they go.
        """
        try:
            with socket.socket(fileno=os.dup(fd)) as sock:
                ours = sock.getsockname()[0]
                known = kernel_queues().get(self.number)
                if sock.family != socket.AF_NETLINK or known is None or known.portid != ours:
                    return False
                self._set_size(max_length, socket_buffer)
                with contextlib.suppress(OSError):  # without CAP_NET_ADMIN the size stays as it is
                    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.wanted_buffer)
                sock.send(settings(self.number, max_length, flags))
                if not orderly:
                    self._drop_orphans(sock, known)
        except OSError:
            return False
        self._fd = fd
        return True

    def _drop_orphans(self, sock: socket.socket, known: KernelQueue) -> None:
        first_id = known.last_id + 1  # of those that are still to be read
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # of an overrun, which would be said instead of a packet
        with contextlib.suppress(BlockingIOError):
            message = sock.recv(PACKET_ID_AT + 4, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if native16(message, 4) == NFQNL_MSG_PACKET:
                first_id = u32(message, PACKET_ID_AT)
        if known.waiting > known.last_id + 1 - first_id:
            sock.send(drop_up_to(self.number, first_id - 1))

    def _set_size(self, max_length: int, socket_buffer: int) -> None:
        self.max_length = max_length
        self.wanted_buffer = wanted_buffer(max_length, socket_buffer)

    def _why_not(self) -> str:
        owner = kernel_queues().get(self.number)
        if owner is None:
            return f"Queue {self.number} can't be bound: the kernel refused it and nobody else holds it."
        return (
            f"Queue {self.number} is already bound by {process(owner.portid)}: "
            "stop it, or set another queue number in the configuration."
        )

    def fileno(self) -> int:
        """The descriptor that is readable while packets wait."""
        return self._fd

    def socket_memory(self) -> tuple[int, int]:
        """Bytes that the kernel holds for us, and may hold, as it granted them; 0 while nothing is bound."""
        if self._fd < 0:
            return 0, 0
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            used, size = struct.unpack("=2I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 8))
        return int(used), int(size)

    def turn(self, budget: int) -> bool:
        """Give verdicts until the queue is empty or `budget` packets are done; say whether it was emptied."""
        woken_ns = time.monotonic_ns()
        if self._verdicts or self._abandoned:
            self.send()
        left = budget
        emptied = False
        while left > 0 and not emptied:
            wanted = min(left, MESSAGES_AT_ONCE)
            try:
                received = self._inbox.receive(self._fd, wanted)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1  # said once; what is in the buffer is still to be read
                continue
            try:
                for slot in range(received):
                    self.on_message(self._inbox.message(slot))
            except MemoryError:
                self.errors += 1
                self._abandoned = received
            self.send()
            left -= received
            emptied = received < wanted
        if left < budget:
            self._observe((time.monotonic_ns() - woken_ns) // 1000, budget - left)
        return left > 0

    def unbind(self) -> None:
        """Give the queue back; the kernel drops what still waits in it."""
        if self._nfqueue is not None:
            self._nfqueue.unbind()
        elif self._fd >= 0:
            os.close(self._fd)
        self._nfqueue = None
        self._fd = -1

    def leave(self) -> None:
        """Let go of the queue without giving it back: who holds its socket besides us goes on with it."""
        if self._fd >= 0:
            # NetfilterQueue would give it back in the end, so it is left with something else in its hand.
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(nothing, self._fd, inheritable=False)
            os.close(nothing)
            self._fd = -1

    def on_message(self, message: bytes) -> None:
        """Read a message and decide on its packet. Every way out of here with a packet has recorded a verdict."""
        kind = native16(message, 4)
        if kind != NFQNL_MSG_PACKET:
            if kind == NLMSG_ERROR and u32(message, 16) != 0:
                self.verdict_errors += 1
            return
        packet_id = hook = mark = iif = oif = info = whole = 0
        data = b""
        at = MESSAGE_HEADER
        end = len(message)
        while at + 4 <= end:
            size = native16(message, at)
            kind = native16(message, at + 2)
            if kind == NFQA_PAYLOAD:
                data = message[at + 4 : at + size]
            elif kind == NFQA_PACKET_HDR:
                packet_id = u32(message, at + 4)
                hook = message[at + 10]
            elif kind == NFQA_MARK:
                mark = u32(message, at + 4)
            elif kind == NFQA_IFINDEX_INDEV:
                iif = u32(message, at + 4)
            elif kind == NFQA_IFINDEX_OUTDEV:
                oif = u32(message, at + 4)
            elif kind == NFQA_SKB_INFO:
                info = u32(message, at + 4)
            elif kind == NFQA_CAP_LEN:
                whole = u32(message, at + 4)
            at += (size + 3) & ~3

        self.packets += 1
        self.message_bytes += end
        try:
            self._fw.checksum = info & NFQA_SKB_CSUM_NOTVERIFIED != 0
            self._fw.whole = whole
            if self.tracing is None:
                bits = self.judge(data, hook, mark, iif, oif)
            else:
                bits = self.tracing.judge(self, data, hook, mark, iif, oif)
        except Exception:
            bits = self._failed(self._mark.read(mark))
        if bits == DROP:
            self.dropped += 1
            self._verdicts.append(VERDICT.pack(self._head, NF_DROP, packet_id, MARK_HEAD, mark))
        else:
            mark = mark & self._mark.keep | self._mark.lay[bits]
            self._verdicts.append(VERDICT.pack(self._head, NF_ACCEPT, packet_id, MARK_HEAD, mark))

    def judge(self, data: bytes, hook: int, mark: int, iif: int, oif: int) -> int:
        """Ask the hook that the packet is at: mark bits or DROP."""
        if hook == NF_INET_PRE_ROUTING or hook == NF_INET_LOCAL_OUT:
            return self._track(self._fw, data, hook, iif, self.now_ms, mark)
        return post_routing(self._fw, data, self._mark.read(mark), hook, iif, oif, self.now_ms, mark)

    def send(self) -> None:
        """Send the collected verdicts; the kernel carries them out before this returns.

        What it does not take is kept and sent again, by the next turn or the loop's next tick: a packet without a
        verdict holds its place in the queue for ever. There are never more of them than the queue has places.
        """
        if self._abandoned:
            newest = u32(self._inbox.message(self._abandoned - 1), PACKET_ID_AT)
            self._verdicts = [drop_up_to(self.number, newest)]
            self._abandoned = 0
        while self._verdicts:
            part = self._verdicts[:VERDICTS_AT_ONCE]
            try:
                self._write(self._fd, b"".join(part))
            except OSError as error:
                self.verdict_errors += 1
                if self._may_log():
                    log.warning("verdicts_refused", queue=self.number, error=error.strerror, suppressed=self._unlogged)
                    self._unlogged = 0
                return
            del self._verdicts[: len(part)]

    def _observe(self, took_us: int, packets: int) -> None:
        """Count packets in the latency histogram: none waited longer for its verdict than the whole turn took."""
        self.latency_sum_us += took_us * packets
        for slot, bound in enumerate(LATENCY_BOUNDS_US):
            if took_us <= bound:
                self.latency[slot] += packets
                return
        self.latency[-1] += packets

    def _failed(self, bits: int) -> int:
        """Decide on a packet that our own code failed on, as configured, and say so now and then."""
        self.errors += 1
        self.errors_accepted += self.accept_on_error
        if self._may_log():
            try:
                log.exception(
                    "packet_failed",
                    queue=self.number,
                    verdict="accept" if self.accept_on_error else "drop",
                    suppressed=self._unlogged,
                )
                self._unlogged = 0
            except MemoryError:
                self._unlogged += 1  # the packet needs its verdict more than its line
        return bits if self.accept_on_error else DROP

    def _may_log(self) -> bool:
        """Whether it is time for another line about trouble on the packet path."""
        if self.now_ms - self._logged_ms < LOG_PAUSE_MS:
            self._unlogged += 1
            return False
        self._logged_ms = self.now_ms
        return True


def _unused(_packet: object) -> None:
    """Stand where NetfilterQueue wants a callback: its loop never runs."""


def wanted_buffer(max_length: int, socket_buffer: int) -> int:
    """Bytes that a queue's socket is to hold: as configured, and enough for the packets that may wait."""
    return min(max(socket_buffer, max_length * SOCKET_BYTES_PER_PACKET), SOCKET_BUFFER_MAX)


def kernel_queues() -> dict[int, KernelQueue]:
    """The queues that are bound in this network namespace, by number."""
    try:
        text = PROC.read_text()
    except OSError:
        return {}
    rows = [[int(word) for word in line.split()] for line in text.splitlines()]
    return {row[0]: KernelQueue(row[1], row[2], row[5], row[6], row[7]) for row in rows}


def process(portid: int) -> str:
    """Name the owner of a netlink port: its number is as a rule the owner's process id."""
    try:
        name = Path(f"/proc/{portid}/comm").read_text().strip()
    except OSError:
        return f"another process (netlink port {portid})"
    return f"process {portid} ({name})"
