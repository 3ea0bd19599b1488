"""Control conversations for each helper, right and wrong, and the connections that they announce."""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from tests.differential import packets
from tests.differential.generate.path import addresses
from tests.differential.kernel import CLIENT, SERVER
from tests.differential.packets import ACK, FIN, PSH, SYN

Steps = list[tuple[int, bytes]]


@dataclass
class Exchange:
    """One conversation: what it is about, and its packets with the side each comes from."""

    name: str
    steps: Steps


class Scene:
    """Two ends and a third party, a dice, and the packets so far."""

    def __init__(self, rng: random.Random, index: int, family: int, crowded: bool = False) -> None:
        self.rng = rng
        self.family = family
        self.crowded = crowded  # others announce ports of the same ends, too
        client, server, self.third = addresses(index, family)
        self.ends = (client, server)
        self.steps: Steps = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def text(self, end: int) -> str:
        return str(ip_address(self.ends[end]))

    def port(self) -> int:
        if self.crowded:
            return self.rng.choice((5000, 5000, 5001, 5002, 1024))
        return self.rng.choice((self.rng.randrange(1024, 65536), self.rng.randrange(1024, 1100), 20, 1023))

    def udp(self, side: int, sport: int, dport: int, payload: bytes, source: bytes = b"") -> None:
        saddr, daddr = source or self.ends[side], self.ends[1 - side]
        self.steps.append((side, packets.ip(saddr, daddr, 17, packets.udp(saddr, daddr, sport, dport, payload))))

    def gre(self, side: int, call_id: int, version: int = 1) -> None:
        saddr, daddr = self.ends[side], self.ends[1 - side]
        head = struct.pack(">HHHH", 0x2000 | version, 0x880B if version else 0x0800, 4, call_id)
        self.steps.append((side, packets.ip(saddr, daddr, 47, head + b"data")))

    def error(self, side: int, quoted: bytes) -> None:
        """An ICMP error about a packet, by somebody on its way."""
        message = packets.icmp(3, 4, bytes(4) + quoted)
        self.steps.append((side, packets.ip(self.third, self.ends[1 - side], 1, message)))

    def connect(self, side: int, sport: int, dport: int, source: bytes = b"") -> None:
        """A SYN of a data connection, perhaps its answer, perhaps another SYN after it."""
        saddr, daddr = source or self.ends[side], self.ends[1 - side]
        syn = packets.tcp(saddr, daddr, sport, dport, SYN, 100, 0, 8192)
        self.steps.append((side, packets.ip(saddr, daddr, 6, syn)))
        if self.chance(0.6):
            answer = packets.tcp(daddr, saddr, dport, sport, SYN | ACK, 900, 101, 8192)
            self.steps.append((1 - side, packets.ip(daddr, saddr, 6, answer)))
            ack = packets.tcp(saddr, daddr, sport, dport, ACK, 101, 901, 8192)
            self.steps.append((side, packets.ip(saddr, daddr, 6, ack)))
        if self.chance(0.3):
            syn = packets.tcp(saddr, daddr, sport + 1 & 0xFFFF, dport, SYN, 100, 0, 8192)
            self.steps.append((side, packets.ip(saddr, daddr, 6, syn)))

    def connect_udp(self, side: int, sport: int, dport: int, source: bytes = b"") -> None:
        self.udp(side, sport, dport, b"media", source)
        if self.chance(0.5):
            self.udp(1 - side, dport, sport, b"media")
        if self.chance(0.3):
            self.udp(side, sport + 1 & 0xFFFF, dport, b"more", source)


