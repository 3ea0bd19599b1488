"""What goes wrong: our own code fails, the operator errs, or somebody else was first."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import CONNTRACKD, POLICY, Daemon, daemon
from tests.lab.network import Network
from tests.lab.traffic import udp_socket

THREE_MISTAKES = """\
version = 1

[zones.lan]
interfaces = ["lan"]

[policy]
default = "dorp"

[[rule]]
name = "web"
from = "lna"
protocol = "tpc"
action = "accept"
"""

TEST_SWITCH = {"CONNTRACKD_TEST": "1"}


# --- Our own code fails -------------------------------------------------------------------------------------


def errors(fw: Daemon) -> int:
    return sum(queue["errors"] for queue in fw.status()["queues"])


@pytest.mark.parametrize("verdict", ["drop", "accept"])
def test_exception_in_the_tracker(quiet_net: Network, verdict: str) -> None:
    """The packet gets the configured verdict and is counted; the next one is tracked as if nothing happened."""
    config = f'{POLICY}\n[exception]\ninternal_error = "{verdict}"\n'
    with daemon(quiet_net.router, config, "--simulate", "exception:3", env=TEST_SWITCH) as fw:
        near, far = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4, 5300)
        for number in range(1, 6):
            near.sendto(bytes([number]), far.getsockname())
        expected = [1, 2, 3, 4, 5] if verdict == "accept" else [1, 2, 4, 5]
        # In any order: the one that was accepted unseen crosses the second queue too, and others may overtake it.
        assert sorted(far.recv(10)[0] for _ in expected) == expected
        far.sendto(b"answer", near.getsockname())
        assert near.recv(10) == b"answer"

        assert errors(fw) == 1
        flow = fw.flow("udp", dport=5300)
        assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
        assert fw.process is not None
        assert fw.process.running
        fw.wait_for_log("RuntimeError")
        fw.wait_for_empty_queues()


def test_failures_are_only_simulated_in_tests(net: Network) -> None:
    with daemon(net.router, POLICY, start=False) as fw:
        process = fw.launch("--simulate", "exception:1")
        assert process.wait() == 2
        assert "CONNTRACKD_TEST" in process.output()


# --- The operator errs --------------------------------------------------------------------------------------


@pytest.fixture
def idle(net: Network) -> Iterator[Daemon]:
    """Configured, and not running."""
    with daemon(net.router, POLICY, start=False) as idle:
        yield idle


def rules(net: Network) -> str:
    return net.router.run("iptables-legacy-save").stdout + net.router.run("ip6tables-legacy-save").stdout


def sentence(output: str) -> str:
    """The one line in which the operator is told; anything else on top, but for the log, fails the test."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith('{"')]
    assert len(lines) == 1, output
    assert lines[0].endswith("."), output
    return lines[0]


@pytest.mark.parametrize("command", [("check",), ("rules", "install", "--config"), ("run", "--config")], ids=" ".join)
def test_three_mistakes_get_three_messages(net: Network, idle: Daemon, command: tuple[str, ...]) -> None:
    idle.write_config(THREE_MISTAKES)
    before = rules(net)
    done = idle.cli(*command, idle.config_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    heads = re.findall(rf"^{re.escape(str(idle.config_path))}:(\d+):(\d+): error: (.*)$", done.stderr, re.MULTILINE)
    assert [(int(line), int(column)) for line, column, _ in heads] == [(7, 11), (11, 8), (12, 12)]
    for (_, _, message), wrong, suggestion in zip(heads, ("dorp", "lna", "tpc"), ("drop", "lan", "tcp"), strict=True):
        assert repr(wrong) in message
        assert f"did you mean {suggestion!r}?" in message
    assert rules(net) == before
    assert idle.queues() == {}


def test_mistakes_in_a_new_config_leave_the_rules_alone(net: Network, fw: Daemon) -> None:
    before = rules(net)
    fw.write_config(THREE_MISTAKES)
    assert fw.cli("rules", "install", "--config", fw.config_path, check=False).returncode == 2
    assert re.sub(r"\[\d+:\d+\]|#.*", "", rules(net)) == re.sub(r"\[\d+:\d+\]|#.*", "", before)
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)


def test_no_config_file(idle: Daemon) -> None:
    idle.config_path.unlink()
    done = idle.cli("run", "--config", idle.config_path, check=False)
    assert done.returncode == 2
    assert str(idle.config_path) in sentence(done.stderr.replace("\n", ".\n"))


@pytest.mark.parametrize("command", [("run",), ("rules", "install")], ids=" ".join)
def test_no_permission(net: Network, idle: Daemon, command: tuple[str, ...]) -> None:
    done = net.router.run(
        "setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-net_admin,-net_raw",
        *idle.command(*command, "--config", idle.config_path),
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "root" in sentence(done.stdout + done.stderr)


def test_queue_already_bound(net: Network, fw: Daemon) -> None:
    assert fw.process is not None
    other = fw.directory / "other.sock"
    done = net.router.run(CONNTRACKD, "--socket", other, "run", "--config", fw.config_path, check=False)
    assert done.returncode == 1
    said = sentence(done.stdout + done.stderr)
    assert "already bound" in said
    assert str(fw.process.pid) in said
    # The first one goes on.
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)
    assert fw.status()["pid"] == fw.process.pid


def test_another_daemon_on_the_socket(net: Network, fw: Daemon) -> None:
    assert fw.process is not None
    other = fw.directory / "other.toml"
    other.write_text(POLICY + "\n[queue]\nnumbers = [7, 8]\n")
    done = net.router.run(*fw.command("run", "--config", other), check=False)
    assert done.returncode == 1
    assert str(fw.socket_path) in sentence(done.stdout + done.stderr)
    assert set(fw.queues()) == {0, 1}
    assert fw.status()["pid"] == fw.process.pid


def test_a_socket_left_by_a_crash_is_no_obstacle(net: Network, fw: Daemon) -> None:
    fw.kill()
    assert fw.socket_path.exists()
    fw.start()
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)


def test_missing_iptables(net: Network, idle: Daemon, tmp_path: Path) -> None:
    done = net.router.run(
        "env", f"PATH={tmp_path}", *idle.command("rules", "install", "--config", idle.config_path), check=False
    )
    assert done.returncode == 1
    said = sentence(done.stdout + done.stderr)
    assert "iptables" in said
    assert "install" in said


@pytest.mark.parametrize("command", ["status", "stats", "flows", "drops"])
def test_daemon_not_running(idle: Daemon, command: str) -> None:
    done = idle.cli(command, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert str(idle.socket_path) in sentence(done.stderr)
