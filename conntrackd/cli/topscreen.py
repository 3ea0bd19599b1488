"""The screen of `conntrackd top`."""

import asyncio
import time
from typing import Any, ClassVar

import msgspec
from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Label, Static

from conntrackd import api
from conntrackd.cli.output import duration, endpoint
from conntrackd.filter import FilterError, parse

GROUPS = ("flow", "src", "dst", "zone", "rule")
SORTS = ("rate", "bytes", "packets", "age", "flows")
ROWS = 200
# A walk through a big table takes the daemon some time: it is asked again only after so many times as long.
REST = 4
COLUMNS = {
    "flow": ("RATE", "BYTES", "PACKETS", "AGE", "PROTO", "STATE", "SOURCE", "DESTINATION", "IN", "OUT", "RULE"),
    "group": ("RATE", "BYTES", "PACKETS", "FLOWS", "AGE"),
}
RIGHT = ("RATE", "BYTES", "PACKETS", "FLOWS", "AGE")
# What ends the connections of a group.
KILL = {"src": "src host {}", "dst": "dst host {}", "rule": "rule {}"}

Leading = list[api.TopFlow | api.TopGroup]


class Confirm(ModalScreen[bool]):
    """A question that y answers with yes and everything else with no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "yes"),
        Binding("n,escape,q,enter", "dismiss(False)", "no"),
    ]
    DEFAULT_CSS = """
    Confirm { align: center middle; }
    Confirm > Vertical {
        width: auto; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface;
    }
    Confirm Label { width: auto; }
    """

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Show the question."""
        with Vertical():
            yield Label(self._question, markup=False)
            yield Label("\ny  yes      n  no", markup=False)


