"""Changing the policy while traffic flows: at once, whole, and with a way back."""

import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conntrackd.cli.changes import change
from conntrackd.cli.output import EXIT_USAGE
from tests.lab.daemon import Daemon, daemon
from tests.lab.network import Host, Network, wait_until
from tests.lab.traffic import AF, talk, tcp_listener, tcp_pair, udp_socket

ZONES = """\
version = 1
[zones]
lan = { interfaces = "lan" }
wan = { interfaces = "wan" }
"""
OUT = '[[rule]]\nname = "out"\nfrom = "lan"\naction = "accept"\n'
NO_WEB = '[[rule]]\nname = "no-web"\nprotocol = "tcp"\nport = 80\naction = "drop"\n'
REJUDGE = "[reload]\nrejudge = true\n"
BROKEN_FILES = Path(__file__).parents[1] / "unit" / "broken"
BROKEN = ZONES + OUT.replace("accept", "acept")


def generation(fw: Daemon) -> int:
    number: int = fw.status()["generation"]
    return number


def in_force(fw: Daemon) -> list[str]:
    return [row["name"] for row in fw.ask("rules") if not row["name"].startswith("default-")]


def test_reload(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        fw.write_config(ZONES + NO_WEB + OUT)
        assert in_force(fw) == ["out"]
        assert fw.cli("reload").stdout == "Generation 2 is in force.\n"
        assert in_force(fw) == ["no-web", "out"]
        assert generation(fw) == 2


def test_a_broken_file_leaves_the_policy_in_force_and_says_so(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        fw.write_config(BROKEN)
        for command in (("reload",), ("apply", fw.config_path), ("diff", fw.config_path)):
            done = fw.cli(*command, check=False)
            assert done.returncode == 2
            assert f"{fw.config_path}:8:10: error: unknown action 'acept'" in done.stderr
            assert "Traceback" not in done.stderr
        assert "generation 1 stays in force" in fw.cli("reload", check=False).stderr
        fw.config_path.unlink()
        done = fw.cli("reload", check=False)
        assert done.returncode == 2
        assert "No such file" in done.stderr
        assert (generation(fw), in_force(fw)) == (1, ["out"])
        assert len(fw.json("history")) == 1


def test_conf_d_is_part_of_it(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        parts = fw.directory / "conf.d"
        parts.mkdir()
        (parts / "10-web.toml").write_text(NO_WEB)
        fw.cli("reload")
        assert in_force(fw) == ["out", "no-web"]
        (parts / "20-bad.toml").write_text(NO_WEB)
        assert "20-bad.toml:2:8: error: rule name 'no-web' is used twice" in fw.cli("reload", check=False).stderr


@pytest.mark.parametrize("rejudge", [False, True])
def test_connections_that_a_new_policy_forbids(net: Network, family: int, rejudge: bool) -> None:
    """They go on, or end at their next packet; those that it allows go on in any case, under its rules."""
    with daemon(net.router, ZONES + OUT) as fw:
        web, web_far = tcp_pair(net.client, net.server, family, 80)
        other, other_far = tcp_pair(net.client, net.server, family, 81)
        talk(web, web_far, b"before")
        talk(other, other_far, b"before")
        fw.write_config(ZONES + (REJUDGE if rejudge else "") + NO_WEB + OUT.replace('"out"', '"out-2"'))
        fw.cli("reload")
        talk(other, other_far, b"after")
        if not rejudge:
            talk(web, web_far, b"after")
            assert fw.flow("tcp", dport=81)["rule"] == "out"
            return
        web.sendall(b"after")
        fw.wait_for_drop(dport=80, rule="no-web")
        # The other end may not go on either, though nothing forbids it to open connections of its own.
        web_far.sendall(b"from the server")
        fw.wait_for_drop(sport=80)
        web.settimeout(0.3)
        with pytest.raises(TimeoutError):
            web.recv(100)
        assert [flow["orig"]["dport"] for flow in fw.flows() if flow["protocol"] == "tcp"] == [81]
        assert fw.flow("tcp", dport=81)["rule"] == "out-2"
        assert fw.stats()["closed"]["policy"] == 1


def test_what_is_left_of_a_connection_does_not_come_back_from_the_router(net: Network, family: int) -> None:
    """The router may open any connection; its packets of a forbidden one open none."""
    router = {4: "10.1.0.1", 6: "fd00:1::1"}[family]
    ssh = '[[rule]]\nname = "ssh"\nfrom = "lan"\nto = "self"\nprotocol = "tcp"\nport = 22\naction = "accept"\n'
    with daemon(net.router, ZONES + ssh) as fw:
        near, far = tcp_pair(net.client, net.router, family, 22, router)
        talk(near, far, b"before")
        fw.write_config(ZONES + REJUDGE)
        fw.cli("reload")
        far.sendall(b"from the router")
        wait_until(lambda: [drop for drop in fw.drops() if drop["reason"] == "revoked"], "it is dropped")
        near.settimeout(0.5)
        with pytest.raises(TimeoutError):
            near.recv(100)
        # A retransmission of it is no new connection.
        wait_until(lambda: len([d for d in fw.drops() if d["reason"] == "revoked"]) > 1, "so is what follows")
        assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]
        # A new policy that allows it lets it go on.
        fw.write_config(ZONES + ssh)
        fw.cli("reload")
        near.settimeout(30.0)
        assert near.recv(100) == b"from the router"


# --- On trial ---------------------------------------------------------------------------------------------------


def candidate(fw: Daemon, text: str) -> Path:
    path = fw.directory / "candidate.toml"
    path.write_text(fw.complete(text))
    return path


def test_nobody_confirms(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        said = fw.cli("apply", candidate(fw, ZONES + NO_WEB), "--confirm", "3s").stdout
        assert said.startswith("Generation 2 is in force for 3 s: `conntrackd confirm` keeps it")
        assert in_force(fw) == ["no-web"]
        assert fw.json("history")[-1]["state"].startswith("unconfirmed, ends in")
        wait_until(lambda: generation(fw) == 3, "the timer goes back", 20.0)
        assert in_force(fw) == ["out"]
        assert [row["how"] for row in fw.json("history")] == ["start", "apply", "timer"]
        assert [row["state"] for row in fw.json("history")] == ["replaced", "rolled back", "in force"]
        assert fw.cli("confirm", check=False).returncode == 1


def test_what_nobody_confirmed_is_not_gone_back_to(net: Network) -> None:
    """Two trials, one after the other: when nobody confirms the second, the first does not stay for good."""
    with daemon(net.router, ZONES + OUT) as fw:
        fw.cli("apply", candidate(fw, ZONES + NO_WEB), "--confirm", "60s")
        again = fw.cli("apply", candidate(fw, ZONES + NO_WEB + OUT), "--confirm", "1s")
        assert "otherwise generation 1 comes back" in again.stdout
        assert "Generation 2 was not confirmed: a rollback goes back to 1." in again.stderr
        wait_until(lambda: generation(fw) == 4, "the timer goes back", 20.0)
        assert in_force(fw) == ["out"]
        fw.cli("apply", candidate(fw, ZONES + NO_WEB), "--confirm", "60s")
        fw.cli("apply", candidate(fw, ZONES + NO_WEB + OUT))
        fw.cli("rollback")
        assert in_force(fw) == ["out"]


def test_files_of_sets_count_from_the_file_that_is_applied(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        (fw.directory / "bad.txt").write_text("192.0.2.0/24\n")
        path = candidate(fw, ZONES + OUT + '[sets.bad]\nfile = "bad.txt"\n')
        apply = shlex.join(map(str, fw.command("apply", path.name)))
        fw.router.run("sh", "-c", f"cd {fw.directory} && {apply}")
        assert fw.json("set", "list")[0]["configured"] == 1
        assert fw.json("history")[-1]["file"] == str(path)


def test_somebody_confirms(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        fw.cli("apply", candidate(fw, ZONES + NO_WEB), "--confirm", "3s")
        assert fw.cli("confirm").stdout == "Generation 2 stays.\n"
        applied = time.monotonic()
        wait_until(lambda: time.monotonic() - applied > 4.5, "the time to confirm in is over")
        assert (generation(fw), in_force(fw)) == (2, ["no-web"])


def test_what_the_next_start_would_not_find_is_said(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        said = f"The next start reads {fw.config_path}, which is another: `conntrackd history 2` prints"
        assert said not in fw.cli("apply", candidate(fw, ZONES + NO_WEB), "--confirm", "60s").stderr
        assert said in fw.cli("confirm").stderr
        fw.config_path.write_text(fw.cli("history", "2").stdout)
        assert fw.cli("apply", fw.config_path).stderr == ""
        assert "`conntrackd history 4`" in fw.cli("apply", candidate(fw, ZONES + OUT)).stderr
        assert fw.cli("rollback").stderr == ""
        fw.config_path.unlink()
        assert "The next start reads" in fw.cli("rollback").stderr


def test_rollback_and_history(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        assert "no generation to go back to" in fw.cli("rollback", check=False).stderr
        fw.cli("apply", candidate(fw, ZONES + NO_WEB))
        fw.cli("rollback")
        assert in_force(fw) == ["out"]
        first, second, third = fw.json("history")
        assert [row["generation"] for row in (first, second, third)] == [1, 2, 3]
        assert second["who"].startswith("root (process ")
        assert second["file"] == str(fw.directory / "candidate.toml")
        assert third["how"] == "rollback"
        assert fw.cli("history", "2").stdout == fw.complete(ZONES + NO_WEB)
        # And back to what was rolled back.
        fw.cli("rollback")
        assert in_force(fw) == ["no-web"]
        assert "not remembered" in fw.cli("history", "99", check=False).stderr


def test_only_root_changes_the_policy(net: Network) -> None:
    with daemon(net.router, ZONES + OUT + "[sets.s]\n") as fw:
        fw.directory.chmod(0o755)
        fw.socket_path.chmod(0o666)
        for command in ("reload", "rollback", "confirm"):
            request = json.dumps({"v": 1, "command": command}) + "\n"
            said = ask_as_nobody(fw, request)
            assert said["ok"] is False
            assert said["error"] == "Changing the policy needs root, and you are nobody."
        change = {"action": "add", "name": "s", "address": "10.0.0.1"}
        said = ask_as_nobody(fw, json.dumps({"v": 1, "command": "set", "args": change}) + "\n")
        assert said["error"] == "Changing a set needs root, and you are nobody."
        assert ask_as_nobody(fw, '{"v": 1, "command": "history"}\n')["ok"] is True


def ask_as_nobody(fw: Daemon, request: str) -> dict[str, object]:
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.send(sys.argv[2].encode())\n"
        "print(s.makefile().readline())"
    )
    done = fw.router.run("python3", "-c", program, fw.socket_path, request)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_diff(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        assert fw.cli("diff", fw.config_path).stdout == ""
        changed = (
            ZONES.replace('"wan"', '["wan", "wan2"]') + NO_WEB + OUT.replace("lan", "any") + "[policy]\ninput='reject'"
        )
        assert fw.cli("diff", candidate(fw, changed)).stdout.splitlines() == [
            '~ zones.wan.interfaces = "wan" -> ["wan", "wan2"]',
            '+ policy = { input = "reject" }',
            '+ rule no-web (at the top): { protocol = "tcp", port = 80, action = "drop" }',
            '~ rule out: from = "lan" -> "any"',
        ]
        assert in_force(fw) == ["out"]


def test_what_needs_a_restart_is_said(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        fw.write_config(ZONES + "[queue]\nmax_length = 77\n" + OUT)
        done = fw.cli("reload")
        assert "queue.max_length: counts from the next start on" in done.stderr


# --- Under traffic ----------------------------------------------------------------------------------------------


@contextmanager
def connections(net: Network, per_second: int) -> Iterator[list[str]]:
    """Open TCP connections all the time, each to say a word and hear one; gives the list of what went wrong."""
    listener = tcp_listener(net.server, 4, 9000)
    listener.settimeout(0.2)
    failures: list[str] = []
    done: list[int] = []
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5.0)
                connection.sendall(connection.recv(10))

    def open_them() -> None:
        begun = time.monotonic()
        number = 0
        while not over.is_set():
            number += 1
            client = net.client.call(lambda: socket.socket(AF[4], socket.SOCK_STREAM))
            with client:
                client.settimeout(10.0)
                try:
                    client.connect((net.server.ipv4, 9000))
                    client.sendall(b"word")
                    assert client.recv(10) == b"word"
                    done.append(number)
                except (OSError, AssertionError) as error:
                    failures.append(f"connection {number}: {error!r}")
            over.wait(max(0.0, begun + number / per_second - time.monotonic()))

    threads = [threading.Thread(target=serve), threading.Thread(target=open_them)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(done) > 20, "connections are opened")
        yield failures
        so_far = len(done)
        wait_until(lambda: len(done) > so_far + 20, "connections go on")
    finally:
        over.set()
        for thread in threads:
            thread.join()


def many_rules(count: int) -> str:
    return "".join(
        f'[[rule]]\nname = "m{n}"\nsource = "10.{n >> 8}.{n & 255}.0/24"\naction = "drop"\n'
        for n in range(1000, 1000 + count)
    )


def datagrams_at(host: Host) -> int:
    """Packets that the one rule in INPUT has counted."""
    return int(host.run("iptables-legacy", "-nvxL", "INPUT").stdout.splitlines()[2].split()[0])


def test_reload_and_rollback_under_traffic_lose_nothing(net: Network) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        net.server.start("iperf3", "-s", "-1")
        wait_until(lambda: ":1451 " in net.server.read("net/tcp6"), "iperf3 listens")  # 5201
        # UDP: every datagram that does not arrive at the server is missed, whatever becomes of it there.
        net.server.run("iptables-legacy", "-A", "INPUT", "-p", "udp", "--dport", "5201")
        bulk = net.client.start("iperf3", "-c", net.server.ipv4, "-u", "-b", "20M", "-t", "5", "-J")
        changes = 0
        with connections(net, 100) as failures:
            while bulk.running or changes < 6:
                fw.write_config(ZONES + REJUDGE + many_rules(500 + changes) + OUT)
                fw.cli("reload")
                fw.cli("rollback")
                changes += 2
            assert generation(fw) == 1 + changes
        assert failures == []
        assert bulk.wait(60.0) == 0
        sent = json.loads(bulk.output())["end"]["sum"]["packets"]
        assert sent > 5000
        greeting = 1  # iperf3's own
        wait_until(lambda: datagrams_at(net.server) == sent + greeting, "every datagram arrives")
        assert not [drop for drop in fw.drops() if {drop["sport"], drop["dport"]} & {5201, 9000}]
        assert not any(queue.dropped_full or queue.dropped_socket for queue in fw.queues().values())


def test_an_udp_stream_lives_through_a_reload(net: Network, family: int) -> None:
    with daemon(net.router, ZONES + OUT) as fw:
        server = udp_socket(net.server, family, 7000)
        client = udp_socket(net.client, family)
        client.sendto(b"x", server.getsockname())
        assert server.recv(10) == b"x"
        fw.write_config(ZONES + REJUDGE + OUT)
        fw.cli("reload")
        server.sendto(b"y", (net.client.address(family), client.getsockname()[1]))
        assert client.recv(10) == b"y"


def test_no_broken_configuration_changes_anything(net: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the unit tests, all of them, against a running daemon; asked in this process, which takes less time."""
    with daemon(net.router, ZONES + OUT) as fw:
        before = fw.cli("history", "1").stdout
        files = sorted(BROKEN_FILES.glob("*.toml"))
        assert len(files) >= 100
        for file in files:
            fw.write_config(file.read_text())
            assert change(str(fw.socket_path), "reload", {}, "text") == EXIT_USAGE, file
            assert "generation 1 stays in force" in capsys.readouterr().err, file
        assert fw.cli("history", "1").stdout == before
        assert (generation(fw), in_force(fw)) == (1, ["out"])
        assert "Traceback" not in fw.log()
