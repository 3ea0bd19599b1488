"""`conntrackd status`: whether all is well, and what is not, found on a running daemon with real traffic."""

import os
import pty
from typing import Any

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket

SMALL = POLICY + '\n[conntrack]\nmax = 20\nearly_drop_timeout = "60s"\n'


def names(fw: Daemon) -> dict[str, str]:
    """The severity of each problem by its name."""
    return {problem["name"]: problem["severity"] for problem in fw.status()["problems"]}


def limit(fw: Daemon, name: str) -> dict[str, Any]:
    (found,) = [each for each in fw.status()["limits"] if each["name"] == name]
    return dict(found)


def on_terminal(fw: Daemon, **env: str) -> str:
    """What `status` writes to a terminal."""
    near, far = pty.openpty()
    process = fw.router.start("sh", "-c", f'exec {" ".join(fw.command("status"))} >"$0"', os.ttyname(far), env=env)
    assert process.wait() == 0
    text = os.read(near, 1 << 16).decode()
    os.close(near)
    os.close(far)
    return text


def test_all_is_well(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 5001)
    talk(near, far, b"hello")
    status = fw.status()
    assert (status["health"], status["problems"]) == ("ok", [])
    assert [each["name"] for each in status["limits"]] == [
        "table", "unconfirmed", "expectations", "queue 0", "buffer 0", "queue 1", "buffer 1",
    ]  # fmt: skip
    assert limit(fw, "table")["used"] >= 1
    assert limit(fw, "buffer 0")["max"] == status["queues"][0]["socket_buffer"]
    assert (status["policy"]["generation"], status["policy"]["how"], status["trial_seconds"]) == (1, "start", None)
    text = fw.cli("status").stdout
    assert text.splitlines()[0].endswith(" is ok")
    assert "generation 1 of " in text
    assert ": start by conntrackd" in text
    assert "\033" not in text


def test_colour_is_for_terminals_that_want_it(fw: Daemon) -> None:
    assert "\033[32mok\033[0m" in on_terminal(fw, NO_COLOR="", TERM="xterm")
    assert "\033" not in on_terminal(fw, NO_COLOR="1", TERM="xterm")


def test_packets_per_second(net: Network, fw: Daemon) -> None:
    near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)

    def counted() -> bool:
        near.sendto(b"x", far.getsockname())
        return bool(fw.status()["packets_per_second"])

    wait_until(counted, "the rate is counted")


def test_a_table_that_fills_up(net: Network) -> None:
    with daemon(net.router, SMALL) as fw:
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)
        for port in range(16):
            near.sendto(b"x", (far.getsockname()[0], 5300 + port))
        wait_until(lambda: names(fw).get("table_filling") == "warning", "80 percent are a warning")
        assert fw.status()["health"] == "degraded"
        for port in range(16, 40):
            near.sendto(b"x", (far.getsockname()[0], 5300 + port))
        wait_until(lambda: names(fw).get("table_refused") == "error", "refused connections are an error")
        status = fw.status()
        assert status["health"] == "failing"
        assert status["problems"][0]["severity"] == "error"
        text = fw.cli("status").stdout
        assert text.splitlines()[0].endswith(" is failing")
        assert "raise conntrack.max" in " ".join(text.split())


def test_a_refused_policy_is_a_problem_until_the_next_good_one(fw: Daemon) -> None:
    fw.write_config("version = 7\n")
    assert fw.cli("reload", check=False).returncode != 0
    assert names(fw) == {"reload_failed": "warning"}
    fw.write_config(POLICY)
    fw.cli("reload")
    assert names(fw) == {}
    assert fw.status()["policy"]["how"] == "reload"


def test_a_policy_on_trial(fw: Daemon) -> None:
    fw.cli("apply", fw.config_path, "--confirm", "60s")
    assert 0 < fw.status()["trial_seconds"] <= 60
    assert "unless `conntrackd confirm` keeps it" in fw.cli("status").stdout
    fw.cli("confirm")
    assert fw.status()["trial_seconds"] is None


def test_a_fault_of_our_own(net: Network) -> None:
    with daemon(net.router, POLICY, "--simulate", "exception:1", env={"CONNTRACKD_TEST": "1"}) as fw:
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)

        def noticed() -> bool:
            near.sendto(b"x", far.getsockname())
            return names(fw).get("internal_errors") == "error"

        wait_until(noticed, "the fault is a problem")


def test_packets_that_the_kernel_dropped(net: Network) -> None:
    """A queue that runs over because its daemon is stopped."""
    with daemon(net.router, POLICY + "\n[queue]\nmax_length = 4\n") as fw:
        assert fw.process is not None
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)
        fw.process.signal(19)  # SIGSTOP
        try:
            for _ in range(20):
                near.sendto(b"x", far.getsockname())
            wait_until(lambda: fw.queues()[0].dropped_full > 0, "the queue runs over")
        finally:
            fw.process.signal(18)  # SIGCONT
        wait_until(lambda: names(fw).get("queue_drops") == "error", "the loss is a problem")
