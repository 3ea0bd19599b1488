"""The deputy: judges packets while the daemon becomes its next program (handover.py).

To start Python takes half a second, to hand a million connections over takes five more. So a process is forked off with
the whole table, and reads the queues in place of the daemon. The next program gets the table as it was at the fork.
When it has taken that in it relieves the deputy, which tells what has changed since, and ends. Packets wait as long as
the changes take.

Forking is cheap, for the two share their memory until one of them writes to it. But in the end there are up to two and
a half tables: where memory is short there is no deputy, and packets wait in the queues for the whole time.
"""

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from conntrackd.const import IPCT_DESTROY
from conntrackd.core.conntrack import gc
from conntrackd.daemon.hugepages import resident
from conntrackd.daemon.queue import CONFIRM_BUDGET, TRACK_BUDGET, Queue
from conntrackd.daemon.snapshot import ending
from conntrackd.hooks import Firewall

TABLES: Final = 2  # times the memory of the daemon that must be left for it
READY_S: Final = 5.0
RELIEF_S: Final = 30.0  # how long a deputy may take to tell what has changed
EVENTS_MAX: Final = 1 << 16  # in one turn
MEMINFO: Final = Path("/proc/meminfo")
STDERR: Final = 2

log = structlog.get_logger()


class Deputy:
    """The way to the deputy: its end of a socket pair, and its process."""

    def __init__(self, fd: int, process: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._process = process

    def fds(self) -> tuple[int, int]:
        """The descriptors of both, for the process after this one."""
        return self._socket.fileno(), self._process

    def is_ready(self) -> bool:
        """Wait until it has begun to judge packets; False if it does not."""
        self._socket.settimeout(READY_S)
        with contextlib.suppress(OSError):
            return self._socket.recv(1) != b""
        return False

    def relieve(self) -> BinaryIO:
        """Have it judge no more packets, and tell what has changed. Raises OSError if it does not."""
        self._socket.settimeout(RELIEF_S)
        try:
            self._socket.send(b"!")
            _, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
        except OSError:
            self.dismiss()
            raise
        if not fds:
            self.dismiss()
            raise ChildProcessError("the deputy has ended before its time")
        self._leave()
        return os.fdopen(fds[0], "rb")

    def dismiss(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        self._leave()

    def _leave(self) -> None:
        """Let go of it. To wait for its end takes time, for it has much memory to give back."""
        self._socket.close()
        threading.Thread(target=_wait_for, args=(self._process,), name="deputy", daemon=True).start()


def _wait_for(process: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, process, os.WEXITED)
    os.close(process)


def available() -> int:
    """Bytes of memory that the machine has left."""
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return 0


def appoint(stand_in: Callable[[socket.socket], None], fork: Callable[[], int]) -> Deputy | None:
    """Fork a deputy that does this, with its end of a socket pair; None if that is not to be had."""
    try:
        if available() < TABLES * resident():
            log.warning("handover_without_deputy", error="the machine has too little memory left")
            return None
        ours, its = socket.socketpair()
        with ours, its:
            pid = fork()
            if pid == 0:
                ours.close()
                _be(stand_in, its)
            process = os.pidfd_open(pid)  # without one it ends by itself, for nobody holds the other end
            deputy = Deputy(ours.detach(), process)
    except OSError as error:
        log.warning("handover_without_deputy", error=error.strerror)
        return None
    if not deputy.is_ready():
        log.warning("handover_without_deputy", error="it did not begin")
        deputy.dismiss()
        return None
    return deputy


def _be(stand_in: Callable[[socket.socket], None], sock: socket.socket) -> None:
    """Do what a deputy does, and end: nothing of what the daemon would do at its end may happen here."""
    status = os.EX_SOFTWARE
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        stand_in(sock)
        status = os.EX_OK
    finally:
        os._exit(status)


def keep_only(fds: set[int]) -> None:
    """Close all descriptors but these and the standard ones: locks and clients are not the deputy's."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > STDERR and int(name) not in fds:
            with contextlib.suppress(OSError):  # of the listing itself
                os.close(int(name))


def serve(
    sock: socket.socket,
    track: Queue,
    confirm: Queue,
    fw: Firewall,
    read_clock: Callable[[], int],
    after_turn: Callable[[], None],
) -> "Ended":
    """Judge packets until the next program wants to; returns what has ended meanwhile."""
    ended = Ended(fw)
    poll = select.poll()
    for fd in (sock.fileno(), track.fileno(), confirm.fileno()):
        poll.register(fd, select.POLLIN)
    gc_ms = now_ms = read_clock()
    sock.send(b"!")
    while True:
        ready = {fd for fd, _ in poll.poll(max(0, gc_ms - now_ms))}
        now_ms = read_clock()
        if sock.fileno() in ready:
            if sock.recv(1) == b"":
                raise ConnectionResetError("nobody is there any more to hand over to")
            return ended
        if confirm.fileno() in ready:
            confirm.turn(CONFIRM_BUDGET)
        if track.fileno() in ready:
            track.turn(TRACK_BUDGET)
        if now_ms >= gc_ms:
            gc_ms = gc(fw.net, now_ms)
        after_turn()
        ended.collect()


class Ended:
    """The connections that end from now on, as rows."""

    def __init__(self, fw: Firewall) -> None:
        self.rows: list[bytes] = []
        self._events = events = fw.net.events
        while events.listeners:
            events.leave()  # of the daemon's clients, who are not ours
        events.limit = EVENTS_MAX
        self._listener = events.listen()

    def collect(self) -> None:
        """Take what has ended since the last time. Raises OverflowError if that was too much to know all of it."""
        while (event := self._events.read(self._listener)) is not None:
            if event.expect is None and event.bits & IPCT_DESTROY:
                self.rows.append(ending(event.ct))
        if self._listener.lost:
            raise OverflowError("more happened in one turn than is kept")
