"""TCP conversations: two plausible ends, and noise at every boundary that the tracker knows."""

import struct
from collections.abc import Callable
from typing import Final

from conntrackd.const import IPPROTO_TCP
from tests.differential.generate.path import CLIENT, SERVER, Conversation, Path
from tests.differential.packets import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG, tcp

_SEQ: Final = 0xFFFFFFFF
_FLAGS: Final = (SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, FIN | ACK, RST, RST, RST | ACK)
_ODD_OPTIONS: Final = (
    b"\x03\x03\x0f",  # scale above 14
    b"\x03\x04\x01\x00",  # scale of a wrong length
    b"\x04\x03\x00",  # SACK permitted of a wrong length
    b"\x05\x05\x00\x00\x00",  # SACK of a wrong length
    b"\x05\x02",
    b"\x08\x00\x00\x00",  # length zero
    b"\xfe\x01",
    b"\x1e\x28\x00\x00",  # longer than the header
    b"\x00\x03\x03\x07",  # behind the end of the list
    b"\x01\x01\x01\x03",  # cut off
    b"\x05\x22" + bytes(32),  # four blocks
)


class _End:
    """One end's own view: what it sent, what it has, what it offers."""

    def __init__(self, isn: int) -> None:
        self.isn = isn
        self.next = isn  # sequence number of the next byte to send
        self.has = 0  # next byte expected from the peer
        self.window = 0
        self.scale: int | None = None  # offered on the SYN
        self.sack = False
        self.stamps = False


