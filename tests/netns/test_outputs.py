"""Every command with `-o json` against a daemon with real traffic: it prints what the published schema says.

And for people: what they look for is there.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conntrackd.apischema import OUTPUTS, schema
from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, network, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket

WITH_SETS = (
    POLICY
    + """
[[rule]]
name = "blocked"
from = "wan"
source = "@blocked"
action = "drop"

[labels]
bulk = 3

[sets.blocked]
addresses = ["192.0.2.0/24"]
"""
)


def strict(node: Any) -> Any:
    """The schema without room for what it does not name."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    return made | {"additionalProperties": False} if "properties" in node and "type" in node else made


def check(command: str, printed: str) -> Any:
    """Validate what a command has printed; it, parsed."""
    value = json.loads(printed)
    made = schema(command)
    Draft202012Validator.check_schema(made)
    problems = [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(strict(made)).iter_errors(value)
    ]
    assert problems == []
    return value


class Router:
    """A daemon with traffic going through it."""

    def __init__(self, net: Network, fw: Daemon) -> None:
        self.net = net
        self.fw = fw
        self.ends = tcp_pair(net.client, net.server, 4, 8080)
        talk(*self.ends, b"x" * 5000)
        talk(self.ends[1], self.ends[0], b"y" * 100)
        self.datagrams = udp_socket(net.client, 6)
        self.datagrams.sendto(b"hello", (net.server.ipv6, 5353))
        net.client.run("ping", "-c", "1", "-W", "2", net.server.ipv4)
        net.server.run("ping", "-c", "1", "-W", "1", net.client.ipv4, check=False)  # is dropped
        wait_until(lambda: {"tcp", "udp", "icmp"} <= {flow["protocol"] for flow in fw.flows()}, "all flows are there")
        fw.wait_for_drop(protocol="icmp")

    def json(self, command: str, *words: str, check_: bool = True) -> Any:
        """Run a command; what it prints with -o json, which fits the schema of `command`."""
        return check(command, self.fw.cli(*(words or (command,)), "-o", "json", check=check_).stdout)

    def people(self, *words: str) -> str:
        return self.fw.cli(*words).stdout


@contextmanager
def _router() -> Iterator[Router]:
    with network() as net, daemon(net.router, WITH_SETS) as fw:
        yield Router(net, fw)


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    with _router() as made:
        yield made


def test_flows(router: Router) -> None:
    rows = router.json("flows", "flows", "tcp and dst port 8080 and bytes > 5k")
    (flow,) = rows
    assert (flow["state"], flow["rule"], flow["in"], flow["out"]) == ("ESTABLISHED", "lan-to-wan", "lan", "wan")
    assert flow["orig"]["bytes"] > 5000 > flow["reply"]["bytes"] > 100
    header, row = router.people("flows", "tcp and dst port 8080").splitlines()
    assert header.startswith("PROTO")
    assert row.split()[:4] == ["tcp", "ESTABLISHED", f"10.1.0.2:{flow['orig']['sport']}", "10.2.0.2:8080"]
    lines = router.people("flows", "-o", "jsonl", "--sort", "bytes").splitlines()
    assert json.loads(lines[0])["id"] == flow["id"]
    assert {json.loads(line)["protocol"] for line in lines} >= {"tcp", "udp", "icmp"}


def test_groups(router: Router) -> None:
    for by in ("src", "dst", "rule", "state", "service"):
        rows = router.json("flows --by", "flows", "--by", by)
        assert sum(row["count"] for row in rows) >= 3
    assert "tcp/8080" in router.people("flows", "--by", "service")


def test_flow(router: Router) -> None:
    (flow,) = router.fw.json("flows", "tcp and dst port 8080")
    details = router.json("flow", "flow", str(flow["id"]))
    assert details["tcp"]["orig"]["max_window"] > 0
    assert details["generation"] == 1
    said = router.people("flow", str(flow["id"]))
    assert "rule lan-to-wan of generation 1" in said
    for other in router.fw.flows():
        router.json("flow", "flow", str(other["id"]))


