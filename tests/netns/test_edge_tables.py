"""Where the kernel has no security table, INPUT is judged in mangle."""

import os
from pathlib import Path

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network

# Every kernel that tests run on has the table: this says what iptables says where there is none.
WITHOUT_SECURITY = """#!/bin/sh
case "$*" in *"-t security"*)
    echo "iptables v1.8.9 (legacy): can't initialize iptables table \\`security': Table does not exist" >&2
    exit 3;;
esac
exec /usr/sbin/$(basename $0) "$@"
"""


def tables(net: Network) -> dict[str, str]:
    """Chain of ours -> its table."""
    found, table = {}, ""
    for line in net.router.run("iptables-legacy-save").stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":CONNTRACKD-"):
            found[line[1:].split()[0]] = table
    return found


def test_input_without_a_security_table(net: Network, tmp_path: Path) -> None:
    for tool in "iptables-legacy", "ip6tables-legacy":
        (tmp_path / tool).write_text(WITHOUT_SECURITY)
        (tmp_path / tool).chmod(0o755)
    with daemon(net.router, POLICY, start=False) as fw:
        install = fw.command("rules", "install", "--config", fw.config_path)
        net.router.run(*install, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert tables(net)["CONNTRACKD-IN"] == "mangle"
        fw.start()
        net.client.run("ping", "-n", "-c", "1", "10.1.0.1")
        assert fw.flow("icmp", dst="10.1.0.1")["out"] is None
        # The same with a kernel that has it: our chain moves.
        net.router.run(*install)
        assert tables(net)["CONNTRACKD-IN"] == "security"
        assert sorted(tables(net)) == ["CONNTRACKD-IN", "CONNTRACKD-OUT", "CONNTRACKD-POST", "CONNTRACKD-PRE"]
        net.client.run("ping", "-n", "-c", "1", "10.1.0.1")


def test_rules_are_removed_without_a_configuration(net: Network, fw: Daemon) -> None:
    fw.config_path.write_text("nonsense")
    fw.cli("rules", "remove")
    assert tables(net) == {}
