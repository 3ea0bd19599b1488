"""The endpoint for Prometheus on a router with real traffic; alerts and dashboard speak of nothing that it lacks."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.programs import program
from tests.lab.traffic import talk, tcp_pair, udp_socket

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "config" / "prometheus-alerts.yml"
DASHBOARD = ROOT / "config" / "grafana-dashboard.json"
PORT = 9799  # in the router's own namespace
WITH_METRICS = f'{POLICY}\n[metrics]\nlisten = "127.0.0.1:{PORT}"\n'
NAME = re.compile(r"\b(?:conntrackd|process)_\w+")

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


@pytest.fixture
def measured(net: Network) -> Iterator[Daemon]:
    with daemon(net.router, WITH_METRICS) as running:
        yield running


def scrape(fw: Daemon) -> str:
    return fw.router.run("curl", "-sS", "--fail", "--max-time", "20", f"http://127.0.0.1:{PORT}/metrics").stdout


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(fw: Daemon, metric: str, /, **labels: str) -> float:
    return samples(scrape(fw)).get(metric, {}).get(tuple(sorted(labels.items())), 0)


def traffic(net: Network) -> None:
    """Something of everything: TCP, UDP that is answered, ping, a refused connection."""
    near, far = tcp_pair(net.client, net.server, 4, 5001)
    talk(near, far, b"x" * 5000)
    near_udp, far_udp = udp_socket(net.client, 6), udp_socket(net.server, 6, 5300)
    near_udp.sendto(b"question", far_udp.getsockname())
    far_udp.recv(100)
    far_udp.sendto(b"answer", near_udp.getsockname())
    near_udp.recv(100)
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)
    udp_socket(net.server, 4).sendto(b"unwanted", (net.client.ipv4, 7))


def promtool(*arguments: str | Path, stdin: str = "") -> None:
    command = [str(program("usr/bin/promtool")), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_alerts_and_dashboard_use_is_there(net: Network, measured: Daemon) -> None:
    traffic(net)
    text = scrape(measured)
    promtool("check", "metrics", stdin=text)
    there = set(samples(text))
    # A problem is there only while there is one.
    used = set(NAME.findall(ALERTS.read_text())) | set(NAME.findall(DASHBOARD.read_text())) - {"conntrackd_problem"}
    assert used - {"conntrackd_problem"} <= there
    named = set(NAME.findall((ROOT / "docs" / "metrics.md").read_text()))
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there}
    assert bare <= named, "docs/metrics.md does not name them"
    assert named - {"conntrackd_problem"} <= bare | {"conntrackd_expectations"}


def test_alerts_are_right() -> None:
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", ROOT / "tests" / "promtool" / "alerts.yml")


def test_the_figures_are_those_of_the_router(net: Network, measured: Daemon) -> None:
    traffic(net)
    measured.wait_for_drop(reason="policy", dport=7)
    # A text is good for a second.
    wait_until(lambda: value(measured, "conntrackd_drops_total", reason="policy") >= 1, "the drop is counted")
    text = scrape(measured)
    found = samples(text)
    flows = found["conntrackd_flows"]
    assert flows[("protocol", "tcp"), ("state", "ESTABLISHED")] == 1
    assert flows[("protocol", "udp"), ("state", "REPLIED")] == 1
    assert flows[("protocol", "icmp"), ("state", "REPLIED")] == 1
    assert sum(flows.values()) == len(measured.flows())
    carried = found["conntrackd_rule_bytes_total"][("action", "accept"), ("rule", "lan-to-wan")]
    assert carried == sum(
        flow[way]["bytes"] for flow in measured.flows() if flow["rule"] == "lan-to-wan" for way in ("orig", "reply")
    )
    assert found["conntrackd_rule_flows"][("action", "accept"), ("rule", "lan-to-wan")] >= 3
    assert found["conntrackd_flows_created_total"][()] >= 3
    judged = sum(found["conntrackd_packets_total"].values())
    durations = found["conntrackd_verdict_duration_seconds_count"]
    assert 0 < judged <= sum(queue["packets"] for queue in measured.status()["queues"])
    assert sum(durations.values()) <= judged
    assert found["conntrackd_config_generation"][()] == 1
    for labels in (labels for series in found.values() for labels in series):
        for _, label in labels:
            assert not re.search(r"\d+\.\d+\.\d+\.\d+|fd00:|::", label), "an address in a label"


def test_problems_and_refused_policies_are_seen(measured: Daemon) -> None:
    measured.write_config("version = 7\n")
    measured.cli("reload", check=False)
    wait_until(lambda: not value(measured, "conntrackd_config_last_reload_successful"), "the refused reload is seen")
    assert value(measured, "conntrackd_problem", name="reload_failed", severity="warning") == 1


def test_counters_of_rules_never_go_back(net: Network) -> None:
    """Not when connections end, and not when another generation takes over."""
    rules = "".join(f'[[rule]]\nname = "r{n}"\nport = {n}\nprotocol = "udp"\naction = "drop"\n' for n in range(1, 500))
    with daemon(net.router, WITH_METRICS + rules) as fw:
        traffic(net)
        labels = {"rule": "lan-to-wan", "action": "accept"}
        wait_until(lambda: value(fw, "conntrackd_rule_bytes_total", **labels) > 5000, "the bytes are counted")
        before = value(fw, "conntrackd_rule_bytes_total", **labels)
        fw.cli("reload")
        wait_until(lambda: value(fw, "conntrackd_config_generation") == 2, "the reload is seen")
        assert value(fw, "conntrackd_rule_bytes_total", **labels) >= before
        series = samples(scrape(fw))["conntrackd_rule_packets_total"]
        assert {dict(labels)["rule"] for labels in series} >= {f"r{n}" for n in range(1, 500)}


def test_hostile_clients_hold_nothing_up(net: Network, measured: Daemon) -> None:
    """Silent ones, endless requests, and ones that do not read; packets pass and the next scrape is served."""

    def connect() -> socket.socket:
        made = measured.router.open_socket(socket.AF_INET, socket.SOCK_STREAM)
        made.connect(("127.0.0.1", PORT))
        return made

    silent = [connect() for _ in range(30)]
    for each in silent[:5]:
        each.sendall(b"GET /met")
    endless = connect()
    with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012 - until the answer comes
        while True:
            endless.sendall(b"x" * 65536)
    greedy = connect()
    greedy.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    traffic(net)
    assert "conntrackd_build_info" in scrape(measured)
    assert measured.status()["health"] == "ok"


def test_off_by_default(fw: Daemon) -> None:
    assert not fw.router.run("ss", "-Hltn").stdout


def off(fw: Daemon) -> str:
    """Why a daemon that runs has no endpoint."""
    (problem,) = [each for each in fw.status()["problems"] if each["name"] == "metrics_off"]
    return str(problem["message"])


def test_a_port_that_is_taken_is_no_reason_to_leave_the_router_alone(net: Network) -> None:
    listener = net.router.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", PORT))
    listener.listen()
    with daemon(net.router, WITH_METRICS) as fw:
        assert off(fw) == f"[metrics] can't listen on 127.0.0.1 port {PORT}: Address already in use."
        traffic(net)


def test_without_prometheus_client(net: Network, tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text(
        'raise ModuleNotFoundError("No module named \'prometheus_client\'", name="prometheus_client")\n'
    )
    with daemon(net.router, WITH_METRICS, env={"PYTHONPATH": str(tmp_path)}) as fw:
        assert "needs the Python package prometheus_client" in off(fw)
        traffic(net)
