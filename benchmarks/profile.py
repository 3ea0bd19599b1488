"""`make profile`: where the time of conntrackd goes while packets pass.

perf samples all of it: kernel, interpreter, compiled modules, by library and by function, with the clock in place of
the counters that virtual machines lack. py-spy samples the Python functions; those of compiled modules it sees
through their C frames.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.contestants import contestants
from benchmarks.programs import HERE
from benchmarks.works import Bout, bout

TRAFFIC = {
    "udp": ("--udp", "30000"),
    "full": ("--udp", "0"),
    "conns": ("--conns", "32"),
}
HERTZ = "999"
LINES = 45


def _perf_report(data: Path, title: str, *options: str) -> str:
    command = ["perf", "report", "--stdio", "--input", str(data), "--percent-limit", "0.3", "-g", "none", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # What perf could not name is left out, and so are its empty columns.
    lines = [line.rstrip(" -") for line in done.stdout.splitlines() if not re.match("$|#|.*] (0x)?0{4}", line)]
    return "\n".join([f"== {title}", *lines[:LINES], ""])


def perf(here: Bout, pid: int, traffic: tuple[str, ...], seconds: float, data: Path) -> str:
    """Sample a process under load; the report."""
    record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", HERTZ, "-g", "-p", str(pid), "-o", str(data)]
    recorder = here.net.router.start(*record)
    here.blast(seconds, *traffic)
    recorder.signal(2)  # SIGINT is what ends a record in order
    recorder.wait()
    return (
        _perf_report(data, "by library", "--no-children", "--sort", "dso")
        + _perf_report(data, "by function, itself", "--no-children", "--sort", "dso,symbol")
        + _perf_report(data, "by function, with what it calls", "--children", "--sort", "symbol")
    )


def py_spy(here: Bout, pid: int, traffic: tuple[str, ...], seconds: float, native: bool, out: Path) -> None:
    """Sample a Python process under load and draw a flame graph."""
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(pid), "--rate", "200"]
    command += ["--duration", str(round(seconds)), "--output", str(out), *(["--native"] if native else [])]
    spy = here.net.router.start(*command)
    here.blast(seconds + 1, *traffic)
    if spy.wait():
        print(f"py-spy failed: {spy.output()}", file=sys.stderr)


def main() -> None:
    known = contestants()
    parser = argparse.ArgumentParser(prog="make profile", description=__doc__)
    parser.add_argument("--work", choices=TRAFFIC, default="udp")
    parser.add_argument("--contestants", default="f,g", help=f"of {', '.join(known)}; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "profile")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.contestants.split(","):
        text = arguments.out / f"{name}-{arguments.work}.txt"
        graph = text.with_suffix(".svg")
        with bout(known[name]) as here:
            if here.pid is None:
                sys.exit(f"{name} has no daemon")
            traffic = TRAFFIC[arguments.work]
            data = text.with_suffix(".perf")
            try:
                text.write_text(perf(here, here.pid, traffic, arguments.seconds, data))
            finally:
                data.unlink(missing_ok=True)
            py_spy(here, here.pid, traffic, arguments.seconds, name != "f", graph)
        print(f"{text.read_text()}\nwritten to {text} and {graph}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
