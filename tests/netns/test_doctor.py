"""`conntrackd doctor`: each matter is made for real in a router and found; a clean router gets a clean bill."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conntrackd.apischema import schema
from conntrackd.doctor.system import wall_clock
from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, network, wait_until
from tests.lab.programs import program

V4, V6 = "iptables-legacy", "ip6tables-legacy"
AHEAD = f"{V6} -t mangle -I POSTROUTING"
LOOPBACK = "-i lo -m comment --comment 'conntrackd: loopback is left alone' -j RETURN"
LEFT = POLICY + '\n[rules]\nwatch = "off"\n'  # what the tests do to the rules stays so
CHAIN = "{ type filter hook forward priority 0; }"


def examined(fw: Daemon, *prefix: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and what is not ok by its name."""
    command = fw.command("doctor", "--config", fw.config_path, "-o", "json")
    done = fw.router.run(*prefix, *command, check=False)
    assert done.stderr == ""
    findings = json.loads(done.stdout)
    Draft202012Validator(schema("doctor")).validate(findings)
    assert all(finding["message"] for finding in findings)
    assert all(finding["advice"] or finding["severity"] == "ok" for finding in findings)
    return done.returncode, {finding["name"]: finding for finding in findings if finding["severity"] != "ok"}


@pytest.fixture(scope="module")
def router_of_all() -> Iterator[Daemon]:
    with network() as net, daemon(net.router, LEFT) as running:
        yield running


@pytest.fixture
def shared(router_of_all: Daemon) -> Iterator[Daemon]:
    """A daemon and its router, which are as before when the test is over."""
    router = router_of_all.router
    before = {tool: router.run(f"{tool}-save").stdout for tool in (V4, V6)}
    yield router_of_all
    for tool, text in before.items():
        router.run("sh", "-c", f"{tool} -F; {tool} -X")
        router.run(f"{tool}-restore", stdin=text)
    router.run("nft", "flush", "ruleset")
    router.run("sh", "-c", "while ip rule del table 100; do :; done 2>/dev/null")
    router.sysctl("net/ipv4/ip_forward", 1)
    router.sysctl("net/ipv4/conf/wan/rp_filter", 0)


def test_a_clean_router_gets_a_clean_bill(shared: Daemon) -> None:
    assert examined(shared) == (0, {})
    text = shared.cli("doctor", "--config", shared.config_path).stdout
    assert all(line.startswith("ok ") for line in text.splitlines())
    assert "rules: are in place and in order" in text


def test_neighbours_that_know_their_bits_are_no_matter(shared: Daemon) -> None:
    for each in (
        f"{V4} -t mangle -A FORWARD -j MARK --set-xmark 0x1/0xff",
        f"{V4} -A FORWARD -m mark --mark 0x40000000/0xe0000000 -j ACCEPT",
        f"{V4} -t mangle -I POSTROUTING -o lo -j ACCEPT",
        f"{V4} -t mangle -I POSTROUTING -p tcp --dport 25 -j DROP",
        "ip rule add fwmark 0x1/0xff table 100",
        "nft add table ip t && nft add chain ip t c",
        "nft 'add rule ip t c meta mark set meta mark & 0xffffff00 | 1'",
    ):
        shared.router.run("sh", "-c", each)
    assert examined(shared) == (0, {})


