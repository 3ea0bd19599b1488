"""The daemon as a service: what the service manager hears of it, and the kernel's rules from start to stop."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.manager import Manager
from tests.lab.network import Network, wait_until
from tests.lab.traffic import udp_socket

REMOVE = POLICY + '\n[rules]\nat_stop = "remove"\n'
REJECT = POLICY.replace('default = "drop"', 'default = "reject"')
LEAVE = POLICY + '\n[rules]\nat_start = "leave"\n'


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


def chains(net: Network) -> set[str]:
    saved = net.router.run("iptables-legacy-save").stdout + net.router.run("ip6tables-legacy-save").stdout
    return {line.split()[0] for line in saved.splitlines() if line.startswith(":CONNTRACKD-")}


def test_ready_is_said_when_queues_are_bound_and_rules_installed(net: Network, manager: Manager) -> None:
    with daemon(net.router, POLICY, start=False) as fw:
        fw.launch(env=manager.environ)
        assert "2 rules" in manager.wait_for("READY")["STATUS"]
        assert set(fw.queues()) == {0, 1}
        assert len(chains(net)) == 4
        assert fw.status()["generation"] == 1


def test_the_watchdog_is_fed_by_the_loop_and_by_nothing_else(net: Network, manager: Manager) -> None:
    with daemon(net.router, POLICY, env=manager.environ) as fw:
        assert fw.process is not None
        wait_until(lambda: sum("WATCHDOG" in said for said in manager.listen()) >= 3, "the watchdog is fed")
        wait_until(lambda: any(" flows, " in said.get("STATUS", "") for said in manager.listen()), "a status")

        fw.process.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{fw.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it stands still")
        manager.forget()
        time.sleep(1.5)  # more than the whole time that WATCHDOG_USEC gives it
        assert manager.listen() == []
        fw.process.signal(signal.SIGCONT)
        manager.wait_for("WATCHDOG")


def test_a_stuck_loop_says_where_it_is_stuck(net: Network, fw: Daemon) -> None:
    """What systemd sends to a service that does not feed its watchdog is SIGABRT."""
    assert fw.process is not None
    fw.process.signal(signal.SIGABRT)
    assert fw.process.wait() == -signal.SIGABRT
    assert "in loop" in fw.log()


def test_a_reload_is_announced_and_a_bad_one_fails_where_it_was_asked_for(net: Network, manager: Manager) -> None:
    with daemon(net.router, POLICY, env=manager.environ) as fw:
        manager.wait_for("READY")
        manager.forget()
        fw.cli("reload")
        assert manager.wait_for("RELOADING")["MONOTONIC_USEC"].isdecimal()
        assert manager.wait_for("READY")["STATUS"] == "Generation 2 is in force."

        manager.forget()
        fw.write_config(POLICY.replace('"drop"', '"dorp"', 1))
        done = fw.cli("reload", check=False)
        assert done.returncode == 2
        assert "dorp" in done.stdout + done.stderr
        assert "generation 2 stays in force" in manager.wait_for("READY")["STATUS"]
        words = [word for said in manager.listen() for word in said if word in ("RELOADING", "READY")]
        assert words == ["RELOADING", "READY"]


def test_stopped_it_says_so_and_keeps_the_rules(net: Network, manager: Manager) -> None:
    with daemon(net.router, POLICY, env=manager.environ) as fw:
        before = chains(net)
        assert fw.stop() == 0
        manager.wait_for("STOPPING")
        assert chains(net) == before


def test_stopped_it_removes_the_rules_when_told_to(net: Network, family: int) -> None:
    with daemon(net.router, REMOVE) as fw:
        far, near = udp_socket(net.server, family, 7000), udp_socket(net.client, family, 6000)
        near.sendto(b"before", (net.server.address(family), 7000))
        assert far.recv(10) == b"before"
        assert fw.stop() == 0
        assert chains(net) == set()
        near.sendto(b"after", (net.server.address(family), 7000))
        assert far.recv(10) == b"after"


def test_a_reload_decides_what_becomes_of_the_rules(net: Network) -> None:
    with daemon(net.router, POLICY) as fw:
        fw.write_config(REMOVE)
        fw.cli("reload")
        assert fw.stop() == 0
        assert chains(net) == set()


def test_rules_are_left_to_the_operator_who_wants_it(net: Network) -> None:
    with daemon(net.router, LEAVE):
        assert chains(net) == set()


def test_rules_that_cannot_be_installed_end_the_start(net: Network, manager: Manager, tmp_path: Path) -> None:
    with daemon(net.router, POLICY, start=False) as fw:
        process = fw.launch(env=manager.environ | {"PATH": f"{tmp_path}:{Path('/usr/bin')}"})
        # `ip` itself is found; iptables is in /usr/sbin.
        assert process.wait() == 1
        assert "iptables" in process.output()
        assert "SIGTERM" not in process.output()  # which nobody has sent
        assert not any("READY" in said for said in manager.listen())
        assert fw.queues() == {}


def test_answers_that_may_not_be_sent_are_said_once(net: Network) -> None:
    """As by IPAddressDeny of the unit; here it is a rule that stands in their way."""
    net.router.run("iptables-legacy", "-A", "OUTPUT", "-p", "icmp", "-j", "DROP")
    with daemon(net.router, REJECT) as fw:
        near = udp_socket(net.server, 4)
        for port in 7000, 7001:
            near.sendto(b"x", (net.client.ipv4, port))
            fw.wait_for_drop(dport=port)
        fw.wait_for_log('"event": "reject_cannot_answer"')
        assert fw.log().count('"event": "reject_cannot_answer"') == 1
