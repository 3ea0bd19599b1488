"""The contract of the control socket, and its client.

A Unix stream socket that carries lines of JSON. A request is one line, `{"v":1,"command":"flows"}`. The
answer is a head, `{"v":1,"ok":true}` or `{"v":1,"ok":false,"error":"a sentence"}`; after a good head come
the rows of the answer, a line each, then `{"end":true,"count":N}`; then the daemon closes. Commands: status
and stats (one row each), flows, flow, count, kill, label, drops; events and trace, whose rows come when something
happens, until the client closes; of the policy: rules, explain, set, config and history; and reload, apply, confirm and
rollback, which answer when it is done; let_go, after which iptables rules that are taken out stay out. A request may
have arguments, `"args":{...}`: the structs here whose names end in Args.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

VERSION: Final = 1
DEFAULT_SOCKET: Final = "/run/conntrackd/control.sock"
TIMEOUT_S: Final = 30.0
CHUNK: Final = 1 << 16
DROPS_KEPT: Final = 1024  # the most that `drops` can list (hooks.DROPS_MAX)
END_MARK: Final = b'{"end":true'


class Request(msgspec.Struct):
    """What a client asks for."""

    v: int
    command: str
    args: dict[str, Any] = {}  # which ones there are depends on the command


class Head(msgspec.Struct):
    """The first line of an answer."""

    v: int
    ok: bool
    error: str | UnsetType = UNSET


class End(msgspec.Struct, kw_only=True):
    """The last line of an answer: how many rows came before it."""

    end: bool = True
    count: int


class FilterArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `flows` and `count`: which connections, all if it is empty (docs/filter.md)."""

    filter: str = ""


class EventsArgs(FilterArgs, forbid_unknown_fields=True):
    """The arguments of `events`; `expected`: of what these connections expect."""

    expected: bool = False


class KillArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `kill`, which answers with the flows that it has ended; `dry_run`: that it would end.

    `expected`: it ends what these connections expect, and answers with that.
    """

    filter: str
    dry_run: bool = False
    expected: bool = False


class LabelArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `label`: `list` answers with all there are; `add` and `del` with the flows that they change.

    `labels` are names, or numbers of bits; `del` without any takes all.
    """

    action: Literal["list", "add", "del"]
    labels: list[str] = []
    filter: str = ""


class DropArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `drops`: which packets, by the connections they would have begun, and since when; 0: ever."""

    filter: str = ""
    last_ms: int = 0


class TopArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `top`: which connections, in which groups and order, and how many rows at most."""

    filter: str = ""
    by: Literal["flow", "src", "dst", "zone", "rule"] = "flow"
    sort: Literal["rate", "bytes", "packets", "age", "flows"] = "rate"
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 50


class TraceArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `trace`: which packets, by the connections they belong to, and whether their bytes too."""

    filter: str = ""
    bytes: bool = False


class FlowArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `flow`."""

    id: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Direction(msgspec.Struct, kw_only=True):
    """One direction of a flow. Which of the optional fields are there depends on the protocol."""

    src: str
    dst: str
    sport: int | UnsetType = UNSET
    dport: int | UnsetType = UNSET
    type: int | UnsetType = UNSET  # ICMP and ICMPv6, as the two below
    code: int | UnsetType = UNSET
    id: int | UnsetType = UNSET
    srckey: int | UnsetType = UNSET  # GRE, as the one below
    dstkey: int | UnsetType = UNSET
    vtag: int | UnsetType = UNSET  # SCTP: the verification tag of its packets; 0 until it is known
    packets: int
    bytes: int  # from the IP header on


class Flow(msgspec.Struct, rename={"in_": "in"}):
    """One confirmed connection."""

    id: int
    family: str  # ipv4, ipv6
    protocol: str
    protonum: int
    zone: int
    state: str | None  # null where the protocol has none
    status: list[str]
    timeout_seconds: int
    age_seconds: int
    orig: Direction
    reply: Direction
    mark: int
    helper: str | None
    master: int | None
    rule: str
    in_: str | None  # null: the router itself, as below
    out: str | None
    labels: list[str] | UnsetType = UNSET  # in the order of their bits, a number for one without name; only if any
    idle_seconds: int | UnsetType = UNSET  # since its last packet