class Tcp:
    """A control connection."""

    def __init__(self, scene: Scene, dport: int) -> None:
        self.scene = scene
        self.ports = (scene.rng.randrange(1024, 65536), dport)
        self.seq = [scene.rng.choice((1000, 0xFFFFFF80)), scene.rng.choice((5000, 0xFFFFFFC0))]
        self._segment(CLIENT, SYN, b"")
        self._segment(SERVER, SYN | ACK, b"")
        self._segment(CLIENT, ACK, b"")

    def _segment(self, side: int, flags: int, payload: bytes, seq: int = -1) -> None:
        scene = self.scene
        saddr, daddr = scene.ends[side], scene.ends[1 - side]
        ack = self.seq[1 - side] if flags & ACK else 0
        at = self.seq[side] if seq < 0 else seq
        segment = packets.tcp(
            saddr, daddr, self.ports[side], self.ports[1 - side], flags, at, ack, 30000, payload=payload
        )
        scene.steps.append((side, packets.ip(saddr, daddr, 6, segment)))
        if seq < 0:
            self.seq[side] = at + len(payload) + (1 if flags & (SYN | FIN) else 0) & 0xFFFFFFFF

    def say(self, side: int, payload: bytes) -> None:
        """One segment; at times sent again or cut in two."""
        scene = self.scene
        if len(payload) > 2 and scene.chance(0.08):
            cut = scene.rng.randrange(1, len(payload))
            self._segment(side, ACK | PSH, payload[:cut])
            self._segment(side, ACK | PSH, payload[cut:])
            return
        before = self.seq[side]
        self._segment(side, ACK | PSH, payload)
        if payload and scene.chance(0.08):
            self._segment(side, ACK | PSH, payload, before)

    def close(self) -> None:
        self._segment(CLIENT, FIN | ACK, b"")
        self._segment(SERVER, FIN | ACK, b"")
        self._segment(CLIENT, ACK, b"")


def spoil(rng: random.Random, text: bytes) -> bytes:
    """Change text here and there."""
    data = bytearray(text)
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.choice(b"0123456789 \r\n,.|():;@=\0\xffAz")
        elif kind == 1:
            del data[at]
        elif kind == 2:
            data.insert(at, rng.choice(b"0123456789 \r\n,.|():;@=Az"))
        else:
            del data[at:]
        if not data:
            return b"\n"
    return bytes(data)


# --- FTP --------------------------------------------------------------------------------------------------------


def ftp(scene: Scene) -> None:
    rng = scene.rng
    control = Tcp(scene, rng.choice((21, 2121)))
    if scene.chance(0.9):
        control.say(SERVER, b"220 ready\r\n")
    if scene.chance(0.9):
        control.say(CLIENT, b"USER anonymous\r\n")
    control.say(SERVER, rng.choice((b"331 password\r\n", b"230-many\r\n230 lines\r\n")))
    for _ in range(rng.randrange(1, 5)):
        _ftp_transfer(scene, control)
    if scene.chance(0.3):
        control.close()


def _ftp_transfer(scene: Scene, control: Tcp) -> None:
    rng = scene.rng
    port = scene.port()
    active = scene.chance(0.5)
    side = CLIENT if active else SERVER
    whose = scene.ends[side] if scene.chance(0.85) else rng.choice((scene.third, scene.ends[1 - side]))
    address = str(ip_address(whose))
    comma = ",".join(address.split(".")) if scene.family == 4 else "10,0,0,1"
    numbers = f"{comma},{port >> 8},{port & 0xFF}"
    if scene.chance(0.05):
        numbers = f"{comma},{rng.choice((0, 4, 300))},{rng.choice((0, 999, 12345678901))}"
    number = 2 if scene.family == 6 else 1
    delimiter = rng.choice("||||!/x")
    extended = scene.chance(0.5) or scene.family == 6
    if active and extended:
        line = f"EPRT {delimiter}{number}{delimiter}{address}{delimiter}{port}{delimiter}\r\n"
    elif active:
        line = f"PORT {numbers}\r\n"
    elif extended:
        line = f"229 Entering Extended Passive Mode ({delimiter * 3}{port}{delimiter})\r\n"
    else:
        line = rng.choice(
            (f"227 Entering Passive Mode ({numbers}).\r\n", f"227 {numbers}\r\n", f"227 ok ={numbers} \r\n")
        )
    text = line.encode()
    if scene.chance(0.1):
        text = rng.choice((text.lower(), text.replace(b"\r\n", b"\n"), b" " + text, b"x" * 40 + b"\r\n" + text))
    if scene.chance(0.12):
        text = spoil(rng, text)
    if not active:
        control.say(CLIENT, rng.choice((b"PASV\r\n", b"EPSV\r\n")))
    control.say(side, text)
    if active:
        control.say(SERVER, b"200 ok\r\n")
    if scene.chance(0.8):
        source = scene.third if scene.chance(0.1) else b""
        scene.connect(1 - side, rng.choice((20, scene.port())), port, source)


