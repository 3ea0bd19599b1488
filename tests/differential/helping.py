"""Helpers of the kernel and ours side by side: the same control conversations, and what each side then expects.

    python -m tests.differential.helping --exchanges 5000 --seed 1 [--only "sip call"]

After every packet both sides' expectations are compared (tuple, mask, class, flags, timeout, master, helper), besides
the packet's own classification, what became of it, and the status and timeout of every connection.
"""

import argparse
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from conntrackd import config, const
from conntrackd.core.conntrack import gc
from conntrackd.core.expect import Expect
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import format_tuple
from conntrackd.hooks import DROPPED_BY_HELPER, Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile  # noqa: A004
from conntrackd.policy.ruleset import Ruleset
from tests.differential import kernel
from tests.differential.generate.helpers import SCENES, Exchange, crowd, exchange
from tests.differential.kernel import SERVER, Router
from tests.differential.packets import describe

CAPTURE: Final = 3900

# Which helper the router gives to what: protocol and port, as a rule would say.
ASSIGNED: Final = (
    ("ftp", const.IPPROTO_TCP, (21, 2121), True),
    ("tftp", const.IPPROTO_UDP, (69, 6969), True),
    ("irc", const.IPPROTO_TCP, (6667,), False),
    ("sip", const.IPPROTO_TCP, (5060,), True),
    ("sip", const.IPPROTO_UDP, (5060,), True),
    ("amanda", const.IPPROTO_UDP, (10080,), True),
    ("sane", const.IPPROTO_TCP, (6566,), True),
    ("pptp", const.IPPROTO_TCP, (1723,), False),
)
_NAMES: Final = {const.IPPROTO_TCP: "tcp", const.IPPROTO_UDP: "udp"}

_EXP: Final = 2 << 8
_EXP_GET: Final = _EXP | 1
_STATUS: Final = (
    const.IPS_EXPECTED | const.IPS_SEEN_REPLY | const.IPS_ASSURED | const.IPS_CONFIRMED | const.IPS_DYING
) | const.IPS_HELPER


def _assigning_rules() -> str:
    objects, assignments = [], []
    for number, (helper, protonum, ports, ipv6) in enumerate(ASSIGNED):
        name = _NAMES[protonum]
        family = "" if ipv6 else "l3proto ip;"
        objects.append(f'  ct helper h{number} {{ type "{helper}" protocol {name}; {family} }}')
        joined = ", ".join(map(str, ports))
        match = "" if ipv6 else "meta nfproto ipv4 "
        assignments.append(f'    {match}{name} dport {{ {joined} }} ct helper set "h{number}"')
    lines = ["table inet helping {", *objects, "  chain pre {", "    type filter hook prerouting priority -150;"]
    return "\n".join([*lines, *assignments, "  }", "}", ""])


class Expected(NamedTuple):
    """One expectation, of either side. The mask without its protocol, which is always exact."""

    tuple: bytes
    mask: bytes
    master: bytes
    helper: str
    expect_class: int
    flags: int
    timeout: int

    def __str__(self) -> str:
        mask = self.mask.hex()
        return f"{format_tuple(self.tuple)}/{mask} class {self.expect_class} flags {self.flags} {self.timeout}s"


class HelpingRouter(Router):
    """An oracle that assigns helpers."""

    @classmethod
    def helping(cls) -> Self:
        """Build it in a namespace of its own."""
        with kernel.namespace():
            return cls(kernel.TRACKING + kernel.LOGGING + _assigning_rules(), {"acct": 1})

    def expectations(self) -> dict[bytes, Expected]:
        """What the kernel expects, by tuple."""
        found = {}
        for message, start, end in self.dump(_EXP_GET):
            expected = decode_expectation(message, kernel.attributes(message, start + 20, end))
            found[expected.tuple] = expected
        return found

    def left(self) -> list[bytes]:
        """The packets that have left the router since it was asked last."""
        packets = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packets.append(os.read(self.device(SERVER), 1 << 17))
        return packets