class Label(msgspec.Struct):
    """One name for a bit that connections may have (`label list`)."""

    name: str
    bit: int  # 0 to 127


class Count(msgspec.Struct):
    """How many connections there are (`count`)."""

    count: int


class Group(msgspec.Struct):
    """Connections that have something in common (`flows --by`)."""

    by: str  # src, dst, rule, state, service
    key: str
    count: int
    packets: int  # both ways together, as the bytes
    bytes: int


class Event(msgspec.Struct, kw_only=True):
    """What happened to a connection, and what it was like then."""

    type: str  # NEW, UPDATE, DESTROY
    time: str  # RFC 3339, UTC
    changes: list[str]  # as the kernel's IPCT_*: RELATED, REPLY, ASSURED, PROTOINFO, MARK, ...
    reason: str | None  # of a DESTROY: timeout, fin, rst, killed, evicted, policy
    flow: Flow


class Lost(msgspec.Struct, kw_only=True):
    """Events that are not in the answer: the client was too slow for them."""

    type: str = "LOST"
    count: int


class Expectation(msgspec.Struct, rename={"class_": "class"}, kw_only=True):
    """One connection that a helper expects. Its destination is exact, its source may be open."""

    id: int
    family: str
    protocol: str
    protonum: int
    zone: int
    timeout_seconds: int
    src: str | None  # null: any address; a network where it is any of these
    dst: str
    sport: int | UnsetType | None = UNSET  # null: any port
    dport: int | UnsetType = UNSET
    srckey: int | UnsetType = UNSET  # GRE, as the one below
    dstkey: int | UnsetType = UNSET
    helper: str
    class_: str | None  # null where the helper knows one class only
    flags: list[str]  # PERMANENT, INACTIVE
    master: int  # id of the connection that announced it


class TcpSide(msgspec.Struct):
    """What one side of a TCP connection has sent and may send; sequence numbers modulo 2^32."""

    end: int  # highest sequence number sent, plus one
    max_end: int  # highest that the other side allows, plus one
    max_window: int  # largest window offered, in bytes; 0: nothing seen of this side
    scale: int
    flags: list[str]  # WINDOW_SCALE, SACK_PERM, CLOSE_INIT, BE_LIBERAL


class TcpDetails(msgspec.Struct):
    """What is known of a TCP connection besides its state."""

    orig: TcpSide
    reply: TcpSide


class FlowDetails(Flow, rename={"in_": "in"}, kw_only=True):
    """Everything about one connection (`flow`)."""

    begun: str  # RFC 3339, UTC
    last_packet: str
    generation: int  # of the policy that admitted it
    ending: str | None  # fin, rst: how it began to end
    own_timeouts: bool  # those of its rule, not the tracker's
    children: list[int]  # ids of the connections that it has announced
    expected: list[Expectation]  # that it has announced and that have not come
    tcp: TcpDetails | UnsetType = UNSET


class ExpectationEvent(msgspec.Struct, kw_only=True):
    """A connection that a helper begins to expect, or expects no more: it has come, it is too late, it was killed."""

    type: str  # NEW, DESTROY
    time: str  # RFC 3339, UTC
    expectation: Expectation


class Drop(msgspec.Struct, rename={"in_": "in"}, kw_only=True):
    """One packet that was dropped: when, why, by which rule, and what it was as far as that could be read."""

    time: str  # RFC 3339, UTC
    reason: str
    rule: str | None  # null: no rule was asked
    family: str | None  # null, as the next four: the packet had no tuple that could be read
    protocol: str | None
    protonum: int | None
    src: str | None
    dst: str | None
    sport: int | UnsetType = UNSET
    dport: int | UnsetType = UNSET
    type: int | UnsetType = UNSET
    code: int | UnsetType = UNSET
    id: int | UnsetType = UNSET
    srckey: int | UnsetType = UNSET
    dstkey: int | UnsetType = UNSET
    in_: str | None  # null: the router itself
    out: str | None  # null: the router itself, or not known where the packet was dropped


class DropGroup(msgspec.Struct):
    """Drops that have something in common (`drops --by`)."""

    by: str  # src, dst, dport, protocol, rule, reason, in, out
    key: str | None
    count: int
    last: str  # RFC 3339, UTC
    reasons: dict[str, int]


