"""The report of a run: ratios first, then every figure, as Markdown, JSON and charts."""

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.results import Results, Summary
from benchmarks.works import WORKS

MARKDOWN = "results.md"
JSON = "results.json"

# The tables: a work, and which of its figures are shown under which heading.
TABLES: dict[str, dict[str, str]] = {
    "tcp-1": {"Gbit/s": "gbit_per_s", "retransmits": "retransmits"},
    "tcp-8": {"Gbit/s": "gbit_per_s", "retransmits": "retransmits"},
    "udp-fixed": {
        "us per packet": "cpu_us_per_packet",
        "us of the whole machine": "machine_us_per_packet",
        "packets/s": "rate",
        "loss": "loss",
    },
    "udp-full": {"packets/s through": "delivered_pps", "packets/s sent": "sent_pps", "queue drops": "queue_drops"},
    "udp-lossless": {"packets/s": "pps", "limited by the sender": "sender_bound"},
    "conns": {
        "connections/s": "per_second",
        "us per connection": "cpu_us_per_connection",
        "us of the whole machine": "machine_us_per_connection",
        "p50 us": "p50_us",
        "p99 us": "p99_us",
        "failed": "failed",
    },
    "latency-idle": {"p50 us": "ping_p50_us", "p99 us": "ping_p99_us", "p99.9 us": "ping_p999_us", "lost": "lost"},
    "latency-loaded": {
        "packets/s beside": "rate",
        "p50 us": "ping_p50_us",
        "p99 us": "ping_p99_us",
        "p99.9 us": "ping_p999_us",
        "request p50 us": "request_p50_us",
        "request p99 us": "request_p99_us",
        "request p99.9 us": "request_p999_us",
        "lost": "lost",
    },
    "soak": {
        "packets/s": "rate",
        "lost": "lost",
        "p99 us": "ping_p99_us",
        "p99.9 us": "ping_p999_us",
        "max us": "ping_max_us",
    },
    "inprocess": {
        "TCP, full-size and ACK, ns": "tcp_ns",
        "TCP, small and ACK, ns": "tcp_small_ns",
        "UDP, small, ns": "udp_ns",
    },
}
TITLES = {name: work.title for name, work in WORKS.items()} | {"inprocess": "Established packet within one process"}


def write(out: Path, results: Results, titles: dict[str, str]) -> None:
    """Write everything into a directory. `titles` are those of the contestants, in the order of the tables."""
    out.mkdir(parents=True, exist_ok=True)
    everything = {
        "about": results.about,
        "ratios": [
            {"title": ratio.title, "bound": ratio.bound, "at_most": ratio.at_most, **asdict(summary)}
            for ratio, summary in results.ratios()
        ],
        "results": [asdict(result) for result in results.results],
    }
    (out / JSON).write_text(json.dumps(everything, indent=1) + "\n")
    names = dict.fromkeys([*titles, *(result.contestant for result in results.results)])
    titles = {name: titles.get(name, name) for name in names}
    charts = [work for work in WORKS if _chart(out, results, work, titles)]
    (out / MARKDOWN).write_text("\n".join(_markdown(results, titles, charts)) + "\n")


def _markdown(results: Results, titles: dict[str, str], charts: list[str]) -> list[str]:
    lines = ["# Results", "", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.about.items())]
    lines += ["", "Medians over the rounds; lowest and highest in brackets. How it is measured: docs/benchmarks.md."]
    rows = [
        [ratio.title, _shown(summary) + ratio.unit, f"{'<=' if ratio.at_most else '>='} {ratio.bound:g}{ratio.unit}",
         "yes" if ratio.met(summary.median) else "**no**"]
        for ratio, summary in results.ratios()
    ]  # fmt: skip
    if rows:
        lines += ["", "## Ratios", "", *_table(["", "ratio", "goal", "met"], rows)]
    for work, columns in TABLES.items():
        rows = []
        for name, title in titles.items():
            summaries = {head: results.summary(work, name, value) for head, value in columns.items()}
            if any(summaries.values()):
                rows.append([name, title, *(_shown(each) if each else "-" for each in summaries.values())])
        if rows:
            lines += ["", f"## {TITLES[work]} (`{work}`)", "", *_table(["", "", *columns], rows)]
            if work in charts:
                lines += ["", f"![{TITLES[work]}]({work}.svg)"]
    failures = [result for result in results.results if result.error]
    if failures:
        lines += ["", "## Failed", ""]
        lines += [f"- {each.work}, {each.contestant}, round {each.round}: {each.error}" for each in failures]
    return lines


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _number(figure: float) -> str:
    """Three figures are enough, and no exponents."""
    if figure and abs(figure) < 100:
        return f"{figure:.3g}"
    return f"{figure:,.0f}"


def _shown(summary: Summary) -> str:
    low, middle, high = map(_number, (summary.low, summary.median, summary.high))
    return middle if low == high else f"{middle} ({low}-{high})"


def _color(contestant: str) -> str:
    """Make conntrackd stand out."""
    return "#2a6db0" if contestant in ("f", "g") else "#9fb6cc"


def _chart(out: Path, results: Results, name: str, titles: dict[str, str]) -> bool:
    """Draw the bars of a work, one per contestant with its spread; False when there is nothing to draw."""
    work = WORKS[name]
    bars = {contestant: results.summary(name, contestant, work.value) for contestant in titles}
    if not any(summary and summary.median for summary in bars.values()):
        return False
    shown = [(contestant, summary) for contestant, summary in reversed(bars.items()) if summary is not None]
    figure = Figure(figsize=(9, 1 + 0.4 * len(shown)), layout="constrained")  # inches; the first is drawn at the bottom
    axes = figure.subplots()
    axes.barh(
        [f"{contestant}  {titles[contestant]}:  {_number(summary.median)}" for contestant, summary in shown],
        [summary.median for _, summary in shown],
        xerr=(
            [summary.median - summary.low for _, summary in shown],
            [summary.high - summary.median for _, summary in shown],
        ),
        color=[_color(contestant) for contestant, _ in shown],
        ecolor="#444444",
        capsize=3,
    )
    axes.set_title(f"{work.title} ({work.unit})")
    # Without a date and with fixed ids the same figures make the same file.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    return True
