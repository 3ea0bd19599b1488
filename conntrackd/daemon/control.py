"""The control socket: requests in, answers out (api.py has the messages), in the loop of the packets.

Nothing a client does may hold the packets up or fill the memory: rows of an answer are made a few at a time,
and only as the client takes them; a client that neither speaks nor listens is closed; a request has a size,
and clients a number. One request per connection.
"""

import fcntl
import os
import pwd
import selectors
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import structlog

from conntrackd import api

CLIENTS_MAX: Final = 32
READ_MAX: Final = 1 << 16
REQUEST_MAX: Final = 1 << 16
REQUEST_MAX_ADMIN: Final = 1 << 24  # of those who may change things: a whole configuration
# Rows per turn of the loop, shared by the clients; one row takes about ten microseconds.
ROWS_PER_TURN: Final = 128
OUTPUT_LOW: Final = 1 << 16  # rows are made while less than this is waiting to be sent
PATIENCE_MS: Final = 10_000
END: Final = msgspec.Struct()  # behind the last row
QUIET: Final = msgspec.Struct()  # in place of a row: nothing until something happens, and `wake` is called
MORE: Final = msgspec.Struct()  # in place of a row: none yet, after about as much work as a row takes
ROWS_PER_TURN_OF_LISTENERS: Final = 8  # while packets come, events must not take their time

Args = TypeVar("Args", bound=msgspec.Struct)

log = structlog.get_logger()


class ControlError(Exception):
    """The control socket can't be opened; the text is one sentence for the operator."""


