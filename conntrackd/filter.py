"""The language of filters, which choose connections: `tcp and dst port 443 and not src net 10.0.0.0/8`.

`parse` reads a filter and checks it: what it returns can be asked of any connection (predicate.py). docs/filter.md
describes the language. A filter is as long, as deep and as costly as the limits here at most: the daemon asks it of
every connection that it has.
"""

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address, ip_network
from typing import Final, NamedTuple, TypeVar

from conntrackd.const import IPS_ASSURED, IPS_EXPECTED, IPS_SEEN_REPLY, STATUS_NAMES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.core.tuples import PROTOCOL_NAMES

T = TypeVar("T")

LENGTH_MAX: Final = 8192
DEPTH_MAX: Final = 32
TERMS_MAX: Final = 128
MARK_MAX: Final = 0xFFFFFFFF

TOKEN: Final = re.compile(r"\s*(&&|\|\||[<>=!]=|[(),<>=!]|[^\s(),<>=!&|]+|\S)")
COMPARISONS: Final = {"=": "=", "==": "=", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
MULTIPLES: Final = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip

PROTOCOLS: Final = {name: number for number, name in PROTOCOL_NAMES.items()}
FAMILIES: Final = {"ipv4": False, "ipv6": True}
DIRECTIONS: Final = ("orig", "reply")
SIDES: Final = ("src", "dst", "any")
ENDS: Final = ("host", "net", "port")
FLAGS: Final = {
    "assured": (IPS_ASSURED, True), "unreplied": (IPS_SEEN_REPLY, False), "replied": (IPS_SEEN_REPLY, True),
    "expected": (IPS_EXPECTED, True),
}  # fmt: skip
TIMES: Final = ("age", "idle", "timeout")
AMOUNTS: Final = ("bytes", "packets")
NAMES: Final = ("rule", "label", "helper", "in", "out")
NUMBERS: Final = {"zone": 0xFFFF, "id": (1 << 63) - 1}  # the highest that there may be
JOINTS: Final = ("and", "or", "not", "&&", "||", "!", "(", ")", ",")
WORDS: Final = (
    "all", *PROTOCOLS, "proto", *FAMILIES, *DIRECTIONS, *SIDES, *ENDS, "state", "status", *FLAGS, *TIMES, *AMOUNTS,
    *NAMES, *NUMBERS, "mark", "not",
)  # fmt: skip
SYNONYMS: Final = {
    "ip": "ipv4", "ip4": "ipv4", "inet": "ipv4", "ip6": "ipv6", "inet6": "ipv6", "source": "src", "saddr": "src",
    "destination": "dst", "daddr": "dst", "sport": "src port", "dport": "dst port", "iif": "in", "iface": "in",
    "interface": "in", "oif": "out", "original": "orig", "protocol": "proto", "either": "any", "duration": "age",
    "network": "net", "address": "host", "ttl": "timeout",
    "labels": "label", "connlabel": "label",
}  # fmt: skip


class FilterError(Exception):
    """A filter that means nothing: the sentence, and the place under the filter itself."""

    def __init__(self, text: str, at: int, length: int, sentence: str) -> None:
        # One line, and not a long one, however long the filter is.
        begin = max(0, at - 60)
        shown = text[begin : begin + 120].translate(dict.fromkeys(range(32), " "))
        carets = "^" * max(1, min(length, len(shown) - (at - begin)))
        end = "" if sentence.endswith("?") else "."
        super().__init__(f"The filter is not understood: {sentence}{end}\n  {shown}\n  {' ' * (at - begin)}{carets}")
        self.sentence = sentence
        self.at = at


class Range(NamedTuple):
    """From one address to another of the same family, both in; as they stand in tuples."""

    first: bytes
    last: bytes


class All(NamedTuple):
    """Every connection."""


class And(NamedTuple):
    """What all of these match."""

    parts: "tuple[Expression, ...]"


class Or(NamedTuple):
    """What one of these matches."""

    parts: "tuple[Expression, ...]"


class Not(NamedTuple):
    """What this does not match."""

    part: "Expression"


class Protocol(NamedTuple):
    """`tcp`, `proto 50`."""

    numbers: frozenset[int]


class Family(NamedTuple):
    """`ipv4`, `ipv6`."""

    ipv6: bool


class Address(NamedTuple):
    """`src host 10.0.0.5`, `reply dst net 10.0.0.0/8`; `direction` is orig or reply, `side` src, dst or any."""

    direction: str
    side: str
    ranges: tuple[Range, ...]


class Port(NamedTuple):
    """`dst port 80,8000-8080`."""

    direction: str
    side: str
    ranges: tuple[tuple[int, int], ...]


class State(NamedTuple):
    """`state ESTABLISHED`: of TCP and SCTP."""

    names: frozenset[str]


class Status(NamedTuple):
    """`assured`, `status SEEN_REPLY`: a bit that is set, or is not."""

    bit: int
    wanted: bool


class Measure(NamedTuple):
    """`age > 1h`, `reply bytes = 0`: seconds or a number; `direction` is "" where both count together."""

    what: str
    direction: str
    comparison: str
    value: int


class Names(NamedTuple):
    """`rule web-*`, `label voip`, `helper ftp`, `in lan0`; a name may hold `*`."""

    what: str
    names: tuple[str, ...]


class Numbers(NamedTuple):
    """`zone 1`, `id 7-9`."""

    what: str
    ranges: tuple[tuple[int, int], ...]


class Mark(NamedTuple):
    """`mark 0x10/0xff`: (value, mask)."""

    pairs: tuple[tuple[int, int], ...]


Expression = (
    All | And | Or | Not | Protocol | Family | Address | Port | State | Status | Measure | Names | Numbers | Mark
)  # fmt: skip


class Token(NamedTuple):
    """A word of a filter and where it stands."""

    text: str
    at: int


def parse(text: str) -> Expression:
    """Read a filter; an empty one is `all`. Raises FilterError."""
    if len(text) > LENGTH_MAX:
        raise FilterError(text, LENGTH_MAX, 1, f"the filter is longer than {LENGTH_MAX} characters")
    return _Parser(text).whole()


def cost(expression: Expression) -> int:
    """Count what must be looked at to ask the expression of a connection."""
    if isinstance(expression, And | Or):
        return sum(map(cost, expression.parts))
    if isinstance(expression, Not):
        return cost(expression.part)
    return len(expression.names) if isinstance(expression, Names) else 1


class _Parser:
    """One filter on its way: tokens, and how far they are read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [Token(found[1], found.start(1)) for found in TOKEN.finditer(text)]
        self._end = Token("", len(text.rstrip()))
        self._next = 0
        self._depth = 0

    def whole(self) -> Expression:
        if not self._tokens:
            return All()
        expression = self._or()
        if self._peek().text == ")":
            raise self._error(self._peek(), "nothing is open here that ')' could close")
        if self._peek() is not self._end:
            hint = "" if self._word() in WORDS else _meant(self._peek().text, WORDS)
            raise self._error(self._peek(), f"'and' or 'or' is missing before {self._peek().text!r}", hint)
        if cost(expression) > TERMS_MAX:
            raise FilterError(self._text, 0, len(self._text), f"the filter has more than {TERMS_MAX} conditions")
        return expression

    # --- Tokens ---------------------------------------------------------------------------------------------------

    def _peek(self) -> Token:
        return self._tokens[self._next] if self._next < len(self._tokens) else self._end

    def _take(self) -> Token:
        token = self._peek()
        if token is not self._end:
            self._next += 1
        return token

    def _word(self) -> str:
        return self._peek().text.lower()

    def _accept(self, *words: str) -> bool:
        if self._word() not in words:
            return False
        self._next += 1
        return True

    def _error(self, token: Token, sentence: str, hint: str = "") -> FilterError:
        return FilterError(self._text, token.at, len(token.text), f"{sentence}; {hint}" if hint else sentence)

    def _unknown(self, token: Token, what: str, options: Sequence[str]) -> FilterError:
        """Say that a word is none of the options: all of them if they are few, and the one that may be meant."""
        from conntrackd.mistakes import any_of  # takes longer to load than a client may take to answer

        expected = f" (expected {any_of(options)})" if options is not WORDS else ""
        if token is self._end:
            return self._error(token, f"it ends where {what} is expected{expected}")
        if token.text in JOINTS or token.text in COMPARISONS:
            return self._error(token, f"{what} is expected before {token.text!r}{expected}")
        return self._error(token, f"{token.text!r} is not {what}{expected}", _meant(token.text, options))

    # --- Or, and, not ---------------------------------------------------------------------------------------------

    def _or(self) -> Expression:
        parts = [self._and()]
        while self._accept("or", "||"):
            parts.append(self._and())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _and(self) -> Expression:
        parts = [self._not()]
        while self._accept("and", "&&") or self._qualifies(parts[-1]):
            parts.append(self._not())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _qualifies(self, before: Expression) -> bool:
        """Whether a family or a protocol stands in front of a condition without `and`, as in `tcp port 80`."""
        if isinstance(before, Protocol):
            return self._word() in WORDS and self._word() not in (*PROTOCOLS, "proto", *FAMILIES, "all")
        return isinstance(before, Family) and self._word() in WORDS

    def _not(self) -> Expression:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise self._error(self._peek(), f"the filter is nested deeper than {DEPTH_MAX}")
        opened = self._peek()
        if self._accept("not", "!"):
            expression: Expression = Not(self._not())
        elif self._accept("("):
            expression = self._or()
            if not self._accept(")"):
                if self._peek() is self._end:
                    raise self._error(opened, "'(' is not closed")
                raise self._error(self._peek(), f"'and', 'or' or ')' is missing before {self._peek().text!r}")
        else:
            expression = self._condition()
        self._depth -= 1
        return expression

    # --- Conditions -----------------------------------------------------------------------------------------------

    def _condition(self) -> Expression:
        token = self._take()
        word = token.text.lower()
        if word == "all":
            return All()
        if word in PROTOCOLS or word.startswith("proto-"):
            return Protocol(frozenset((self._protocol(token),)))
        if word == "proto":
            return Protocol(frozenset(self._list(self._protocol)))
        if word in FAMILIES:
            return Family(FAMILIES[word])
        if word in DIRECTIONS:
            if self._word() in AMOUNTS:
                return self._measure(self._take().text.lower(), word)
            return self._end_of(word)
        if word in SIDES or word in ENDS:
            self._next -= 1
            return self._end_of("orig")
        if word == "state":
            return State(frozenset(self._list(self._state)))
        if word in FLAGS:
            return Status(*FLAGS[word])
        if word == "status":
            flags = [Status(*pair) for pair in self._list(self._flag)]
            return Or(tuple(flags)) if len(flags) > 1 else flags[0]
        if word in TIMES or word in AMOUNTS:
            return self._measure(word, "")
        if word == "helper":
            return Names(word, tuple(self._list(self._helper)))
        if word in NAMES:
            return Names(word, tuple(self._list(self._name)))
        if word in NUMBERS:
            return Numbers(word, tuple(self._list(lambda value: self._numbers(value, word, NUMBERS[word]))))
        if word == "mark":
            return Mark(tuple(self._list(self._mark)))
        raise self._unknown(token, "a condition", WORDS)

    def _end_of(self, direction: str) -> Expression:
        """Read what an end of a connection is to be: an address or a port."""
        side = self._take().text.lower() if self._word() in SIDES else "any"
        token = self._take()
        word = token.text.lower()
        if word == "port":
            return Port(direction, side, tuple(self._list(lambda value: self._numbers(value, "port", 65535))))
        if word == "host" or word == "net":
            read = self._host if word == "host" else self._net
            return Address(direction, side, tuple(self._list(read)))
        if "." in word or ":" in word:  # an address, as in `src 10.0.0.5`
            self._next -= 1
            return Address(direction, side, tuple(self._list(self._net if "/" in word else self._host)))
        raise self._unknown(token, "an end of a connection", ENDS if side != "any" else (*SIDES, *ENDS))

    def _measure(self, what: str, direction: str) -> Measure:
        sign = self._take()
        if sign.text not in COMPARISONS:
            raise self._error(sign, f"'<', '<=', '=', '!=', '>=' or '>' is missing behind {what!r} (as '{what} > 10')")
        token = self._take()
        units = SECONDS if what in TIMES else MULTIPLES
        found = re.fullmatch(r"(\d{1,15})([a-z]{0,2})", token.text.lower(), re.ASCII)
        unit = found[2].removesuffix("b") if found and what == "bytes" else found[2] if found else ""
        if not found or unit not in units:
            example = "'90s', '5m', '1h' or '2d'" if what in TIMES else "'1500', '10k' or '4Mi'"
            example = f"a {'time' if what in TIMES else 'number'} (as {example})"
            wrong = f"it ends where {example} is expected" if token is self._end else f"{token.text!r} is not {example}"
            raise self._error(token, wrong)
        return Measure(what, direction, COMPARISONS[sign.text], int(found[1]) * units[unit])

    # --- Values ---------------------------------------------------------------------------------------------------

    def _list(self, read: Callable[[Token], T]) -> list[T]:
        """Read values with commas between them: any of them will do."""
        values = [read(self._value())]
        while self._accept(","):
            values.append(read(self._value()))
        return values

    def _value(self) -> Token:
        token = self._take()
        if token is self._end or token.text in JOINTS or token.text in COMPARISONS:
            before = self._tokens[max(0, self._next - (1 if token is self._end else 2))]
            raise self._error(token, f"a value is missing behind {before.text!r}")
        return token

    def _protocol(self, token: Token) -> int:
        word = token.text.lower().removeprefix("proto-")
        if word in PROTOCOLS:
            return PROTOCOLS[word]
        if word.isascii() and word.isdigit() and len(word) < 4 and int(word) < 256:
            return int(word)
        raise self._unknown(token, "a protocol", (*PROTOCOLS, "a number from 0 to 255"))

    def _host(self, token: Token) -> Range:
        ends = token.text.split("-")
        try:
            first, last = ip_address(ends[0]), ip_address(ends[-1])
        except ValueError:
            hint = f"did you mean 'net {token.text}'?" if "/" in token.text else ""
            raise self._error(token, f"{token.text!r} is no address (expected as '192.0.2.1' or '::1')", hint) from None
        if len(ends) > 2 or first.version != last.version or first.packed > last.packed:
            raise self._error(token, f"{token.text!r} is no range of addresses (expected as '10.0.0.1-10.0.0.9')")
        return Range(first.packed, last.packed)

    def _net(self, token: Token) -> Range:
        try:
            network = ip_network(token.text)
        except ValueError:
            try:
                hint = f"did you mean '{ip_network(token.text, strict=False)}'?"
            except ValueError:
                sentence = f"{token.text!r} is no network (expected as '10.0.0.0/8' or '2001:db8::/32')"
                raise self._error(token, sentence) from None
            raise self._error(token, f"{token.text!r} has bits set behind its prefix", hint) from None
        return Range(network.network_address.packed, network.broadcast_address.packed)

    def _numbers(self, token: Token, what: str, highest: int) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", token.text, re.ASCII)
        if not found:
            hint = "for an interface, use 'in' or 'out'" if what == "zone" else ""
            raise self._error(token, f"{token.text!r} is no {what} (expected a number or a range as '10-19')", hint)
        first, last = int(found[1]), int(found[2] or found[1])
        if max(first, last) > highest:
            raise self._error(token, f"{what} {token.text!r} is out of range (expected 0 to {highest})")
        if first > last:
            raise self._error(token, f"the range {token.text!r} is backwards", f"did you mean '{last}-{first}'?")
        return first, last

    def _state(self, token: Token) -> str:
        name = token.text.upper()
        if name in TCP_STATE_NAMES:
            return name
        from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES  # loads more than most filters need

        if name in SCTP_STATE_NAMES:
            return name
        raise self._unknown(token, "a state", list(dict.fromkeys((*TCP_STATE_NAMES, *SCTP_STATE_NAMES))))

    def _flag(self, token: Token) -> tuple[int, bool]:
        if token.text.lower() in FLAGS:
            return FLAGS[token.text.lower()]
        for bit, name in STATUS_NAMES.items():
            if name == token.text.upper():
                return bit, True
        raise self._unknown(token, "a status", (*STATUS_NAMES.values(), "UNREPLIED"))

    def _helper(self, token: Token) -> str:
        from conntrackd.core.helpers import HELPERS  # as above

        if token.text not in HELPERS:
            raise self._unknown(token, "a helper", sorted(HELPERS))
        return token.text

    def _name(self, token: Token) -> str:
        return token.text

    def _mark(self, token: Token) -> tuple[int, int]:
        value, slash, mask = token.text.partition("/")
        try:
            pair = int(value, 0), int(mask, 0) if slash else MARK_MAX
        except ValueError:
            raise self._error(token, f"{token.text!r} is no mark (expected as '7', '0x10' or '0x10/0xff')") from None
        if not all(0 <= part <= MARK_MAX for part in pair):
            raise self._error(token, f"the mark {token.text!r} is out of range (expected 0 to {MARK_MAX:#x})")
        if pair[0] & ~pair[1]:
            raise self._error(token, f"no mark is {token.text!r}: it has bits set outside of its mask")
        return pair


def _meant(word: str, options: Sequence[str]) -> str:
    """Say what the operator may have meant by a word: a hint, or ""."""
    from conntrackd.mistakes import nearest  # as above

    meant = SYNONYMS.get(word.lower(), "")
    if meant and meant.split()[0] in options:
        return f"did you mean {meant!r}?"
    return nearest(word, options)
