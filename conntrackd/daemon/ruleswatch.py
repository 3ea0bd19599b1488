"""Looks whether the kernel's rules are still as they were installed, and puts them back: `[rules] watch`.

The kernel tells nobody when iptables-legacy changes something, so that one has to look. A thread does, for a moment and
every few seconds, and no packet waits for it; the loop makes of it what there is to count and to say, once a second.

What an operator takes out by `conntrackd rules remove` stays out until it is there again: the command asks us for that.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import structlog

from conntrackd import api
from conntrackd.config import Rules
from conntrackd.daemon import rules
from conntrackd.daemon.control import Asked
from conntrackd.daemon.health import ERROR, WARNING
from conntrackd.daemon.rulescheck import SHOWN, Deviation, Saved, compare, parse

MINUTE_MS: Final = 60_000
REPAIRS_MAX: Final = 3  # in a minute; more is a fight, in which every repair waits twice as long as the one before
PAUSE_MAX_MS: Final = 60_000

log = structlog.get_logger()


@dataclass
class Look:
    """What came of one look, which may have gone on to a repair."""

    wrong: list[Deviation] = field(default_factory=list)
    repaired: bool = False
    error: str = ""  # why it could neither look nor repair


class RulesWatch:
    """Counts the changes and the repairs. It is at rest until it is told what was installed."""

    def __init__(self) -> None:
        self.changed = 0
        self.repaired = 0
        self.failed = 0
        self._chains: dict[str, list[rules.Chain]] = {}
        self._installed: dict[str, Saved] = {}
        self._seen: dict[str, str] = {}  # by iptables command: the listing in which nothing was wrong
        self._thread: threading.Thread | None = None
        self._look = Look()
        self._wrong: list[Deviation] = []
        self._error = ""
        self._look_ms = 0  # when the next look is due,
        self._repair_ms = 0  # and from when on it may repair
        self._pause_ms = 0  # between two repairs, after failures and in a fight
        self._fight = False  # another program undoes what we repair
        self._repairs_ms: list[int] = []  # when it repaired within the last minute
        self._alone = False  # an operator takes the rules out,
        self._alone_ms = 0  # and from when on rules in place mean that they were put back, or never taken out

    def begin(self, chains: dict[str, list[rules.Chain]], installed: dict[str, Saved]) -> None:
        """Watch these rules from now on, which were asked for and installed, by iptables command."""
        self._chains, self._installed = chains, installed

    def rows(self, asked: Asked) -> Iterator[api.Done | None] | None:
        """Begin to answer a command; None if it is another."""
        if asked.command != "let_go":
            return None
        if not asked.may_change():
            raise api.RequestError(f"Having the rules left out needs root, and you are {asked.who()}.")
        log.warning("rules_left_alone", who=asked.who(), pid=asked.pid)
        self._alone, self._alone_ms = True, 0
        return self._answer()

    def _answer(self) -> Iterator[api.Done | None]:
        while self.busy():  # with a repair, perhaps, that was begun before
            yield None
        yield api.Done(
            "The daemon runs on, and leaves the rules out until `conntrackd rules install` or its next start. "
            "Until then packets pass unfiltered."
        )

    def busy(self) -> bool:
        """Whether iptables is at work for us."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until iptables is no longer at work for us; that may take it as long as another holds its lock."""
        if self._thread is not None:
            self._thread.join()

    def tick(self, now_ms: int, settings: Rules) -> None:
        """See what came of the last look, and begin the next when it is due; to be called about once a second."""
        if self.busy():
            return
        wanted = settings.watch != "off" and settings.at_start == "install"
        if self._thread is not None:
            self._thread = None
            if wanted:
                self.judge(self._look, now_ms, settings.watch_every)
        if not wanted:
            self._wrong, self._error = [], ""
        elif self._installed and now_ms >= self._look_ms:
            self._look_ms = now_ms + settings.watch_every
            self._look = Look()
            repair = settings.watch == "repair" and now_ms >= self._repair_ms and not self._alone
            self._thread = threading.Thread(target=self._work, args=(self._look, repair), name="rules", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                self.judge(Look(error="The system lets us start no thread."), now_ms, settings.watch_every)

    def _work(self, look: Look, repair: bool) -> None:
        look.error = "The rules could not be looked at because of a fault of conntrackd: see its log."
        try:
            for tool, wanted in self._installed.items():
                text = rules.listed(tool)
                if text != self._seen.get(tool):
                    wrong = list(compare(tool, parse(text), wanted))
                    look.wrong += wrong
                    self._seen[tool] = "" if wrong else text
            if look.wrong and repair:
                rules.install(self._chains)
                look.repaired = True
            look.error = ""
        except rules.RulesError as error:
            look.error = str(error)

    def judge(self, look: Look, now_ms: int, every_ms: int) -> None:
        """Count and say what came of a look, and find out when rules may be put back again."""
        self._repairs_ms = [at for at in self._repairs_ms if now_ms - at < MINUTE_MS]
        if self._alone:
            if look.wrong:
                self._alone_ms = now_ms
            elif not self._alone_ms:
                self._alone_ms = now_ms + MINUTE_MS
            self._alone = bool(look.wrong or look.error) or now_ms < self._alone_ms
        if look.wrong and look.wrong != self._wrong and not self._alone:
            self.changed += 1
            log.warning("rules_changed", what=[each.text for each in look.wrong])
        elif self._wrong and not look.wrong and not look.error:
            log.info("rules_in_place")
        self._error = look.error
        if look.error:
            self.failed += 1
            self._look_ms = self._slow_down(now_ms, every_ms)
            log.warning("rules_not_watched", error=look.error, again_in_seconds=self._pause_ms // 1000)
        elif look.repaired:
            self.repaired += 1
            self._repairs_ms.append(now_ms)
            log.warning("rules_repaired", repairs=self.repaired)
            self._fight |= len(self._repairs_ms) > REPAIRS_MAX
            self._pause_ms *= self._fight
            if self._fight:
                self._slow_down(now_ms, every_ms)
                log.warning("rules_contested", again_in_seconds=self._pause_ms // 1000)
        elif not look.wrong and not self._repairs_ms:
            self._fight = False
            self._pause_ms = 0
        if look.wrong or not look.error:
            self._wrong = [] if look.repaired else look.wrong

    def _slow_down(self, now_ms: int, every_ms: int) -> int:
        self._pause_ms = min(max(self._pause_ms, every_ms) * 2, max(PAUSE_MAX_MS, every_ms))
        self._repair_ms = now_ms + self._pause_ms
        return self._repair_ms

    def problems(self) -> Iterator[api.Problem]:
        """Name what is wrong with the rules now."""
        if self._wrong:
            severity = WARNING if all(each.mild for each in self._wrong) else ERROR
            text = " ".join(each.text for each in self._wrong[:SHOWN])
            why = "`conntrackd rules remove` was run here: " if self._alone else ""
            yield api.Problem("rules_wrong", severity, f"{why}{text} Run `conntrackd rules install`.")
        if self._error:
            yield api.Problem("rules_not_watched", ERROR, f"Nobody sees what becomes of the rules: {self._error}")
