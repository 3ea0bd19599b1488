"""SCTP conversations: associations from INIT to SHUTDOWN_COMPLETE, collisions, wrong tags, odd bundles."""

import struct
from collections.abc import Callable
from typing import Final

from conntrackd.const import IPPROTO_SCTP
from tests.differential import packets
from tests.differential.generate.path import CLIENT, SERVER, Conversation, Path

DATA, INIT, INIT_ACK, SACK, HEARTBEAT, HEARTBEAT_ACK, ABORT, SHUTDOWN = range(8)
SHUTDOWN_ACK, ERROR, COOKIE_ECHO, COOKIE_ACK = range(8, 12)
SHUTDOWN_COMPLETE: Final = 14
_KINDS: Final = (*range(12), SHUTDOWN_COMPLETE, 12, 13, 0x80, 0xC1)


class _Talk:
    def __init__(self, path: Path) -> None:
        self.path, self.rng = path, path.rng
        self.ports = (self.rng.randrange(65536), self.rng.choice((36412, 0, 7)))
        self.tags = [self._tag(), self._tag()]  # what each end chose: the other puts it into its packets
        self.noise = self.rng.choice((0.0, 0.03, 0.15, 0.4))
        path.watch(IPPROTO_SCTP, CLIENT, struct.pack(">HH", *self.ports))

    def _tag(self) -> int:
        return self.rng.randrange(1, 1 << 32)

    def put(self, side: int, vtag: int, *chunks: bytes, bad: bool = False, cut: int | None = None) -> None:
        ports = self.ports if side == CLIENT else self.ports[::-1]
        self.path.send(side, IPPROTO_SCTP, packets.sctp(*ports, vtag, chunks, bad=bad)[:cut])

    def chunk(self, side: int, kind: int, flags: int = 0) -> bytes:
        """A chunk as `side` sends it, with a plausible body."""
        if kind in (INIT, INIT_ACK):
            return packets.chunk(kind, flags, struct.pack(">IIHHI", self.tags[side], 1 << 16, 10, 10, 1))
        size = {DATA: 20, SACK: 12, SHUTDOWN: 4, COOKIE_ECHO: 40, HEARTBEAT: 12, HEARTBEAT_ACK: 12}.get(kind, 0)
        return packets.chunk(kind, flags, self.rng.randbytes(size))

    def say(self, side: int, *kinds: int) -> None:
        """Chunks in their place: with the tag that they need."""
        vtag = 0 if kinds == (INIT,) else self.tags[1 - side]
        self.put(side, vtag, *[self.chunk(side, kind) for kind in kinds])
        self.some_noise()

    def some_noise(self) -> None:
        while self.path.chance(self.noise):
            self.wild()

    def wild(self) -> None:
        """Any chunks, any plausible tag, at times a broken packet."""
        rng = self.rng
        side = rng.randrange(2)
        kinds = [rng.choice(_KINDS) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]
        chunks = [self.chunk(side, kind, rng.choice((0, 0, 0, 1, 2, 255))) for kind in kinds]
        vtag = rng.choice((self.tags[1 - side],) * 5 + (self.tags[side], 0, self._tag()))
        match rng.randrange(24):
            case 0:
                self.path.error()
            case 1:
                self.path.again()
            case 2:
                self.put(side, vtag, *chunks, bad=True)
            case 3:
                self.put(side, vtag, *chunks, cut=rng.randrange(48))
            case 4:  # a chunk whose length lies
                length = rng.choice((0, 1, 3, 4, 5, 1000, 65535))
                chunks[rng.randrange(len(chunks))] = packets.chunk(kinds[0], 0, rng.randbytes(12), length)
                self.put(side, vtag, *chunks)
            case 5:  # another INIT from here, with a new tag
                self.tags[side] = self._tag()
                self.say(side, INIT)
            case 6:
                self.put(side, vtag)
            case 7 | 8:  # an answer to an INIT, sent or not, with a tag of its own
                self.tags[side] = rng.choice((self.tags[side], self._tag()))
                self.say(side, INIT_ACK)
            case 9:
                self.put(side, 0, *chunks)
            case 10:  # more than the daemon sees of a packet
                self.put(side, vtag, packets.chunk(DATA, 3, bytes(5000)))
            case _:
                self.put(side, vtag, *chunks)

    # --- an association -----------------------------------------------------------------------------------------

    def open(self) -> None:
        openings: tuple[Callable[[], None], ...] = (self._normal, self._collision, self._heartbeat, self._twice)
        self.rng.choices(openings, (6, 2, 1, 2))[0]()

    def _normal(self) -> None:
        self.say(CLIENT, INIT)
        self.say(SERVER, INIT_ACK)
        self.say(CLIENT, COOKIE_ECHO, *([DATA] if self.path.chance(0.3) else []))
        self.say(SERVER, COOKIE_ACK, *([SACK] if self.path.chance(0.3) else []))

    def _collision(self) -> None:
        """Both ends start; which answers cross is open [RFC 9260 5.2]."""
        steps = [(CLIENT, INIT), (SERVER, INIT), (CLIENT, INIT_ACK), (SERVER, INIT_ACK)]
        if self.path.chance(0.5):
            steps[2:] = reversed(steps[2:])
        for side, kind in steps:
            if self.path.chance(0.9):
                self.say(side, kind)
        for side in (CLIENT, SERVER):
            if self.path.chance(0.8):
                self.say(side, COOKIE_ECHO)
                self.say(1 - side, COOKIE_ACK)

    def _heartbeat(self) -> None:
        """A further path of an association that opened elsewhere."""
        self.say(CLIENT, HEARTBEAT)
        if self.path.chance(0.3):
            self.tags = [self._tag(), self._tag()]
        if self.path.chance(0.8):
            self.say(SERVER, HEARTBEAT_ACK)
        self.say(self.rng.randrange(2), self.rng.choice((DATA, SACK, HEARTBEAT, INIT)))

    def _twice(self) -> None:
        for _ in range(self.rng.randrange(1, 3)):
            self.say(CLIENT, INIT)
            if self.path.chance(0.4):
                self.tags[CLIENT] = self._tag()
            if self.path.chance(0.4):
                self.say(SERVER, INIT_ACK)
                self.tags[SERVER] = self._tag()
        self._normal()

    def talk(self) -> None:
        for _ in range(self.rng.choice((0, 2, 6))):
            side = self.rng.randrange(2)
            match self.rng.randrange(8):
                case 0:
                    self.say(side, HEARTBEAT)
                    self.say(1 - side, HEARTBEAT_ACK)
                case 1:  # a restart, or a late INIT
                    if self.path.chance(0.5):
                        self.tags[side] = self._tag()
                    self.say(side, INIT)
                    if self.path.chance(0.7):
                        self.say(1 - side, INIT_ACK)
                        self.say(side, COOKIE_ECHO)
                        self.say(1 - side, COOKIE_ACK)
                case 2:
                    self.say(side, ERROR)
                case 3:  # a heartbeat under a strange tag, then perhaps its answer
                    self.put(side, self._tag(), self.chunk(side, HEARTBEAT))
                    if self.path.chance(0.7):
                        self.put(
                            1 - side, self.rng.choice((self._tag(), self.tags[side])), self.chunk(side, HEARTBEAT_ACK)
                        )
                case _:
                    self.say(side, DATA)
                    self.say(1 - side, SACK)

    def close(self) -> None:
        side = self.rng.randrange(2)
        if self.path.chance(0.3):  # ABORT, with the own or (T) the peer's tag
            reflected = self.rng.randrange(2)
            self.put(side, self.tags[side if reflected else 1 - side], self.chunk(side, ABORT, reflected))
            return
        self.say(side, SHUTDOWN)
        if self.path.chance(0.2):
            self.say(1 - side, SHUTDOWN)
        self.say(1 - side, SHUTDOWN_ACK)
        if self.path.chance(0.9):
            self.say(side, SHUTDOWN_COMPLETE)


def converse(path: Path) -> Conversation:
    talk = _Talk(path)
    for _ in range(path.rng.choice((1, 1, 1, 2))):
        if path.chance(0.1):
            for _ in range(path.rng.randrange(1, 12)):
                talk.wild()
        else:
            talk.open()
            talk.talk()
            if path.chance(0.8):
                talk.close()
                talk.some_noise()
    return path.finish()
