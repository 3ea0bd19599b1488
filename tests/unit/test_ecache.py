"""Events: one per packet with all that it changed, kept for whoever listens, and nobody waits for a listener."""

import pytest

from conntrackd.const import (
    CLOSED_FIN,
    CLOSED_KILLED,
    CLOSED_RST,
    CLOSED_TIMEOUT,
    IPCT_ASSURED,
    IPCT_DESTROY,
    IPCT_LABEL,
    IPCT_MARK,
    IPCT_NEW,
    IPCT_PROTOINFO,
    IPCT_REPLY,
    IPS_DYING,
)
from conntrackd.core.conntrack import conntrack_in, gc, set_labels, set_mark
from conntrackd.core.ecache import Event, EventRing, Listener
from tests.differential.packets import ACK, RST, SYN, chunk
from tests.unit.craft import Talk, TcpTalk, icmp, sctp, sctp_init, udp


def rest(ring: EventRing, listener: Listener) -> list[Event]:
    """What the listener has not read yet."""
    found = []
    while (event := ring.read(listener)) is not None:
        found.append(event)
    return found


def bits(ring: EventRing, listener: Listener) -> list[int]:
    return [event.bits for event in rest(ring, listener)]


def test_while_nobody_listens_nothing_is_kept() -> None:
    talk = Talk()
    talk.send(udp())
    assert (talk.net.events.seq, talk.net.events.ring) == (0, [])


def test_a_tcp_life() -> None:
    talk = TcpTalk()
    ring = talk.net.events
    listener = ring.listen()
    talk.handshake()
    opened = rest(ring, listener)
    assert [event.bits for event in opened] == [IPCT_NEW, IPCT_PROTOINFO | IPCT_REPLY, IPCT_PROTOINFO | IPCT_ASSURED]
    assert [event.state for event in opened] == [1, 2, 3]  # as it was then
    talk.client(ACK, 1, 1, data=b"data")
    talk.server(ACK, 1, 5)
    assert not rest(ring, listener)  # data is no news
    talk.client_isn += 4
    talk.close()
    assert bits(ring, listener) == [IPCT_PROTOINFO] * 4
    talk.client(SYN, 100)  # the same ports again
    destroyed, new = rest(ring, listener)
    assert (destroyed.bits, destroyed.reason, new.bits) == (IPCT_DESTROY, CLOSED_FIN, IPCT_NEW)
    assert [event.kind() for event in (destroyed, new)] == ["DESTROY", "NEW"]


def test_a_refused_connection_begins_and_ends() -> None:
    talk = TcpTalk()
    listener = talk.net.events.listen()
    talk.client(SYN, 0)
    talk.server(RST | ACK, 0, 1)
    new, destroyed = rest(talk.net.events, listener)
    assert (new.kind(), destroyed.kind(), destroyed.reason) == ("NEW", "DESTROY", CLOSED_RST)
    assert destroyed.state == 8  # CLOSE
    assert talk.net.cached == 0


def test_an_aborted_connection_ends_when_it_is_swept() -> None:
    talk = TcpTalk()
    talk.handshake()
    talk.reset()
    listener = talk.net.events.listen()
    talk.wait(20)
    gc(talk.net, talk.now_ms)
    (destroyed,) = rest(talk.net.events, listener)
    assert (destroyed.reason, destroyed.now_ms) == (CLOSED_RST, talk.now_ms)


@pytest.mark.parametrize(("ask", "answer"), [(udp(), udp(back=True)), (icmp(8), icmp(0, back=True))])
def test_a_question_and_its_answer(ask: bytes, answer: bytes) -> None:
    talk = Talk()
    listener = talk.net.events.listen()
    talk.send(ask)
    talk.send(ask)
    talk.send(answer)
    talk.send(answer)
    assert bits(talk.net.events, listener) == [IPCT_NEW, IPCT_REPLY]
    talk.wait(40)
    assert talk.find(ask) is None
    (destroyed,) = rest(talk.net.events, listener)
    assert destroyed.reason == CLOSED_TIMEOUT