class _Talk:
    def __init__(self, path: Path) -> None:
        rng = path.rng
        self.path, self.rng = path, rng
        self.ports = rng.choice(((rng.randrange(1024, 65536), rng.choice((80, 443, 22))), (0, 80), (7, 7)))
        if path.chance(0.9):
            self.ports = (rng.randrange(1024, 65536), 443)
        self.ends = [_End(self._isn()), _End(self._isn())]
        self.noise = rng.choice((0.0, 0.02, 0.1, 0.3))
        self.scaled = False  # both ends offered a scale and their SYNs have passed
        for end in self.ends:
            self._offer(end)
        path.watch(IPPROTO_TCP, CLIENT, struct.pack(">HH", *self.ports))

    def _isn(self) -> int:
        """Often just below a wrap of the sequence space."""
        if self.rng.random() < 0.4:
            return (-self.rng.randrange(4000)) & _SEQ
        return self.rng.getrandbits(32)

    def _offer(self, end: _End) -> None:
        rng = self.rng
        end.scale = rng.choice((None, 0, 2, 7, 14))
        end.sack = rng.random() < 0.6
        end.stamps = rng.random() < 0.4
        end.window = rng.choice((0, 1, 512, 1460, 8192, 29200, 65535))

    # --- segments -----------------------------------------------------------------------------------------------

    def _options(self, side: int, flags: int, blocks: bytes) -> bytes:
        end = self.ends[side]
        if self.rng.random() < self.noise / 4:
            return self.rng.choice(_ODD_OPTIONS)
        options = b""
        if flags & SYN:
            options = b"\x02\x04\x05\xb4" if self.rng.random() < 0.8 else b""
            if end.sack:
                options += b"\x04\x02" if end.stamps else b"\x01\x01\x04\x02"
            if end.stamps:
                options += b"\x08\x0a" + self.rng.randbytes(8)
            if end.scale is not None:
                options += b"\x01\x03\x03" + bytes([end.scale])
        elif self.ends[0].stamps and self.ends[1].stamps:
            options = b"\x01\x01\x08\x0a" + self.rng.randbytes(8)
        if blocks:
            options += b"\x01\x01\x05" + bytes([2 + len(blocks)]) + blocks
        return options[:40]

    def segment(
        self,
        side: int,
        flags: int,
        *,
        seq: int | None = None,
        ack: int | None = None,
        window: int | None = None,
        payload: int = 0,
        blocks: bytes = b"",
        words: int | None = None,
        bad: bool = False,
        arrives: bool = True,
        seen: bool = True,
    ) -> None:
        """Sends and lets both ends move on, unless it does not arrive; unseen: lost before the router."""
        end, peer = self.ends[side], self.ends[1 - side]
        own = seq is None
        seq = end.next if seq is None else seq
        if ack is None:
            ack = end.has if flags & ACK else (self.rng.getrandbits(32) if self.rng.random() < 0.1 else 0)
        if window is None:
            window = end.window
        if flags & ACK and not flags & SYN and self.rng.random() < 0.7:
            flags |= PSH if payload else 0
        data = bytes(payload)
        if seen:
            source, target = self.path.ends[side], self.path.ends[1 - side]
            ports = self.ports if side == CLIENT else self.ports[::-1]
            self.path.send(
                side,
                IPPROTO_TCP,
                tcp(
                    source,
                    target,
                    *ports,
                    flags,
                    seq,
                    ack,
                    window,
                    self._options(side, flags, blocks),
                    data,
                    words=words,
                    bad=bad,
                ),
            )
        length = payload + bool(flags & SYN) + bool(flags & FIN)
        if own:
            end.next = (seq + length) & _SEQ
        if arrives and seq & _SEQ == peer.has:
            peer.has = (seq + length) & _SEQ

    def _edge(self, side: int) -> int:
        """The first sequence number that the peer has not allowed `side` to send, by what both ends said."""
        end, peer = self.ends[side], self.ends[1 - side]
        scale = min(peer.scale or 0, 14) if self.scaled else 0
        return (end.next if peer.has == 0 else peer.has) + (peer.window << scale)

    def _some_seq(self, side: int) -> int:
        rng, end, peer = self.rng, self.ends[side], self.ends[1 - side]
        scale = min(peer.scale or 0, 14) if self.scaled else 0
        window = peer.window << scale
        base = rng.choice(
            (end.next, end.next, end.isn, self._edge(side), self._edge(side) + window, end.next - window, peer.has)
        )
        if rng.random() < 0.1:
            return rng.getrandbits(32)
        if rng.random() < 0.1:
            return base + rng.randrange(-100000, 100000)
        if rng.random() < 0.05:  # where "before" turns into "after"
            return base + (1 << 31) + rng.choice((-1, 0, 1))
        return base + rng.choice((-2, -1, 0, 0, 0, 1, 2))

    def _some_ack(self, side: int) -> int:
        rng, end, peer = self.rng, self.ends[side], self.ends[1 - side]
        if rng.random() < 0.1:
            far = rng.choice((rng.randrange(-100000, 100000), (1 << 31) + rng.choice((-1, 0, 1))))
            return rng.choice((0, rng.getrandbits(32), peer.next + far))
        base = rng.choice((end.has, end.has, peer.next, peer.next, peer.isn, peer.isn + 1, peer.next - 66000))
        return base + rng.choice((-1, 0, 0, 0, 0, 1))

    def wild(self) -> None:
        """Any class of packet, numbers around some boundary."""
        rng = self.rng
        side = rng.randrange(2)
        flags = rng.choice(_FLAGS)
        if rng.random() < 0.15:
            flags = rng.getrandbits(8)
        elif rng.random() < 0.1:
            flags |= rng.choice((URG, ECE, CWR, ECE | CWR, PSH, URG | PSH))
        payload = rng.choice((0, 0, 0, 1, 10, 100, 1460)) if rng.random() < 0.5 else 0
        seq, ack = self._some_seq(side), self._some_ack(side)
        if rng.random() < 0.3:
            seq = self.ends[side].next
        if rng.random() < 0.4:
            ack = self.ends[side].has
        window = rng.choice((None, None, 0, 1, 65535, rng.getrandbits(16)))
        words = rng.choice((0, 4, 6, 15)) if rng.random() < 0.02 else None
        bad = rng.random() < 0.02
        self.segment(side, flags, seq=seq, ack=ack, window=window, payload=payload, words=words, bad=bad)
        if rng.random() < 0.2:  # it goes on from there, as if it had been meant
            self.ends[side].next = (seq + payload + bool(flags & (SYN | FIN))) & _SEQ

    # --- openings -----------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        self.scaled = self.ends[0].scale is not None and self.ends[1].scale is not None

    def open(self) -> None:
        openings: tuple[tuple[int, Callable[[], None]], ...] = (
            (12, self._handshake),
            (2, self._refused),
            (2, self._lost_syns),
            (2, self._simultaneous),
            (2, self._midstream),
            (1, self._half_open),
            (1, self._challenged),
            (1, self._changed_syn_ack),
            (1, self._oddly),
        )
        self.rng.choices([way for _, way in openings], [weight for weight, _ in openings])[0]()

    def _handshake(self) -> None:
        fast_open = self.rng.choice((0, 0, 0, 0, 1, 500))
        client, server = self.ends
        if fast_open and self.rng.random() < 0.5:  # the server acknowledges the SYN alone
            self.segment(CLIENT, SYN, payload=fast_open, arrives=False)
            server.has = (client.isn + 1) & _SEQ
        else:
            self.segment(CLIENT, SYN, payload=fast_open)
            server.has = client.next
        self.some_noise()
        self.segment(SERVER, SYN | ACK, payload=self.rng.choice((0, 0, 0, 0, 0, 20)))
        client.has = server.next
        self._agree()
        self.some_noise()
        self.segment(CLIENT, ACK, arrives=True)
        server.has = client.next

    def _refused(self) -> None:
        self.segment(CLIENT, SYN)
        self.ends[SERVER].has = self.ends[CLIENT].next
        side = self.rng.choice((SERVER, SERVER, CLIENT))
        flags = self.rng.choice((RST | ACK, RST))
        self.segment(side, flags, seq=self.rng.choice((0, None, 17)), ack=self.rng.choice((None, None, 99)))
        if self.rng.random() < 0.6:
            self._handshake()

    def _lost_syns(self) -> None:
        client = self.ends[CLIENT]
        for _ in range(self.rng.randrange(1, 4)):
            self.segment(CLIENT, SYN, seq=client.isn)
            if self.rng.random() < 0.2:  # given up and tried anew from the same port
                client.isn = self._isn()
                self._offer(client)
        client.next = client.isn
        self._handshake()

    def _simultaneous(self) -> None:
        client, server = self.ends
        self.segment(CLIENT, SYN)
        self.segment(SERVER, SYN)
        client.has, server.has = server.next, client.next
        self._agree()
        self.some_noise()
        first = self.rng.randrange(2)
        for side in (first, 1 - first):
            if self.rng.random() < 0.8:
                self.segment(side, SYN | ACK, seq=self.ends[side].isn)
        self.segment(first, ACK)

    def _midstream(self) -> None:
        client, server = self.ends
        client.has, server.has = server.next, client.next
        self.segment(self.rng.randrange(2), ACK, payload=self.rng.choice((0, 1, 1000)))
        if self.rng.random() < 0.5:
            self.segment(self.rng.randrange(2), ACK)

    def _half_open(self) -> None:
        self.segment(CLIENT, SYN)
        self.ends[SERVER].has = self.ends[CLIENT].next
        if self.rng.random() < 0.7:
            for _ in range(self.rng.randrange(1, 4)):
                self.segment(SERVER, SYN | ACK, seq=self.ends[SERVER].isn)

    def _challenged(self) -> None:
        """The server still holds a connection of before and answers the SYN with an ACK [RFC 5961]."""
        self.segment(CLIENT, SYN)
        old = self.rng.getrandbits(32)
        self.segment(SERVER, ACK, seq=self.rng.getrandbits(32), ack=old)
        if self.rng.random() < 0.2:
            self.segment(self.rng.randrange(2), ACK, ack=self.rng.getrandbits(32))
        side = CLIENT if self.rng.random() < 0.8 else SERVER
        self.segment(side, RST, seq=self.rng.choice((old, old, old + 1)))
        if self.rng.random() < 0.8:
            self.ends[CLIENT].next = self.ends[CLIENT].isn
            self._handshake()

    def _changed_syn_ack(self) -> None:
        client, server = self.ends
        self.segment(CLIENT, SYN)
        server.has = client.next
        self.segment(SERVER, SYN | ACK)
        server.isn = server.next = self.rng.choice((server.isn + 1, server.isn - 1, self._isn())) & _SEQ
        self._offer(server)
        self.segment(SERVER, SYN | ACK)
        client.has = server.next
        self._agree()
        self.segment(CLIENT, ACK)

    def _oddly(self) -> None:
        self.segment(self.rng.randrange(2), self.rng.getrandbits(8), payload=self.rng.choice((0, 10)))

    # --- in the middle ------------------------------------------------------------------------------------------

    def some_noise(self) -> None:
        while self.rng.random() < self.noise:
            if self.rng.random() < 0.15:
                self.path.error()
            elif self.rng.random() < 0.1:
                self.path.again()
            else:
                self.wild()

    def talk(self, turns: int) -> None:
        acts: tuple[tuple[int, Callable[[], None]], ...] = (
            (10, self._data),
            (6, self._acknowledge),
            (3, self._lost),
            (2, self._reordered),
            (3, self.path.again),
            (2, self._repeated_ack),
            (1, self._selective),
            (2, self._window),
            (1, self._keepalive),
            (1, self._over),
            (1, self._reset),
            (1, self._syn_within),
            (1, self.path.error),
        )
        ways, weights = [way for _, way in acts], [weight for weight, _ in acts]
        for _ in range(turns):
            self.rng.choices(ways, weights)[0]()
            self.some_noise()

    def _data(self) -> None:
        side = self.rng.randrange(2)
        self.segment(side, ACK, payload=self.rng.choice((1, 100, 1460, 1460, 2920, 9000)))
        if self.rng.random() < 0.6:
            self.segment(1 - side, ACK)

    def _acknowledge(self) -> None:
        self.segment(self.rng.randrange(2), ACK)

    def _lost(self) -> None:
        """Lost before the router or behind it; sometimes sent again."""
        side, seen = self.rng.randrange(2), self.rng.random() < 0.5
        seq, size = self.ends[side].next, self.rng.choice((1, 1460))
        self.segment(side, ACK, payload=size, seen=seen, arrives=False)
        if self.rng.random() < 0.5:
            self.segment(side, ACK, payload=100, arrives=False)
            self.segment(1 - side, ACK)
        if self.rng.random() < 0.8:
            self.segment(side, ACK, seq=seq, payload=size)

    def _reordered(self) -> None:
        side = self.rng.randrange(2)
        first = self.ends[side].next
        self.segment(side, ACK, seq=first + 500, payload=500)
        self.segment(side, ACK, payload=500)
        self.ends[side].next = self.ends[1 - side].has = (first + 1000) & _SEQ

    def _repeated_ack(self) -> None:
        side = self.rng.randrange(2)
        seq, size = self.ends[side].next, self.rng.choice((0, 0, 100))
        for _ in range(self.rng.randrange(2, 8)):
            self.segment(side, ACK, seq=seq, payload=size)
        self.ends[side].next = (seq + size) & _SEQ

    def _selective(self) -> None:
        side = self.rng.randrange(2)
        peer = self.ends[1 - side]
        edges = []
        for _ in range(self.rng.randrange(1, 4)):
            right = peer.next + self.rng.choice((-100, -1, 0, 0, 0, 1, 70000))
            edges += [(right - self.rng.choice((1, 100, 1460))) & _SEQ, right & _SEQ]
        self.segment(side, ACK, blocks=struct.pack(f">{len(edges)}I", *edges))

    def _window(self) -> None:
        """A new window, possibly shut; then perhaps a probe into it and its opening."""
        side = self.rng.randrange(2)
        self.ends[side].window = self.rng.choice((0, 0, 1, 100, 1460, 30000, 65535))
        self.segment(side, ACK)
        if self.rng.random() < 0.5:
            self.segment(1 - side, ACK, payload=1, arrives=False)
            self.ends[1 - side].next = (self.ends[1 - side].next - 1) & _SEQ
            self.segment(side, ACK)
        if self.rng.random() < 0.7:
            self.ends[side].window = 29200
            self.segment(side, ACK)

    def _keepalive(self) -> None:
        side = self.rng.randrange(2)
        self.segment(side, ACK, seq=self.ends[side].next - 1, payload=self.rng.randrange(2))
        self.segment(1 - side, ACK)

    def _over(self) -> None:
        """Data at the right edge of the window and beyond."""
        side = self.rng.randrange(2)
        self.segment(
            side, ACK, seq=self._edge(side) + self.rng.choice((-1, 0, 1, 2)), payload=self.rng.choice((0, 1, 100))
        )

    def _reset(self) -> None:
        """A reset that hits, just misses, or came late."""
        side = self.rng.randrange(2)
        end, peer = self.ends[side], self.ends[1 - side]
        seq = self.rng.choice((end.next, peer.has, peer.has + 1, peer.has - 1, peer.has + 100, end.isn, 0))
        flags = self.rng.choice((RST, RST | ACK))
        self.segment(side, flags, seq=seq, ack=self.rng.choice((None, None, 0)))
        if self.rng.random() < 0.3:
            self.segment(side, RST, seq=self.rng.choice((seq, end.next)))
        if self.rng.random() < 0.3:
            self.segment(self.rng.randrange(2), ACK, payload=10)

    def _syn_within(self) -> None:
        """A SYN into what we hold for open: an attack, or an end that has forgotten."""
        side = self.rng.randrange(2)
        end, peer = self.ends[side], self.ends[1 - side]
        seq = self.rng.choice((end.next, end.isn, end.next + 100000, self.rng.getrandbits(32)))
        before = end.next
        self.segment(side, SYN, seq=seq)
        match self.rng.randrange(5):
            case 0:  # challenge ACK, and the reset that answers it
                self.segment(1 - side, ACK)
                self.segment(side, RST, seq=peer.has)
            case 1:  # the peer has forgotten too and answers: we were out of sync
                end.isn, end.next = seq & _SEQ, (seq + 1) & _SEQ
                peer.isn = peer.next = self._isn()
                peer.has = end.next
                self.segment(1 - side, SYN | ACK, ack=self.rng.choice((peer.has, peer.has, peer.has + 1)))
                end.has = peer.next
                if self.rng.random() < 0.8:
                    self.segment(side, ACK)
            case 2:  # refused
                self.segment(1 - side, RST | ACK, seq=self.rng.choice((0, peer.next)), ack=seq + 1)
            case 3:
                self.segment(side, RST | ACK, seq=self.rng.getrandbits(32), ack=seq + 1)
            case _:
                end.next = before

    # --- closings -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        self.rng.choice((self._orderly, self._orderly, self._both, self._abort, self._half, self._fin_again))()

    def _orderly(self) -> None:
        side = self.rng.randrange(2)
        self.segment(side, FIN | ACK)
        self.some_noise()
        if self.rng.random() < 0.5:
            self.segment(1 - side, ACK)
        self.segment(1 - side, FIN | ACK)
        self.some_noise()
        if self.rng.random() < 0.1:  # a SYN now, its challenge ACK, and only then the last ACK
            self.segment(CLIENT, SYN, seq=self._some_seq(CLIENT))
            for _ in range(self.rng.randrange(3)):
                self.segment(self.rng.choice((SERVER, SERVER, CLIENT)), ACK)
        self.segment(side, ACK)

    def _both(self) -> None:
        for side in (CLIENT, SERVER):
            self.segment(side, FIN | ACK, arrives=False)
        self.ends[0].has, self.ends[1].has = self.ends[1].next, self.ends[0].next
        for side in (CLIENT, SERVER):
            self.some_noise()
            self.segment(side, ACK)

    def _abort(self) -> None:
        side = self.rng.randrange(2)
        if self.rng.random() < 0.3:
            self.segment(side, FIN | ACK)
        self.segment(self.rng.randrange(2), self.rng.choice((RST, RST | ACK)))

    def _half(self) -> None:
        side = self.rng.randrange(2)
        self.segment(side, FIN | ACK)
        for _ in range(self.rng.randrange(1, 5)):
            self.segment(1 - side, ACK, payload=self.rng.choice((0, 1000)))
            self.some_noise()
        if self.rng.random() < 0.6:
            self.segment(1 - side, FIN | ACK)
        if self.rng.random() < 0.6:
            self.segment(side, ACK)

    def _fin_again(self) -> None:
        side = self.rng.randrange(2)
        seq = self.ends[side].next
        for _ in range(self.rng.randrange(2, 4)):
            self.segment(side, FIN | ACK, seq=seq)
        self.ends[side].next = (seq + 1) & _SEQ
        self.segment(1 - side, FIN | ACK)
        self.segment(side, ACK)

    def reopen(self) -> None:
        """The same ports again, by either end, with numbers above or below the old ones."""
        side = self.rng.choice((CLIENT, CLIENT, SERVER))
        end, peer = self.ends[side], self.ends[1 - side]
        end.isn = end.next = self.rng.choice((end.next + 100000, end.next - 100000, self._isn(), end.next)) & _SEQ
        peer.isn = peer.next = self._isn()
        self.segment(side, SYN)
        peer.has = end.next
        self.some_noise()
        if self.rng.random() < 0.8:
            self.segment(1 - side, SYN | ACK)
            end.has = peer.next
            self.segment(side, ACK)

    def late(self) -> None:
        """Stragglers of what is over."""
        if self.rng.random() < 0.1:
            self._reset()
        for _ in range(self.rng.randrange(3)):
            self.path.again()
        self.some_noise()


def converse(path: Path) -> Conversation:
    talk = _Talk(path)
    if path.chance(0.08):  # noise alone
        for _ in range(path.rng.randrange(2, 20)):
            talk.wild()
        return path.finish()
    talk.open()
    talk.some_noise()
    talk.talk(path.rng.choice((0, 1, 3, 8)))
    for _ in range(path.rng.choice((1, 1, 1, 2))):
        if path.chance(0.8):
            talk.close()
            talk.some_noise()
            talk.late()
        if path.chance(0.4):
            talk.reopen()
            talk.talk(path.rng.choice((0, 1, 4)))
    return path.finish()
