"""What each side tells of its connections, packet by packet: NEW, UPDATE, DESTROY, and what was true then."""

import random
import socket
import struct
from collections import Counter
from typing import NamedTuple, Self

from conntrackd import const
from tests.differential import kernel
from tests.differential.compare import AmbiguousTimingError, Twin
from tests.differential.generate import generate
from tests.differential.kernel import LOGGING, TRACKING, Passage, Router, attributes, decode_tuple
from tests.differential.packets import describe

CONVERSATIONS = 800
NETLINK_NETFILTER = 12
GROUPS = 1 << 0 | 1 << 1 | 1 << 2  # NFNLGRP_CONNTRACK_NEW, _UPDATE, _DESTROY
DELETE = 2
CREATED = 0x600  # NLM_F_CREATE, NLM_F_EXCL
STATUS = const.IPS_EXPECTED | const.IPS_SEEN_REPLY | const.IPS_ASSURED | const.IPS_CONFIRMED


class Told(NamedTuple):
    """An event of either side; the state is there if it has changed, or is the first."""

    kind: str
    orig: bytes
    status: int
    state: int | None


class TellingRouter(Router):
    """An oracle that tells what happens; a packet that it drops or calls INVALID, it tells of with the next one."""

    news: socket.socket
    silent = False

    @classmethod
    def telling(cls) -> Self:
        with kernel.namespace():
            router = cls(TRACKING + LOGGING, {"acct": 1})
            router.news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
            router.news.bind((0, GROUPS))
            router.news.setblocking(False)
        return router

    def forward(self, side: int, packet: bytes) -> Passage:
        passage = super().forward(side, packet)
        self.silent = not passage.left or passage.ctinfo >= const.INVALID
        return passage

    def told(self) -> list[Told]:
        """Everything since it was asked last."""
        events: list[Told] = []
        while True:
            try:
                message = self.news.recv(1 << 16)
            except BlockingIOError:
                return events
            length, kind, flags = struct.unpack_from("=IHH", message)
            found = attributes(message, 20, length)
            name = "DESTROY" if kind & 0xFF == DELETE else "NEW" if flags & CREATED else "UPDATE"
            state = None
            for nest in attributes(message, *found[4]).values() if name != "DESTROY" and 4 in found else ():
                state = message[attributes(message, *nest)[1][0]]
            status = int.from_bytes(message[slice(*found[3])], "big")
            events.append(Told(name, decode_tuple(message, *found[1]), status & STATUS, state))


class TellingTwin(Twin):
    def __init__(self) -> None:
        self.profile = "default"
        self.router: TellingRouter = TellingRouter.telling()
        self._begin()
        self.listener = self.net.events.listen()

    def __exit__(self, *_: object) -> None:
        self.router.news.close()
        self.router.__exit__()

    def told(self) -> list[Told]:
        events: list[Told] = []
        while (event := self.net.events.read(self.listener)) is not None:
            kind = event.kind()
            stateful = event.ct.protonum in (const.IPPROTO_TCP, const.IPPROTO_SCTP)
            shown = event.bits & const.IPCT_PROTOINFO or (kind == "NEW" and stateful)
            state = event.state if shown and kind != "DESTROY" else None
            events.append(Told(kind, event.ct.orig, event.status & STATUS, state))
        return events


def test_events_are_the_kernels() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    seen: Counter[str] = Counter()
    with TellingTwin() as twin:
        for index in range(CONVERSATIONS):
            conversation = generate(seed, index)
            own = set(conversation.watch)  # who else expires meanwhile is told when somebody looks
            for step in conversation.steps:
                try:
                    answer = twin.forward(step.side, step.data, conversation.watch)
                except AmbiguousTimingError:
                    twin.router.told()
                    twin.told()
                    break
                assert not isinstance(answer, tuple), answer
                theirs = [told for told in twin.router.told() if told.kind != "DESTROY" or told.orig in own]
                ours = [told for told in twin.told() if told.kind != "DESTROY" or told.orig in own]
                if ours and not theirs and twin.router.silent:
                    break
                assert ours == theirs, (index, describe(step.data))
                seen.update(told.kind for told in ours)
    assert min(seen[kind] for kind in ("NEW", "UPDATE", "DESTROY")) > 10