def test_count(router: Router) -> None:
    assert router.json("count", "count", "tcp and dst port 8080") == {"count": 1}
    assert router.people("count", "tcp and dst port 8080") == "1\n"


def test_kill_ends_a_real_connection(router: Router) -> None:
    """Without tcp_loose nothing of it passes any more; a dry run before changes nothing."""
    near, far = tcp_pair(router.net.client, router.net.server, 4, 8081)
    talk(near, far, b"before")
    (would,) = router.json("kill", "kill", "dst port 8081", "--dry-run")
    talk(near, far, b"still")
    done = router.fw.cli("kill", "dst port 8081", "-o", "json")
    (flow,) = check("kill", done.stdout)
    assert flow["id"] == would["id"]
    assert done.stderr == "1 flow ended.\n"
    router.fw.wait_for_log("flows_killed")
    assert router.fw.json("flows", f"id {flow['id']}") == []
    assert router.json("kill", "kill", "dst port 8081 and id 1") == []
    assert router.fw.stats()["closed"]["killed"] >= 1


def test_only_root_kills(router: Router) -> None:
    """Another user of the socket's group reads, and changes nothing."""
    socket_path = router.fw.socket_path
    router.fw.directory.chmod(0o755)
    socket_path.chmod(0o666)
    as_nobody = ["setpriv", "--reuid=65534", "--clear-groups", *router.fw.command()]
    try:
        assert int(router.fw.router.run(*as_nobody, "count").stdout) >= 3
        assert router.fw.router.run(*as_nobody, "kill", "all", "--dry-run", "-o", "json").stdout != "[]\n"
        done = router.fw.router.run(*as_nobody, "kill", "all", check=False)
    finally:
        socket_path.chmod(0o660)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Killing flows needs root, and you are ")
    assert len(router.fw.flows()) >= 3


def test_events(router: Router) -> None:
    watching = router.net.router.start(
        *router.fw.command("events", "udp and dst port 5454", "-o", "json", "--for", "30s")
    )
    wait_until(lambda: router.fw.stats()["listeners"] == 1, "somebody listens")
    sender = udp_socket(router.net.client, 4)
    for port in (5455, 5454):
        sender.sendto(b"x", (router.net.server.ipv4, port))
    watching.wait_for_output("\n")
    watching.stop()
    (line,) = watching.output().splitlines()
    event = check("events", line)
    assert (event["type"], event["flow"]["orig"]["dport"]) == ("NEW", 5454)


def test_trace(router: Router) -> None:
    tracing = router.net.router.start(
        *router.fw.command("trace", "udp and dst port 5456", "-o", "json", "--for", "30s")
    )
    tracing.wait_for_output('"BEGIN"')
    udp_socket(router.net.client, 4).sendto(b"x", (router.net.server.ipv4, 5456))
    tracing.wait_for_output('"hook":"POSTROUTING"')
    wait_until(lambda: tracing.output().endswith("\n"), "the line is whole")
    tracing.stop()
    begin, *steps = [check("trace", line) for line in tracing.output().splitlines()]
    assert begin["type"] == "BEGIN"
    assert [step["hook"] for step in steps[:2]] == ["PREROUTING", "POSTROUTING"]  # what the server answers may follow


def test_groups_of_drops(router: Router) -> None:
    rows = router.json("drops --by", "drops", "icmp", "--by", "src")
    assert [row["key"] for row in rows] == [router.net.server.ipv4]


def test_expected(router: Router) -> None:
    assert router.json("flows --expected", "flows", "--expected") == []


@pytest.mark.parametrize("command", ["drops", "status", "stats", "rules", "history"])
def test_what_is_only_asked(router: Router, command: str) -> None:
    assert router.json(command)
    assert router.people(command)