# What is done to the router, what is found, and how bad it is.
MATTERS: list[tuple[str, Sequence[str], str]] = [
    ("rules_differ", (f"{V4} -t mangle -F CONNTRACKD-POST",), "error"),
    ("rules_differ", (f"{V6} -t raw -D CONNTRACKD-OUT 3",), "error"),
    ("rules_order", (f"{V4} -t raw -D CONNTRACKD-PRE 1", f"{V4} -t raw -A CONNTRACKD-PRE {LOOPBACK}"), "error"),
    ("defrag_missing", (f"{V6} -t raw -D CONNTRACKD-PRE 3",), "error"),
    ("rules_not_reached", (f"{V4} -t mangle -D POSTROUTING 1",), "error"),
    ("rules_missing", (f"{V6} -t mangle -F", f"{V6} -t mangle -X"), "error"),
    ("rules_twice", (f"{V4} -t raw -A PREROUTING -j CONNTRACKD-PRE",), "warning"),
    ("rules_order", (f"{V4} -t mangle -I POSTROUTING -p tcp --dport 22 -j ACCEPT",), "error"),
    ("rules_order", (f"{V6} -t mangle -N M", f"{V6} -t mangle -A M -j NFQUEUE", f"{AHEAD} -j M"), "error"),
    ("rules_order", (f"{V4} -t raw -I PREROUTING -p tcp --dport 22 -j ACCEPT",), "warning"),
    ("queue_shared", (f"{V4} -A FORWARD -p udp --dport 9 -j NFQUEUE --queue-balance 1:3",), "error"),
    ("mark_written", (f"{V4} -t mangle -A FORWARD -j MARK --set-mark 1",), "warning"),
    ("mark_written", ("nft add table ip t", "nft add chain ip t c", "nft add rule ip t c meta mark set 7"), "warning"),
    ("mark_read", (f"{V6} -A FORWARD -m mark --mark 0x1 -j DROP",), "warning"),
    ("mark_routed", ("ip rule add fwmark 1 table 100",), "error"),
    ("kernel_conntrack", (f"{V4} -A FORWARD -m conntrack --ctstate INVALID -j DROP",), "warning"),
    ("other_firewall", ("nft add table inet firewalld", f"nft 'add chain inet firewalld f {CHAIN}'"), "warning"),
    ("other_firewall", (f"{V4} -N ufw-user-forward",), "warning"),
    ("forwarding_off", ("sysctl -qw net.ipv4.ip_forward=0",), "warning"),
    ("rp_filter", ("sysctl -qw net.ipv4.conf.wan.rp_filter=1", "ip rule add fwmark 1/0xff table 100"), "warning"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "commands", "severity"), MATTERS, ids=[f"{n}-{each[0]}" for n, each in enumerate(MATTERS)]
)
def test_what_is_wrong_is_found(shared: Daemon, name: str, commands: Sequence[str], severity: str) -> None:
    for each in commands:
        shared.router.run("sh", "-c", each)
    code, found = examined(shared)
    assert name in found
    assert found[name]["severity"] == severity
    assert code == (1 if severity == "error" else 0)


def test_rules_of_both_kinds(net: Network, fw: Daemon) -> None:
    other = fw.directory / "nft.toml"
    other.write_text(POLICY + '\n[rules]\niptables = "iptables-nft"\n')
    fw.cli("rules", "install", "--config", other)
    code, found = examined(fw)
    assert code == 1
    assert "tables-nft" in found["rules_twice"]["message"]


def test_without_daemon_and_rules(net: Network) -> None:
    with daemon(net.router, POLICY, start=False) as idle:
        code, found = examined(idle)
        assert (code, set(found)) == (0, {"daemon_not_running", "rules_missing"})
        idle.install_rules()
        code, found = examined(idle)
        assert (code, set(found)) == (1, {"daemon_not_running", "rules_without_daemon"})


def test_a_queue_that_another_holds(net: Network) -> None:
    hold = "from netfilterqueue import NetfilterQueue as Q; q = Q(); q.bind(1, print); import time; time.sleep(600)"
    with daemon(net.router, POLICY, start=False) as idle:
        net.router.start(sys.executable, "-c", hold)
        wait_until(lambda: 1 in idle.queues(), "the queue is held")
        code, found = examined(idle)
        assert code == 1
        assert "Queue 1 is held by process" in found["queue_held"]["message"]


def test_a_broken_configuration(fw: Daemon) -> None:
    fw.write_config("version = 7\n")
    code, found = examined(fw)
    assert code == 1
    assert f"{fw.config_path}:1:11" in found["config_invalid"]["message"]


def test_a_configuration_that_is_not_in_force(fw: Daemon) -> None:
    fw.write_config(POLICY + "\n[reload]\nrejudge = true\n")
    code, found = examined(fw)
    assert (code, set(found)) == (0, {"config_not_in_force"})


