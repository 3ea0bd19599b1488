"""`conntrackd trace` and `conntrackd drops` beside real packets."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import Daemon
from tests.lab.network import Network, Process, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket

PORT, CLOSED = 8000, 8080


def trace(fw: Daemon, *words: str | Path) -> Process:
    """A trace that has begun."""
    process = fw.router.start(*fw.command("trace", *words, "-o", "jsonl"))
    process.wait_for_output("BEGIN")
    return process


def steps(process: Process) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in process.output().splitlines()]
    return [row for row in rows if row["type"] == "STEP"]


def wait_for_step(process: Process, **wanted: Any) -> dict[str, Any]:
    """Wait until there is a step with these values."""

    def found() -> list[dict[str, Any]]:
        return [step for step in steps(process) if wanted.items() <= step.items()]

    return wait_until(found, f"a step with {wanted}")[0]


def test_a_connection_step_by_step(net: Network, fw: Daemon, family: int) -> None:
    process = trace(fw, f"tcp and dst port {PORT}")
    near, far = tcp_pair(net.client, net.server, family, PORT)
    talk(near, far, b"hello")
    near.close()
    far.close()
    wait_for_step(process, state="TIME_WAIT")
    first, confirmed, answer, *_ = steps(process)
    assert (first["hook"], first["class"], first["verdict"], first["state"]) == (
        "PREROUTING", "NEW", "accept", "SYN_SENT",
    )  # fmt: skip
    assert (confirmed["hook"], confirmed["in"], confirmed["out"]) == ("POSTROUTING", "lan", "wan")
    assert (confirmed["rule"], confirmed["status"], confirmed["mark_before"]) == (
        "lan-to-wan", ["CONFIRMED"], first["mark"],
    )  # fmt: skip
    assert (answer["class"], answer["state_before"], answer["state"]) == ("ESTABLISHED", "SYN_SENT", "SYN_RECV")
    states = [step["state"] for step in steps(process)]
    assert list(dict.fromkeys(states)) == [
        "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "LAST_ACK", "TIME_WAIT",
    ]  # fmt: skip
    assert {step["packet"]["protocol"] for step in steps(process)} == {"tcp"}


def test_what_is_dropped_and_why(net: Network, fw: Daemon, family: int) -> None:
    process = trace(fw, f"dst port {CLOSED}")
    net.server.run("nc", "-z", "-w", "1", net.client.address(family), str(CLOSED), check=False)
    step = wait_for_step(process, verdict="drop")
    assert (step["hook"], step["rule"], step["reason"]) == ("POSTROUTING", "default-forward", "policy")
    assert (step["packet"]["dst"], step["flow"], step["mark"]) == (
        net.client.address(family),
        None,
        step["mark_before"],
    )


def test_the_capture_opens_in_tshark_with_what_came_of_each_packet(net: Network, fw: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "trace.pcapng"
    process = trace(fw, "--pcap", file)
    near, far = tcp_pair(net.client, net.server, 4, PORT)
    talk(near, far, b"hello from afar")
    net.server.run("nc", "-z", "-w", "1", net.client.ipv6, str(CLOSED), check=False)
    wait_for_step(process, verdict="drop")
    fields = ("frame.interface_name", "ip.src", "ipv6.src", "tcp.flags.syn", "tcp.payload", "frame.comment")
    done = subprocess.run(
        ["tshark", "-r", file, "-T", "fields", *(word for field in fields for word in ("-e", field))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [dict(zip(fields, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]
    rows = [row for row in rows if row["tcp.flags.syn"]]
    assert [row["frame.interface_name"] for row in rows[:2]] == ["PREROUTING lan", "POSTROUTING wan"]
    assert rows[0]["ip.src"] == net.client.ipv4
    assert "rule=lan-to-wan" in rows[1]["frame.comment"]
    assert b"hello from afar".hex() in [row["tcp.payload"] for row in rows]
    assert rows[-1]["ipv6.src"] == net.server.ipv6
    assert "drop" in rows[-1]["frame.comment"]
    assert "reason=policy" in rows[-1]["frame.comment"]
    assert len([step for step in steps(process) if (step["packet"] or {}).get("protocol") == "tcp"]) == len(rows)
    assert "data" not in steps(process)[0]


def test_for_a_time_and_as_text(net: Network, fw: Daemon) -> None:
    done = fw.cli("trace", "icmp", "--for", "1ms")
    assert (done.stdout, "Tracing" in done.stderr) == ("", True)
    process = fw.router.start(*fw.command("trace", "icmp"))
    process.wait_for_output("Tracing")
    net.client.run("ping", "-c", "1", net.server.ipv4)
    process.wait_for_output("class=ESTABLISHED")
    new, confirmed, answer = process.output().splitlines()[1:]
    assert "PREROUTING  accept icmp 10.1.0.2 > 10.2.0.2 type 8 code 0 id" in new
    assert "out=wan len=84 class=NEW flow=1 status=none>CONFIRMED rule=lan-to-wan" in confirmed
    assert "status=CONFIRMED>SEEN_REPLY,CONFIRMED" in answer


def test_a_client_that_does_not_read_stalls_nothing(net: Network, fw: Daemon) -> None:
    """It is stopped while more steps come than all buffers hold; packets go on, and what it missed it is told."""
    process = trace(fw, "udp", "--pcap", "/dev/null")
    process.popen.send_signal(19)
    sender, receiver = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)
    for number in range(4000):
        sender.sendto(number.to_bytes(4, "big") + bytes(1000), (net.server.ipv4, 5300))
        if number % 20 == 19:  # not more at once than its socket holds
            while int.from_bytes(receiver.recv(2000)[:4], "big") != number:
                pass
    process.popen.send_signal(18)
    wait_until(lambda: '"LOST"' in process.output(), "the client is told what it missed")
    lost = [json.loads(line) for line in process.output().splitlines() if '"LOST"' in line]
    assert lost[0]["steps"] > 0
    assert fw.status()["queues"][0]["errors"] == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(("tcp dport 80",), "dport"), (("src", "host", "example.org"), "example.org"), (("--for", "soon"), "no time")],
)
def test_a_filter_that_means_nothing_is_refused_before_anything_is_traced(
    fw: Daemon, words: tuple[str, ...], complaint: str
) -> None:
    done = fw.cli("trace", *words, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_the_capture_cannot_be_written(fw: Daemon) -> None:
    done = fw.cli("trace", "--pcap", "/nowhere/trace.pcapng", "--for", "1s", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "/nowhere/trace.pcapng can't be written: No such file or directory.\n"


def test_drops_by_filter_and_in_groups(net: Network, fw: Daemon) -> None:
    for port in (CLOSED, CLOSED + 1, CLOSED + 2):
        net.server.run("nc", "-z", "-w", "1", net.client.ipv4, str(port), check=False)
        fw.wait_for_drop(dport=port)
    assert {drop["dport"] for drop in fw.json("drops", f"dst port {CLOSED}-{CLOSED + 1}")} == {CLOSED, CLOSED + 1}
    assert fw.json("drops", "rule lan-to-wan") == []
    assert {drop["dport"] for drop in fw.json("drops", "--last", "1h")} >= {CLOSED, CLOSED + 1, CLOSED + 2}
    assert fw.json("drops", "--last", "1ms") == []
    (by_source,) = (group for group in fw.json("drops", "--by", "src") if group["key"] == net.server.ipv4)
    assert by_source["count"] == len(fw.json("drops", f"src {net.server.ipv4}"))
    assert by_source["reasons"] == {"policy": by_source["count"]}
    table = fw.cli("drops", "tcp", "--by", "rule").stdout.splitlines()
    assert table[0].split() == ["RULE", "DROPS", "LAST", "REASONS"]
    assert table[1].split()[0] == "default-forward"
