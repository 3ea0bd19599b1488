"""The benchmark harness: one tiny round that measures and writes its files. What it measures is not a matter here."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.lab.network import wait_until

pytest.importorskip("matplotlib", reason="needs what `make bench` and `make test` install: requirements/bench.lock")

from benchmarks.contestants import COMPILED

ROOT = Path(__file__).parents[2]
BENCH = [sys.executable, "-m", "benchmarks"]


def commands(parent: int) -> dict[int, list[str]]:
    """The processes that a process has started, and what they run."""
    pids = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    found = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
    return {pid: path.read_text().split("\0") for pid, path in found.items() if path.exists()}


def test_a_tiny_round_measures_every_contestant_and_writes_its_files(tmp_path: Path) -> None:
    # Both kinds of conntrackd only where it has been compiled (`make compile`).
    who = ["a", "b", "c-pre", "d-both", "g" if (COMPILED / ".done").exists() else "f"]
    options = ["--rounds", "1", "--seconds", "0.5", "--out", str(tmp_path)]
    done = subprocess.run(
        [*BENCH, "--quick", "--work", "udp-fixed,conns", "--contestants", ",".join(who), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(each["work"], each["contestant"]) for each in results] == [
        (work, name) for work in ("udp-fixed", "conns") for name in who
    ]
    for each in results:
        assert not each["error"]
        assert each["values"].get("per_second", 1) > 0
        # Where there is a daemon its processor time is told.
        costs = [value for name, value in each["values"].items() if name.startswith("cpu_us_per_")]
        assert all(costs)
        assert bool(costs) == (each["contestant"] not in ("a", "b"))
    text = (tmp_path / "results.md").read_text()
    assert all(f"| {name} |" in text for name in who)
    for work in "udp-fixed", "conns":
        assert f"({work}.svg)" in text
        assert ElementTree.parse(tmp_path / f"{work}.svg").getroot().tag.endswith("svg")  # noqa: S314 - our own file


def test_ctrl_c_leaves_no_namespace_and_no_process(tmp_path: Path) -> None:
    options = ["--work", "udp-full", "--contestants", "d-both", "--seconds", "60", "--out", str(tmp_path)]
    bench = subprocess.Popen([*BENCH, *options], cwd=ROOT, start_new_session=True)
    try:
        traffic = wait_until(
            lambda: [words for words in commands(bench.pid).values() if "--client" in words], "traffic runs", 60
        )
        pids = list(commands(bench.pid))
        assert len(pids) == 2  # traffic and daemon
        netns = Path("/run/netns", traffic[0][traffic[0].index("--client") + 1])
        assert netns.exists()
        bench.send_signal(signal.SIGINT)
        assert bench.wait(30) == 130
    finally:
        bench.terminate()
        bench.wait(30)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not list(netns.parent.glob(netns.name.removesuffix("client") + "*"))
    assert not list(tmp_path.iterdir())
