"""A real conntrackd in the router of the network: its config, its rules, its life, and what it answers."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conntrackd import api
from tests.lab.network import Host, LabError, Process, wait_until

# The policy of a home or office: `lan` may do what it likes, `wan` may only answer, the router is there for `lan`.
POLICY = """\
version = 1

[zones.lan]
interfaces = ["lan"]

[zones.wan]
interfaces = ["wan"]

[policy]
default = "drop"
input = "drop"
output = "accept"
invalid = "drop"

[[rule]]
name = "lan-to-wan"
from = "lan"
to = "wan"
action = "accept"

[[rule]]
name = "lan-to-router"
from = "lan"
to = "self"
action = "accept"
"""

CONNTRACKD = Path(sys.executable).with_name("conntrackd")


@dataclass(frozen=True)
class Queue:
    """One line of /proc/net/netfilter/nfnetlink_queue: the truth about what got stuck or lost."""

    number: int
    waiting: int
    dropped_full: int
    dropped_socket: int
    seen: int


def queues(host: Host) -> dict[int, Queue]:
    """The queues that are bound in the namespace, by number."""
    found = {}
    for line in host.read("net/netfilter/nfnetlink_queue").splitlines():
        number, _portid, waiting, _mode, _range, full, socket_full, seen, _one = map(int, line.split())
        found[number] = Queue(number, waiting, full, socket_full, seen)
    return found


class Daemon:
    """conntrackd in a namespace with a config file and a control socket of its own. Use `daemon()`."""

    def __init__(self, router: Host, config: str, directory: Path) -> None:
        self.router = router
        self.directory = directory
        self.config_path = directory / "conntrackd.toml"
        self.socket_path = directory / "control.sock"
        self.process: Process | None = None
        self.write_config(config)

    def write_config(self, config: str) -> None:
        """Replace the config file; a running daemon does not notice by itself."""
        self.config_path.write_text(self.complete(config))

    def complete(self, config: str) -> str:
        """Keep the state of a daemon with this config in the lab, unless the config says where."""
        return config if "[state]" in config else f'{config}\n[state]\ndirectory = "{self.directory}/state"\n'

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line of `conntrackd ARGUMENTS` that speaks to this daemon."""
        return [str(CONNTRACKD), "--socket", str(self.socket_path), *map(str, arguments)]

    def cli(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `conntrackd ARGUMENTS` against this daemon. With `check`, LabError when it fails."""
        return self.router.run(*self.command(*arguments), check=check)

    def json(self, *arguments: str) -> Any:
        """What `conntrackd ARGUMENTS -o json` prints, parsed."""
        return json.loads(self.cli(*arguments, "-o", "json").stdout)

    def ask(self, command: str) -> list[dict[str, Any]]:
        """The rows of the daemon's own answer, without a command line around it, which takes longer than all else."""
        return [json.loads(row) for row in api.request(str(self.socket_path), command)]

    def flows(self) -> list[dict[str, Any]]:
        """The table, one dict per connection."""
        return self.ask("flows")

    def flow(self, protocol: str, **orig: Any) -> dict[str, Any]:
        """The one connection of this protocol whose `orig` has these values; LabError when it is not one."""
        flows = self.flows()
        found = [f for f in flows if f["protocol"] == protocol and orig.items() <= f["orig"].items()]
        if len(found) != 1:
            raise LabError(f"{len(found)} flows, not one, of {protocol} with {orig} in {json.dumps(flows, indent=1)}")
        return found[0]

    def stats(self) -> dict[str, Any]:
        """The counters."""
        (stats,) = self.ask("stats")
        return stats

    def status(self) -> dict[str, Any]:
        """The state of the daemon as a whole."""
        (status,) = self.ask("status")
        return status

    def drops(self) -> list[dict[str, Any]]:
        """The most recent drops and their reasons."""
        return self.ask("drops")

    def wait_for_drop(self, **wanted: Any) -> dict[str, Any]:
        """Wait until a packet with these values (reason, dport, ...) has been dropped; its entry."""

        def found() -> list[dict[str, Any]]:
            return [drop for drop in self.drops() if wanted.items() <= drop.items()]

        return wait_until(found, f"a drop with {wanted}")[0]

    def wait_for_empty_queues(self) -> None:
        """Wait until no packet is in the queues; LabError when one stays there."""
        wait_until(lambda: not any(queue.waiting for queue in self.queues().values()), "the queues are empty")

    def queues(self) -> dict[int, Queue]:
        """The kernel's own account of the queues."""
        return queues(self.router)

    def install_rules(self) -> None:
        """`conntrackd rules install` in the namespace."""
        self.cli("rules", "install", "--config", self.config_path)

    def remove_rules(self) -> None:
        """`conntrackd rules remove` in the namespace."""
        self.cli("rules", "remove", "--config", self.config_path)

    def launch(self, *options: str, env: Mapping[str, str] | None = None) -> Process:
        """Start `conntrackd run` and do not wait for anything."""
        argv = self.command("run", "--config", self.config_path, *options)
        self.process = self.router.start(*argv, env=env)
        return self.process

    def start(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Start `conntrackd run` and wait until it is ready: queues bound, rules installed."""
        self.launch(*options, env=env)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the daemon that was launched says that it is ready; LabError when it ends before."""
        assert self.process is not None
        self.process.wait_for_output('"event": "ready"', 20.0)

    def restart(self) -> str:
        """`conntrackd restart`: the process goes on as a new one; what was printed."""
        return self.cli("restart").stdout

    def stop(self) -> int:
        """End it as an operator would (SIGTERM); its exit code."""
        assert self.process is not None
        return self.process.stop(20.0)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        assert self.process is not None
        self.process.kill()

    def log(self) -> str:
        """What it has written to stdout and stderr."""
        assert self.process is not None
        return self.process.output()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until it has logged this so often: it writes its log beside its work."""
        wait_until(lambda: self.log().count(text) >= times, f"{text!r} is logged")


@contextmanager
def daemon(
    router: Host, config: str, *options: str, env: Mapping[str, str] | None = None, start: bool = True
) -> Iterator[Daemon]:
    """Run the daemon, which installs its rules; with `start` False it is only configured."""
    directory = Path(tempfile.mkdtemp(prefix="conntrackd-"))
    this = Daemon(router, config, directory)
    try:
        if start:
            this.start(*options, env=env)
        yield this
    finally:
        if this.process is not None:
            this.process.stop()
        shutil.rmtree(directory)
