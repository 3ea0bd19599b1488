"""Messages and filters that mean nothing: a clear error each, no effect, and nothing stays behind in the daemon."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, network, wait_until
from tests.lab.traffic import talk, tcp_pair
from tests.unit.test_filter import WRONG

WITH_SET = POLICY + '\n[sets.blocked]\nsize = 8\n[[rule]]\nname = "blocked"\nsource = "@blocked"\naction = "drop"\n'
ROUNDS = 10
GROWTH_KB = 4096  # of all rounds together: what fragmentation may take, far less than any leak


def asks(command: Any, args: Any = None) -> bytes:
    return json.dumps({"v": 1, "command": command} | ({} if args is None else {"args": args})).encode()


MESSAGES = [
    b"",
    b"hello",
    b"GET / HTTP/1.1",
    b"{}",
    b"[]",
    b"null",
    b"1",
    b'"flows"',
    b"\0\0\0\0",
    b"\xff\xfe\xfd",
    b'{"v":1,"command":"fl\xffows"}',
    b'{"v":1,"command":"flows"',
    b'{"v":1,"command":"flows"}}',
    b'{"v":1,"command":"flows"}{"v":1,"command":"flows"}',
    b"{'v':1,'command':'flows'}",
    b'{"v":1,"command":"\\ud800"}',
    b'{"v":1,"command":"flows","args":' + b"[" * 5000,
    b'{"v":1,"command":"flows","args":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"v":1}',
    b'{"command":"flows"}',
    b'{"v":2,"command":"flows"}',
    b'{"v":0,"command":"flows"}',
    b'{"v":-1,"command":"flows"}',
    b'{"v":"1","command":"flows"}',
    b'{"v":1.5,"command":"flows"}',
    b'{"v":null,"command":"flows"}',
    b'{"v":1e400,"command":"flows"}',
    b'{"v":' + b"9" * 5000 + b',"command":"flows"}',
    asks(7),
    asks(None),
    asks([]),
    asks(""),
    asks("fly"),
    asks("FLOWS"),
    asks("flows "),
    asks("x" * 60_000),
    asks("flows", []),
    asks("flows", "tcp"),
    asks("flows", 7),
    asks("flows", {"filter": 7}),
    asks("flows", {"filter": None}),
    asks("flows", {"filter": ["tcp"]}),
    asks("flows", {"filtre": "tcp"}),
    asks("count", {"filter": "tcp", "n": 1}),
    asks("events", {"filter": {}}),
    asks("kill"),
    asks("kill", {}),
    asks("kill", {"filter": ""}),
    asks("kill", {"filter": " \t"}),
    asks("kill", {"filter": "all", "dry_run": "yes"}),
    asks("kill", {"filter": "all", "dry_run": 1}),
    asks("kill", {"filter": "all", "dryrun": True}),
    asks("flow"),
    asks("flow", {"id": "1"}),
    asks("flow", {"id": None}),
    asks("flow", {"id": 1.5}),
    b'{"v":1,"command":"flow","args":{"id":' + b"9" * 400 + b"}}",
    asks("flow", {"id": 1, "all": True}),
    asks("explain"),
    asks("explain", {"packet": 7}),
    asks("explain", {"packet": "tcp"}),
    asks("config", {"generation": "x"}),
    asks("config", {"generation": None}),
    asks("config", {"generation": 99}),
    asks("config", {"generation": -1}),
    asks("apply"),
    asks("apply", {"files": []}),
    asks("apply", {"files": [{}]}),
    asks("apply", {"files": [{"name": 1, "text": ""}]}),
    asks("apply", {"files": "version = 1"}),
    asks("apply", {"files": [{"name": "x", "text": POLICY}], "confirm_ms": "soon"}),
    asks("apply", {"files": [{"name": "x", "text": POLICY}], "confirm_ms": -1}),
    asks("set", {"action": "add", "name": "blocked", "address": 7}),
    asks("set", {"action": "add", "name": "blocked", "address": "10.0.0.1/8"}),
    asks("set", {"action": "add", "name": "blocked", "address": "10.0.0.1", "timeout_ms": "1h"}),
    asks("set", {"action": "add", "name": "blocked", "address": "10.0.0.1", "timeout_ms": True}),
    asks("set", {"action": "add", "name": "blocked", "address": "10.0.0.1", "timeout_ms": -5}),
    asks("set", {"action": "add", "name": "none", "address": "10.0.0.1"}),
    asks("set", {"action": "del", "name": "blocked", "address": "10.9.9.9"}),
    asks("set", {"action": "fly", "name": "blocked", "address": "10.0.0.1"}),
    asks("set", {"action": "list", "name": []}),
]
FILTERS = [text for text, _, _ in WRONG if "\ud800" not in text]


class Router:
    """A daemon with one connection, and what of it must not change."""

    def __init__(self, net: Network, fw: Daemon) -> None:
        self.fw = fw
        self.ends = tcp_pair(net.client, net.server, 4, 8080)
        talk(*self.ends, b"x")
        assert fw.process is not None
        self.pid = fw.process.pid

    def answer(self, message: bytes) -> list[Any]:
        """All lines of the answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.fw.socket_path))  # waits for room; with a timeout it would not
            client.settimeout(30)
            client.sendall(message + b"\n")
            answer = b""
            while part := client.recv(1 << 16):
                answer += part
        return [json.loads(line) for line in answer.splitlines()]

    def facts(self) -> list[Any]:
        """What a message without a meaning must leave as it is."""
        (_, status, _), (_, *flows, _) = self.answer(asks("status")), self.answer(asks("flows", {"filter": "tcp"}))
        sets, history = self.answer(asks("set", {"action": "list"})), self.answer(asks("history"))
        return [[flow["id"] for flow in flows], status["generation"], sets, len(history)]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_kb(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    with network() as net, daemon(net.router, WITH_SET) as fw:
        yield Router(net, fw)


def test_there_are_enough() -> None:
    assert len({*MESSAGES}) == len(MESSAGES) >= 50
    assert len({*FILTERS}) >= 50


@pytest.mark.parametrize("message", MESSAGES, ids=[ascii(message[:60]) for message in MESSAGES])
def test_a_message_that_means_nothing_is_refused_in_a_sentence(router: Router, message: bytes) -> None:
    before = router.facts()
    (head,) = router.answer(message)
    assert head["ok"] is False
    assert len(head["error"]) > 20
    assert router.facts() == before


def test_a_filter_that_means_nothing_is_refused_wherever_it_is_asked(router: Router) -> None:
    before = router.facts()
    for text in FILTERS:
        for command in ("flows", "count", "events", "kill", "drops", "trace"):
            (head,) = router.answer(asks(command, {"filter": text}))
            assert head["ok"] is False
            assert head["error"].startswith("The filter is not understood: "), (command, text)
    assert router.facts() == before


def test_nothing_stays_behind(router: Router) -> None:
    """Clients, descriptors and memory are as before; who leaves in the middle of a request leaves nothing, too."""

    def everything() -> None:
        for message in MESSAGES:
            router.answer(message)
        for text in FILTERS:
            router.answer(asks("kill", {"filter": text}))
        for message in MESSAGES:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(router.fw.socket_path))
                client.sendall(message[: len(message) // 2])
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(router.fw.socket_path))
            client.sendall(asks("events") + b"\n")
        router.answer(asks("status"))

    everything()  # what is loaded, and grows to its size, once
    wait_until(lambda: router.fw.stats()["listeners"] == 0, "nobody listens")
    descriptors, resident_kb = router.descriptors(), router.resident_kb()
    for _ in range(ROUNDS):
        everything()
    wait_until(lambda: router.fw.stats()["listeners"] == 0, "nobody listens")
    wait_until(lambda: router.descriptors() <= descriptors, "all descriptors are closed")
    assert router.resident_kb() - resident_kb < GROWTH_KB
    assert "control_failed" not in router.fw.log()
    talk(*router.ends, b"and packets go through")
