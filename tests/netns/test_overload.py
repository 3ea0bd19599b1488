"""Faults of the machine around the daemon: each is counted and told by its name, and the packets go on."""

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import LabError, Network, Process, wait_until
from tests.lab.traffic import udp_socket

TEST_SWITCH = {"CONNTRACKD_TEST": "1"}
# Packets that begin a new connection each.
SENDER = """
import socket, sys
while True:
    near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for port in range(1024, 60000):
        near.sendto(b"x", (sys.argv[1], port))
"""


@pytest.fixture
def quiet_net(net: Network) -> Network:
    """IPv4 alone: no neighbour discovery, so that the packets can be numbered."""
    for host in net.hosts:
        host.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    return net


@contextmanager
def failing(net: Network, failure: str, more: str = "") -> Iterator[Daemon]:
    with daemon(net.router, POLICY + more, "--simulate", failure, env=TEST_SWITCH) as fw:
        yield fw


def problems(fw: Daemon) -> dict[str, str]:
    return {problem["name"]: problem["message"] for problem in fw.status()["problems"]}


def wait_for_problem(fw: Daemon, name: str) -> str:
    return wait_until(lambda: problems(fw).get(name, ""), f"the problem {name}")


def exchange(net: Network, fw: Daemon, count: int = 5) -> None:
    """Packets go to and fro in their order, and nothing stays in the queues."""
    near, far = udp_socket(net.client, 4), udp_socket(net.server, 4)
    for number in range(count):
        near.sendto(bytes([number]), far.getsockname())
        assert far.recv(10) == bytes([number])
        far.sendto(bytes([number]), near.getsockname())
        assert near.recv(10) == bytes([number])
    fw.wait_for_empty_queues()


# --- On the packet path ---------------------------------------------------------------------------------------


def test_enobufs_is_counted_and_costs_no_packet_that_arrived(net: Network) -> None:
    with failing(net, "enobufs:3") as fw:
        exchange(net, fw)
        assert fw.status()["queues"][0]["overruns"] == 1


def test_verdicts_that_are_not_taken_are_sent_again(net: Network) -> None:
    with failing(net, "verdict:3") as fw:
        exchange(net, fw)
        wait_for_problem(fw, "verdicts_refused")
        assert fw.status()["queues"][0]["verdict_errors"] == 1


def test_no_memory_for_one_packet_costs_that_packet(quiet_net: Network) -> None:
    with failing(quiet_net, "memory:2") as fw:
        near, far = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4)
        for number in range(4):
            near.sendto(bytes([number]), far.getsockname())
        assert [far.recv(10)[0] for _ in range(3)] == [0, 2, 3]
        assert "failed on 1 packets" in wait_for_problem(fw, "internal_errors")
        exchange(quiet_net, fw)


def test_a_packet_that_takes_long_is_noticed_and_the_rest_wait(net: Network) -> None:
    with failing(net, "slow:3:3000") as fw:
        exchange(net, fw)
        assert "stood still" in wait_for_problem(fw, "held_up")
        assert fw.status()["queues"][0]["latency_us"]["+Inf"] >= 1


def test_no_memory_for_a_request_ends_that_client(net: Network) -> None:
    with failing(net, "request:2") as fw:
        said = wait_until(lambda: fw.cli("flows", check=False).stderr, "a request fails")
        assert "closed the connection" in said
        wait_for_problem(fw, "requests_failed")
        exchange(net, fw)


@pytest.fixture
def lean_fw(net: Network) -> Iterator[Daemon]:
    """The daemon with one heap for all its threads, without room in reserve for each."""
    with daemon(net.router, POLICY, env={"MALLOC_ARENA_MAX": "1"}) as fw:
        yield fw


