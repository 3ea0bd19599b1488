"""The way to the next process: queues, control socket and state pass on to it, and no packet is lost.

A queue belongs to its socket, not to a process. While the socket is open and nobody reads, packets wait in the kernel,
as many as `queue.max_length`; whoever reads next judges them. There are two ways to leave the sockets to the next one:

- exec in place (`conntrackd restart`, SIGUSR2): the same process becomes the new program. That is tried out before, in
  a process of its own (`run --rehearse`), so that a program or a configuration that can't start replaces nothing.
- the service manager keeps them (notify.py) while one process ends and the next one begins, also after a crash.

Either way the state goes along in memory, in the form of a snapshot. While a process becomes the new program packets
need not wait: a deputy judges them (deputy.py).
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import BinaryIO, Final

import structlog

from conntrackd import api
from conntrackd.daemon import notify
from conntrackd.daemon.control import Asked

ENV: Final = "CONNTRACKD_HANDOVER"  # NAME=DESCRIPTOR ...
REHEARSE: Final = "--rehearse"
# Would end a process that does not expect them yet.
HELD_BACK: Final = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}

STATE: Final = "state"
LISTENER: Final = "control"
LOCK: Final = "lock"
DEPUTY: Final = "deputy"
DEPUTY_PROCESS: Final = "deputy-process"

REHEARSAL_S: Final = 60.0
FAREWELL_MS: Final = 1000  # how long clients have to take their answers

log = structlog.get_logger()


def queue_name(number: int) -> str:
    """Name a queue's descriptor."""
    return f"queue-{number}"


def heirlooms(environ: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """The descriptors that the process before has left to us, by name; to be called once."""
    found = {name: fds[0] for name, fds in notify.inherited(environ).items()}
    for entry in environ.pop(ENV, "").split():
        name, _, number = entry.partition("=")
        try:
            os.set_inheritable(int(number), False)
        except (OSError, ValueError):
            continue  # there is none: it is made anew
        found[name] = int(number)
    return found


def accept_signals() -> None:
    """Let signals come that the process before held back for us; to be called when they are handled."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


def in_memory(pieces: Iterable[bytes], progress: Callable[[], None]) -> BinaryIO:
    """Write a snapshot into memory that can be handed over; `progress` is called again and again meanwhile."""
    file = os.fdopen(os.memfd_create("conntrackd-state", os.MFD_CLOEXEC), "wb")
    for piece in pieces:
        file.write(piece)
        progress()
    file.flush()
    return file


def become_next(fds: Mapping[str, int], environment: Mapping[str, str]) -> str:
    """Become the new program, which gets these descriptors. Returns only when that failed: why."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    for fd in fds.values():
        os.set_inheritable(fd, True)
    handed = " ".join(f"{name}={fd}" for name, fd in fds.items())
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment, ENV: handed})  # noqa: S606
    except OSError as error:
        for fd in fds.values():
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return error.strerror or str(error)


class Restart:
    """A restart in place: asked for, rehearsed, and then due. `now_ms` is set by the loop."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._wanted = False
        self._rehearsal: subprocess.Popen[bytes] | None = None
        self._output: BinaryIO | None = None
        self._begun_s = 0.0
        self._due_ms = -1
        self._outcome: api.Restart | None = None

    def rows(self, asked: Asked) -> Iterator[api.Restart | None] | None:
        """Begin to answer a command; None if it is another."""
        if asked.command != "restart":
            return None
        if not asked.may_change():
            raise api.RequestError(f"Restarting the daemon needs root, and you are {asked.who()}.")
        log.info("restart_asked", who=asked.who(), pid=asked.pid)
        self._begin()
        return self._answer()

    def _answer(self) -> Iterator[api.Restart | None]:
        while self._rehearsal is not None:
            yield None
        yield self._outcome

    def want(self) -> None:
        """Ask for a restart from a signal's handler, which must not do more."""
        self._wanted = True

    def _begin(self) -> None:
        """Try the next process out, unless one is being tried out already."""
        self._wanted = False
        if self.busy():
            return
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the rehearsal is over
        self._begun_s = time.monotonic()
        try:
            self._rehearsal = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:], REHEARSE],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._refuse(error.strerror or str(error))

    def busy(self) -> bool:
        """Whether the loop is to come back soon."""
        return self._wanted or self._rehearsal is not None or self._due_ms >= 0

    def turn(self) -> None:
        """See whether the rehearsal is over; to be called in every turn of the loop while `busy`."""
        if self._wanted:
            self._begin()
        rehearsal = self._rehearsal
        if rehearsal is None:
            return
        code = rehearsal.poll()
        if code is None and time.monotonic() - self._begun_s < REHEARSAL_S:
            return
        if code is None:
            rehearsal.kill()
            rehearsal.wait()
        assert self._output is not None
        self._output.seek(0)
        said = self._output.read(1 << 16).decode(errors="replace").strip()
        self._output.close()
        self._rehearsal = None
        if code == 0:
            self._outcome = api.Restart(True, "The new process begins.")
            self._due_ms = self.now_ms
        else:
            self._refuse(said or f"it did not come to an end within {REHEARSAL_S:g} s")

    def due(self, clients_wait: bool) -> bool:
        """Whether it is time: the rehearsal went well, and its clients know, or had time to."""
        return self._due_ms >= 0 and (not clients_wait or self.now_ms - self._due_ms > FAREWELL_MS)

    def failed(self, reason: str) -> None:
        """Go on after all: the new program could not be begun."""
        self._due_ms = -1
        log.error("restart_failed", error=reason)

    def _refuse(self, reason: str) -> None:
        self._outcome = api.Restart(False, f"The new process can't start, so this one goes on:\n{reason}")
        log.warning("restart_refused", error=reason)
