"""The unit, really started by a systemd: readiness, privileges, reload, watchdog, and what becomes of failures."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conntrackd.core import compiled
from tests.lab.daemon import POLICY, queues
from tests.lab.network import Host, Network, network, wait_until
from tests.lab.systemd import INSTALLED, UNIT, Machine, control_groups, machine
from tests.lab.traffic import AF, talk, tcp_pair, udp_socket
from tests.netns.test_handover import Probes

CONFIG = "/etc/conntrackd/conntrackd.toml"
SLICE = "/etc/systemd/system/system-conntrackd.slice.d"
REJECT = POLICY.replace('default = "drop"', 'default = "reject"')
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network() as built:
        yield built


@pytest.fixture(scope="module")
def booted(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if control_groups() is None:
        pytest.skip("starts a systemd: needs a cgroup2 that may be written")
    with machine(net.router, tmp_path_factory.mktemp("systemd")) as booted:
        yield booted


@pytest.fixture
def service(booted: Machine) -> Iterator[Machine]:
    """The unit, started; started means that its `systemctl start` has returned."""
    booted.write(CONFIG, POLICY)
    booted.systemctl("start")
    yield booted
    booted.systemctl("stop")


def passes(net: Network) -> bool:
    return net.client.run("ping", "-n", "-c", "1", "-W", "2", net.server.ipv4, check=False).returncode == 0


def jumps(net: Network, save: str) -> bool:
    return "-j CONNTRACKD-PRE" in net.router.run(save, "-t", "raw").stdout


def process_status(service: Machine, name: str) -> str:
    text = service.run("cat", f"/proc/{service.show('MainPID')}/status").stdout
    found = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_started_means_bound_and_filtering(net: Network, service: Machine) -> None:
    assert set(queues(net.router)) == {0, 1}
    assert service.show("SubState") == "running"
    assert passes(net)
    assert net.server.run("ping", "-n", "-c", "1", "-W", "1", net.client.ipv4, check=False).returncode != 0
    wait_until(lambda: " flows, " in service.show("StatusText"), "systemctl status says how it is")


def test_the_build_under_test_runs_in_the_sandbox(service: Machine) -> None:
    core = json.loads(service.run("conntrackd", "status", "-o", "json").stdout)["core"]
    assert core == ("compiled" if compiled() else "pure")


def test_it_is_nobody_and_may_do_little(service: Machine) -> None:
    wanted = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(process_status(service, name), 16) == wanted
    assert process_status(service, "NoNewPrivs") == "1"
    assert process_status(service, "Seccomp") == "2"
    uid = int(service.run("id", "-u", "conntrackd").stdout)
    assert uid != 0
    assert process_status(service, "Uid").split() == [str(uid)] * 4


def as_daemon(service: Machine) -> list[str]:
    """Begins a command with the daemon's user, and what it sees of the file system."""
    pid = service.show("MainPID")
    return ["nsenter", "-t", pid, "-m", "setpriv", "--reuid=conntrackd", "--regid=conntrackd", "--clear-groups"]


def test_what_it_can_write_it_cannot_run(service: Machine) -> None:
    for place in ("/run/conntrackd", "/var/lib/conntrackd", "/tmp"):
        service.run(*as_daemon(service), "cp", "/bin/true", f"{place}/true")
        done = service.run(*as_daemon(service), f"{place}/true", check=False)
        assert "Permission denied" in done.stderr
        service.run(*as_daemon(service), "rm", f"{place}/true")


def test_it_sees_what_the_kernel_keeps_for_root(service: Machine) -> None:
    """How many packets wait, and how many were lost, before they came to it: the daemon's user may read that."""
    daemon = as_daemon(service)
    lines = service.run(*daemon, "cat", "/proc/net/netfilter/nfnetlink_queue").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert service.run(*daemon, "cat", "/proc/net/ip_tables_names").stdout
    assert service.run(*daemon, "cat", "/etc/shadow", check=False).returncode != 0


def test_the_group_may_ask_and_root_may_change(service: Machine) -> None:
    ask = ["conntrackd", "status"]
    change = ["conntrackd", "reload"]
    group = ["setpriv", "--reuid=nobody", "--regid=conntrackd", "--clear-groups"]
    stranger = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    assert service.run(*group, *ask, check=False).returncode == 0
    refused = service.run(*group, *change, check=False)
    assert refused.returncode == 1
    assert "needs root" in refused.stderr
    assert service.run(*stranger, *ask, check=False).returncode != 0
    assert service.run(*change, check=False).returncode == 0