class Top(msgspec.Struct, kw_only=True):
    """The first row of `top`: the connections that the filter chooses, together."""

    flows: int  # in the table
    chosen: int
    packets: int
    bytes: int
    rate: int | None  # bytes per second since `top` was asked before; null: nobody has asked of late


class TopFlow(msgspec.Struct, kw_only=True):
    """A connection that leads (`top`)."""

    flow: Flow
    rate: int | None


class TopGroup(msgspec.Struct, kw_only=True):
    """A group of connections that leads (`top`)."""

    by: str
    key: str  # an address, a rule, or zones as `lan > wan`; "": all that there was no room for
    flows: int
    packets: int
    bytes: int
    rate: int | None
    age_seconds: int  # of the oldest


class TraceBegin(msgspec.Struct, kw_only=True):
    """The first row of a trace: it has begun, and these are its limits."""

    type: str = "BEGIN"
    steps_per_second: int
    packets_per_second: int  # that are compared with the filter


class TraceLost(msgspec.Struct, kw_only=True):
    """What is missing at this place of a trace."""

    type: str = "LOST"
    steps: int  # more in a second than are told, or than the client took
    packets: int  # that nobody compared with the filter: more in a second than a trace may look at


class Packet(msgspec.Struct, kw_only=True):
    """What a packet is, as far as its tuple says."""

    family: str
    protocol: str
    protonum: int
    src: str
    dst: str
    sport: int | UnsetType = UNSET
    dport: int | UnsetType = UNSET
    type: int | UnsetType = UNSET
    code: int | UnsetType = UNSET
    id: int | UnsetType = UNSET
    srckey: int | UnsetType = UNSET
    dstkey: int | UnsetType = UNSET


class TraceStep(msgspec.Struct, rename={"in_": "in", "class_": "class"}, kw_only=True):
    """What a hook made of a packet."""

    type: str = "STEP"
    time: str  # RFC 3339, UTC
    hook: str  # PREROUTING, OUTPUT, POSTROUTING, INPUT
    packet: Packet | None  # null: it had no tuple that could be read
    in_: str | None  # null: the router itself
    out: str | None  # null: the router itself, or not known yet
    length: int  # from the IP header on
    zone: int
    flow: int | None  # id of its connection, once that is confirmed
    class_: str | None  # NEW, ESTABLISHED, RELATED, INVALID, UNTRACKED; null: dropped before it had one
    ctinfo: str | None  # what the tracker counted it as, why it is INVALID; null: tracked at a hook before
    state_before: str | None  # of the connection; null: there was none, or its protocol has none
    state: str | None
    status_before: list[str]
    status: list[str]
    rule: str | None  # null: no rule decided here
    verdict: str  # accept, drop; failed: our own code did, and the verdict is the configured one
    reason: str | None  # of a drop
    mark_before: int
    mark: int
    data: bytes | UnsetType = UNSET  # its first 2048 bytes, base64; where they were asked for


class QueueStatus(msgspec.Struct):
    """One queue: what we did with its packets, and what only the kernel knows about it."""

    number: int
    hooks: list[str]
    max_length: int
    packets: int
    dropped: int  # by our verdict
    errors: int  # packets on which our own code failed; their verdict is the configured one
    verdict_errors: int  # messages with verdicts that the kernel did not take
    overruns: int  # times that the kernel said that the socket's buffer had been full
    latency_us: dict[str, int]  # packets by the time from wake-up to verdict: at most so many microseconds
    socket_buffer: int  # bytes that the kernel may hold for the daemon, as granted
    waiting: int
    dropped_full: int  # never reached us: the queue was full
    dropped_socket: int  # never reached us: the socket's buffer was full


class Interface(msgspec.Struct):
    """A network interface and the zone of the policy it belongs to."""

    index: int
    name: str
    zone: str | None


class GenerationRow(msgspec.Struct):
    """One generation of the policy (`history`)."""

    generation: int
    time: str  # RFC 3339, UTC
    who: str
    how: str
    file: str
    rules: int
    state: str


class Problem(msgspec.Struct):
    """Something that is wrong now."""

    name: str  # the same for the same problem, for scripts
    severity: str  # warning, error
    message: str


class Diagnosis(msgspec.Struct):
    """One finding of `doctor`."""

    name: str  # the same for the same matter, for scripts; where all is well that of the check
    severity: str  # ok, warning, error
    message: str
    advice: str = ""  # empty where nothing is to be done