def decode_expectation(message: bytes, found: dict[int, tuple[int, int]]) -> Expected:
    """Read one of the kernel's."""

    def number(kind: int) -> int:
        return int.from_bytes(message[slice(*found[kind])], "big") if kind in found else 0

    return Expected(
        kernel.decode_tuple(message, *found[2]),
        kernel.decode_tuple(message, *found[3])[1:],
        kernel.decode_tuple(message, *found[1]),
        message[slice(*found[6])].rstrip(b"\0").decode(),
        number(9),
        number(8),
        number(4),
    )


def ours(expect: Expect, now_ms: int) -> Expected:
    """Say one of ours in the same words."""
    assert expect.master.help is not None
    return Expected(
        expect.tuple,
        expect.mask[1:],
        expect.master.orig,
        expect.master.help.helper.name,
        expect.expect_class,
        expect.flags,
        (expect.expires_ms - now_ms) // 1000,
    )


def ruleset() -> Ruleset:
    """Everything may pass; what ASSIGNED names gets its helper."""
    lines = ["version = 1", "[policy]", 'default = "accept"', 'invalid = "accept"']
    for helper, protonum, ports, _ in ASSIGNED:
        name = _NAMES[protonum]
        lines += ["[[rule]]", f'name = "{helper}-{name}"', f'protocol = "{name}"', f"port = {list(ports)}"]
        lines += [f'helper = "{helper}"', 'action = "accept"']
    return compile(config.parse("\n".join(lines).encode(), "helpers.toml"), 1)


@dataclass
class Tally:
    """What was compared."""

    exchanges: int = 0
    packets: int = 0
    expectations: int = 0  # seen after some packet
    dropped: int = 0  # packets that a helper dropped
    related: int = 0
    names: Counter[str] = field(default_factory=Counter)
    expected_by: Counter[str] = field(default_factory=Counter)