def test_a_zone_without_an_interface(fw: Daemon) -> None:
    fw.write_config(POLICY + '\n[zones.dmz]\ninterfaces = ["dmz0", "dmz1"]\n')
    fw.cli("reload")
    code, found = examined(fw)
    assert (code, set(found)) == (0, {"zone_empty"})
    assert found["zone_empty"]["message"] == "Zone 'dmz' is empty: this machine has no interface dmz0 or dmz1."


def test_what_the_daemon_says_is_wrong(fw: Daemon) -> None:
    fw.write_config("version = 7\n")
    fw.cli("reload", check=False)
    fw.write_config(POLICY)
    code, found = examined(fw)
    assert (code, set(found)) == (0, {"reload_failed"})


def test_missing_capabilities_and_memory(net: Network) -> None:
    with daemon(net.router, POLICY + f"\n[queue]\nsocket_buffer = {1 << 30}\n", start=False) as idle:
        code, found = examined(idle, "setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-all")
        assert code == 1
        assert {"capability_missing", "buffer_short", "not_looked_at"} <= set(found)
        assert {"kernel_refuses_rules", "rules_missing"}.isdisjoint(found)
        text = net.router.run("setpriv", "--bounding-set=-all", *idle.command("doctor"), check=False).stdout
        assert "rules: are in place" not in text


def test_from_another_network_namespace(net: Network, fw: Daemon) -> None:
    """What would be said of this namespace, as to install rules in it, is not said."""
    command = fw.command("doctor", "--config", fw.config_path, "-o", "json")
    done = net.client.run(*command, check=False)
    found = {finding["name"] for finding in json.loads(done.stdout) if finding["severity"] != "ok"}
    assert (done.returncode, found) == (1, {"other_namespace"})


def test_without_iptables(shared: Daemon) -> None:
    code, found = examined(shared, "env", "PATH=/nowhere")
    assert code == 1
    assert "install the Debian package iptables" in found["kernel_refuses_rules"]["message"]


def test_without_prometheus_client(fw: Daemon, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['prometheus_client'] = None\n")
    fw.write_config(POLICY + '\n[metrics]\nlisten = "127.0.0.1:9799"\n')
    code, found = examined(fw, "env", f"PYTHONPATH={tmp_path}")
    assert code == 1
    assert "prometheus_client" in found["metrics_package"]["message"]


def test_the_other_conntrackd(net: Network, fw: Daemon, tmp_path: Path) -> None:
    """netfilter.org's, unpacked and run."""
    config = tmp_path / "conntrackd.conf"
    config.write_text(
        f"Stats {{ LogFile off }}\nGeneral {{ HashSize 1024 HashLimit 4096 LogFile off Syslog off\n"
        f"LockFile {tmp_path}/lock\nUNIX {{ Path {tmp_path}/ctl }}\nNetlinkBufferSize 262142 }}\n"
    )
    libraries = program("usr/lib").glob("*/libnetfilter_cthelper.so.0")
    env = {"LD_LIBRARY_PATH": str(next(libraries).parent)}
    process = net.router.start(program("usr/sbin/conntrackd"), "-C", config, env=env)
    wait_until(lambda: (tmp_path / "ctl").exists() or not process.running, "it runs")
    assert process.running, process.output()
    _, found = examined(fw)
    assert f"process {process.pid}" in found["other_conntrackd"]["message"]


def test_a_clock_that_is_wrong() -> None:
    assert not list(wall_clock(2000.0, 1000.0))
    (finding,) = wall_clock(1000.0, 2000.0)
    assert (finding.name, finding.severity) == ("clock_wrong", "warning")
    assert "1970-01-01 00:16" in finding.message


def test_it_leaves_nothing_behind(shared: Daemon) -> None:
    def state() -> str:
        return "".join(shared.router.run(f"{tool}-save").stdout for tool in (V4, V6))

    before = [line for line in state().splitlines() if not line.startswith((":", "#"))]
    examined(shared)
    assert [line for line in state().splitlines() if not line.startswith((":", "#"))] == before