# --- the others over TCP ------------------------------------------------------------------------------------------


def irc(scene: Scene) -> None:
    rng = scene.rng
    control = Tcp(scene, 6667)
    control.say(CLIENT, b"NICK me\r\n")
    control.say(SERVER, b":irc 001 me :Welcome\r\n")
    for _ in range(rng.randrange(1, 12)):
        port = rng.choice((scene.port(), scene.port(), 0, 70000))
        whose = scene.ends[CLIENT] if scene.chance(0.8) else rng.choice((scene.third, scene.ends[SERVER]))
        offer = rng.choice(("SEND file", "CHAT chat", "MOVE x", "TSEND file", "SCHAT s", "SEND f", "RESUME file"))
        number = int.from_bytes(whose, "big")
        blanks = " " * rng.choice((1, 1, 1, 3))
        end = rng.choice((" 12345", "", ""))
        text = f"PRIVMSG friend :\1DCC {offer} {number}{blanks}{port}{end}\1\r\n".encode()
        if scene.chance(0.2):
            text = rng.choice(
                (
                    b"\r\n" + text,
                    text.lower(),
                    b"NOTICE x :y\r\n" + text,
                    text.replace(b" :", b" :hello "),
                    text.replace(b"PRIVMSG", b"privmsg"),
                    b"  " + text,
                    text[:-1],
                    text.replace(b"friend", b"a b :c"),
                )
            )
        if scene.chance(0.1):
            text = spoil(rng, text)
        control.say(rng.choice((CLIENT,) * 9 + (SERVER,)), text)
        if scene.chance(0.4):
            scene.connect(SERVER, scene.port(), port & 0xFFFF, scene.third if scene.chance(0.5) else b"")


def sane(scene: Scene) -> None:
    rng = scene.rng
    control = Tcp(scene, 6566)
    control.say(CLIENT, struct.pack(">III", 0, 0x01000003, 4))
    control.say(SERVER, struct.pack(">II", 0, 0x01000003))
    for _ in range(rng.randrange(1, 5)):
        port = scene.port()
        request = struct.pack(">II", rng.choice((7, 7, 7, 7, 6)), 1)
        reply = struct.pack(">IHHI", rng.choice((0, 0, 0, 0, 5)), rng.choice((0, 0, 0, 1)), port, 0x1234)
        if scene.chance(0.15):
            request = spoil(rng, request)
        if scene.chance(0.15):
            reply = rng.choice((spoil(rng, reply), reply[:8], reply[:7], reply + bytes(20)))
        control.say(CLIENT, request)
        control.say(SERVER, reply)
        if scene.chance(0.7):
            scene.connect(CLIENT, scene.port(), port, scene.third if scene.chance(0.1) else b"")


def pptp_message(kind: int, body: bytes) -> bytes:
    return struct.pack(">HHIHH", 12 + len(body), 1, 0x1A2B3C4D, kind, 0) + body