def test_a_reload_waits_and_a_bad_one_fails_where_it_can_be_seen(net: Network, service: Machine) -> None:
    def generation() -> int:
        return int(json.loads(service.run("conntrackd", "status", "-o", "json").stdout)["generation"])

    before = generation()  # a restart does not begin to count anew
    service.systemctl("reload")
    assert service.show("StatusText") == f"Generation {before + 1} is in force."
    service.write(CONFIG, POLICY.replace('"drop"', '"dorp"', 1))
    assert service.systemctl("reload", check=False).returncode != 0
    assert service.show("ActiveState") == "active"
    assert generation() == before + 1
    assert passes(net)


@pytest.mark.parametrize("signal", ["STOP", "KILL"])
def test_stuck_or_killed_it_comes_back(net: Network, service: Machine, signal: str) -> None:
    """Stopped, its loop feeds the watchdog no more."""
    pid, restarts = service.show("MainPID"), int(service.show("NRestarts"))
    service.run("kill", f"-{signal}", pid)
    wait_until(lambda: int(service.show("NRestarts")) > restarts, "it is started again", 30.0)
    wait_until(lambda: service.show("SubState") == "running", "it runs again", 30.0)
    assert service.show("MainPID") != pid
    assert passes(net)
    if signal == "STOP":
        assert "Fatal Python error: Aborted" in service.log()


def test_it_puts_back_the_rules_that_another_took(net: Network, service: Machine) -> None:
    service.write(CONFIG, POLICY + '\n[rules]\nwatch_every = "1s"\n')
    service.systemctl("reload")
    for tool in "iptables-legacy", "ip6tables-legacy":
        net.router.run(tool, "-t", "raw", "-F")
    for tool in "iptables-legacy-save", "ip6tables-legacy-save":
        wait_until(partial(jumps, net, tool), "the rules are back")
    wait_until(lambda: "rules_repaired" in service.log(), "it says so")
    assert passes(net)


# --- The queues, kept over a restart and a crash -------------------------------------------------------------------


def logged(service: Machine, event: str) -> int:
    return service.log().count(f'"event": "{event}"')


def flow(service: Machine, near: socket.socket) -> dict[str, Any]:
    """The connection of this client."""
    (found,) = json.loads(service.run("conntrackd", "flows", f"src port {near.getsockname()[1]}", "-o", "json").stdout)
    assert isinstance(found, dict)
    return found


def test_a_restart_loses_no_packet_and_no_connection(net: Network, service: Machine, family: int) -> None:
    near, far = tcp_pair(net.client, net.server, family, 7)
    talk(near, far, b"before")
    before, adopted, pid = flow(service, near), logged(service, "queue_adopted"), service.show("MainPID")
    assert service.show("NFileDescriptorStore") == "2"
    probes = Probes(udp_socket(net.client, family), udp_socket(net.server, family), 0.002)
    with probes.flowing():
        for number in range(1, 4):
            wait_until(lambda: len(probes.arrived) > 20, "probes arrive")
            service.systemctl("restart")
            assert logged(service, "queue_adopted") == adopted + 2 * number
            assert service.show("NFileDescriptorStore") == "2"  # the state has been taken, the queues are the same
            talk(far, near, b"from outside")
            talk(near, far, b"from inside")
    assert probes.lost() == set()
    assert service.show("MainPID") != pid
    after = flow(service, near)
    assert (after["id"], after["age_seconds"] >= before["age_seconds"]) == (before["id"], True)
    for queue in queues(net.router).values():
        assert (queue.dropped_full, queue.dropped_socket) == (0, 0)


def test_a_crash_keeps_the_queues_and_the_last_snapshot(net: Network, service: Machine) -> None:
    service.write(CONFIG, POLICY + '\n[state]\nsnapshot = "1s"\n')
    service.systemctl("restart")
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    before, adopted, restored = (
        flow(service, near),
        logged(service, "queue_adopted"),
        logged(service, "snapshot_restored"),
    )
    taken = state(service)["taken"]
    wait_until(lambda: state(service)["taken"] >= taken + 2, "a snapshot with the connection")
    probes = Probes(udp_socket(net.client, 4), udp_socket(net.server, 4), 0.005)
    with probes.flowing():
        wait_until(lambda: len(probes.arrived) > 20, "probes arrive")
        service.run("kill", "-KILL", service.show("MainPID"))
        wait_until(lambda: logged(service, "snapshot_restored") > restored, "it runs again", 30.0)
        talk(far, near, b"from outside")
    assert len(probes.lost()) <= 64  # what the one that was killed had in its hands, and nothing else
    assert logged(service, "queue_adopted") == adopted + 2
    assert flow(service, near)["id"] == before["id"]
    assert state(service)["restored"] >= 1