def test_explain(router: Router) -> None:
    steps = router.json("explain", "explain", "tcp 10.1.0.2:9 > 10.2.0.2:80 in lan out wan")
    assert (steps[-1]["rule"], steps[-1]["matches"]) == ("lan-to-wan", True)


def test_sets(router: Router) -> None:
    router.people("set", "add", "blocked", "198.51.100.7", "--timeout", "1h")
    (row,) = router.json("set list", "set", "list")
    assert (row["name"], row["configured"], row["added"]) == ("blocked", 1, 1)
    entries = router.json("set list NAME", "set", "list", "blocked")
    assert {entry["address"] for entry in entries} == {"192.0.2.0/24", "198.51.100.7"}


def test_labels(router: Router) -> None:
    assert router.json("label list", "label", "list") == [{"name": "bulk", "bit": 3}]
    assert router.people("label", "list").splitlines() == ["LABEL  BIT", "bulk   3"]
    done = router.fw.cli("label", "add", "bulk,7", "tcp and dst port 8080", "-o", "json")
    (flow,) = check("label", done.stdout)
    assert (flow["labels"], done.stderr) == (["bulk", "7"], "1 flow changed.\n")
    (row,) = router.people("flows", "label bulk").splitlines()[1:]
    assert row.endswith("lan-to-wan labels=bulk,7")
    assert router.json("flow", "flow", str(flow["id"]))["labels"] == ["bulk", "7"]
    assert "bulk, 7" in router.people("flow", str(flow["id"]))
    (row,) = router.people("label", "del", "7", "label 7").splitlines()[1:]
    assert row.endswith(" labels=bulk")
    assert router.fw.cli("label", "add", "bulk", "dst prot 8080", check=False).returncode == 2
    assert router.fw.cli("label", "add", "bulg", "all", check=False).returncode == 1


def test_check(router: Router) -> None:
    assert router.json("check", "check", str(router.fw.config_path)) == []
    broken = router.fw.directory / "broken.toml"
    broken.write_text("version = 1\n[polcy]\n")
    (finding,) = router.json("check", "check", str(broken), check_=False)
    assert (finding["kind"], finding["line"]) == ("error", 2)


def test_doctor(router: Router) -> None:
    """What it finds here depends on the machine; that it is of the published form does not."""
    router.json("doctor", "doctor", "--config", str(router.fw.config_path), check_=False)


def test_changes(router: Router) -> None:
    """The last, for it makes generations."""
    config = str(router.fw.config_path)
    assert router.json("reload")["ok"]
    assert router.json("apply", "apply", config, "--confirm", "60s")["ok"]
    assert router.json("confirm")["ok"]
    assert router.json("rollback")["ok"]
    assert not router.json("confirm", check_=False)["ok"]
    broken = router.fw.directory / "broken.toml"
    router.fw.write_config(broken.read_text())
    try:
        refused = router.json("reload", check_=False)
    finally:
        router.fw.write_config(WITH_SETS)
    assert refused["errors"]


def test_every_output_is_tested_here() -> None:
    """A command that learns `-o json` publishes what it prints, and stands above."""
    text = Path(__file__).read_text()
    for command in OUTPUTS:
        assert f'"{command}"' in text


def test_the_published_schema_is_what_is_checked(router: Router) -> None:
    for command in OUTPUTS:
        assert json.loads(router.people("schema", command)) == schema(command)
    assert "version" in json.loads(router.people("schema"))["properties"]
    assert router.fw.cli("schema", "fly", check=False).returncode == 2


def test_a_client_that_reads_slowly_costs_nobody_anything(router: Router) -> None:
    """It is closed in the end; others are answered and packets go through meanwhile."""
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(router.fw.socket_path))
        slow.sendall(b'{"v":1,"command":"flows"}\n')
        talk(*router.ends, b"meanwhile")
        assert router.fw.flows()