class Limit(msgspec.Struct):
    """How much is used of something that has a limit."""

    name: str  # table, unconfirmed, expectations, queue N (packets), buffer N (bytes)
    used: int
    max: int  # 0: no limit
    percent: int | None  # null: no limit


class StateStatus(msgspec.Struct):
    """What outlives the daemon, and how it stands with that."""

    directory: str
    period_seconds: int  # 0: only when the daemon stops
    age_seconds: int | None  # of the last snapshot; null: there is none of this process yet, and so below
    flows: int
    bytes: int
    taken: int
    failed: int
    error: str | None  # why the last one could not be taken
    restored: int | None  # connections that the start found; null: there was nothing to restore


class Status(msgspec.Struct):
    """The daemon as a whole."""

    version: str
    core: str  # compiled, pure
    pid: int
    uptime_seconds: int
    config: str
    generation: int
    flows: int
    flows_max: int  # 0: no limit
    unconfirmed: int
    unconfirmed_max: int
    health: str  # ok; degraded: there are warnings; failing: there are errors
    problems: list[Problem]  # errors first
    limits: list[Limit]
    packets_per_second: int  # through both queues, in the last second
    policy: GenerationRow  # in force
    trial_seconds: (
        int | None
    )  # until the policy before comes back unless this one is confirmed; null: it is not on trial
    queues: list[QueueStatus]
    interfaces: list[Interface]
    state: StateStatus | None = None  # null: nothing is kept


class RuleHits(msgspec.Struct):
    """A rule of the policy and how many new connections it decided."""

    name: str
    action: str  # accept, drop, reject, log, notrack
    hits: int


class Stats(msgspec.Struct):
    """Counts since the start. The first thirteen have the kernel's names and meanings (`conntrack -S`)."""

    found: int
    invalid: int
    insert: int
    insert_failed: int
    drop: int
    early_drop: int
    error: int
    search_restart: int
    clash_resolve: int
    chaintoolong: int
    expect_new: int
    expect_create: int
    expect_delete: int
    created: int  # connections begun, confirmed or not
    destroyed: int  # confirmed connections that ended
    unconfirmed_expired: int  # connections whose first packet never left
    unconfirmed_full: int  # of these: forgotten early because there were too many
    expired_when_full: int  # expired connections that were cleared away because the table was full
    emergency_drop: int  # connections that were ASSURED, but about to end, and made room in a full table
    adaptive_drop: int  # connections that ended early because the table was filling up
    table_full: int  # new connections refused: the table was full
    source_full: int  # new connections refused: their source had too many
    zone_full: int  # new connections refused: their conntrack zone had too many
    closed: dict[str, int]  # connections that ended, by reason
    listeners: int  # who reads events now
    events: int  # that were kept for listeners
    events_lost: int  # that a listener was too slow for
    ctinfo: dict[str, int]  # packets by classification; the INVALID ones by reason
    drops: dict[str, int]  # packets by the reason they were dropped for
    faults: dict[str, int]  # how often things went wrong, by the names that `status` has for them
    rules: list[RuleHits]
    queues: list[QueueStatus]


class Mistake(msgspec.Struct):
    """One mistake of a configuration: where it is, what it is, and what may be meant (mistakes.py)."""

    file: str
    line: int
    column: int
    end_column: int
    message: str
    hint: str
    source: str


class Finding(Mistake, kw_only=True):
    """One entry of what `check` has found."""

    kind: str  # error, warning


class Change(msgspec.Struct, kw_only=True):
    """What came of reload, apply, confirm or rollback."""

    ok: bool
    generation: int  # that is in force now
    message: str
    errors: list[Mistake] = []
    remarks: list[str] = []


class SourceText(msgspec.Struct):
    """One file of the configuration of a generation (`config`)."""

    name: str
    text: str


class ApplyArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `apply`: the files of a configuration, the main one first, and how long it is on trial."""

    files: Annotated[list[SourceText], msgspec.Meta(min_length=1)]
    confirm_ms: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: it stays


class ConfigArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `config`: which generation, 0 for the one in force."""

    generation: int = 0


class ExplainArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `explain`."""

    packet: str


class SetArgs(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `set`; `timeout_ms`: null for that of the set, 0 for none."""

    action: str  # list, add, del
    name: str = ""
    address: str = ""
    timeout_ms: Annotated[int, msgspec.Meta(ge=0)] | None = None


