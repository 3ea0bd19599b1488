"""The language of filters: what it means, and what it says to one that means nothing."""

import re
from pathlib import Path

import pytest

from conntrackd import filter as language
from conntrackd.filter import FilterError, cost, parse
from conntrackd.predicate import predicate
from tests.differential.packets import ACK, SYN
from tests.unit import craft
from tests.unit.answering import LAN, WAN, Lab

DOC = Path(__file__).parents[2] / "docs" / "filter.md"


class Some(Lab):
    """TCP answered, 10 s old; UDP with a mark in zone 7 to the router; ping; UDP over IPv6; protocol 50."""

    def __init__(self) -> None:
        super().__init__()
        self.send(craft.tcp(SYN, 1))
        self.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
        self.wait(10)
        self.send(craft.udp(b"x" * 72, sport=5353, dport=53))
        self.send(craft.icmp(8))
        self.send(craft.udp(family=6, sport=546, dport=547))
        self.send(craft.ip(50, bytes(8)))
        self.all = self.connections()
        udp = next(ct for ct in self.all if ct.id == UDP)
        udp.mark, udp.zone, udp.oif = 0x1A, 7, 0
        self.fw.ruleset.labels = {0: "voip", 1: "guest", 127: "guests-old"}
        self.fw.net.table.labels = {UDP: 1 << 127 | 1, PING: 1 << 5 | 1 << 1}

    def chosen(self, text: str) -> set[int]:
        """The ids of the connections that a filter chooses."""
        ask = predicate(parse(text), self.links.interface, self.fw.net.table.labels, self.fw.ruleset)
        return {ct.id for ct in self.all if ask(ct, ct, self.now_ms)}


@pytest.fixture(scope="module")
def some() -> Some:
    return Some()


TCP, UDP, PING, UDP6, ESP = range(1, 6)
EVERY = {TCP, UDP, PING, UDP6, ESP}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", EVERY),
        ("all", EVERY),
        ("not all", set()),
        ("tcp", {TCP}),
        ("TCP", {TCP}),
        ("udp", {UDP, UDP6}),
        ("proto 50", {ESP}),
        ("proto-50", {ESP}),
        ("proto tcp,50, 1", {TCP, ESP, PING}),
        ("ipv4", EVERY - {UDP6}),
        ("ipv6 udp", {UDP6}),
        ("udp port 53", {UDP}),
        ("tcp or udp port 53", {TCP, UDP}),
        ("(tcp or udp) and port 53,80", {TCP, UDP}),
        ("not tcp and not udp", {PING, ESP}),
        ("!tcp && !(udp || icmp)", {ESP}),
        ("not not tcp", {TCP}),
        ("tcp and udp or icmp", {PING}),
        ("icmp or tcp and udp", {PING}),
        ("src host 10.0.0.5", EVERY - {UDP6}),
        ("dst host 10.0.0.5", set()),
        ("reply dst host 10.0.0.5", EVERY - {UDP6}),
        ("orig src 10.0.0.5 and tcp", {TCP}),
        ("host 192.0.2.80 and icmp", {PING}),
        ("any host 10.0.0.0-10.0.0.4,10.0.0.6-10.0.0.9", set()),
        ("any host 10.0.0.0-10.0.0.5", EVERY - {UDP6}),
        ("src net 10.0.0.0/8,192.168.0.0/16", EVERY - {UDP6}),
        ("dst net 2001:db8::/32", {UDP6}),
        ("src 2001:db8:1::5", {UDP6}),
        ("net 0.0.0.0/0", EVERY - {UDP6}),
        ("net ::/0", {UDP6}),
        ("dst port 53,547", {UDP, UDP6}),
        ("src port 53", set()),
        ("reply src port 53", {UDP}),
        ("port 540-550", {UDP6}),
        ("port 0-65535", {TCP, UDP, UDP6}),  # an ICMP id is no port
        ("state SYN_RECV", {TCP}),
        ("state established,syn_recv", {TCP}),
        ("state COOKIE_WAIT", set()),
        ("unreplied", EVERY - {TCP}),
        ("replied", {TCP}),
        ("status SEEN_REPLY", {TCP}),
        ("status UNREPLIED,SEEN_REPLY", EVERY),
        ("assured or expected", set()),
        ("age > 9s", {TCP}),
        ("age >= 10", {TCP}),
        ("age < 10s", EVERY - {TCP}),
        ("age = 10", {TCP}),
        ("age != 10", EVERY - {TCP}),
        ("idle < 1", EVERY - {TCP}),
        ("timeout > 5m", {ESP}),
        ("timeout = 50", {TCP}),
        ("bytes = 100", {UDP}),
        ("bytes > 79 and bytes <= 100", {TCP, UDP}),
        ("reply bytes > 0", {TCP}),
        ("orig packets = 1", EVERY),
        ("packets = 2", {TCP}),
        ("bytes > 1k or bytes > 1Ki or bytes >= 1MB", set()),
        ("rule out", EVERY),
        ("rule o*,none", EVERY),
        ("rule [o]*", set()),
        ("rule ou", set()),
        ("label voip", {UDP}),
        ("label guest", {PING}),
        ("label guest,voip", {UDP, PING}),
        ("label guest* and not label guest", {UDP}),
        ("label 5", {PING}),
        ("label 127,64", {UDP}),
        ("label other*", set()),
        ("not label voip", EVERY - {UDP}),
        ("zone 7", {UDP}),
        ("zone 0", EVERY - {UDP}),
        ("zone 5-9", {UDP}),
        ("mark 26", {UDP}),
        ("mark 0x1a", {UDP}),
        ("mark 0xa/0xf,0x100", {UDP}),
        ("mark 0/0x10", EVERY - {UDP}),
        ("helper ftp", set()),
        ("in lan0", EVERY),
        ("in lan*", EVERY),
        ("out wan0", EVERY - {UDP}),
        ("out self", {UDP}),
        ("id 1", {TCP}),
        ("id 2-4,1", {TCP, UDP, PING, UDP6}),
    ],
)
def test_what_it_means(some: Some, text: str, ids: set[int]) -> None:
    assert some.chosen(text) == ids
    assert some.chosen(f"not ({text or 'all'})") == EVERY - ids


