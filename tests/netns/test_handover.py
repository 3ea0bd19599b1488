"""A restart in place on real packets: connections go on, and packets that come meanwhile wait and are judged."""

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket

# Gives descriptors to a command as a service manager does: NAME=DESCRIPTOR ... -- COMMAND.
MANAGER = """\
import fcntl, os, sys
end = sys.argv.index("--")
names, fds = zip(*(entry.split("=") for entry in sys.argv[1:end]))
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in fds]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number)
    os.close(fd)
handed = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
os.execvpe(sys.argv[end + 1], sys.argv[end + 1 :], {**os.environ, **handed})
"""

# How long one waits for a datagram, and for those that are missing when no more are sent.
WAIT_S = 0.05
LAST_ONES_S = 5.0


def restarts(fw: Daemon) -> int:
    """How often the process that runs has been handed over to."""
    return fw.log().count("snapshot_restored")


class Probes:
    """Numbered datagrams from client to server, as long as they are wanted, and which of them arrive."""

    def __init__(self, near: socket.socket, far: socket.socket, pause_s: float) -> None:
        self.sent = 0
        self.arrived: set[int] = set()
        self._near, self._far, self._pause_s = near, far, pause_s
        self._stop = threading.Event()
        self._sender = threading.Thread(target=self._send)
        self._receiver = threading.Thread(target=self._receive)

    def _send(self) -> None:
        while not self._stop.is_set():
            self._near.sendto(self.sent.to_bytes(8, "big"), self._far.getsockname())
            self.sent += 1
            time.sleep(self._pause_s)

    def _receive(self) -> None:
        patience = LAST_ONES_S / WAIT_S
        while patience and not (self._stop.is_set() and len(self.arrived) == self.sent):
            try:
                self.arrived.add(int.from_bytes(self._far.recv(100), "big"))
            except TimeoutError:
                patience -= self._stop.is_set()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        self._far.settimeout(WAIT_S)
        self._sender.start()
        self._receiver.start()
        try:
            yield
        finally:
            self._stop.set()
            self._sender.join()
            self._receiver.join()

    def lost(self) -> set[int]:
        return set(range(self.sent)) - self.arrived


def test_no_packet_is_lost_and_no_connection_broken(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.client, net.server, family, 7)
    talk(near, far, b"before")
    flow = fw.flow("tcp", dport=7)
    assert fw.process is not None
    pid = fw.process.pid
    probes = Probes(udp_socket(net.client, family), udp_socket(net.server, family, 5300), 0.005)
    with probes.flowing():
        for number in range(1, 3):
            wait_until(lambda: len(probes.arrived) > 20, "probes arrive")
            assert f"goes on in process {pid} " in fw.restart()
            assert restarts(fw) == number
            talk(near, far, b"after")
            talk(far, near, b"from outside")
            first = probes.sent
            wait_until(lambda: any(seen > first for seen in probes.arrived), "probes arrive again")  # noqa: B023
    assert probes.lost() == set()
    assert fw.flow("tcp", dport=7)["id"] == flow["id"]
    assert fw.stats()["drops"].keys() <= {"policy"}
    for queue in fw.queues().values():
        assert (queue.dropped_full, queue.dropped_socket) == (0, 0)
    fw.wait_for_empty_queues()


def test_what_comes_while_nobody_reads_waits(net: Network, fw: Daemon) -> None:
    """Every datagram of a hand-over arrives; new connections that begin in it, too."""
    probes = Probes(udp_socket(net.client, 4), udp_socket(net.server, 4, 5300), 0.002)
    with probes.flowing():
        wait_until(lambda: probes.sent > 20, "probes are sent")
        for _ in range(2):
            fw.restart()
            near, far = tcp_pair(net.client, net.server, 4, 7)
            talk(near, far, b"hello")
            near.close()
            far.close()
    assert probes.lost() == set()
    fw.wait_for_log("queue_adopted", 4)