class ExplainStep(msgspec.Struct):
    """One rule that was asked (`explain`); the last one decides."""

    rule: str
    action: str
    matches: bool
    why: str


class RuleRow(msgspec.Struct):
    """A rule and what it did (`rules hits`)."""

    name: str
    action: str
    hits: int  # packets that it decided, or logged
    flows: int  # connections that it admitted
    live: int  # of these: still there
    packets: int  # of its connections, or that it stopped
    bytes: int
    last_hit: str | None  # RFC 3339, UTC


class SetRow(msgspec.Struct):
    """A set of addresses (`set list`)."""

    name: str
    configured: int
    added: int
    size: int
    refused: int  # additions for which there was no room


class SetEntry(msgspec.Struct):
    """An address or network in a set (`set list NAME`)."""

    address: str
    configured: bool
    timeout_seconds: int | None  # null: none


class Done(msgspec.Struct):
    """What came of a command that changes something."""

    message: str


class Restart(msgspec.Struct):
    """What came of the wish to restart."""

    ok: bool
    message: str


class DaemonNotRunningError(Exception):
    """Nobody listens on the control socket; the text is one sentence."""


class RequestError(Exception):
    """The daemon did not do what it was asked; the text is one sentence."""


def timestamp(seconds: float) -> str:
    """Write a time of the wall clock as everything here does: RFC 3339, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def socket_path(given: str | None) -> str:
    """Choose the control socket: the one given, else the environment's, else the default."""
    return given or os.environ.get("CONNTRACKD_SOCKET") or DEFAULT_SOCKET


def request(
    path: str, command: str, args: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[bytes]:
    """Ask the daemon behind the socket `path`; yields the rows of its answer as JSON.

    Raises DaemonNotRunningError or RequestError; only a return without one means that the answer was
    complete.
    """
    with _asked(path, command, args or {}, timeout_s) as connection:
        yield from _answer(_lines(connection))


def listen(path: str, command: str, seconds: float | None, args: dict[str, Any] | None = None) -> Iterator[bytes]:
    """Ask for what happens from now on, for so long or, with None, as long as the daemon runs; yields rows as JSON.

    Raises DaemonNotRunningError or RequestError.
    """
    with _asked(path, command, args or {}, TIMEOUT_S) as connection:
        lines = _lines(connection)
        _check_head(lines)
        end_s = None if seconds is None else time.monotonic() + seconds
        while True:
            left_s = None if end_s is None else end_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return
            connection.settimeout(left_s)
            try:
                row = next(lines, None)
            except TimeoutError:
                return
            if row is None:
                raise RequestError("conntrackd has ended.")
            yield row


@contextmanager
def _asked(path: str, command: str, args: dict[str, Any], timeout_s: float) -> Iterator[socket.socket]:
    """Connect, send the request, and turn what goes wrong into sentences."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
            with suppress(BrokenPipeError):  # a client too many is answered before it has asked
                connection.sendall(msgspec.json.encode(Request(VERSION, command, args)) + b"\n")
            yield connection
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonNotRunningError(f"No conntrackd answers on {path}: it is not running.") from None
        except PermissionError:
            raise RequestError(f"The control socket {path} is not open to this user: try as root.") from None
        except TimeoutError:
            raise RequestError(f"conntrackd gave no answer on {path} within {timeout_s:.0f} s.") from None
        except OSError as error:
            raise RequestError(f"Speaking to conntrackd on {path} failed: {error.strerror or error}.") from None


def _answer(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the rows between a good head and the end."""
    _check_head(lines)
    for line in lines:
        if line.startswith(END_MARK):
            return
        yield line
    raise RequestError("conntrackd closed the connection in the middle of its answer.")


def _check_head(lines: Iterator[bytes]) -> None:
    """Read the head of an answer; RequestError if it is a bad one."""
    first = next(lines, None)
    if first is None:
        raise RequestError("conntrackd closed the connection without an answer.")
    try:
        head = msgspec.json.decode(first, type=Head)
    except msgspec.MsgspecError:
        raise RequestError("What answers on the control socket is not conntrackd.") from None
    if not head.ok:
        raise RequestError(str(head.error))


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """Split what arrives into lines, until the other side closes."""
    rest = b""
    while chunk := connection.recv(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