WRONG = [
    ("tcp and", 7, "it ends where a condition is expected"),
    ("tcp prot 443", 4, "'and' or 'or' is missing before 'prot'; did you mean 'proto'?"),
    ("tcp udp", 4, "'and' or 'or' is missing before 'udp'"),
    ("tcp port 80 assured", 12, "'and' or 'or' is missing before 'assured'"),
    ("and tcp", 0, "a condition is expected before 'and'"),
    ("tcp and or udp", 8, "a condition is expected before 'or'"),
    ("not", 3, "it ends where a condition is expected"),
    ("()", 1, "a condition is expected before ')'"),
    ("(tcp", 0, "'(' is not closed"),
    ("(tcp udp", 5, "'and', 'or' or ')' is missing before 'udp'"),
    ("tcp)", 3, "nothing is open here that ')' could close"),
    ("dport 80", 0, "'dport' is not a condition; did you mean 'dst port'?"),
    ("established", 0, "'established' is not a condition"),
    ("asured", 0, "'asured' is not a condition; did you mean 'assured'?"),
    ("tcp & udp", 4, "'and' or 'or' is missing before '&'"),
    ("proto", 5, "a value is missing behind 'proto'"),
    ("proto sctpp", 6, "'sctpp' is not a protocol (expected icmp, tcp, udp, gre, icmpv6, sctp, udplite or a number"),
    ("proto 256", 6, "'256' is not a protocol"),
    ("proto-x", 0, "'proto-x' is not a protocol"),
    ("src", 3, "it ends where an end of a connection is expected (expected host, net or port)"),
    ("src foo", 4, "'foo' is not an end of a connection"),
    ("reply tcp", 6, "'tcp' is not an end of a connection (expected src, dst, any, host, net or port)"),
    ("src host", 8, "a value is missing behind 'host'"),
    ("src host www.example.com", 9, "'www.example.com' is no address (expected as '192.0.2.1' or '::1')"),
    ("src 10.0.0.256", 4, "'10.0.0.256' is no address"),
    ("host 10.0.0.0/8", 5, "'10.0.0.0/8' is no address (expected as '192.0.2.1' or '::1'); did you mean 'net"),
    ("host 10.0.0.9-10.0.0.1", 5, "'10.0.0.9-10.0.0.1' is no range of addresses"),
    ("host 10.0.0.9-::1", 5, "'10.0.0.9-::1' is no range of addresses"),
    ("host 10.0.0.1-10.0.0.2-10.0.0.3", 5, "is no range of addresses"),
    ("net 10.0.0.1/8", 4, "'10.0.0.1/8' has bits set behind its prefix; did you mean '10.0.0.0/8'?"),
    ("src 10.0.0.0/33", 4, "'10.0.0.0/33' is no network"),
    ("net lan", 4, "'lan' is no network (expected as '10.0.0.0/8' or '2001:db8::/32')"),
    ("port http", 5, "'http' is no port (expected a number or a range as '10-19')"),
    ("port 80,", 8, "a value is missing behind ','"),
    ("port ,80", 5, "a value is missing behind 'port'"),
    ("port 80-", 5, "'80-' is no port"),
    ("port 90-80", 5, "the range '90-80' is backwards; did you mean '80-90'?"),
    ("port 65536", 5, "port '65536' is out of range (expected 0 to 65535)"),
    ("port ٣", 5, "'٣' is no port"),
    ("port > 80", 5, "a value is missing behind 'port'"),
    ("state ESTAB", 6, "did you mean 'ESTABLISHED'?"),
    ("status GONE", 7, "'GONE' is not a status (expected EXPECTED, SEEN_REPLY, ASSURED, "),
    ("age 5m", 4, "'<', '<=', '=', '!=', '>=' or '>' is missing behind 'age' (as 'age > 10')"),
    ("age >", 5, "it ends where a time (as '90s', '5m', '1h' or '2d') is expected"),
    ("age > 5x", 6, "'5x' is not a time"),
    ("age > -5s", 6, "'-5s' is not a time"),
    ("age > 1k", 6, "'1k' is not a time"),
    ("age => 5", 5, "'>' is not a time"),
    ("bytes > 1h", 8, "'1h' is not a number (as '1500', '10k' or '4Mi')"),
    ("bytes > 1e9", 8, "'1e9' is not a number"),
    ("packets > 1kb", 10, "'1kb' is not a number"),
    ("bytes > 9999999999999999999999", 8, "is not a number"),
    ("orig age > 5", 5, "'age' is not an end of a connection"),
    ("zone lan", 5, "'lan' is no zone (expected a number or a range as '10-19'); for an interface, use 'in' or 'out'"),
    ("zone 65536", 5, "zone '65536' is out of range"),
    ("id 99999999999999999999", 3, "id '99999999999999999999' is out of range"),
    ("mark x", 5, "'x' is no mark (expected as '7', '0x10' or '0x10/0xff')"),
    ("mark 1/", 5, "'1/' is no mark"),
    ("mark 0x1ffffffff", 5, "the mark '0x1ffffffff' is out of range"),
    ("mark -1", 5, "the mark '-1' is out of range"),
    ("mark 0x10/0x1", 5, "no mark is '0x10/0x1': it has bits set outside of its mask"),
    ("helper fpt", 7, "'fpt' is not a helper (expected amanda, ftp, "),
    ("in", 2, "a value is missing behind 'in'"),
    ("tcp; udp", 0, "'tcp;' is not a condition; did you mean 'tcp'?"),
    ("tcp\0", 0, "is not a condition"),
    ("\ud800", 0, "is not a condition"),
    ("(" * 40, 32, "the filter is nested deeper than 32"),
    ("not " * 10_000, 8192, "the filter is longer than 8192 characters"),
    ("! " * 4000, 64, "the filter is nested deeper than 32"),
    ("tcp or " * 200 + "tcp", 0, "the filter has more than 128 conditions"),
]


