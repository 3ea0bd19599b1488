"""`make bench`: run the chosen works on the chosen contestants, round by round, and write what came out.

Within a round every work goes once over all contestants before the next work, in an order that turns around from round
to round: whatever else happens on the machine hits all alike.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import inprocess, report
from benchmarks.contestants import Contestant, contestants
from benchmarks.programs import HERE
from benchmarks.results import Result, Results, machine
from benchmarks.works import WORKS, Round, Settings, Work
from tests.lab.network import LabError

INPROCESS = "inprocess"


def chosen(wanted: str, known: Iterable[str], by_default: Iterable[str]) -> list[str]:
    """The names that a list means: `udp` is `udp`, or all that begin with `udp-` and run by default."""
    if not wanted:
        return list(by_default)
    names: set[str] = set()
    for word in wanted.split(","):
        found = [name for name in known if name == word]
        found = found or [name for name in by_default if name.startswith(f"{word}-")]
        if not found:
            sys.exit(f"nothing is called {word!r}; there are {', '.join(known)}")
        names.update(found)
    return [name for name in known if name in names]


def measure(work: Work, contestant: Contestant, this: Round, number: int) -> Result:
    """One measurement; its failure is a result, too, and the others go on."""
    try:
        values = work.do(this, contestant)
    except LabError as error:
        return Result(work.name, contestant.name, number, {}, str(error))
    return Result(work.name, contestant.name, number, values)


def run(
    works: list[Work], who: list[Contestant], rounds: int, settings: Settings, quick: bool, in_process: bool
) -> list[Result]:
    """All measurements, each shown when it is done."""
    results: list[Result] = []

    def add(result: Result, unit: str, value: str) -> None:
        results.append(result)
        text = f"{result.values[value]:12,.2f} {unit}" if value in result.values else f"  {result.error or 'no figure'}"
        print(f"round {result.round}  {result.work:15} {result.contestant:8} {text}", flush=True)

    for number in range(1, rounds + 1):
        this = Round(settings)
        for work in works:
            if not work.every_round and number > 1:
                continue
            for contestant in who if number % 2 else who[::-1]:
                if not work.contestants or contestant.name in work.contestants:
                    add(measure(work, contestant, this, number), work.unit, work.value)
        if in_process:
            for name, values, error in inprocess.measure(quick):
                add(Result(INPROCESS, name, number, values, error), "ns", inprocess.VALUE)
    return results


def main() -> int:
    known = contestants()
    by_default = [name for name, each in known.items() if each.by_default]
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--work", default="", help=f"of {', '.join([*WORKS, INPROCESS])}; default: all")
    parser.add_argument("--contestants", default="", help=f"of {', '.join(known)}; default: all but -naive")
    parser.add_argument("--rounds", type=int, default=0, help="default: 3, quick 1")
    parser.add_argument("--seconds", type=float, default=0.0, help="per measurement; default: 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="a short look: fewer contestants and steps")
    parser.add_argument("--out", type=Path, help="directory for the results")
    arguments = parser.parse_args()

    settings = Settings()
    if arguments.quick:
        settings = Settings(seconds=1.0, step_seconds=0.3, steps=5, soak_seconds=5.0)
        by_default = [name for name in by_default if not name.endswith("-pre")]
    if arguments.seconds:
        settings.seconds = arguments.seconds
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    names = chosen(arguments.work, [*WORKS, INPROCESS], [*WORKS, INPROCESS])
    who = chosen(arguments.contestants, known, by_default)
    complete = not (arguments.work or arguments.contestants or arguments.quick)
    out = arguments.out or HERE / "results" / ("" if complete else "partial")

    # Being ended from outside takes the networks down as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    results = run(
        [WORKS[name] for name in names if name in WORKS],
        [known[name] for name in who],
        rounds,
        settings,
        arguments.quick,
        INPROCESS in names,
    )
    about = machine() | {
        "rounds": rounds,
        "seconds_per_measurement": settings.seconds,
        "seconds_in_all": round(time.monotonic() - begin),
    }
    report.write(out, Results(about, results), {name: known[name].title for name in who})
    print(f"\n{(out / report.MARKDOWN).read_text()}\nwritten to {out}/")
    return 1 if any(result.error for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
