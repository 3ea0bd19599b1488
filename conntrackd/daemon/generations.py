"""Generations of the policy: loaded beside the packets, put in force between two of them, and gone back on.

A configuration is read, checked and compiled in a thread of its own, while packets go on under the policy in force.
What is wrong with it is wrong before anything has changed. A generation that is to be confirmed and is not goes back by
itself to the last one that was not on trial: what nobody has confirmed is never gone back to, or two trials, one after
the other, would leave the first in force for good.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import structlog

from conntrackd import api
from conntrackd import config as config_file
from conntrackd.config import Config, ConfigErrors
from conntrackd.configfiles import SourceFile, read
from conntrackd.core.conn import Conn
from conntrackd.core.sysctl import SETTINGS, Sysctl
from conntrackd.daemon.control import Asked, arguments
from conntrackd.daemon.links import Links
from conntrackd.daemon.notify import Notify
from conntrackd.hooks import Firewall, still_allowed
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.compile import inherit
from conntrackd.policy.ruleset import NO_ZONE, Ruleset

HISTORY_MAX: Final = 50
REJUDGE_SLICE: Final = 256  # connections judged anew in one turn of the loop
SWITCH_S: Final = 0.0005  # while a configuration is loaded: how long the loop may wait for the interpreter
TIMEOUTS_MAX: Final = 255  # different settings that rules give connections (Conn.timeouts is a byte)
BY_TIMER: Final = Asked("timer", {}, 0, 0)

log = structlog.get_logger()


@dataclass
class Generation:
    """One policy that was in force."""

    number: int
    how: str  # start, reload, apply, rollback, timer
    who: str
    at: float  # seconds since the epoch
    files: Sequence[SourceFile]
    rules: int
    config: Config | None  # kept of the one in force and of the one that is gone back to
    ended: str = ""  # replaced, rolled back


class Loading:
    """A configuration on its way: loaded in a thread, put in force by the loop."""

    def __init__(self, how: str, asked: Asked, files: Sequence[SourceFile] | Config | None, confirm_ms: int) -> None:
        self.how = how
        self.asked = asked
        self.files = files  # None: the daemon's own file
        self.confirm_ms = confirm_ms
        self.done = False
        self.config: Config | None = None
        self.ruleset: Ruleset | None = None
        self.errors: ConfigErrors | None = None
        self.failure = ""
        self.lasts = True  # the daemon's own file, which the next start reads, is the same
        self.outcome: api.Change | None = None


class Generations:
    """The policy in force, those before it, and the way from one to the next. `now_ms` is set by the loop."""

    def __init__(self, config: Config, file: str, fw: Firewall, links: Links, notify: Notify) -> None:
        self.now_ms = 0
        self.file = file
        self.accept_on_error = config.exception.internal_error == "accept"
        self._fw = fw
        self._links = links
        self._notify = notify
        self.number = 1
        self.failed_at = 0.0  # when a policy was refused, in seconds since the epoch; 0 if the last one was not
        self.failed_file = ""  # and which
        self._loading: Loading | None = None
        self._deadline_ms = 0  # of the generation that is to be confirmed; 0: there is none
        self._previous: Generation | None = None  # what is gone back to
        self._lasts = True  # the policy in force is that of the daemon's own file
        self._sweep: Iterator[Conn] | None = None
        self.history = [_generation(1, "start", "conntrackd", config)]
        self.fingerprint = fingerprint(config)
        self.interfaces_gone = 0  # or out of their zones, for they have another name
        self.set_links()
        self._set_timeouts(fw.ruleset)

    def resume(self, number: int, config: str) -> None:
        """Count on from the generation before a restart: it is still in force if its configuration is this one."""
        same = config == self.fingerprint
        self.number = number if same else number + 1
        self._fw.ruleset.generation = self.history[-1].number = self.number
        in_force = self.history[-1].config
        if not same and in_force is not None:
            self._begin_rejudging(in_force)

    # --- Commands -------------------------------------------------------------------------------------------------

    def rows(self, asked: Asked) -> "Iterator[api.Change | api.GenerationRow | api.SourceText | None] | None":
        """Begin to answer a command; None if it is none of these."""
        if asked.command == "history":
            return iter(self._history())
        if asked.command == "config":
            return iter(self._texts(arguments(asked, api.ConfigArgs).generation))
        if asked.command in ("reload", "apply", "confirm", "rollback"):
            if not asked.may_change():
                raise api.RequestError(f"Changing the policy needs root, and you are {asked.who()}.")
            return self._change(asked)
        return None

    def _change(self, asked: Asked) -> Iterator[api.Change | None]:
        if asked.command == "confirm":
            return iter([self._confirm(asked)])
        if self._loading is not None:
            raise api.RequestError("Another change of the policy is being loaded: try again.")
        if asked.command == "rollback":
            if self._previous is None:
                return iter([self._failed("There is no generation to go back to.")])
            return _outcome(self._roll_back(asked))
        if asked.command == "reload":
            return _outcome(self._load(Loading("reload", asked, None, 0)))
        wanted = arguments(asked, api.ApplyArgs)
        files = [SourceFile(file.name, file.text.encode()) for file in wanted.files]
        return _outcome(self._load(Loading("apply", asked, files, wanted.confirm_ms)))

    def _confirm(self, asked: Asked) -> api.Change:
        if not self._deadline_ms:
            return self._failed("No generation waits to be confirmed.")
        self._deadline_ms = 0
        log.info("policy_confirmed", generation=self.number, who=asked.who(), pid=asked.pid)
        message = f"Generation {self.number} stays."
        return api.Change(ok=True, generation=self.number, message=message, remarks=self._goes_at_next_start())

    def _goes_at_next_start(self) -> list[str]:
        """Say so if the daemon's own file is another than the policy in force."""
        if self._lasts:
            return []
        prints = f"`conntrackd history {self.number}` prints what is in force, to be put there"
        return [f"The next start reads {self.file}, which is another: {prints}."]

    def _failed(self, sentence: str) -> api.Change:
        return api.Change(ok=False, generation=self.number, message=sentence)

    def _history(self) -> Iterator[api.GenerationRow]:
        for entry in self.history:
            yield self.row(entry)

    def row(self, entry: Generation | None = None) -> api.GenerationRow:
        """Describe a generation; without one, the one that is in force."""
        entry = entry or self.history[-1]
        state = entry.ended or "in force"
        trial_s = self.trial_seconds()
        if entry is self.history[-1] and trial_s is not None:
            state = f"unconfirmed, ends in {trial_s} s"
        return api.GenerationRow(
            generation=entry.number,
            time=api.timestamp(entry.at),
            who=entry.who,
            how=entry.how,
            file=entry.files[0].name,
            rules=entry.rules,
            state=state,
        )

    def trial_seconds(self) -> int | None:
        """How long the policy in force stays if nobody confirms it; None: it is not on trial."""
        return max(0, self._deadline_ms - self.now_ms) // 1000 if self._deadline_ms else None

    def _texts(self, number: int) -> Iterator[api.SourceText]:
        for entry in self.history:
            if entry.number == (number or self.number):
                return iter([api.SourceText(file.name, file.text.decode()) for file in entry.files])
        raise api.RequestError(f"Generation {number} is not remembered: `conntrackd history` lists those that are.")

    # --- Loading --------------------------------------------------------------------------------------------------

    def _load(self, loading: Loading) -> Loading:
        self._loading = loading
        self._notify.reloading()
        sys.setswitchinterval(SWITCH_S)
        threading.Thread(target=self._work, args=(loading,), name="load", daemon=True).start()
        return loading

    def _work(self, loading: Loading) -> None:
        """Do, beside the packets, all that can be done before the new policy is in force."""
        try:
            if isinstance(loading.files, Config):
                loading.config = loading.files
            else:
                loading.config = config_file.check(loading.files or read(self.file))
            loading.ruleset = compile_ruleset(loading.config, self.number + 1)
            loading.lasts = loading.files is None or self._is_own_file(loading.config)
        except ConfigErrors as errors:
            loading.errors = errors
        except Exception:
            log.exception("policy_failed")
            loading.failure = "The configuration could not be loaded because of a fault of conntrackd: see its log."
        loading.done = True

    def _is_own_file(self, config: Config) -> bool:
        try:
            own = read(self.file)
        except ConfigErrors:
            return False
        return [file.text for file in own] == [file.text for file in config.files().files]

    def _roll_back(self, asked: Asked) -> Loading:
        assert self._previous is not None
        self._deadline_ms = 0
        return self._load(Loading("timer" if asked is BY_TIMER else "rollback", asked, self._previous.config, 0))

    def busy(self) -> bool:
        """Whether the loop is to come back soon: something is being loaded, or connections are judged anew."""
        return self._loading is not None or self._fw.rejudging

    def turn(self) -> None:
        """Go on with what is under way; to be called in every turn of the loop while `busy`."""
        if self._fw.rejudging:
            self._rejudge()
        loading = self._loading
        if loading is None or not loading.done:
            return
        self._loading = None
        sys.setswitchinterval(0.005)
        if loading.config is None or loading.ruleset is None:
            errors = loading.errors.errors if loading.errors is not None else []
            message = f"{loading.failure or 'The configuration has mistakes'}; generation {self.number} stays in force."
            loading.outcome = self._failed(message)
            loading.outcome.errors = [api.Mistake(**vars(error)) for error in errors]
            self.failed_at = time.time()
            self.failed_file = loading.files[0].name if isinstance(loading.files, list) else self.file
            log.warning(
                "policy_refused", file=self.failed_file, how=loading.how, who=loading.asked.who(), errors=len(errors)
            )
        else:
            loading.outcome = self._install(loading, loading.config, loading.ruleset)
        self._notify.reloaded(loading.outcome.message)

    def tick(self) -> None:
        """Go back if time to confirm is up; to be called about once a second."""
        if self._deadline_ms and self.now_ms >= self._deadline_ms and self._loading is None:
            log.warning("policy_not_confirmed", generation=self.number)
            self._roll_back(BY_TIMER)

    # --- Putting in force -----------------------------------------------------------------------------------------

    def _install(self, loading: Loading, config: Config, ruleset: Ruleset) -> api.Change:
        """Put a policy in force. Nothing in here can fail."""
        fw, before = self._fw, self.history[-1]
        remarks = _needs_restart(before.config, config)
        previous = before
        if self._deadline_ms and self._previous is not None:
            previous = self._previous
            remarks.append(f"Generation {self.number} was not confirmed: a rollback goes back to {previous.number}.")
        inherit(ruleset, fw.ruleset, self.now_ms)
        self.failed_at = 0.0
        self.number = ruleset.generation
        fw.net.configure(config.sysctl())
        self._set_timeouts(ruleset)
        fw.ruleset = ruleset
        fw.revoked.clear()
        self.set_links()
        self.accept_on_error = config.exception.internal_error == "accept"
        self.fingerprint = fingerprint(config)
        self._lasts = loading.lasts
        self._begin_rejudging(config)
        self._deadline_ms = self.now_ms + loading.confirm_ms if loading.confirm_ms else 0
        before.ended = "rolled back" if loading.how in ("rollback", "timer") else "replaced"
        for entry in self.history:
            if entry is not previous:
                entry.config = None
        self._previous = previous
        who = "nobody confirmed" if loading.how == "timer" else f"{loading.asked.who()} (process {loading.asked.pid})"
        self.history.append(_generation(self.number, loading.how, who, config))
        del self.history[:-HISTORY_MAX]
        log.info(
            "policy_in_force",
            generation=self.number,
            how=loading.how,
            who=who,
            rules=len(config.rule),
            confirm_seconds=loading.confirm_ms // 1000,
            lasts=loading.lasts,
        )
        message = f"Generation {self.number} is in force."
        if loading.confirm_ms:
            message = (
                f"Generation {self.number} is in force for {loading.confirm_ms // 1000} s: "
                "`conntrackd confirm` keeps it, otherwise generation "
                f"{previous.number} comes back."
            )
        else:
            remarks += self._goes_at_next_start()
        return api.Change(ok=True, generation=self.number, message=message, remarks=remarks)

    def config(self) -> Config:
        """Give the configuration in force."""
        config = self.history[-1].config
        assert config is not None
        return config

    def set_links(self) -> None:
        """Tell the policy and the tracker which interfaces there are; to be called whenever they change."""
        ruleset, names = self._fw.ruleset, self._links.names
        before = ruleset.zone_of
        ruleset.set_links(self._links.absent | names)
        now = ruleset.zone_of
        self.interfaces_gone += sum(zone not in (NO_ZONE, now.get(index, NO_ZONE)) for index, zone in before.items())
        zones = {index: ruleset.conntrack_zones.get(now.get(index, NO_ZONE), 0) for index in names}
        self._fw.net.zones = {index: zone for index, zone in zones.items() if zone}

    def _set_timeouts(self, ruleset: Ruleset) -> None:
        """Number the settings that rules give their connections. Those of older generations keep their numbers."""
        known = self._fw.net.timeouts
        for rule in ruleset.rules:
            if rule.timeouts is None:
                continue
            wanted = _values(rule.timeouts)
            found = [number for number, settings in enumerate(known, start=1) if _values(settings) == wanted]
            if not found and len(known) < TIMEOUTS_MAX:
                known.append(rule.timeouts)
                found = [len(known)]
            if not found:
                log.warning("timeouts_exhausted", rule=rule.name, limit=TIMEOUTS_MAX)
            rule.timeouts_number = found[0] if found else 0

    def _begin_rejudging(self, config: Config) -> None:
        self._fw.rejudging = config.reload.rejudge
        self._sweep = self._fw.net.table.connections() if self._fw.rejudging else None

    def _rejudge(self) -> None:
        """Judge a few connections anew. Until all are, each is at its next packet, too (hooks.py)."""
        assert self._sweep is not None
        for _ in range(REJUDGE_SLICE):
            ct = next(self._sweep, None)
            if ct is None:
                self._fw.rejudging = False
                self._sweep = None
                return
            still_allowed(self._fw, ct, self.now_ms)