def test_really_no_memory(net: Network, lean_fw: Daemon) -> None:
    """The daemon may have no more memory than it has, and new connections come: it loses packets, and lives."""
    fw = lean_fw
    exchange(net, fw)
    assert fw.process is not None
    status = net.router.read(f"/proc/{fw.process.pid}/status")
    (size_kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    net.router.run("prlimit", f"--pid={fw.process.pid}", f"--as={(size_kb + 1024) * 1024}:")
    sender = net.client.start(sys.executable, "-c", SENDER, net.server.ipv4)

    def short_of_memory() -> bool:
        done = fw.cli("stats", "-o", "json", check=False)  # which may find no memory itself
        stats = json.loads(done.stdout or '{"faults": {}, "queues": []}')
        failed = sum(queue["errors"] for queue in stats["queues"])
        return bool(failed + sum(stats["faults"].get(name, 0) for name in ("requests_failed", "out_of_memory")))

    wait_until(short_of_memory, "something finds no memory, and it tells", 60.0)
    sender.kill()
    net.router.run("prlimit", f"--pid={fw.process.pid}", "--as=unlimited:")
    wait_until(lambda: fw.cli("status", check=False).returncode == 0, "it answers")
    fw.wait_for_empty_queues()
    # The table is full of connections that are too young to make room yet.
    ping = ("ping", "-n", "-c", "1", "-W", "1", net.server.ipv4)
    wait_until(lambda: net.client.run(*ping, check=False).returncode == 0, "new connections pass")
    exchange(net, fw)
    assert fw.process.running


# --- Clocks ---------------------------------------------------------------------------------------------------

HOURS = 8 * 3600


def timeouts(fw: Daemon, port: int) -> list[int]:
    return [flow["timeout_seconds"] for flow in fw.flows() if port in (flow["orig"]["sport"], flow["orig"]["dport"])]


@pytest.mark.parametrize("setting", ["expire", "keep"])
def test_sleep_counts_as_the_setting_says(quiet_net: Network, setting: str) -> None:
    more = f'\n[exception]\nsuspend = "{setting}"\n[conntrack]\nudp_timeout = "1h"\n'
    with failing(quiet_net, f"suspend:3:{HOURS}", more) as fw:
        near, far = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4, 5300)
        for payload in (b"1", b"2"):
            near.sendto(payload, far.getsockname())
            assert far.recv(10) == payload
        (left,) = timeouts(fw, 5300)
        assert left <= 3600
        other, there = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4, 5400)
        other.sendto(b"3", there.getsockname())
        assert there.recv(10) == b"3"  # who asks before has waited for hours in the daemon's eyes, and is sent away
        assert "slept" in wait_for_problem(fw, "suspended")
        assert "clock_set" not in problems(fw)
        wait_until(
            lambda: len(timeouts(fw, 5300)) == (0 if setting == "expire" else 1),
            "what has expired is swept, and no more",
        )
        exchange(quiet_net, fw)


def test_setting_the_wall_clock_changes_nothing_but_times_in_answers(quiet_net: Network) -> None:
    with failing(quiet_net, f"clock:2:{HOURS}") as fw:
        near, far = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4, 5300)
        for payload in (b"1", b"2"):
            near.sendto(payload, far.getsockname())
            assert far.recv(10) == payload
        assert "wall clock" in wait_for_problem(fw, "clock_set")
        assert len(timeouts(fw, 5300)) == 1
        assert "suspended" not in problems(fw)


def test_clocks_that_are_hours_apart_are_no_matter(net: Network) -> None:
    """A machine that has slept before: here really, in a time namespace."""
    with daemon(net.router, POLICY, start=False) as fw:
        command = fw.command("run", "--config", fw.config_path)
        fw.process = net.router.start(
            "unshare", "--time", "--boottime", str(HOURS), "--monotonic", "60", "--fork", *command
        )
        fw.install_rules()
        fw.wait_until_ready()
        exchange(net, fw)
        assert fw.status()["uptime_seconds"] < HOURS
        assert problems(fw).keys().isdisjoint({"suspended", "clock_set"})
        udp = [flow for flow in fw.flows() if flow["protocol"] == "udp"]
        assert all(0 < flow["timeout_seconds"] <= 120 for flow in udp)
        os.kill(fw.status()["pid"], signal.SIGTERM)
        assert fw.process.wait() == 0


# --- The log --------------------------------------------------------------------------------------------------

LOG_ALL = '\n[policy]\nlog_denied = true\nlog_limit = "100000/s"\n'


def with_stderr(net: Network, fw: Daemon, stderr: str) -> None:
    """Start the daemon with its stderr where the shell's words say."""
    command = shlex.join(fw.command("run", "--config", fw.config_path))
    fw.process = net.router.start("sh", "-c", f"exec {command} {stderr}")
    wait_until(lambda: fw.cli("status", check=False).returncode == 0, "the daemon answers `status`", 20.0)


@pytest.fixture
def logging_fw(net: Network) -> Iterator[Daemon]:
    """Configured to log a line per denied packet; not started."""
    with daemon(net.router, POLICY.replace("[policy]", LOG_ALL), start=False) as fw:
        yield fw