def pptp(scene: Scene) -> None:
    rng = scene.rng
    control = Tcp(scene, 1723)
    pns, pac = [0 if scene.chance(0.05) else rng.randrange(0x10000) for _ in range(2)]
    start = struct.pack(">HBBIIHH", 0x100, 0, 0, 1, 1, 0, 1) + bytes(128)
    started = struct.pack(">HBBIIHH", 0x100, rng.choice((1, 1, 1, 1, 2)), 0, 1, 1, 0, 1) + bytes(128)
    result = rng.choice((1, 1, 1, 1, 2))
    peers = rng.choice((pns, pns, pns, pns, pns ^ 1))
    out_request = struct.pack(">HHIIIIHHHH", pns, 1, 300, 10**6, 3, 3, 64, 0, 0, 0) + bytes(128)
    out_reply = struct.pack(">HHBBHIHHI", pac, peers, result, 0, 0, 10**6, 64, 0, 0)
    in_request = struct.pack(">HHIIHH", pac, 1, 3, 0, 0, 0) + bytes(192)
    in_reply = struct.pack(">HHBBHHH", pns, rng.choice((pac, pac, pac, pac ^ 1)), result, 0, 64, 0, 0)
    in_connect = struct.pack(">HHIHHI", peers, 0, 10**6, 64, 0, 3)
    if scene.chance(0.6):
        call = [(CLIENT, 7, out_request), (SERVER, 8, out_reply)]
    else:
        call = [(SERVER, 9, in_request), (CLIENT, 10, in_reply), (SERVER, 11, in_connect)]
    script = [(CLIENT, 1, start), (SERVER, 2, started), *call]
    for side, kind, body in script:
        if scene.chance(0.03):
            continue
        message = pptp_message(kind, body)
        if scene.chance(0.04):
            message = rng.choice((spoil(rng, message), message[: rng.randrange(len(message))], message + bytes(8)))
        control.say(side, message)
        if scene.chance(0.05):
            control.say(side, message)
    for _ in range(rng.randrange(0, 5)):
        side = rng.choice((CLIENT, SERVER))
        call_id = rng.choice(((pac, pns)[side], (pac, pns)[side], pns, rng.randrange(0x10000)))
        scene.gre(side, call_id, version=0 if scene.chance(0.1) else 1)
        if scene.chance(0.2):
            scene.error(1 - side, scene.steps[-1][1])
    if scene.chance(0.2):  # the call once more
        for side, kind, body in call:
            control.say(side, pptp_message(kind, body))
    if scene.chance(0.4):
        control.say(CLIENT, pptp_message(12, struct.pack(">HH", pns, 0)))
        control.say(SERVER, pptp_message(13, struct.pack(">HBBHH", pac, 4, 0, 0, 0) + bytes(128)))
    if scene.chance(0.3):
        control.say(CLIENT, pptp_message(3, bytes((1, 0, 0, 0))))
        control.say(SERVER, pptp_message(4, bytes((1, 0, 0, 0))))
    if scene.chance(0.3):
        scene.gre(rng.choice((CLIENT, SERVER)), rng.choice((pac, pns)))


# --- over UDP -----------------------------------------------------------------------------------------------------


def tftp(scene: Scene) -> None:
    rng = scene.rng
    sport, dport = rng.randrange(1024, 65536), rng.choice((69, 6969))
    for _ in range(rng.randrange(1, 4)):
        code = rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 0x0101))
        payload = struct.pack(">H", code) + b"file\0octet\0"
        if scene.chance(0.1):
            payload = payload[: rng.randrange(4)]
        scene.udp(CLIENT, sport, dport, payload)
        if scene.chance(0.15):
            scene.udp(SERVER, dport, sport, payload)
        if scene.chance(0.8):
            tid = scene.port()
            scene.udp(SERVER, tid, sport, b"\0\3\0\1data", scene.third if scene.chance(0.1) else b"")
            scene.udp(CLIENT, sport, tid, b"\0\4\0\1")
            if scene.chance(0.3):
                scene.udp(SERVER, tid + 1 & 0xFFFF, sport, b"\0\3\0\1data")


