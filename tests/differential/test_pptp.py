"""PPTP calls whose ids are equal, zero or used twice, and errors about them: rare, so they are scripted."""

import random
import struct

import pytest

from conntrackd import const
from tests.differential import packets
from tests.differential.generate.helpers import Scene, Tcp, pptp_message
from tests.differential.helping import HelpingTwin
from tests.differential.kernel import CLIENT, SERVER


class Calm(Scene):
    """A scene without dice."""

    def __init__(self) -> None:
        super().__init__(random.Random(1), 1, 4)

    def chance(self, _probability: float) -> bool:
        return False

    def session(self) -> Tcp:
        control = Tcp(self, 1723)
        start = struct.pack(">HBBIIHH", 0x100, 1, 0, 1, 1, 0, 1) + bytes(128)
        control.say(CLIENT, pptp_message(1, start))
        control.say(SERVER, pptp_message(2, start))
        return control

    def call(self, control: Tcp, pns: int, pac: int) -> None:
        request = struct.pack(">HHIIIIHHHH", pns, 1, 300, 10**6, 3, 3, 64, 0, 0, 0) + bytes(128)
        control.say(CLIENT, pptp_message(7, request))
        control.say(SERVER, pptp_message(8, struct.pack(">HHBBHIHHI", pac, pns, 1, 0, 0, 10**6, 64, 0, 0)))

    def hang_up(self, control: Tcp, pac: int) -> None:
        control.say(SERVER, pptp_message(13, struct.pack(">HBBHH", pac, 4, 0, 0, 0) + bytes(128)))

    def speak(self, pns: int, pac: int) -> None:
        self.gre(CLIENT, pac)
        self.gre(SERVER, pns)

    def agree(self) -> list[int]:
        """Hold it on both sides; returns what the kernel took its packets for."""
        seen = []
        with HelpingTwin() as twin:
            for side, packet in self.steps:
                difference, ctinfo, _ = twin.forward(side, packet)
                assert not difference, packets.describe(packet)
                seen.append(ctinfo)
        return seen


@pytest.mark.parametrize("size", [None, 28], ids=["whole", "as far as the call's id"])
def test_an_error_about_a_call_is_related_to_it(size: int | None) -> None:
    """Or no tunnel would learn of a smaller MTU on its way."""
    scene = Calm()
    scene.call(scene.session(), 5, 9)
    for side, call in ((CLIENT, 9), (SERVER, 5)):
        scene.gre(side, call)
        scene.error(1 - side, scene.steps[-1][1][:size])
    assert scene.agree()[-4:] == [
        const.IP_CT_RELATED, const.IP_CT_RELATED_REPLY, const.IP_CT_ESTABLISHED_REPLY, const.IP_CT_RELATED
    ]  # fmt: skip


@pytest.mark.parametrize(("pns", "pac"), [(0, 9), (5, 0), (0, 0)])
def test_plain_gre_is_no_call_of_id_zero(pns: int, pac: int) -> None:
    scene = Calm()
    scene.call(scene.session(), pns, pac)
    for side in (CLIENT, SERVER):
        scene.gre(side, 0, version=0)
    scene.speak(pns, pac)
    for side in (CLIENT, SERVER):
        scene.gre(side, 0, version=0)
    scene.agree()


@pytest.mark.parametrize("second", [(5, 10), (6, 9), (5, 9)])
def test_two_sessions_whose_calls_have_an_id_in_common(second: tuple[int, int]) -> None:
    """The older call gets the packets that may be of either; the younger does when the older has ended."""
    scene = Calm()
    sessions = scene.session(), scene.session()
    calls = (5, 9), second
    for control, (pns, pac) in zip(sessions, calls, strict=True):
        scene.call(control, pns, pac)
    for call in calls:
        scene.speak(*call)
    for control, (_, pac) in zip(sessions, calls, strict=True):
        scene.hang_up(control, pac)
        for call in calls:
            scene.speak(*call)
    scene.agree()


@pytest.mark.parametrize("second", [(5, 10), (6, 9), (6, 10)])
@pytest.mark.parametrize("used", [False, True])
def test_a_second_call_of_a_session(second: tuple[int, int], used: bool) -> None:
    scene = Calm()
    control = scene.session()
    scene.call(control, 5, 9)
    if used:
        scene.speak(5, 9)
    for _ in range(2):
        scene.call(control, *second)
        scene.speak(5, 9)
        scene.speak(*second)
    scene.hang_up(control, second[1])
    scene.speak(*second)
    scene.agree()