class TopScreen(App[None]):
    """What leads, asked for again and again."""

    TITLE = "conntrackd top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 2; padding: 0 1; background: $panel; }
    #message { height: auto; padding: 0 1; color: $warning; }
    #filter { display: none; border: tall $accent; }
    #filter.asking { display: block; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space,p", "pause", "pause"),
        Binding("f,slash", "filter", "filter"),
        Binding("s", "sort", "sort"),
        Binding("g", "group", "group"),
        Binding("k,x", "kill", "kill"),
        Binding("q", "quit", "quit"),
        Binding("escape", "leave_filter", "table", show=False),
    ]

    def __init__(self, path: str, text: str, by: str, sort: str, every_s: float) -> None:
        super().__init__()
        self.filter_text = text
        self.by = by
        self.sort = sort
        self.paused = False
        self.leading: Leading = []
        self._path = path
        self._every_s = every_s
        self._top: api.Top | None = None
        self._said = self._trouble = ""
        self._columns: tuple[str, ...] = ()
        self._asked = 0  # counts the questions: an answer to one that is no longer asked is not shown

    def compose(self) -> ComposeResult:
        """Lay the screen out."""
        yield Static(id="head", markup=False)
        yield DataTable(cursor_type="row", zebra_stripes=True)
        yield Static(id="message", markup=False)
        yield Input(id="filter", placeholder="tcp and dst port 443 and src net 10.0.0.0/8 (docs/filter.md)")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self.query_one(DataTable).focus()
        self.ask()

    # --- Asking ---------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask the daemon once, beside the screen."""
        self._asked += 1
        number, args = self._asked, {"filter": self.filter_text, "by": self.by, "sort": self.sort, "limit": ROWS}
        self.run_worker(lambda: self._fetch(number, args), thread=True)

    def _fetch(self, number: int, args: dict[str, Any]) -> None:
        begun_s = time.monotonic()
        try:
            head, *rows = api.request(self._path, "top", args)
            top = msgspec.json.decode(head, type=api.Top)
            kind: type[api.TopFlow | api.TopGroup] = api.TopFlow if args["by"] == "flow" else api.TopGroup
            leading = [msgspec.json.decode(row, type=kind) for row in rows]
        except (api.DaemonNotRunningError, api.RequestError) as error:
            self.call_from_thread(self._failed, number, str(error))
            return
        self.call_from_thread(self._show, number, top, leading, time.monotonic() - begun_s)

    def _again(self, number: int, took_s: float) -> None:
        def due() -> None:
            if number == self._asked and not self.paused:
                self.ask()

        self.set_timer(max(self._every_s, REST * took_s), due)

    def _failed(self, number: int, sentence: str) -> None:
        if number == self._asked:
            self._tell(trouble=sentence)
            self._again(number, 0)

    # --- Showing --------------------------------------------------------------------------------------------------

    def _show(self, number: int, top: api.Top, leading: Leading, took_s: float) -> None:
        if number != self._asked:
            return
        self.leading, self._top = leading, top
        self._tell(trouble="")
        self._head()
        table: DataTable[Text] = self.query_one(DataTable)
        selected = self._selected()
        columns = COLUMNS["flow"] if self.by == "flow" else (*COLUMNS["group"], self.by.upper())
        if columns != self._columns:
            table.clear(columns=True)
            table.add_columns(*columns)
            self._columns = columns
            selected = None
        table.clear()
        lines = [_flow_cells(row) if isinstance(row, api.TopFlow) else _group_cells(row) for row in leading]
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        for row, cells in zip(leading, lines, strict=True):
            padded = (
                cell.rjust(width) if column in RIGHT else cell
                for cell, column, width in zip(cells, columns, widths, strict=True)
            )
            table.add_row(*map(Text, padded), key=_key(row))
        if selected is not None and selected in table.rows:
            table.move_cursor(row=table.get_row_index(selected))
        self._again(number, took_s)

    def _head(self) -> None:
        top = self._top
        if top is None:
            return
        flows = f"{top.chosen} of {top.flows} flows" if self.filter_text else f"{top.flows} flows"
        rate = "measuring" if top.rate is None else f"{_amount(top.rate)}B/s"
        total = f"{_amount(top.bytes)}B in {_amount(top.packets)} packets"
        order = f"{'' if self.by == 'flow' else f'by {self.by}, '}sorted by {self.sort}"
        line = "   ".join(("conntrackd top", flows, rate, total, order, "PAUSED" if self.paused else ""))
        self.query_one("#head", Static).update(f"{line}\nfilter: {self.filter_text or 'all'}")

    def _tell(self, *, said: str | None = None, trouble: str | None = None) -> None:
        """Show what a key has led to, which stays until the next key, or the trouble with the daemon while there is."""
        self._said = self._said if said is None else said
        self._trouble = self._trouble if trouble is None else trouble
        self.query_one("#message", Static).update(self._trouble or self._said)

    def _selected(self) -> str | None:
        table: DataTable[Text] = self.query_one(DataTable)
        if not table.is_valid_row_index(table.cursor_row):
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    # --- Keys -----------------------------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._tell(said="")
        self.paused = not self.paused
        if self.paused:
            self._asked += 1  # what is under way comes too late
            self._head()
        else:
            self.ask()

    def action_sort(self) -> None:
        """Take the next order."""
        self._tell(said="")
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        if self.sort == "flows" and self.by == "flow":
            self.sort = SORTS[0]
        self.ask()

    def action_group(self) -> None:
        """Take the next kind of groups."""
        self._tell(said="")
        self.by = GROUPS[(GROUPS.index(self.by) + 1) % len(GROUPS)]
        self.ask()

    def action_filter(self) -> None:
        """Ask for another filter."""
        self._tell(said="")
        box = self.query_one("#filter", Input)
        box.value = self.filter_text
        box.add_class("asking")
        box.focus()

    @on(Input.Submitted, "#filter")
    def filter_given(self, event: Input.Submitted) -> None:
        """Take the filter if it means something; else say what is wrong with it."""
        try:
            parse(event.value)
        except FilterError as error:
            self._tell(said=str(error))
            return
        self.filter_text = event.value.strip()
        self.action_leave_filter()
        self.ask()

    def action_leave_filter(self) -> None:
        """Go back to the table."""
        self._tell(said="")
        self.query_one("#filter", Input).remove_class("asking")
        self.query_one(DataTable).focus()

    @work
    async def action_kill(self) -> None:
        """End the connections of the row, if the operator says so twice."""
        self._tell(said="")
        chosen = self._filter_of_row()
        if chosen is None:
            return
        try:
            count = await asyncio.to_thread(self._count, chosen)
            if await self.push_screen_wait(Confirm(f"End {count} flow{'' if count == 1 else 's'}: {chosen}?")):
                killed = await asyncio.to_thread(self._kill, chosen)
                self.ask()
                self._tell(said=f"{killed} flow{'' if killed == 1 else 's'} ended: {chosen}")
        except (api.DaemonNotRunningError, api.RequestError) as error:
            self._tell(said=str(error))

    def _filter_of_row(self) -> str | None:
        """Write the filter that chooses what the row in hand shows; None, and a sentence, if none does."""
        key = self._selected()
        row = next((each for each in self.leading if _key(each) == key), None)
        if isinstance(row, api.TopFlow):
            return f"id {row.flow.id}"
        if row is None or row.by not in KILL or not row.key:
            self._tell(said="No filter chooses what is in this row: group by flow, src, dst or rule.")
            return None
        group = KILL[row.by].format(row.key)
        return f"({self.filter_text}) and {group}" if self.filter_text else group

    def _count(self, text: str) -> int:
        (row,) = api.request(self._path, "count", {"filter": text})
        return msgspec.json.decode(row, type=api.Count).count

    def _kill(self, text: str) -> int:
        return sum(1 for _ in api.request(self._path, "kill", {"filter": text}))


def _key(row: api.TopFlow | api.TopGroup) -> str:
    return str(row.flow.id) if isinstance(row, api.TopFlow) else f"{row.by} {row.key}"


def _flow_cells(row: api.TopFlow) -> list[str]:
    flow, orig, reply = row.flow, row.flow.orig, row.flow.reply
    return [
        _rate(row.rate),
        _amount(orig.bytes + reply.bytes),
        _amount(orig.packets + reply.packets),
        duration(flow.age_seconds),
        flow.protocol,
        flow.state or "-",
        endpoint(orig.src, orig.sport),
        endpoint(orig.dst, orig.dport),
        flow.in_ or "self",
        flow.out or "self",
        flow.rule,
    ]


def _group_cells(row: api.TopGroup) -> list[str]:
    numbers = [_rate(row.rate), _amount(row.bytes), _amount(row.packets), _amount(row.flows)]
    return [*numbers, duration(row.age_seconds), row.key or "(all others)"]


def _rate(rate: int | None) -> str:
    return "-" if not rate else f"{_amount(rate)}/s"


def _amount(number: float) -> str:
    """Write a number for people: 999, 1.2k, 34M."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.1f}{unit}" if unit and number < 10 else f"{number:.0f}{unit}"
