"""The whole daemon instead of the core: `conntrackd run` in a twin of the oracle's router, fed the same packets.

The classification is read from the mark that the daemon leaves on each packet, the connections from its control
socket after every packet. One conversation at a time, a few hundred packets per second.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

import msgspec
from msgspec import UNSET, UnsetType

from conntrackd import const
from conntrackd.api import Direction, Flow, request
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATES
from conntrackd.core.proto.udp import STREAM_AFTER_MS
from tests.differential.compare import Mismatch
from tests.differential.generate import PROTOCOLS, generate
from tests.differential.generate.path import Conversation
from tests.differential.kernel import DEVICES, LOGGING, POST, PRE, Entry, Router
from tests.differential.profiles import PROFILES, SLOW
from tests.lab.daemon import Daemon, daemon
from tests.lab.network import network

_PATIENCE_S = 10.0
_SLOW_S = 0.3
_BATCH = 300  # conversations per daemon: its whole table is read after every packet
_CONFIG = f"""\
version = 1

[zones.here]
interfaces = {list(DEVICES)}

[policy]
default = "accept"
input = "accept"
output = "accept"
invalid = "accept"
fragment = "accept"

[conntrack]
"""
_MARK_SHIFT = 26
_CLASSES = {
    const.MARK_NEW: "new",
    const.MARK_ESTABLISHED: "established",
    const.MARK_RELATED: "related",
    const.MARK_INVALID: "invalid",
    const.MARK_UNTRACKED: "untracked",
}


@dataclass
class Outcome:
    """What a live run has compared."""

    packets: int = 0
    conversations: int = 0
    given_up: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)


class LiveTwin:
    """The oracle and the daemon side by side. Use `live_twin()`."""

    def __init__(self, oracle: Router, router: Router, running: Daemon) -> None:
        self.oracle = oracle
        self.router = router
        self.daemon = running

    def hold(self, conversation: Conversation, outcome: Outcome) -> None:
        """Holds one conversation on both sides up to the first difference."""
        outcome.conversations += 1
        opened = 0.0
        for number, step in enumerate(conversation.steps):
            if conversation.protocol == "udp":  # two seconds make it a stream; the rest waits for nothing here
                time.sleep(step.delay_ms / 1000)
            outcome.packets += 1
            begun = time.monotonic()
            opened = opened or begun
            passage = self.oracle.forward(step.side, step.data)
            self.router.send(step.side, step.data)
            if passage.data is None:
                continue
            difference = self._classified(passage.ctinfo, passage.data, passage.left)
            if difference is None and passage.ctinfo == const.IP_CT_NEW and not passage.left:
                outcome.given_up += 1  # from here on a wanted difference: docs/differences.md, the second one
                return
            difference = difference or self._entries(conversation.watch)
            if difference and self._clocks_may_differ(conversation, opened, begun):
                outcome.given_up += 1
                return
            if difference:
                outcome.mismatches.append(Mismatch(conversation, number, *difference))
                return

    def _clocks_may_differ(self, conversation: Conversation, opened: float, begun: float) -> bool:
        """Whether both may be right: they read their clocks far apart, or where UDP becomes a stream."""
        now = time.monotonic()
        return now - begun > _SLOW_S or (
            conversation.protocol == "udp" and abs(now - opened - STREAM_AFTER_MS / 1000) < _SLOW_S
        )

    def _classified(self, ctinfo: int, data: bytes, left: bool) -> tuple[str, str, str] | None:
        kernel = "invalid" if ctinfo >= const.INVALID else const.CTINFO_NAMES[ctinfo]
        logged = self.router.logged(_PATIENCE_S)
        if logged is None:
            return "passage", "seen", "never came out of the queue"
        if (logged.group, logged.data) != (PRE, data):
            return "packet", data.hex(), logged.data.hex()
        number = logged.mark >> _MARK_SHIFT
        ours = _CLASSES.get(number & const.MARK_CLASS, f"mark {logged.mark:#x}")
        if number & const.MARK_REPLY:
            ours += "_reply"
        if kernel != ours:
            return "classification", kernel, ours
        if left:
            logged = self.router.logged(_PATIENCE_S)
            if logged is None or logged.group != POST:
                return "passage", "left", "did not leave"
        return None

    def _entries(self, watch: list[bytes]) -> tuple[str, str, str] | None:
        flows = {}
        for row in request(str(self.daemon.socket_path), "flows"):
            flow = msgspec.json.decode(row, type=Flow)
            for direction in (flow.orig, flow.reply):
                flows[_key(flow.protonum, direction)] = flow
        for key in watch:
            entry, ours = self.oracle.entry(key), flows.get(key)
            about = "entry"
            if entry is None and ours is None:
                continue
            if entry is not None and ours is not None:
                about = _difference(entry, ours)
            if about:
                return about, str(entry), str(ours)
        return None


def _difference(entry: Entry, flow: Flow) -> str:
    if _key(flow.protonum, flow.orig) != entry.orig:
        return "original direction"
    names = {const.IPPROTO_TCP: TCP_STATES, const.IPPROTO_SCTP: SCTP_STATES}.get(flow.protonum)
    if flow.state != (None if names is None or entry.state is None else names[entry.state]):
        return "state"
    if set(flow.status) != {name for bit, name in const.STATUS_NAMES.items() if entry.status & bit}:
        return "status"
    if abs(flow.timeout_seconds - entry.timeout) > 1:
        return "timeout"
    kernel = (entry.packets_orig, entry.bytes_orig, entry.packets_reply, entry.bytes_reply)
    if (flow.orig.packets, flow.orig.bytes, flow.reply.packets, flow.reply.bytes) != kernel:
        return "packets or bytes"
    return ""


def _key(protonum: int, direction: Direction) -> bytes:
    def part(value: int | UnsetType, size: int) -> bytes:
        return (0 if value is UNSET else value).to_bytes(size, "big")

    if protonum in (const.IPPROTO_ICMP, const.IPPROTO_ICMPV6):
        rest = part(direction.id, 2) + part(direction.type, 1) + part(direction.code, 1)
    elif protonum == const.IPPROTO_GRE:
        rest = part(direction.srckey, 2) + part(direction.dstkey, 2)
    else:
        rest = part(direction.sport, 2) + part(direction.dport, 2)
    return bytes([protonum]) + ip_address(direction.src).packed + ip_address(direction.dst).packed + rest


@contextmanager
def live_twin(profile: str) -> Iterator[LiveTwin]:
    """The oracle and a daemon with the settings of a profile; both are gone afterwards."""
    settings = PROFILES[profile].settings
    config = _CONFIG + "".join(f"{name} = {value}\n" for name, value in settings.items())
    with ExitStack() as stack:
        oracle = stack.enter_context(Router.tracking(settings))
        host = stack.enter_context(network()).router
        router = stack.enter_context(host.call(lambda: Router(LOGGING, {})))
        yield LiveTwin(oracle, router, stack.enter_context(daemon(host, config)))


def live(seed: int, seconds: float, protocols: Sequence[str] = PROTOCOLS) -> Outcome:
    """Compares for so long, with one daemon after the other: each profile in turn but the one that waits."""
    outcome = Outcome()
    end = time.monotonic() + seconds
    for batch in itertools.count():
        profile = [name for name in PROFILES if name != SLOW][batch % (len(PROFILES) - 1)]
        indices = range(batch * _BATCH * len(PROFILES), (batch + 1) * _BATCH * len(PROFILES))
        with live_twin(profile) as twin:
            for conversation in (generate(seed, index, protocols) for index in indices):
                if conversation.profile == profile:
                    twin.hold(conversation, outcome)
                if time.monotonic() > end:
                    return outcome
    raise AssertionError("unreachable")