def test_a_signal_asks_for_it_too(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    assert fw.process is not None
    fw.process.signal(signal.SIGUSR2)
    wait_until(lambda: restarts(fw) == 1, "the new process has begun")
    talk(far, near, b"from outside")
    assert fw.flow("tcp", dport=7)
    assert fw.stop() == 0


def test_what_cannot_start_replaces_nothing(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    good = fw.config_path.read_text()
    fw.write_config(good.replace('default = "drop"', 'default = "dorp"'))
    refused = fw.cli("restart", check=False)
    assert refused.returncode == 1
    assert "unknown default 'dorp'" in refused.stderr
    assert "this one goes on" in refused.stderr
    talk(near, far, b"after")
    assert restarts(fw) == 0
    fw.write_config(good)
    fw.restart()
    talk(near, far, b"at last")


def test_a_changed_configuration_counts_from_then_on(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    generation = fw.status()["generation"]
    rejudged = POLICY.replace('to = "wan"', 'to = "wan"\nprotocol = "udp"') + "\n[reload]\nrejudge = true\n"
    fw.write_config(f"{rejudged}\n[queue]\nmax_length = 77\n")
    fw.restart()
    status = fw.status()
    assert status["generation"] == generation + 1
    assert {limit["max"] for limit in status["limits"] if limit["name"].startswith("queue")} == {77}
    wait_until(lambda: not [flow for flow in fw.flows() if flow["protocol"] == "tcp"], "the connection is ended")
    near.sendall(b"refused")
    assert fw.wait_for_drop(protocol="tcp")["reason"] in ("revoked", "policy")


def test_queues_with_other_numbers_are_bound_anew(net: Network, fw: Daemon) -> None:
    before = set(fw.queues())
    fw.write_config(POLICY + "\n[queue]\nnumbers = [70, 71]\n")
    fw.restart()
    assert set(fw.queues()) == {70, 71} != before
    wait_until(lambda: "70" in fw.router.run("iptables-legacy-save").stdout, "the rules name the new queues")
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"hello")


def commands(parent: int) -> dict[int, str]:
    """The command lines of a process's children, by their ids."""
    found = {}
    for child in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in child.read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


def test_it_waits_for_iptables_that_is_at_work_for_us(net: Network, tmp_path: Path) -> None:
    """A repair under way is waited for, as long as another iptables holds the lock: nobody would learn its end."""
    lock = tmp_path / "xtables.lock"
    watching = f'{POLICY}\n[rules]\nwatch_every = "1s"\n'
    with daemon(net.router, watching, env={"XTABLES_LOCKFILE": str(lock)}) as fw:
        assert fw.process is not None
        pid = fw.process.pid
        holder = net.router.start("flock", lock, "sh", "-c", "echo held; exec sleep 600")
        holder.wait_for_output("held")
        net.router.run("iptables-legacy", "-t", "raw", "-F", "PREROUTING")
        repairs = wait_until(
            lambda: {child for child, line in commands(pid).items() if "-restore" in line},
            "iptables waits for the lock",
        )
        fw.process.signal(signal.SIGUSR2)
        wait_until(
            lambda: any("--rehearse" in line for line in commands(pid).values()), "the next process is tried out"
        )
        wait_until(lambda: not any("--rehearse" in line for line in commands(pid).values()), "it was")
        time.sleep(0.3)  # turns of the loop in which it would be due
        handed_over = "handing_over" in fw.log()
        assert not (handed_over and repairs & commands(pid).keys())
        holder.kill()
        wait_until(lambda: restarts(fw) == 1, "the new process has begun")
        fw.wait_for_log('"event": "ready"', 2)
        near, far = tcp_pair(net.client, net.server, 4, 7)
        talk(near, far, b"hello")
        assert fw.flow("tcp", dport=7)


@pytest.mark.parametrize("orderly", [True, False], ids=["stop", "crash"])
def test_a_service_manager_that_keeps_the_queues(net: Network, tmp_path: Path, orderly: bool) -> None:
    """As systemd does it: descriptors come with sd_notify, and go to the next process as LISTEN_FDS."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(0.0)
    kept: dict[str, int] = {}

    def collect() -> dict[str, int]:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(manager, 4096, 8)
            except BlockingIOError:
                return kept
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            if lines.get("FDSTORE") == "1":
                kept[lines["FDNAME"]] = fds[0]
            elif lines.get("FDSTOREREMOVE") == "1":
                kept.pop(lines["FDNAME"], None)

    env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with daemon(net.router, POLICY, env=env) as fw:
        near, far = tcp_pair(net.client, net.server, 4, 7)
        talk(near, far, b"before")
        wait_until(lambda: collect().keys() >= {"queue-0", "queue-1"}, "the queues are given to the manager")
        probes = Probes(udp_socket(net.client, 4), udp_socket(net.server, 4, 5300), 0.005)
        with probes.flowing():
            wait_until(lambda: len(probes.arrived) > 10, "probes arrive")
            assert fw.process is not None
            if orderly:
                assert fw.stop() == 0
                assert collect().keys() == {"queue-0", "queue-1", "state"}
            else:
                fw.kill()
            assert set(fw.queues()) == {0, 1}
            waiting = probes.sent
            wait_until(lambda: probes.sent > waiting + 20, "packets come while nobody reads")
            collect()
            run = fw.command("run", "--config", fw.config_path)
            handed = [f"{name}={fd}" for name, fd in kept.items()]
            fw.process = fw.router.start(
                sys.executable, "-c", MANAGER, *handed, "--", *run, env=env, fds=list(kept.values())
            )
            fw.wait_until_ready()
        if orderly:
            assert probes.lost() == set()
            talk(far, near, b"from outside")
        else:
            # What the one that was killed had in its hands is gone, and nothing else.
            assert len(probes.lost()) <= 64
        fw.wait_for_log("queue_adopted", 2)
        fw.wait_for_empty_queues()
        assert "state" not in collect()
        for fd in kept.values():
            socket.close(fd)
    manager.close()