class HelpingTwin:
    """One router and one core that assign the same helpers."""

    def __init__(self) -> None:
        self.router = HelpingRouter.helping()
        self.helper_dropped = 0  # by the last packet
        self.empty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.router.__exit__()

    def empty(self) -> None:
        """Forget every connection on both sides."""
        self.router.flush()
        self.router.left()
        self.net = Conntrack(Sysctl())
        self.fw = Firewall(self.net, ruleset())

    def hold(self, exchange: Exchange, tally: Tally) -> str:
        """Hold a conversation on both sides; returns the first difference, "" if there is none."""
        tally.exchanges += 1
        tally.names[exchange.name] += 1
        before: set[tuple[bytes, int]] = set()
        for number, (side, packet) in enumerate(exchange.steps):
            tally.packets += 1
            difference, kernel_ctinfo, expected = self.forward(side, packet)
            if difference:
                history = "\n".join(f"  {i} {'<>'[s]} {describe(p)}" for i, (s, p) in enumerate(exchange.steps))
                return f"{exchange.name}, packet {number}: {difference}\n{history}\n  {packet[20:].hex()}"
            tally.related += kernel_ctinfo == const.IP_CT_RELATED
            tally.dropped += self.helper_dropped
            now = {(each.tuple, each.expect_class) for each in expected}
            tally.expectations += len(now - before)
            for each in expected:
                if (each.tuple, each.expect_class) not in before:
                    tally.expected_by[f"{each.helper}/{each.expect_class}"] += 1
            before = now
        known = {ct.orig for ct in self.net.table.connections()}
        alone = [format_tuple(key) for key in self.router.entries() if key not in known]
        return f"{exchange.name}: connections of the kernel alone: {alone}" if alone else ""

    def forward(self, side: int, packet: bytes) -> tuple[str, int, Iterable[Expected]]:
        """Send one packet through both: a difference or "", the kernel's ctinfo, what is expected now."""
        router = self.router
        now = time.monotonic_ns() // 1_000_000
        passage = router.forward(side, packet)
        left = bool(router.left())
        assert passage.data is not None, describe(packet)
        dropped_before = self.fw.drop_counts.get(DROPPED_BY_HELPER, 0)
        ctinfo_before = list(self.net.stats.ctinfo)
        mark = self.cross_hooks(passage.data[:CAPTURE], side, now)
        self.helper_dropped = self.fw.drop_counts.get(DROPPED_BY_HELPER, 0) - dropped_before
        counted = [
            number
            for number, (old, new) in enumerate(zip(ctinfo_before, self.net.stats.ctinfo, strict=True))
            if new != old
        ]
        our_ctinfo = counted[0] if counted else -1
        gc(self.net, now)
        if (mark >= 0) != left:
            return f"left: kernel {left}, ours {mark >= 0}", passage.ctinfo, []
        if our_ctinfo != const.STRESSED_HELPER:
            of_kernel = min(passage.ctinfo, const.INVALID)
            if of_kernel != min(our_ctinfo, const.INVALID):
                names = const.CTINFO_NAMES
                return f"ctinfo: kernel {names[of_kernel]}, ours {names[our_ctinfo]}", passage.ctinfo, []
        theirs = router.expectations()
        mine = {each.tuple: ours(each, now) for each in self.net.table.expectations.by_id.values()}
        for key in theirs.keys() | mine.keys():
            if key not in mine or key not in theirs:
                return f"expectation: kernel {theirs.get(key)}, ours {mine.get(key)}", passage.ctinfo, []
            a, b = theirs[key], mine[key]
            if a[:-1] != b[:-1] or abs(a.timeout - b.timeout) > 1:
                return f"expectation: kernel {a}, ours {b}", passage.ctinfo, []
        return self.compare_tables(now), passage.ctinfo, theirs.values()

    def cross_hooks(self, data: bytes, side: int, now_ms: int) -> int:
        """Let a packet cross our hooks; returns its mark, or DROP."""
        iif, oif = (2, 1) if side == SERVER else (1, 2)
        mark = pre_routing(self.fw, data, const.NF_INET_PRE_ROUTING, iif, now_ms)
        if mark < 0 or not mark & const.MARK_UNCONFIRMED:
            return mark
        return post_routing(self.fw, data, mark, const.NF_INET_POST_ROUTING, iif, oif, now_ms)

    def compare_tables(self, now_ms: int) -> str:
        """Compare the connections that we have with the kernel's: status and timeout."""
        for ct in self.net.table.connections():
            key = ct.orig
            if ct.expires_ms <= now_ms:
                continue
            entry = self.router.entry(key)
            if entry is None or entry.orig != key:
                return f"connection {format_tuple(key)} is ours alone: kernel {entry}"
            if (entry.status ^ ct.status) & _STATUS:
                return f"status of {format_tuple(key)}: kernel {entry.status:x}, ours {ct.status:x}"
            if ct.protonum == const.IPPROTO_GRE and ct.master is not None:
                continue  # calls live longer with us (docs/differences.md)
            left = (ct.expires_ms - now_ms) // 1000
            if abs(entry.timeout - left) > 1:
                return f"timeout of {format_tuple(key)}: kernel {entry.timeout}, ours {left}"
        return ""


def compare(seed: int, count: int, names: tuple[str, ...] = tuple(SCENES)) -> tuple[Tally, list[str]]:
    """Hold conversations; returns what was compared and the differences."""
    tally = Tally()
    differences = []
    with HelpingTwin() as twin:
        for index in range(count):
            write = crowd if index % 4 == 3 else exchange
            difference = twin.hold(write(seed, index, names), tally)
            if difference:
                differences.append(f"{index}: {difference}")
            twin.empty()
    return tally, differences


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare helpers with the kernel's.")
    parser.add_argument("--exchanges", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=sorted(SCENES))
    args = parser.parse_args()
    begun = time.monotonic()
    tally, differences = compare(args.seed, args.exchanges, tuple(args.only or SCENES))
    for difference in differences[:10]:
        print(difference, end="\n\n")
    print(
        f"{tally.exchanges} conversations, {tally.packets} packets in {time.monotonic() - begun:.0f} s: "
        f"{tally.expectations} expectations, {tally.related} packets RELATED, {tally.dropped} dropped by helpers"
    )
    print("conversations:", ", ".join(f"{name} {count}" for name, count in sorted(tally.names.items())))
    print("expectations by helper/class:", ", ".join(f"{k} {v}" for k, v in sorted(tally.expected_by.items())))
    print(f"{len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