class Asked(NamedTuple):
    """A request, and who made it."""

    command: str
    args: dict[str, Any]
    pid: int = 0
    uid: int = 0

    def who(self) -> str:
        """Name the user for people who read it later."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"

    def may_change(self) -> bool:
        """Whether the user may change things: root may, and who the daemon runs as."""
        return self.uid in (0, os.geteuid())


# What answers a request: rows as they can be made, with None where the answer depends on something else that goes on
# and MORE where it takes more work; None for an unknown command.
# It raises api.RequestError to refuse.
Answer = Callable[[Asked], Iterator[msgspec.Struct | None] | None]


def arguments(asked: Asked, args: type[Args]) -> Args:
    """Read the arguments of a request. Raises api.RequestError."""
    try:
        return msgspec.convert(asked.args, args)
    except msgspec.ValidationError as error:
        raise api.RequestError(f"The arguments of {asked.command!r} are not understood: {error}.") from None


class _Client:
    def __init__(self, connection: socket.socket, now_ms: int) -> None:
        self.connection = connection
        self.input = bytearray()
        self.output = bytearray()
        self.rows: Iterator[msgspec.Struct | None] | None = None
        self.pid, self.uid, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self.count = 0
        self.active_ms = now_ms
        self.answering = False
        self.quiet = False  # until something happens
        self.listening = False  # has been quiet once: its rows come as things happen


class Control:
    """The listening socket and its clients; `answer` gives the rows for a command, None if it is unknown."""

    def __init__(
        self,
        path: str,
        selector: selectors.BaseSelector,
        answer: Answer,
        listener: int = -1,
        lock: int = -1,
    ) -> None:
        """Listen at a path, or go on with the descriptors that the process before has left to us."""
        self.now_ms = 0  # set by the loop whenever it wakes
        self._path = Path(path)
        self._selector = selector
        self._answer = answer
        self._encoder = msgspec.json.Encoder()
        self.closed = 0  # clients that hung
        self.refused = 0  # clients that were too many
        self.failed = 0  # requests on which our own code failed
        self._clients: set[_Client] = set()
        self._waiting: list[_Client] = []  # for rows that were not there yet
        self._lock = lock if lock >= 0 else _lock(self._path)
        try:
            self._listener = socket.socket(fileno=listener) if listener >= 0 else _listen(self._path)
        except ControlError:
            os.close(self._lock)
            raise
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it left again, or we are out of descriptors: it may come again
        connection.setblocking(False)
        client = _Client(connection, self.now_ms)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, client))
        self._clients.add(client)
        if len(self._clients) > CLIENTS_MAX:
            self.refused += 1
            self._refuse(client, f"There are {CLIENTS_MAX} clients on the control socket already: try later.")
            self._serve(client, selectors.EVENT_WRITE)

    def _serve(self, client: _Client, events: int) -> None:
        """Do what can be done for a client now; errors on its side end it and nothing else."""
        try:
            if events & selectors.EVENT_READ:
                self._read(client)
            if client.answering and (client.output or not client.quiet):
                self._write(client)
        except BlockingIOError:
            pass  # not ready after all
        except OSError:
            self._close(client)
        except Exception:
            self.failed += 1
            self._close(client)
            log.exception("control_failed")

    def _read(self, client: _Client) -> None:
        data = client.connection.recv(READ_MAX)
        if not data or client.quiet:
            self._close(client)
            return
        client.active_ms = self.now_ms
        client.input += data
        line, newline, _ = client.input.partition(b"\n")
        if newline:
            self._begin(client, bytes(line))
        elif len(client.input) > (limit := REQUEST_MAX_ADMIN if client.uid == 0 else REQUEST_MAX):
            self._refuse(client, f"The request is longer than {limit} bytes.")

    def _begin(self, client: _Client, line: bytes) -> None:
        try:
            request = msgspec.json.decode(line, type=api.Request)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._refuse(client, f"The request is not understood: {error}.")
            return
        if request.v != api.VERSION:
            self._refuse(client, f"The daemon speaks version {api.VERSION} of the protocol, not {request.v}.")
            return
        try:
            client.rows = self._answer(Asked(request.command, request.args, client.pid, client.uid))
        except api.RequestError as refusal:
            self._refuse(client, str(refusal))
            return
        if client.rows is None:
            self._refuse(client, f"The daemon knows no command {request.command!r}.")
            return
        self._send(client, api.Head(api.VERSION, True))

    def _refuse(self, client: _Client, sentence: str) -> None:
        self._send(client, api.Head(api.VERSION, False, sentence))

    def _send(self, client: _Client, head: api.Head) -> None:
        """Begin the answer. From now on the client is listened to no more."""
        client.input.clear()
        client.output += self._encoder.encode(head) + b"\n"
        client.answering = True
        self._selector.modify(client.connection, selectors.EVENT_WRITE, partial(self._serve, client))

    def _write(self, client: _Client) -> None:
        self._make_rows(client)
        if client.output:
            sent = client.connection.send(client.output)
            del client.output[:sent]
            client.active_ms = self.now_ms
        if client.output:
            return
        if client.rows is None:
            self._close(client)
        elif client.quiet:
            self._selector.modify(client.connection, selectors.EVENT_READ, partial(self._serve, client))

    def _make_rows(self, client: _Client) -> None:
        if client.rows is None or client.quiet:
            return
        most = ROWS_PER_TURN_OF_LISTENERS if client.listening else ROWS_PER_TURN
        for _ in range(max(1, most // len(self._clients))):
            if len(client.output) >= OUTPUT_LOW:
                return
            row = next(client.rows, END)
            if row is END:
                client.rows = None
                client.output += self._encoder.encode(api.End(count=client.count)) + b"\n"
                return
            if row is MORE:
                client.active_ms = self.now_ms
                continue
            if row is QUIET:
                client.quiet = client.listening = True
                return
            if row is None:
                self._waiting.append(client)
                self._selector.unregister(client.connection)
                return
            client.output += self._encoder.encode(row) + b"\n"
            client.count += 1

    def _close(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            client.rows = None  # whatever it listened to, it does so no more
            if client in self._waiting:
                self._waiting.remove(client)
            else:
                self._selector.unregister(client.connection)
            client.connection.close()

    def fds(self) -> tuple[int, int]:
        """The descriptors of the listening socket and of the lock, for the process after this one."""
        return self._listener.fileno(), self._lock

    def answering(self) -> bool:
        """Whether some client has not got all of its answer; those that follow events never have."""
        return any(client.answering and not client.quiet for client in self._clients)

    def waits(self) -> bool:
        """Whether some answer was not ready: the loop is to come back soon, and to call `resume`."""
        return bool(self._waiting)

    def resume(self) -> None:
        """Ask again for the rows that were not there yet."""
        for client in self._waiting:
            client.active_ms = self.now_ms
            self._selector.register(client.connection, selectors.EVENT_WRITE, partial(self._serve, client))
        self._waiting.clear()

    def wake(self) -> None:
        """Go on with the clients that wait for something to happen: it has."""
        for client in self._clients:
            if client.quiet:
                client.quiet = False
                client.active_ms = self.now_ms
                self._selector.modify(client.connection, selectors.EVENT_WRITE, partial(self._serve, client))

    def tick(self) -> None:
        """Close the clients that hang; to be called about once a second."""
        for client in list(self._clients):
            idle = client.quiet and not client.output
            if not idle and self.now_ms - client.active_ms > PATIENCE_MS:
                self.closed += 1
                self._close(client)

    def close(self) -> None:
        """End all clients, and take the socket away."""
        for client in list(self._clients):
            self._close(client)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Make sure that no other daemon serves this path. The lock ends with the process, however it ends."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ControlError(f"The control socket {path} can't be made: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise ControlError(
            f"Another conntrackd (process {pid}) already serves the control socket {path}: "
            "stop it, or use another --socket."
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _listen(path: Path) -> socket.socket:
    """Open the socket for root and its group. A socket that a killed daemon left behind is replaced."""
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise ControlError(f"The control socket {path} can't be made: there is a file in its place.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    umask = os.umask(0o117)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ControlError(f"The control socket {path} can't be made: {error.strerror or error}.") from error
    finally:
        os.umask(umask)
    listener.listen(CLIENTS_MAX)
    return listener