def test_an_sctp_association_moves() -> None:
    talk = Talk()
    listener = talk.net.events.listen()
    talk.send(sctp(0, chunk(1, value=sctp_init(5))))
    talk.send(sctp(5, chunk(2, value=sctp_init(9)), back=True))
    assert bits(talk.net.events, listener) == [IPCT_NEW, IPCT_PROTOINFO | IPCT_REPLY]


def test_what_happens_before_the_confirm_is_part_of_new() -> None:
    talk = Talk()
    listener = talk.net.events.listen()
    _, ct = conntrack_in(talk.net, udp(), True, talk.now_ms)
    assert ct is not None
    set_mark(talk.net, ct, 7, talk.now_ms)
    talk.net.table.kill(ct, talk.now_ms)  # never was there
    assert not rest(talk.net.events, listener)


def test_mark_and_labels_are_told_when_they_change() -> None:
    talk = Talk()
    talk.send(udp())
    ct = talk.the()
    listener = talk.net.events.listen()
    set_mark(talk.net, ct, 0xFFFFFFFF, talk.now_ms)
    set_mark(talk.net, ct, 0xFFFFFFFF, talk.now_ms)
    set_labels(talk.net, ct, 1 << 127, talk.now_ms)
    marked, labelled = rest(talk.net.events, listener)
    assert (marked.bits, marked.mark, marked.labels) == (IPCT_MARK, 0xFFFFFFFF, 0)
    assert (labelled.bits, labelled.labels) == (IPCT_LABEL, 1 << 127)
    assert talk.net.table.labels == {ct.id: 1 << 127}
    talk.net.table.kill(ct, talk.now_ms)
    assert talk.net.table.labels == {}
    (destroyed,) = rest(talk.net.events, listener)
    assert (destroyed.reason, destroyed.status & IPS_DYING) == (CLOSED_KILLED, IPS_DYING)
    assert destroyed.labels == 1 << 127


# --- The ring ---------------------------------------------------------------------------------------------------


def test_a_slow_listener_loses_the_oldest_and_is_told_how_many() -> None:
    talk = Talk(events_max=10)
    ring = talk.net.events
    slow, quick = ring.listen(), ring.listen()
    ids = []
    for port in range(1, 26):
        talk.send(udp(sport=port))
        assert talk.last is not None
        ids.append(talk.last.id)
        if port <= 20:
            rest(ring, quick)
    assert [event.ct.id for event in rest(ring, quick)] == ids[20:]
    assert [event.ct.id for event in rest(ring, slow)] == ids[15:]
    assert (slow.lost, quick.lost, ring.lost, len(ring.ring)) == (15, 0, 15, 10)


def test_a_listener_hears_what_happens_from_then_on_and_each_event_once() -> None:
    talk = Talk(events_max=4)
    ring = talk.net.events
    early = ring.listen()
    heard = []
    for port in range(1, 12):
        talk.send(udp(sport=port))
        if port == 5:
            late = ring.listen()
        if port % 3 == 0:
            heard += [event.ct.id for event in rest(ring, early)]
    heard += [event.ct.id for event in rest(ring, early)]
    assert heard == list(range(1, 12))
    assert [event.ct.id for event in rest(ring, late)] == [8, 9, 10, 11]
    assert late.lost == 2


def test_with_the_last_listener_all_events_go() -> None:
    talk = Talk(events_max=4)
    ring = talk.net.events
    first, second = ring.listen(), ring.listen()
    talk.send(udp(sport=1))
    ring.leave()
    assert len(rest(ring, second)) == 1
    ring.leave()
    assert ring.ring == []
    talk.send(udp(sport=2))
    third = ring.listen()
    for port in range(3, 9):
        talk.send(udp(sport=port))
    assert [event.ct.id for event in rest(ring, third)] == [5, 6, 7, 8]
    assert first.lost == 0


def test_the_ring_keeps_its_length_when_its_setting_changes_and_loses_nothing_by_that() -> None:
    talk = Talk(events_max=4)
    ring = talk.net.events
    listener = ring.listen()
    heard = []
    for port in range(1, 31):
        if port == 7:
            talk.net.events.limit = 20
        if port == 15:
            talk.net.events.limit = 2
        talk.send(udp(sport=port))
        heard += [event.ct.id for event in rest(ring, listener)]
    assert heard == list(range(1, 31))
    assert len(ring.ring) == 4
