"""What outlives the daemon, on real packets: by a stop, by a crash, on a disk that is full."""

from pathlib import Path

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.programs import ftp_server
from tests.lab.traffic import talk, tcp_pair, udp_socket

OFTEN = POLICY + '\n[sets.banned]\nsize = 10\n\n[state]\nsnapshot = "1s"\ndirectory = "{directory}"\n'
FTP = POLICY.replace('from = "lan"\nto = "wan"', 'from = "lan"\nto = "wan"\nhelper = "ftp"', 1)


def taken(fw: Daemon) -> int:
    state = fw.status()["state"]
    assert state["error"] is None, state
    return int(state["taken"])


def wait_for_snapshot(fw: Daemon) -> None:
    """Wait until a snapshot has been taken that began after this."""
    before = taken(fw)
    wait_until(lambda: taken(fw) >= before + 2, "the next snapshot but one")


def test_a_stop_and_a_start_break_no_connection(net: Network, fw: Daemon, family: int) -> None:
    """Not even one on which only the outside speaks, which nobody could pick up."""
    near, far = tcp_pair(net.client, net.server, family, 7)
    talk(near, far, b"before")
    before = fw.flow("tcp", dport=7)
    assert fw.stop() == 0
    fw.start()
    after = fw.flow("tcp", dport=7)
    moving = ("timeout_seconds", "age_seconds", "idle_seconds")
    assert {k: v for k, v in after.items() if k not in moving} == {k: v for k, v in before.items() if k not in moving}
    talk(far, near, b"from outside")
    assert fw.flow("tcp", dport=7)["reply"]["packets"] > before["reply"]["packets"]
    assert fw.status()["state"]["restored"] >= 1
    assert fw.stats()["insert"] >= before["id"]


def test_a_crash_loses_at_most_the_last_period(net: Network, tmp_path: Path) -> None:
    with daemon(net.router, OFTEN.format(directory=tmp_path / "state")) as fw:
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)
        near.sendto(b"question", far.getsockname())
        assert far.recv(100) == b"question"
        fw.cli("set", "add", "banned", "198.51.100.7", "--timeout", "1h")
        hits = fw.stats()["rules"]
        wait_for_snapshot(fw)
        fw.kill()
        fw.start()
        assert fw.flow("udp", dport=5300)["orig"]["packets"] == 1
        (entry,) = fw.json("set", "list", "banned")
        assert entry["address"] == "198.51.100.7"
        for rule, was in zip(fw.stats()["rules"], hits, strict=True):
            assert rule["hits"] >= was["hits"]
        far.sendto(b"answer", near.getsockname())
        assert near.recv(100) == b"answer"