@pytest.fixture
def denied(net: Network) -> Iterator[Process]:
    """Packets that the policy denies, one after the other."""
    sender = net.server.start(sys.executable, "-c", SENDER, net.client.ipv4)
    yield sender
    sender.kill()


def test_a_log_that_nobody_reads_holds_no_packet_up(net: Network, logging_fw: Daemon, denied: Process) -> None:
    fw = logging_fw
    read_end, write_end = os.pipe()
    try:
        with_stderr(net, fw, f"2>/proc/{os.getpid()}/fd/{write_end}")
        assert "lost" in wait_for_problem(fw, "log_lost")
        denied.kill()
        fw.wait_for_empty_queues()
        exchange(net, fw)
        assert fw.stop() == 0
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_log_on_a_full_disk_holds_no_packet_up(net: Network, logging_fw: Daemon, denied: Process) -> None:
    fw = logging_fw
    with_stderr(net, fw, "2>/dev/full")
    assert "disk" in wait_for_problem(fw, "log_lost")
    denied.kill()
    fw.wait_for_empty_queues()
    exchange(net, fw)
    assert fw.stop() == 0


# --- Interfaces, clients, signals -----------------------------------------------------------------------------


def test_an_interface_that_goes_and_comes_back_with_another_number(net: Network, fw: Daemon) -> None:
    exchange(net, fw)
    before = {link["name"]: link["index"] for link in fw.status()["interfaces"]}
    net.router.run("ip", "link", "del", "wan")
    wait_until(lambda: "wan" not in {link["name"] for link in fw.status()["interfaces"]}, "it is gone")
    wait_for_problem(fw, "interface_gone")
    fw.wait_for_log('"gone": ["wan"]')
    net.router.run("ip", "link", "add", "filler", "type", "veth", "peer", "name", "filler2")
    net.router.run("ip", "link", "add", "wan", "type", "veth", "peer", "name", "eth0", "netns", net.server.netns)
    net.router.run("ip", "addr", "add", "10.2.0.1/24", "dev", "wan")
    net.router.run("ip", "link", "set", "wan", "up")
    net.server.run("ip", "addr", "add", f"{net.server.ipv4}/24", "dev", "eth0")
    net.server.run("ip", "link", "set", "eth0", "up")
    net.server.run("ip", "route", "add", "default", "via", "10.2.0.1")
    zones = {"lan": "lan", "wan": "wan"}
    wait_until(
        lambda: zones.items() <= {link["name"]: link["zone"] for link in fw.status()["interfaces"]}.items(),
        "it is back in its zone",
    )
    after = {link["name"]: link["index"] for link in fw.status()["interfaces"]}
    assert after["wan"] not in before.values()
    wait_until(
        lambda: net.client.run("ping", "-n", "-c", "1", "-W", "1", net.server.ipv4, check=False).returncode == 0,
        "the server answers again",
    )
    exchange(net, fw)
    assert fw.stats()["faults"]["interface_gone"] == 1


def test_clients_that_hang_leave_room_for_others(net: Network, fw: Daemon) -> None:
    """As many as there may be, none of which speaks: one that comes later is refused, until they are closed."""
    hanging = []
    for _ in range(32):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(fw.socket_path))
        hanging.append(net.router.adopt(client))
    done = fw.cli("flows", check=False)
    assert done.returncode == 1
    assert "32 clients" in done.stderr
    near, far = udp_socket(net.client, 4), udp_socket(net.server, 4)
    near.sendto(b"meanwhile", far.getsockname())
    assert far.recv(20) == b"meanwhile"
    wait_until(lambda: fw.cli("status", check=False).returncode == 0, "there is room again", 30.0)
    assert "neither spoke nor listened" in wait_for_problem(fw, "clients_closed")
    assert "clients_refused" in problems(fw)


def test_a_storm_of_signals(net: Network, fw: Daemon) -> None:
    assert fw.process is not None
    for _ in range(1000):
        fw.process.signal(signal.SIGHUP)
    exchange(net, fw)
    for _ in range(1000):
        try:
            fw.process.signal(signal.SIGTERM)
            fw.process.signal(signal.SIGHUP)
        except (ProcessLookupError, LabError):
            break
    assert fw.process.wait() == 0
    assert "Traceback" not in fw.log()
    assert fw.log().count('"stopping"') == 1
    assert fw.queues() == {}
    assert not fw.socket_path.exists()