def amanda(scene: Scene) -> None:
    rng = scene.rng
    sport = rng.randrange(512, 65536)
    scene.udp(CLIENT, sport, 10080, b"Amanda 2.6 REQ HANDLE 000-1 SEQ 1\nSERVICE sendbackup\n")
    scene.udp(SERVER, 10080, sport, b"Amanda 2.6 ACK HANDLE 000-1 SEQ 1\n")
    for _ in range(rng.randrange(1, 3)):
        ports = [scene.port() for _ in range(4)]
        names = ["DATA", "MESG", "INDEX", "STATE"]
        streams = [f"{name} {port}" for name, port in zip(names, ports, strict=True) if scene.chance(0.85)]
        if scene.chance(0.2):
            rng.shuffle(streams)
        text = f"Amanda 2.6 REP HANDLE 000-1 SEQ 1\nCONNECT {' '.join(streams)}\nOPTIONS ;\n".encode()
        if scene.chance(0.25):
            text = rng.choice(
                (
                    spoil(rng, text),
                    text.replace(b"DATA ", b"DATA 0"),
                    text.replace(b"MESG ", b"MESG 123456"),
                    text.replace(b"\nOPTIONS ;\n", b""),
                    text.lower(),
                )
            )
        scene.udp(rng.choice((SERVER,) * 9 + (CLIENT,)), 10080, sport, text)
        for port in rng.sample(ports, 2):
            scene.connect(CLIENT, scene.port(), port, scene.third if scene.chance(0.1) else b"")


# --- SIP ----------------------------------------------------------------------------------------------------------


