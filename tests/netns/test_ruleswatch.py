"""`[rules] watch`: what another tool does to our rules is seen, said, and undone as the operator wants it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import udp_socket

TOOL = {4: "iptables-legacy", 6: "ip6tables-legacy"}


def watching(how: str, more: str = "") -> str:
    """The common policy with the rules looked at every second."""
    return f'{POLICY}\n[rules]\nwatch = "{how}"\nwatch_every = "1s"\n{more}'


def rules(net: Network, family: int, tool: str = "") -> list[str]:
    return [line for line in net.router.run(f"{tool or TOOL[family]}-save").stdout.splitlines() if line[:1] == "-"]


def lines(fw: Daemon, event: str) -> list[dict[str, Any]]:
    """What the daemon has logged of an event."""
    found = [line for line in fw.log().splitlines() if f'"event": "{event}"' in line]
    return [json.loads(line) for line in found]


def problems(fw: Daemon) -> dict[str, str]:
    return {problem["name"]: problem["message"] for problem in fw.status()["problems"]}


def crosses_the_daemon(net: Network, fw: Daemon, family: int, port: int = 7000) -> None:
    """A datagram arrives and is a connection, which it is not unless both queues saw it."""
    near, far = udp_socket(net.client, family), udp_socket(net.server, family, port)
    near.sendto(b"seen", far.getsockname())
    assert far.recv(10) == b"seen"
    assert fw.flow("udp", dport=port)["orig"]["packets"] == 1


# What other tools do between two looks, by table, and what is said of each thing that they did.
DAMAGE: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "out-of-place": (
        {"raw": ["-D PREROUTING 1"], "mangle": ["-F"], "security": ["-D CONNTRACKD-IN 2"]},
        [
            "Nothing in raw PREROUTING jumps to CONNTRACKD-PRE",
            "The chain CONNTRACKD-POST in table mangle",
            "The chain CONNTRACKD-IN in table security",
        ],
    ),
    "twice-and-missing": (
        {"raw": ["-A PREROUTING -j CONNTRACKD-PRE"], "mangle": ["-F", "-X"]},
        ["jumps to CONNTRACKD-PRE 2 times", "The chain CONNTRACKD-POST is missing in table mangle"],
    ),
    "passed-by": (
        {"raw": ["-I PREROUTING -j ACCEPT"], "mangle": [":M - [0:0]", "-A M -j ACCEPT", "-I POSTROUTING -j M"]},
        ["in front of ours in raw PREROUTING let packets by", "Nobody judges them"],
    ),
    "all-gone": ({table: ["-F", "-X"] for table in ("raw", "mangle", "security")}, ["No rule brings IPv"]),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_it_is_seen_and_repaired(net: Network, family: int, damage: dict[str, list[str]], said: list[str]) -> None:
    with daemon(net.router, watching("repair")) as fw:
        before = rules(net, family)
        # All at once, or it would be repaired in between.
        text = "".join(f"*{table}\n" + "\n".join(commands) + "\nCOMMIT\n" for table, commands in damage.items())
        net.router.run(f"{TOOL[family]}-restore", "--noflush", stdin=text)
        fw.wait_for_log('"event": "rules_repaired"')
        (changed,) = lines(fw, "rules_changed")
        assert [text for text in said if text not in " ".join(changed["what"])] == []
        after = rules(net, family)
        assert [rule for rule in after if "CONNTRACKD" in rule] == [rule for rule in before if "CONNTRACKD" in rule]
        crosses_the_daemon(net, fw, family)
        wait_until(lambda: fw.stats()["faults"]["rules_repaired"] == 1, "it is counted")
        assert fw.stats()["faults"]["rules_changed"] == 1
        assert {"rules_changed", "rules_repaired"} <= set(problems(fw))
        assert "rules_wrong" not in problems(fw)


def test_rules_of_others_stay_as_they_are(net: Network) -> None:
    with daemon(net.router, watching("repair")) as fw:
        for each in "-I PREROUTING -p tcp --dport 9 -j DROP", "-I PREROUTING -j ACCEPT", "-A PREROUTING -j RETURN":
            net.router.run(TOOL[4], "-t", "raw", *each.split())
        net.router.run(TOOL[4], "-t", "raw", "-I", "PREROUTING", "-m", "ttl", "--ttl-eq", "1", "-j", "DROP")
        fw.wait_for_log('"event": "rules_repaired"')
        found = [rule.split()[-1] for rule in rules(net, 4) if rule.startswith("-A PREROUTING")]
        assert found == ["DROP", "CONNTRACKD-PRE", "ACCEPT", "DROP", "RETURN"]


def test_warned_it_is_said_once_and_left(net: Network) -> None:
    with daemon(net.router, watching("warn")) as fw:
        net.router.run(TOOL[4], "-t", "raw", "-D", "PREROUTING", "1")
        fw.wait_for_log('"event": "rules_changed"')
        left = rules(net, 4)
        assert "Nothing in raw PREROUTING" in problems(fw)["rules_wrong"]
        assert fw.status()["health"] == "failing"
        net.router.run(TOOL[6], "-t", "mangle", "-F")
        fw.wait_for_log('"event": "rules_changed"', 2)
        assert rules(net, 4) == left
        fw.install_rules()
        fw.wait_for_log('"event": "rules_in_place"')
        assert len(lines(fw, "rules_changed")) == 2
        assert "rules_wrong" not in problems(fw)
        crosses_the_daemon(net, fw, 4)


def test_off_it_does_nothing_until_a_reload_wants_it(net: Network) -> None:
    with daemon(net.router, watching("off")) as fw:
        net.router.run(TOOL[4], "-t", "raw", "-F")
        left = rules(net, 4)
        time.sleep(2.5)  # looks that would be due
        assert rules(net, 4) == left
        assert problems(fw) == {}
        fw.write_config(watching("repair"))
        fw.cli("reload")
        fw.wait_for_log('"event": "rules_repaired"')
        crosses_the_daemon(net, fw, 4)
        fw.write_config(watching("warn"))
        fw.cli("reload")
        net.router.run(TOOL[4], "-t", "raw", "-F")
        fw.wait_for_log('"event": "rules_changed"', 2)
        assert rules(net, 4) == left
        fw.write_config(watching("off"))
        fw.cli("reload")
        wait_until(lambda: "rules_wrong" not in problems(fw), "nobody asks any more")


def test_what_the_operator_takes_out_stays_out(net: Network) -> None:
    with daemon(net.router, watching("repair")) as fw:
        assert "leaves the rules out until `conntrackd rules install`" in fw.cli("rules", "remove").stderr
        wait_until(lambda: "was run here" in problems(fw).get("rules_wrong", ""), "a look finds them gone")
        assert not [rule for family in TOOL for rule in rules(net, family) if "CONNTRACKD" in rule]
        fw.install_rules()
        fw.wait_for_log('"event": "rules_in_place"')
        assert lines(fw, "rules_changed") == []
        net.router.run(TOOL[4], "-t", "raw", "-F")
        fw.wait_for_log('"event": "rules_repaired"')


def test_rules_that_are_left_to_the_operator_are_not_watched(net: Network) -> None:
    with daemon(net.router, watching("repair", 'at_start = "leave"\n')) as fw:
        time.sleep(2)
        assert rules(net, 4) == []
        assert problems(fw) == {}


def test_a_fight_is_fought_slowly(net: Network) -> None:
    with daemon(net.router, watching("repair")) as fw:
        remove = f"while :; do {TOOL[4]} -w -t raw -F PREROUTING; sleep 0.2; done"
        other = net.router.start("sh", "-c", remove)
        wait_until(lambda: lines(fw, "rules_contested"), "it slows down", 40.0)
        contested = lines(fw, "rules_contested")
        assert (contested[0]["again_in_seconds"], contested[0]["level"]) == (2, "warning")
        assert len(lines(fw, "rules_repaired")) - len(contested) == 3
        other.kill()
        wait_until(lambda: any("-j CONNTRACKD-PRE" in rule for rule in rules(net, 4)), "it goes on", 20.0)
        crosses_the_daemon(net, fw, 4)


def test_a_repair_that_fails_is_said_and_tried_again(net: Network, tmp_path: Path) -> None:
    """Another iptables holds the lock, one that no other test has."""
    lock = tmp_path / "xtables.lock"
    with daemon(net.router, watching("repair"), env={"XTABLES_LOCKFILE": str(lock)}) as fw:
        holder = net.router.start("flock", lock, "sh", "-c", "echo held; exec sleep 600")
        holder.wait_for_output("held", 10.0)
        net.router.run(TOOL[4], "-t", "raw", "-F", "PREROUTING")
        wait_until(lambda: lines(fw, "rules_not_watched"), "it has given up", 30.0)
        (failed,) = lines(fw, "rules_not_watched")
        assert "lock" in failed["error"]
        assert failed["again_in_seconds"] == 2
        found = problems(fw)
        assert "lock" in found["rules_not_watched"]
        assert "Nothing in raw PREROUTING" in found["rules_wrong"]
        wait_until(lambda: fw.stats()["faults"]["rules_watch_failed"] == 1, "it is counted")
        crosses = udp_socket(net.client, 6), udp_socket(net.server, 6, 7001)
        crosses[0].sendto(b"meanwhile", crosses[1].getsockname())
        assert crosses[1].recv(10) == b"meanwhile"
        holder.kill()
        wait_until(lambda: lines(fw, "rules_repaired"), "it is repaired", 30.0)
        wait_until(lambda: "rules_not_watched" not in problems(fw), "it says so")
        crosses_the_daemon(net, fw, 4)


def test_without_iptables_it_says_that_it_sees_nothing(net: Network, tmp_path: Path) -> None:
    for tool in (*TOOL.values(), *(f"{each}-{what}" for each in TOOL.values() for what in ("save", "restore"))):
        (tmp_path / tool).symlink_to(Path("/usr/sbin") / tool)
    with daemon(net.router, watching("warn"), env={"PATH": f"{tmp_path}:/usr/bin"}) as fw:
        (tmp_path / "iptables-legacy-save").unlink()
        fw.wait_for_log('"event": "rules_not_watched"')
        assert "iptables-legacy-save is not on the PATH" in problems(fw)["rules_not_watched"]


def test_the_next_process_watches_on_and_a_stop_leaves_nothing(net: Network) -> None:
    with daemon(net.router, watching("repair", 'at_stop = "remove"\n')) as fw:
        net.router.run(TOOL[4], "-t", "raw", "-F")
        fw.restart()
        fw.wait_for_log('"event": "ready"', 2)
        assert any("-j CONNTRACKD-PRE" in rule for rule in rules(net, 4))
        net.router.run(TOOL[6], "-t", "mangle", "-F")
        fw.wait_for_log('"event": "rules_repaired"')
        net.router.run(TOOL[4], "-t", "raw", "-F")
        assert fw.stop() == 0
        assert not [rule for family in TOOL for rule in rules(net, family) if "CONNTRACKD" in rule]


def test_nft_s_iptables_is_watched_as_well(net: Network) -> None:
    with daemon(net.router, watching("repair", 'iptables = "iptables-nft"\n')) as fw:
        before = rules(net, 4, "iptables-nft")
        net.router.run("nft", "flush", "ruleset")
        fw.wait_for_log('"event": "rules_repaired"')
        assert rules(net, 4, "iptables-nft") == before
        net.router.run("iptables-nft", "-t", "mangle", "-I", "POSTROUTING", "-j", "ACCEPT")
        fw.wait_for_log('"event": "rules_repaired"', 2)
        crosses_the_daemon(net, fw, 4)
        crosses_the_daemon(net, fw, 6, 7001)
