"""Tab in the real shells, beside a running daemon: commands, options, and names that only the daemon knows."""

import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from tests.lab.daemon import CONNTRACKD, POLICY, Daemon, daemon
from tests.lab.network import LabError, network
from tests.lab.traffic import tcp_pair

SETS = '[sets.banned]\ntimeout = "1h"\n[sets.admins]\n[labels]\nvoip = 0\nguest = 1\n'
CASES = (
    ("conntrackd sta", "status", "stats"),
    ("conntrackd flows -o js", "json", "jsonl"),
    ("conntrackd drops --", "--last", "--by", "--output"),
    ("conntrackd set list ", "banned", "admins"),
    ("conntrackd drops rule lan-to-", "lan-to-wan", "lan-to-router"),
    ("conntrackd trace state SYN_", "SYN_SENT", "SYN_RECV"),
)
START = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i"),
}
LOAD = {
    "bash": "bind 'set show-all-if-ambiguous on'; bind 'set page-completions off'; source {}",
    "zsh": "autoload -U compinit; compinit -D -u; setopt no_beep no_list_ambiguous; source {}",
}


@pytest.fixture(scope="module")
def fw() -> Iterator[Daemon]:
    with network() as net, daemon(net.router, POLICY + SETS) as running:
        tcp_pair(net.client, net.server, 4, 8000)
        yield running


def environment(fw: Daemon) -> dict[str, str]:
    return {
        **os.environ, "PATH": f"{CONNTRACKD.parent}:{os.environ['PATH']}", "HOME": str(fw.directory),
        "CONNTRACKD_SOCKET": str(fw.socket_path), "TERM": "xterm", "PS1": "> ", "LC_ALL": "C.UTF-8",
    }  # fmt: skip


def in_fish(fw: Daemon, typed: str) -> list[str]:
    """What fish would show: it can be asked."""
    script = fw.directory / "completion.fish"
    script.write_text(fw.cli("completion", "fish").stdout)
    command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{typed}'"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=fw.directory, env=environment(fw))
    return done.stdout.splitlines()


class Terminal:
    """An interactive shell that has loaded our script."""

    def __init__(self, shell: str, fw: Daemon) -> None:
        script = fw.directory / f"completion.{shell}"
        script.write_text(fw.cli("completion", shell).stdout)
        self._master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        termios.tcsetwinsize(slave, (50, 200))
        self._process = subprocess.Popen(
            START[shell],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(fw),
            start_new_session=True,
            cwd=fw.directory,
        )
        os.close(slave)
        self.type(LOAD[shell].format(script) + "; echo loa''ded\n")
        self.wait_for("loaded")

    def type(self, text: str) -> None:
        self.screen = ""
        os.write(self._master, text.encode())

    def wait_for(self, *words: str) -> None:
        """Wait until all of them have been shown since something was typed."""
        deadline = time.monotonic() + 20
        while not all(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", self.screen) for word in words):
            if time.monotonic() > deadline:
                raise LabError(f"waited in vain for {words} in {self.screen!r}")
            if select.select([self._master], [], [], 0.1)[0]:
                shown = os.read(self._master, 65536).decode(errors="replace")
                self.screen += re.sub(r"\x1b(\[[0-9;?>]*[a-zA-Z]|\][^\x07]*\x07|[()].|[=>])", "", shown)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture(params=list(START))
def terminal(request: pytest.FixtureRequest, fw: Daemon) -> Iterator[Terminal]:
    opened = Terminal(request.param, fw)
    yield opened
    opened.close()


def test_tab_completes_commands_options_and_live_names(terminal: Terminal) -> None:
    for typed, *expected in CASES:
        terminal.type(f"{typed}\t")
        terminal.wait_for(*expected)
        terminal.type("\x15")  # empties the line


def test_fish_completes_the_same_and_says_what_it_means(fw: Daemon) -> None:
    for typed, *expected in CASES:
        lines = in_fish(fw, typed)
        assert {line.split("\t")[0] for line in lines} >= set(expected), typed
    assert "banned\t0 entries" in in_fish(fw, "conntrackd set list ")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("trace in ", {"self", "lo", "lan", "wan"}),
        ("trace zone ", {"0"}),
        ("trace id ", {"1"}),
        ("history ", {"1"}),
        ("flow ", {"1"}),
        ("ct -L --state SYN_S", {"SYN_SENT", "SYN_SENT2"}),
        ("kill helper t", {"tftp"}),
        ("set add b", {"banned"}),
        ("label add vo", {"voip"}),
        ("label add voip label ", {"voip", "guest"}),
        ("flows label g", {"guest"}),
        ("drops tcp and not sr", {"src"}),
        ("drops rule default-f", {"default-forward"}),
        ("apply --confirm ", set()),
        ("check ", {":files"}),
        ("--socket /nowhere set list ", set()),
    ],
)
def test_words(fw: Daemon, typed: str, found: set[str]) -> None:
    lines = fw.router.run(
        CONNTRACKD, "completion", "words", "--", *typed.split(" "), env={"CONNTRACKD_SOCKET": str(fw.socket_path)}
    ).stdout.splitlines()
    assert {line.partition("\t")[0] for line in lines} == found


def test_files_are_completed_where_a_file_is_wanted(fw: Daemon) -> None:
    (fw.directory / "only-this.toml").touch()
    assert in_fish(fw, "conntrackd check only-")[0].split("\t")[0] == "only-this.toml"


def test_unknown_shell(fw: Daemon) -> None:
    done = fw.cli("completion", "tcsh", check=False)
    assert done.returncode == 2
    assert "bash" in done.stderr
