"""What came out of a run: figures, their medians and spread, and the ratios between contestants.

A ratio is taken within each round and only then the median: what disturbs a round disturbs both of its sides.
"""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Result:
    """One measurement: its figures, or why there are none."""

    work: str
    contestant: str
    round: int
    values: dict[str, float]
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """One figure over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> "Summary":
        """Sum up at least one figure."""
        return cls(median(figures), min(figures), max(figures))


@dataclass(frozen=True)
class Ratio:
    """A goal: `combine` of what two contestants did, compared with a bound."""

    title: str
    work: str
    value: str
    left: str
    right: str  # "" when the figure of `left` itself is the matter
    bound: float
    at_most: bool
    combine: Callable[[float, float], float] = lambda left, right: left / right
    unit: str = ""

    def met(self, figure: float) -> bool:
        """Whether a figure is on the right side of the bound."""
        return figure <= self.bound if self.at_most else figure >= self.bound


def _difference_ms(left: float, right: float) -> float:
    return (left - right) / 1e3


def _itself(left: float, _right: float) -> float:
    return left


_CPU = ("udp-fixed", "cpu_us_per_packet")
_LOSSLESS = ("udp-lossless", "pps")
_SMALL = ("inprocess", "tcp_small_ns")
_FULL_SIZE = ("inprocess", "tcp_ns")
_ADDED = (1, True, _difference_ms, " ms")

RATIOS = (
    Ratio("processor time per small packet: compiled / C at both hooks", *_CPU, "g", "c-both", 0.7, True),
    Ratio("processor time per small packet: compiled / C at PREROUTING", *_CPU, "g", "c-pre", 1.2, True),
    Ratio("one TCP flow: compiled / nf_conntrack", "tcp-1", "gbit_per_s", "g", "b", 0.6, False),
    Ratio("one TCP flow: compiled / NetfilterQueue no-op", "tcp-1", "gbit_per_s", "g", "d-both", 12, False),
    Ratio("small packets without loss: compiled / NetfilterQueue no-op", *_LOSSLESS, "g", "d-both", 1.8, False),
    Ratio("small packets without loss: compiled / scapy", *_LOSSLESS, "g", "e-both", 30, False),
    Ratio("new TCP connections: compiled / NetfilterQueue no-op", "conns", "per_second", "g", "d-both", 1, False),
    Ratio("established TCP packet in process, small: pure / compiled", *_SMALL, "f", "g", 4, False),
    Ratio("established TCP packet in process, full-size: pure / compiled", *_FULL_SIZE, "f", "g", 4, False),
    Ratio("established TCP packet in process, small: compiled", *_SMALL, "g", "", 1000, True, _itself, " ns"),
    Ratio("established TCP packet in process, full-size: compiled", *_FULL_SIZE, "g", "", 1000, True, _itself, " ns"),
    Ratio("p99 added at half load, to and fro", "latency-loaded", "ping_p99_us", "g", "a", *_ADDED),
    Ratio("p99 added at half load, request", "latency-loaded", "request_p99_us", "g", "a", *_ADDED),
    Ratio("lost at half load, for long", "soak", "lost", "g", "", 0, True, _itself, " packets"),
)


@dataclass
class Results:
    """All measurements of a run, and what it ran on."""

    about: dict[str, str | float]
    results: list[Result] = field(default_factory=list)

    def figures(self, work: str, contestant: str, value: str) -> dict[int, float]:
        """A figure by round."""
        return {
            result.round: result.values[value]
            for result in self.results
            if result.work == work and result.contestant == contestant and value in result.values
        }

    def summary(self, work: str, contestant: str, value: str) -> Summary | None:
        """A figure over the rounds; None when nobody measured it."""
        figures = list(self.figures(work, contestant, value).values())
        return Summary.of(figures) if figures else None

    def ratios(self) -> Iterator[tuple[Ratio, Summary]]:
        """Those whose sides were measured within one round."""
        for ratio in RATIOS:
            left = self.figures(ratio.work, ratio.left, ratio.value)
            right = self.figures(ratio.work, ratio.right, ratio.value) if ratio.right else dict.fromkeys(left, 0.0)
            figures = [
                ratio.combine(left[n], right[n]) for n in left.keys() & right.keys() if right[n] or not ratio.right
            ]
            if figures:
                yield ratio, Summary.of(figures)


def machine() -> dict[str, str | float]:
    """What the figures hold for."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "kernel": platform.release(),
        "processor": model[0].partition(":")[2].strip() if model else platform.machine(),
        "processors": sum(line.startswith("cpu") for line in Path("/proc/stat").read_text().splitlines()) - 1,
        "python": platform.python_version(),
    }
