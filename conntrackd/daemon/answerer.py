"""Sends what REJECT answers, past our own queues: the rules of the edge let pass what carries the mark that it sets."""

import contextlib
import errno
import socket
import struct
from socket import inet_ntop
from typing import Final

import structlog

from conntrackd.const import MARK_UNTRACKED
from conntrackd.daemon.mark import Mark
from conntrackd.policy.reject import Answer

SO_MARK: Final = 36
ICMP_FILTER: Final = 1
ICMP6_FILTER: Final = 1
SOL_RAW: Final = 255
NOTHING: Final = b"\xff" * 4  # filters out every type: these sockets only send

log = structlog.get_logger()


class Answerer:
    """Raw sockets, by (IPv6, whole packet). They need CAP_NET_RAW; without it nothing is answered, and that is said."""

    def __init__(self, mark: Mark) -> None:
        self.sent = 0
        self.failed = 0
        self._forbidden = False
        self._sockets: dict[tuple[bool, bool], socket.socket] = {}
        self._mark = struct.pack("=I", mark.lay[MARK_UNTRACKED])

    def open(self) -> None:
        """Open the sockets, or log that there will be no answers."""
        try:
            for ipv6, whole, protocol in (
                (False, True, socket.IPPROTO_RAW),
                (False, False, socket.IPPROTO_ICMP),
                (True, True, socket.IPPROTO_RAW),
                (True, False, socket.IPPROTO_ICMPV6),
            ):
                made = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_RAW, protocol)
                made.setblocking(False)
                made.setsockopt(socket.SOL_SOCKET, SO_MARK, self._mark)
                if not whole and ipv6:
                    made.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, b"\xff" * 32)
                elif not whole:
                    made.setsockopt(SOL_RAW, ICMP_FILTER, NOTHING)
                self._sockets[ipv6, whole] = made
        except OSError as error:
            # A machine without IPv6 has no socket for it, and no packet either.
            log.warning("reject_cannot_answer", error=error.strerror, need="CAP_NET_RAW and CAP_NET_ADMIN")

    def fds(self) -> list[int]:
        """The descriptors of the sockets."""
        return [sock.fileno() for sock in self._sockets.values()]

    def send(self, answers: list[Answer]) -> None:
        """Send and forget."""
        for answer in answers:
            sock = self._sockets.get((answer.ipv6, answer.whole))
            if sock is None:
                self.failed += 1
                continue
            try:
                if answer.ipv6:
                    local = answer.destination[:1] == b"\xfe" and answer.destination[1] & 0xC0 == 0x80
                    address = inet_ntop(socket.AF_INET6, answer.destination)
                    sock.sendto(answer.data, (address, 0, 0, answer.iif if local else 0))
                else:
                    sock.sendto(answer.data, (inet_ntop(socket.AF_INET, answer.destination), 0))
                self.sent += 1
            except OSError as error:
                self.failed += 1
                if error.errno == errno.EPERM and not self._forbidden:
                    self._forbidden = True  # said once
                    log.warning(
                        "reject_cannot_answer",
                        error=error.strerror,
                        need="an OUTPUT chain that lets it pass, and IPAddressAllow= in system-conntrackd.slice if the "
                        "addresses that may be answered were made narrower",
                    )
        answers.clear()

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.close()