@pytest.mark.parametrize(("text", "at", "says"), WRONG, ids=[ascii(text[:30]) for text, *_ in WRONG])
def test_what_is_wrong_is_said_at_its_place(text: str, at: int, says: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert says in caught.value.sentence
    assert caught.value.at == at
    sentence, shown, carets = str(caught.value).splitlines()
    assert sentence.startswith("The filter is not understood: ")
    assert sentence[-1] in ".?"
    assert len(shown) <= 122
    if at < len(text) and text.isprintable():
        assert shown[carets.index("^")] == text[at]


def test_limits_hold_what_they_promise() -> None:
    addresses = ",".join(f"10.0.{number // 256}.{number % 256}" for number in range(600))
    assert cost(parse(f"src host {addresses}")) == 1  # found, not tried
    assert cost(parse("rule a,b,c or not (tcp and udp)")) == 5
    assert cost(parse(" or ".join(["tcp"] * language.TERMS_MAX))) == language.TERMS_MAX


def test_the_documentation_is_right() -> None:
    """Each filter of the page is one; each word of the language stands in it."""
    text = DOC.read_text()
    filters = [found for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for found in block.splitlines()]
    assert len(filters) > 10
    for line in filters:
        parse(re.sub(r"\s+#.*", "", line))
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for example in re.findall(r"`([^`]+)`", row):
            parse(example)
    for word in language.WORDS:
        assert f"`{word}" in text, word