class Sip:
    """A signalling connection, over UDP or TCP."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.over_tcp = scene.chance(0.4)
        self.sport = scene.rng.choice((5060, scene.rng.randrange(1024, 65536)))
        self.control = Tcp(scene, 5060) if self.over_tcp else None

    def uri(self, end: int, whose: bytes = b"", port: int = 5060) -> str:
        address = str(ip_address(whose or self.scene.ends[end]))
        host = f"[{address}]" if self.scene.family == 6 else address
        return f"sip:user@{host}" + ("" if port == 5060 and self.scene.chance(0.5) else f":{port}")

    def say(self, side: int, start: str, headers: list[str], body: str) -> None:
        scene, rng = self.scene, self.scene.rng
        newline = "\n" if scene.chance(0.05) and not self.over_tcp else "\r\n"
        body = body.replace("\n", newline)
        if body:
            headers = [*headers, "Content-Type: application/sdp"]
        length = f"Content-Length: {len(body)}"
        headers = [*headers, rng.choice((length, length, f"l: {len(body)}"))]
        if scene.chance(0.1):
            headers = [line.replace(": ", " :" + newline + "  ", 1) for line in headers[:-1]] + headers[-1:]
        text = newline.join([start, *headers, "", ""]) + body
        data = text.encode()
        if scene.chance(0.08):
            data = spoil(rng, data)
        if self.control is not None:
            if scene.chance(0.05):
                data += data
            self.control.say(side, data)
        else:
            ports = (self.sport, 5060)
            scene.udp(side, ports[side], ports[1 - side], data)

    def request(self, side: int, method: str, cseq: int, headers: list[str], body: str = "") -> None:
        headers = [*self.common(side, cseq, method), *headers]
        self.say(side, f"{method} {self.uri(1 - side)} SIP/2.0", headers, body)

    def response(self, side: int, code: int, method: str, cseq: int, headers: list[str], body: str = "") -> None:
        self.say(side, f"SIP/2.0 {code} Said", [*self.common(1 - side, cseq, method), *headers], body)

    def common(self, side: int, cseq: int, method: str) -> list[str]:
        transport = "TCP" if self.over_tcp else "UDP"
        address = self.scene.text(side)
        host = f"[{address}]" if self.scene.family == 6 else address
        return [
            f"Via: SIP/2.0/{transport} {host}:5060;branch=z9hG4bK1",
            f"From: <{self.uri(side)}>;tag=1",
            f"To: <{self.uri(1 - side)}>",
            "Call-ID: 1@there",
            f"CSeq: {cseq} {method}",
        ]

    def description(self, side: int, medias: list[tuple[str, int]]) -> str:
        scene, rng = self.scene, self.scene.rng
        family = f"IN IP{scene.family}"
        address = scene.text(side) if scene.chance(0.9) else str(ip_address(scene.third))
        lines = ["v=0", f"o=user 1 1 {family} {address}", "s=-"]
        if scene.chance(0.9):
            lines.append(f"c={family} {address}")
        lines.append("t=0 0")
        for kind, port in medias:
            lines.append(f"m={kind} {port} RTP/AVP 0")
            if scene.chance(0.2):
                lines.append(f"c={family} {rng.choice((address, str(ip_address(scene.third))))}")
            lines.append("a=sendrecv")
        return "\n".join(lines) + "\n"


def sip_call(scene: Scene) -> None:
    rng = scene.rng
    sip = Sip(scene)
    cseq = rng.choice((1, 1, 77, 0))
    kinds = ("audio", "audio", "video", "image", "application", "AUDIO")
    announced: list[tuple[int, int]] = []

    def medias(side: int) -> list[tuple[str, int]]:
        found = []
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
            rare = 999 if scene.chance(0.2) else 0
            port = rng.choice((rng.randrange(1024, 65536), rng.randrange(4000, 4020), 0, rare))
            found.append((rng.choice(kinds), port))
            announced.append((side, port))
        return found

    caller = CLIENT if scene.chance(0.8) else SERVER
    if caller == SERVER:
        sip.request(CLIENT, "OPTIONS", 1, [])
        sip.response(SERVER, 200, "OPTIONS", 1, [])
    callee = 1 - caller
    contact = f"Contact: <{sip.uri(caller)}>"
    sip.request(caller, "INVITE", cseq, [contact], sip.description(caller, medias(caller)))
    if scene.chance(0.5):
        sip.response(callee, 100, "INVITE", cseq, [])
    if scene.chance(0.3):
        sip.response(callee, 183, "INVITE", cseq, [], sip.description(callee, medias(callee)))
    code = rng.choice((200, 200, 200, 486, 401))
    body = sip.description(callee, medias(callee)) if code == 200 else ""
    sip.response(callee, code, "INVITE", rng.choice((cseq, cseq, cseq, 5)), [], body)
    sip.request(caller, "ACK", cseq, [])
    for side, port in rng.sample(announced, min(3, len(announced))):
        base = port & ~1 if scene.chance(0.8) else port | 1
        scene.connect_udp(1 - side, scene.port(), base & 0xFFFF, scene.third if scene.chance(0.1) else b"")
    if scene.chance(0.3):
        body = sip.description(caller, medias(caller))
        sip.request(caller, rng.choice(("UPDATE", "PRACK", "INVITE")), cseq + 1, [], body)
        sip.response(callee, rng.choice((200, 488)), rng.choice(("UPDATE", "INVITE", "PRACK")), cseq + 1, [])
    if scene.chance(0.5):
        sip.request(rng.choice((caller, callee)), "BYE", cseq + 2, [])


def sip_register(scene: Scene) -> None:
    rng = scene.rng
    sip = Sip(scene)
    for cseq in range(1, rng.randrange(2, 4)):
        rare = rng.choice((80, 0, 70000, 1023, 1024)) if scene.chance(0.3) else 6000
        port = rng.choice((5060, rng.randrange(1024, 65536), rare))
        whose = scene.ends[CLIENT] if scene.chance(0.85) else scene.third
        uri = sip.uri(CLIENT, whose, port)
        transport = rng.choice(("", "", "", ";transport=udp", ";transport=TCP", ";transport=tls"))
        expires = rng.choice((3600, 120, 0, 60))
        parameter = rng.choice(("", f";expires={expires}", ";expires=0"))
        if scene.chance(0.03):
            parameter = rng.choice((";expires=", ";expires=x", ";expires=-1", ";expires=;q=1", ";expires=5x"))
        contact = rng.choice(("Contact", "Contact", "m", "CONTACT"))
        elsewhere = "[2001:db8::9]" if scene.family == 6 else "192.0.2.9"
        other = f", <sip:user@{elsewhere}:5070>" if scene.chance(0.15) else ""
        headers = [f"{contact}: <{uri}{transport}>{parameter}{other}"]
        if scene.chance(0.1):
            headers = ["Contact: <sip:user@phone.example>", *headers]
        if scene.chance(0.7):
            headers.append(f"Expires: {expires}")
        sip.request(CLIENT, "REGISTER", cseq, headers)
        if scene.chance(0.3):
            sip.response(SERVER, 100, "REGISTER", cseq, [])
        if scene.chance(0.2) and not sip.over_tcp:
            scene.udp(SERVER, 5060, port & 0xFFFF, b"OPTIONS sip:x SIP/2.0\r\nCSeq: 1 OPTIONS\r\n\r\n")
        if scene.chance(0.3):
            headers = [f"Contact: <sip:user@{elsewhere}>;expires=5", *headers]
        if scene.chance(0.15):
            headers = [line.replace(f":{port}", f":{rng.choice((1, 99999, 6001))}") for line in headers]
        code = rng.choice((200, 200, 200, 401, 403))
        sip.response(SERVER, code, "REGISTER", rng.choice((cseq, cseq, cseq, 9)), headers)
        if scene.chance(0.7) and not sip.over_tcp:
            source = scene.third if scene.chance(0.15) else b""
            invite = f"INVITE {uri} SIP/2.0\r\nCSeq: 5 INVITE\r\n\r\n".encode()
            scene.udp(SERVER, rng.choice((5061, 5062)), port & 0xFFFF, invite, source)
            scene.udp(SERVER, 5063, port & 0xFFFF, invite)
        elif scene.chance(0.5):
            scene.connect(SERVER, 5070, port & 0xFFFF)


SCENES: Final[dict[str, tuple[Callable[[Scene], None], tuple[int, ...]]]] = {
    "ftp": (ftp, (4, 6)),
    "tftp": (tftp, (4, 6)),
    "irc": (irc, (4,)),
    "amanda": (amanda, (4, 6)),
    "sane": (sane, (4, 6)),
    "pptp": (pptp, (4,)),
    "sip call": (sip_call, (4, 6)),
    "sip register": (sip_register, (4, 6)),
}


def exchange(seed: int, index: int, names: tuple[str, ...] = tuple(SCENES)) -> Exchange:
    """Write conversation number `index`."""
    rng = random.Random(f"{seed} {index}")
    name = rng.choice(names)
    write, families = SCENES[name]
    scene = Scene(rng, index, rng.choice(families))
    write(scene)
    return Exchange(name, scene.steps)


def crowd(seed: int, index: int, names: tuple[str, ...] = tuple(SCENES)) -> Exchange:
    """Write several conversations of the same two ends, in turns: what they announce gets in each other's way."""
    rng = random.Random(f"{seed} {index} crowd")
    family = rng.choice(SCENES[rng.choice(names)][1])
    names = tuple(name for name in names if family in SCENES[name][1])
    chosen = [rng.choice(names) for _ in range(rng.choice((2, 2, 3)))]
    if rng.random() < 0.5:
        chosen = chosen[:1] * len(chosen)
    waiting = []
    for number, name in enumerate(chosen):
        scene = Scene(random.Random(f"{seed} {index} {number}"), index, family, crowded=True)
        SCENES[name][0](scene)
        waiting.append(scene.steps)
    steps: Steps = []
    while waiting := [steps_left for steps_left in waiting if steps_left]:
        steps_left = rng.choice(waiting)
        turn = rng.choice((1, 1, 2, 5))
        steps += steps_left[:turn]
        del steps_left[:turn]
    return Exchange(" and ".join(chosen), steps)
