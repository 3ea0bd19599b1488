"""A firewall that tests send packets through and ask for what the control socket would say."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from conntrackd import config
from conntrackd.const import DROP, MARK_UNCONFIRMED, NF_INET_POST_ROUTING, NF_INET_PRE_ROUTING
from conntrackd.core.conn import Conn
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.answers import Answers
from conntrackd.daemon.control import MORE, Asked
from conntrackd.daemon.dropanswers import DropAnswers
from conntrackd.daemon.faults import Faults
from conntrackd.daemon.flowanswers import FlowAnswers
from conntrackd.daemon.links import Links
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.queue import Queue
from conntrackd.daemon.topanswers import TopAnswers
from conntrackd.daemon.trace import Tracing
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.unit import craft

POLICY = b"""
version = 1
[zones]
lan = { interfaces = ["lan0"] }
wan = { interfaces = ["wan0"] }
[[rule]]
name = "out"
from = "lan"
to = "wan"
action = "accept"
"""
LAN, WAN, GONE = 2, 3, 9
NAMES = {1: "lo", LAN: "lan0", WAN: "wan0"}
BEGIN = craft.START_MS


class Lab:
    """A firewall, its answers, and a clock."""

    def __init__(self) -> None:
        checked = config.parse(POLICY, "test.toml")
        rules = compile_ruleset(checked, 1)
        rules.set_links(NAMES)
        self.fw = Firewall(Conntrack(Sysctl()), rules)
        self.links = links = Links()
        links.close()
        links.names = NAMES
        mark = Mark(checked.queue.mark_mask)
        self.queues = (Queue(0, self.fw, mark, False), Queue(1, self.fw, mark, False))
        self.answers = Answers(self.fw, links, self.queues, Faults(self.fw), BEGIN)
        self.drop_answers = DropAnswers(self.fw, links)
        self.drop_answers.now_ms = BEGIN
        self.top_answers = TopAnswers(self.fw, links)
        self.top_answers.now_ms = BEGIN
        self.tracing = Tracing(self.fw, mark, self.queues, links)
        queues = (Queue(0, self.fw, mark, False), Queue(1, self.fw, mark, False))
        self.answers = Answers(self.fw, links, queues, Faults(self.fw), BEGIN)
        self.flow_answers = FlowAnswers(self.fw, links)
        self.flow_answers.now_ms = BEGIN

    @property
    def now_ms(self) -> int:
        return self.answers.now_ms

    def wait(self, seconds: float) -> None:
        self.answers.now_ms += int(seconds * 1000)
        self.flow_answers.now_ms = self.drop_answers.now_ms = self.answers.now_ms
        self.top_answers.now_ms = self.answers.now_ms

    def send(self, data: bytes, iif: int = LAN, oif: int = WAN) -> None:
        bits = pre_routing(self.fw, data, NF_INET_PRE_ROUTING, iif, self.now_ms)
        if bits != DROP and bits & MARK_UNCONFIRMED:
            post_routing(self.fw, data, bits, NF_INET_POST_ROUTING, iif, oif, self.now_ms)

    def connections(self) -> list[Conn]:
        return list(self.fw.net.table.connections())

    def begin(self, command: str, uid: int = 0, **args: Any) -> Iterator[msgspec.Struct | None]:
        """Ask, and get what stands in place of rows, too."""
        asked = Asked(command, args, 4711, uid)
        for part in (self.answers, self.flow_answers, self.drop_answers, self.top_answers, self.tracing):
            rows = part.rows(asked)
            if rows is not None:
                return rows
        raise AssertionError(f"nobody answers {command}")

    def ask(self, command: str, uid: int = 0, **args: Any) -> list[dict[str, Any]]:
        return [json.loads(msgspec.json.encode(row)) for row in self.begin(command, uid, **args) if row is not MORE]