def _outcome(loading: Loading) -> Iterator[api.Change | None]:
    while loading.outcome is None:
        yield None
    yield loading.outcome


def _generation(number: int, how: str, who: str, config: Config) -> Generation:
    return Generation(number, how, who, time.time(), config.files().files, len(config.rule), config)


def fingerprint(config: Config) -> str:
    """Tell configurations apart by their text."""
    digest = sha256()
    for file in config.files().files:
        digest.update(len(file.text).to_bytes(8, "big") + file.text)
    return digest.hexdigest()


def _values(sysctl: Sysctl) -> list[int]:
    return [getattr(sysctl, name) for name in SETTINGS]


def _needs_restart(before: Config | None, after: Config) -> list[str]:
    """Say what of a configuration counts from the next start on."""
    if before is None:
        return []
    changed = [
        f"queue.{name}"
        for name in type(after.queue).model_fields
        if getattr(before.queue, name) != getattr(after.queue, name)
    ]
    changed += [
        f"exception.{name}"
        for name in ("queue_overflow", "suspend")
        if getattr(before.exception, name) != getattr(after.exception, name)
    ]
    remarks = []
    if changed:
        then = "" if after.rules.at_start == "install" else ", after `conntrackd rules install`"
        remarks.append(f"{', '.join(changed)}: counts from the next start on{then}.")
    if before.metrics != after.metrics:
        remarks.append("metrics.listen: counts from the next start on.")
    return remarks