def test_interfaces_that_were_made_anew_are_found_by_name(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    indexes = {link["name"]: link["index"] for link in fw.status()["interfaces"]}
    fw.stop()
    net.router.run("ip", "link", "set", "wan", "down")
    net.router.run("ip", "link", "set", "wan", "name", "old")
    net.router.run("ip", "link", "set", "old", "up")
    fw.start()
    assert (fw.flow("tcp", dport=7)["in"], fw.flow("tcp", dport=7)["out"]) == ("lan", "wan")
    assert indexes["wan"] == next(link["index"] for link in fw.status()["interfaces"] if link["name"] == "old")


def test_an_announced_connection_comes_through_after_a_restart(net: Network, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    ftp_server(net.server, tmp_path, 21)
    with daemon(net.router, FTP) as fw:
        control = net.client.open_socket(2, 1)
        control.connect((net.server.ipv4, 21))
        lines = control.makefile("rw", newline="\r\n")

        def ask(line: str) -> str:
            if line:
                lines.write(f"{line}\r\n")
                lines.flush()
            return lines.readline()

        assert ask("").startswith("220")
        assert ask("USER anonymous").startswith(("331", "230"))
        assert ask("PASS x").startswith("230")
        passive = ask("PASV")
        assert passive.startswith("227"), passive
        assert len(fw.json("flows", "--expected")) == 1
        fw.stop()
        fw.start()
        assert len(fw.json("flows", "--expected")) == 1
        numbers = [int(number) for number in passive[passive.index("(") + 1 : passive.index(")")].split(",")]
        data = net.client.open_socket(2, 1)
        data.connect((net.server.ipv4, numbers[4] << 8 | numbers[5]))
        flow = fw.flow("tcp", dport=numbers[4] << 8 | numbers[5])
        assert "EXPECTED" in flow["status"]
        assert flow["master"] == fw.flow("tcp", dport=21)["id"]


def test_a_full_disk_costs_no_packet(net: Network, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    with daemon(net.router, OFTEN.format(directory=directory), start=False) as fw:
        # The namespace of the command has mounts of its own: what is mounted there is nowhere else.
        run = " ".join(fw.command("run", "--config", fw.config_path))
        mount = f"mount -t tmpfs -o size=4k tmpfs {directory} && head -c 4096 /dev/zero > {directory}/full"
        fw.process = net.router.start("sh", "-c", f"{mount}; exec {run}")
        fw.install_rules()
        fw.wait_until_ready()
        near, far = tcp_pair(net.client, net.server, 4, 7)
        talk(near, far, b"before")
        wait_until(lambda: fw.status()["state"]["failed"] >= 2, "two snapshots that did not fit")
        talk(near, far, b"after")
        state = fw.status()["state"]
        assert state["error"] == "No space left on device"
        assert fw.log().count("snapshot_failed") == 1
        assert "No space left on device" in fw.cli("status").stdout
        assert [problem["name"] for problem in fw.status()["problems"]] == ["snapshot_failed"]
        assert fw.process.stop() == 0


def test_a_disk_that_fills_up_costs_snapshots_until_there_is_room(net: Network, tmp_path: Path) -> None:
    config = OFTEN.format(directory=tmp_path / "state")
    with daemon(net.router, config, "--simulate", "disk:4:2", env={"CONNTRACKD_TEST": "1"}) as fw:
        near, far = tcp_pair(net.client, net.server, 4, 7)
        talk(near, far, b"before")
        fw.wait_for_log("snapshot_failed")
        talk(near, far, b"after")
        fw.wait_for_log("snapshot_written_again")
        state = fw.status()["state"]
        assert (state["failed"], state["error"]) == (2, None)
        assert "snapshot_failed" not in [problem["name"] for problem in fw.status()["problems"]]
        fw.kill()
        fw.start()
        assert fw.flow("tcp", dport=7)
        talk(far, near, b"from outside")


def test_killed_while_it_writes_it_starts_with_what_was_there(net: Network, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with daemon(net.router, OFTEN.format(directory=directory)) as fw:
        near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 5300)
        near.sendto(b"question", far.getsockname())
        assert far.recv(100) == b"question"
        wait_for_snapshot(fw)
        whole = (directory / "snapshot").read_bytes()
        (directory / "snapshot.new").write_bytes(whole[: len(whole) // 2])
        fw.kill()
        fw.start()
        assert fw.flow("udp", dport=5300)
        wait_for_snapshot(fw)
        assert sorted(path.name for path in directory.iterdir()) in (["snapshot"], ["snapshot", "snapshot.new"])


def test_a_torn_snapshot_is_set_aside_and_the_daemon_starts(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    fw.stop()
    snapshot = fw.directory / "state" / "snapshot"
    snapshot.write_bytes(snapshot.read_bytes()[:-7])
    fw.start()
    assert fw.flows() == []
    assert "snapshot_set_aside" in fw.log()
    assert "it is torn at byte" in fw.log()
    assert (fw.directory / "state" / "snapshot.bad.1").exists()
    talk(near, far, b"picked up")
    assert fw.flow("tcp", dport=7)
