"""What the service manager is told and what it keeps for us: sd_notify(3) and sd_listen_fds(3), without libsystemd.

Where nobody asked to be told, nothing is sent; and nothing here fails: a firewall does not end because nobody listens.
"""

import array
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import MutableMapping, Sequence
from typing import Final

LISTEN_FDS_START: Final = 3


class Notify:
    """The service manager, if there is one. What it put in the environment is taken out: our children get none."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # A name that begins with @ is one of the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._is_ready = False
        self._progress_s = 0.0
        ours = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        timeout_us = environ.pop("WATCHDOG_USEC", "")
        # How often `alive` is to be called: twice in the time after which we are taken for stuck. 0: not at all.
        self.watchdog_ms = max(1, int(timeout_us) // 2000) if ours and timeout_us.isdecimal() else 0

    def environment(self) -> dict[str, str]:
        """Write what was taken out of the environment, for the program that this process becomes."""
        if not self._address:
            return {}
        found = {"NOTIFY_SOCKET": self._address.replace("\0", "@", 1)}
        if self.watchdog_ms:
            found |= {"WATCHDOG_USEC": str(self.watchdog_ms * 2000), "WATCHDOG_PID": str(os.getpid())}
        return found

    def ready(self, status: str) -> None:
        """Say that we serve."""
        self._is_ready = True
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that a new configuration is being loaded; `reloaded` ends it."""
        if self._is_ready:
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self, status: str) -> None:
        """Say that the configuration is loaded, or that the one before it stays. It does not make us ready."""
        if self._is_ready:
            self.ready(status)

    def status(self, status: str) -> None:
        """Say how we are, in one line for `systemctl status`."""
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        """Say that the loop turns."""
        self._send("WATCHDOG=1")

    def progress(self) -> None:
        """Say so where there is no loop that turns, at most once a second."""
        now_s = time.monotonic()
        if now_s - self._progress_s >= 1:
            self._progress_s = now_s
            self.alive()

    def stopping(self) -> None:
        """Say that we are about to end."""
        self._send("STOPPING=1", "STATUS=Stopping")

    def keeps(self) -> bool:
        """Whether there is somebody who may keep descriptors."""
        return self._address != ""

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Give descriptors to be kept until the next start (`inherited`); whether they were sent.

        FDPOLL=0: a queue that was overrun has an error to tell, and would be thrown out for it.
        """
        return self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds)

    def forget(self, name: str) -> None:
        """Have the kept descriptors of this name closed."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        if not self._address:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # A full or vanished socket is the manager's trouble: it hears of us the next time, or takes us for stuck.
        with contextlib.suppress(OSError):
            self._socket.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)
            return True
        return False

    def close(self) -> None:
        """Say no more."""
        self._address = ""
        self._socket.close()


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
    """The descriptors that the service manager kept for us or opened for us, by name; to be called once."""
    ours = environ.pop("LISTEN_PID", "") == str(os.getpid())
    count, names = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[int]] = {}
    if not ours or not count.isdecimal():
        return found
    for number in range(int(count)):
        fd = LISTEN_FDS_START + number
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError:
            break  # there are fewer than we were told
        found.setdefault(names[number] if number < len(names) else "unknown", []).append(fd)
    return found