def state(service: Machine) -> dict[str, Any]:
    found = json.loads(service.run("conntrackd", "status", "-o", "json").stdout)["state"]
    assert isinstance(found, dict)
    return found


def test_a_queue_that_was_overrun_is_kept_too(net: Network, service: Machine) -> None:
    """An overrun is an error that waits on the socket: systemd lets go of such sockets, unless it is asked not to."""
    service.write(CONFIG, POLICY + "\n[queue]\nmax_length = 100\nsocket_buffer = 65536\n")
    service.systemctl("restart")
    adopted, pid = logged(service, "queue_adopted"), service.show("MainPID")
    service.run("kill", "-STOP", pid)
    near, far = udp_socket(net.client, 4), udp_socket(net.server, 4)
    for _ in range(60):
        near.sendto(bytes(60_000), far.getsockname())
    assert queues(net.router)[0].dropped_socket > 0
    service.run("kill", "-KILL", pid)
    wait_until(lambda: logged(service, "queue_adopted") == adopted + 2, "the next one goes on with them", 30.0)
    assert far.recv(65_536) == bytes(60_000)  # one that waited


def test_stopped_it_fails_closed(net: Network, service: Machine) -> None:
    assert passes(net)
    service.systemctl("stop")
    assert service.show("Result") == "success"
    assert not passes(net)
    assert service.run("conntrackd", "status", check=False).returncode == 3


def test_mistakes_in_the_configuration_end_the_start_for_good(service: Machine) -> None:
    service.write(CONFIG, POLICY.replace('"drop"', '"dorp"', 1))
    restarts = service.show("NRestarts")
    assert service.systemctl("restart", check=False).returncode != 0
    assert (service.show("ActiveState"), service.show("ExecMainStatus")) == ("failed", "2")
    assert service.show("NRestarts") == restarts
    assert "did you mean 'drop'?" in service.log()
    service.systemctl("reset-failed")
    service.write(CONFIG, POLICY)
    service.systemctl("start")


def test_the_unit_is_tight_and_without_a_mistake() -> None:
    unit = INSTALLED / "usr" / "lib" / "systemd" / "system" / UNIT
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=15", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= 1.5, done.stdout
    assert done.returncode == 0


def test_the_unit_has_no_mistake(booted: Machine) -> None:
    done = booted.run("systemd-analyze", "verify", "--man=no", UNIT)
    assert done.stdout + done.stderr == ""
    assert os.access(Path(INSTALLED) / "usr" / "sbin" / "conntrackd", os.X_OK)


def is_told(asker: Host, family: int, target: str, kind: socket.SocketKind) -> bool:
    """Whether who asks there hears at once that he may not: by a RST, or by port unreachable."""
    near = asker.open_socket(AF[family], kind)
    near.settimeout(1.0)
    try:
        near.connect((target, 7))
        near.send(b"x")
        near.recv(1)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    raise AssertionError("it was let through")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_reject_answers(net: Network, service: Machine, family: int, kind: socket.SocketKind) -> None:
    service.write(CONFIG, REJECT)
    service.systemctl("reload")
    assert is_told(net.server, family, net.client.address(family), kind)
    assert "reject_cannot_answer" not in service.log()


def test_whom_reject_answers_is_the_slices_matter(net: Network, service: Machine) -> None:
    service.write(CONFIG, REJECT.replace('to = "wan"', 'to = "wan"\nport = 80\nprotocol = "tcp"'))
    service.write(f"{SLICE}/lan.conf", "[Slice]\nIPAddressAllow=\nIPAddressAllow=10.1.0.0/16\n")
    service.run("systemctl", "daemon-reload")
    service.systemctl("restart")
    assert is_told(net.client, 4, net.server.ipv4, socket.SOCK_DGRAM)
    assert not is_told(net.server, 4, net.client.ipv4, socket.SOCK_DGRAM)
    wait_until(lambda: "reject_cannot_answer" in service.log(), "the log says what is needed")

    def problems() -> str:
        return service.run("conntrackd", "status").stdout

    wait_until(lambda: "could not be sent" in problems(), "it is in the status")
    service.run("rm", f"{SLICE}/lan.conf")
    service.run("systemctl", "daemon-reload")
