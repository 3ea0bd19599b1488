"""The daemon: one thread, one loop over the queues, the control socket, link changes and signals.

The postrouting queue goes first, for its packets have cost us work already, and the prerouting queue yields
after a few: so under a flood what was let in gets out, and timers and clients get their turn.
"""

import faulthandler
import gc as garbage
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from types import FrameType
from typing import Final

import msgspec
import structlog

from conntrackd import api
from conntrackd import config as config_file
from conntrackd.config import Config, ConfigErrors
from conntrackd.core.conntrack import gc
from conntrackd.core.net import Conntrack
from conntrackd.daemon import handover, packetlog, rules
from conntrackd.daemon import log as log_setup
from conntrackd.daemon.answerer import Answerer
from conntrackd.daemon.answers import Answers
from conntrackd.daemon.coalescing import Coalescing
from conntrackd.daemon.control import Asked, Control, ControlError
from conntrackd.daemon.deputy import Deputy, appoint, keep_only, serve
from conntrackd.daemon.dropanswers import DropAnswers
from conntrackd.daemon.exporter import Exporter, ExporterError
from conntrackd.daemon.faults import Faults
from conntrackd.daemon.flowanswers import FlowAnswers
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.handover import Restart
from conntrackd.daemon.health import WARNING, Health
from conntrackd.daemon.hugepages import HugePages
from conntrackd.daemon.links import Links
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.nfnetlink import NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO
from conntrackd.daemon.notify import Notify
from conntrackd.daemon.policyanswers import PolicyAnswers
from conntrackd.daemon.queue import CONFIRM_BUDGET, TRACK_BUDGET, Queue, QueueError
from conntrackd.daemon.rulesjob import RulesJob
from conntrackd.daemon.ruleswatch import RulesWatch
from conntrackd.daemon.simulate import Parts, SimulateError
from conntrackd.daemon.simulate import parts as simulate_parts
from conntrackd.daemon.state import State
from conntrackd.daemon.statusanswers import StatusAnswers
from conntrackd.daemon.topanswers import TopAnswers
from conntrackd.daemon.trace import Tracing
from conntrackd.daemon.watch import TableWatch
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.values import endpoint

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

TICK_MS: Final = 1000  # how often the control socket looks for clients that hang
STATUS_MS: Final = 5000  # how often the service manager is told how we are
EVENTS_MAX: Final = 3  # two queues and all else
RESERVE_BYTES: Final = 8 << 20  # to go on with when there is no more memory
IDLE_MS: Final = 1 << 30  # while nothing is under way beside the packets
SOON_MS: Final = 5  # while something is under way beside the packets
DRAIN_MS: Final = 1000  # how long a stopping daemon gives verdicts to what already waits

log = structlog.get_logger()


def run(file: str, socket_path: str, simulate: str | None, rehearse: bool = False) -> int:
    """Run the daemon in the foreground until SIGTERM or SIGINT; returns the exit code.

    `rehearse`: only go as far as one can without taking hold of anything.
    """
    faulthandler.enable()  # a watchdog's SIGABRT says where the loop is stuck
    try:
        parts = simulate_parts(simulate)
        config = config_file.load(file)
    except (SimulateError, ConfigErrors) as error:
        print(error, file=sys.stderr)  # noqa: T201 - for the operator, who reads it as it is
        return EXIT_USAGE
    sink = log_setup.configure()
    daemon = Daemon(config, file, parts, sink)
    if rehearse:
        daemon.close()
        return EXIT_OK
    try:
        daemon.open(socket_path, handover.heirlooms())
    except (ControlError, QueueError) as error:
        sys.stderr.write(f"{error}\n")  # in one piece, for the log writes there, too
        return EXIT_FAILED
    else:
        return daemon.loop()
    finally:
        daemon.close()
        sink.flush()


class Daemon:
    """The parts, and the loop that drives them."""

    def __init__(self, config: Config, file: str, parts: Parts, sink: log_setup.Sink) -> None:
        self._stop = 0  # the signal that ends the loop
        self._failed = False
        self._config = config
        self._wrap_answer = parts.answer
        self._fork = parts.fork
        self._sink = sink
        self._notify = Notify()
        self._starting: RulesJob | None = None
        self._selector = selectors.EpollSelector()
        self._clock = parts.clock(config.exception.suspend == "expire")
        now_ms = self._clock.now_ms()
        self._links = Links()
        ruleset = compile_ruleset(config, generation=1)
        self._net = Conntrack(config.sysctl())
        self._net.broadcasts = self._links.broadcasts
        self._fw = fw = Firewall(self._net, ruleset)
        mark = Mark(config.queue.mark_mask)
        self._generations = Generations(config, file, fw, self._links, self._notify)
        self._answerer = Answerer(mark)
        accept_on_error = self._generations.accept_on_error
        track_number, confirm_number = config.queue.numbers
        self._track = Queue(track_number, fw, mark, accept_on_error, parts.track, parts.inbox, parts.write)
        self._confirm = Queue(confirm_number, fw, mark, accept_on_error)
        queues = (self._track, self._confirm)
        self._faults = Faults(fw)
        self._faults.watch("interface_gone", lambda: self._generations.interfaces_gone)
        self._faults.watch("reject_unanswered", lambda: self._answerer.failed)
        self._faults.watch("log_lost", lambda: sink.lost)
        self._faults.watch("suspended", lambda: self._clock.suspended)
        self._faults.watch("clock_set", lambda: self._clock.set)
        self._rules = RulesWatch()
        self._faults.watch("rules_changed", lambda: self._rules.changed)
        self._faults.watch("rules_repaired", lambda: self._rules.repaired)
        self._faults.watch("rules_watch_failed", lambda: self._rules.failed)
        self._answers = Answers(fw, self._links, queues, self._faults, now_ms)
        self._state = State(config, fw, self._links, self._generations, now_ms, parts.write_disk, self._notify.progress)
        self._flow_answers = FlowAnswers(fw, self._links)
        self._health = health = Health(fw, queues, self._generations, now_ms)
        health.sources += [self._state.problems, self._faults.problems, self._rules.problems]
        self._status_answers = StatusAnswers(
            version("conntrackd"), fw, self._links, queues, self._generations, health, self._state, now_ms
        )
        self._policy_answers = PolicyAnswers(fw, self._links)
        self._drop_answers = DropAnswers(fw, self._links)
        self._top_answers = TopAnswers(fw, self._links)
        self._tracing = Tracing(fw, mark, queues, self._links)
        self._restart = Restart()
        self._parts = (
            self._answers,
            self._flow_answers,
            self._status_answers,
            self._policy_answers,
            self._drop_answers,
            self._top_answers,
            self._tracing,
            self._generations,
            self._restart,
            self._rules,
        )
        self._watch = TableWatch(self._net)
        self._huge_pages = HugePages()
        self._status_ms = now_ms + STATUS_MS
        self._control: Control | None = None
        self._exporter: Exporter | None = None
        # Packets come through `_packets`, all else through `_selector`, whose own descriptor is watched there too.
        self._packets = select.epoll()
        self._packets.register(self._selector.fileno(), select.EPOLLIN)
        self._wakeup, self._wakeup_write = socket.socketpair()
        self._reserve = bytes(RESERVE_BYTES)

    def open(self, socket_path: str, heirlooms: dict[str, int]) -> None:
        """Take hold of the sockets, the signals and the queues, some of which the process before has left to us.

        Raises ControlError or QueueError.
        """
        listener, lock = heirlooms.pop(handover.LISTENER, -1), heirlooms.pop(handover.LOCK, -1)
        answer = self._wrap_answer(self._answer)
        self._control = control = Control(socket_path, self._selector, answer, listener, lock)
        self._faults.watch("clients_closed", lambda: control.closed)
        self._faults.watch("clients_refused", lambda: control.refused)
        self._faults.watch("requests_failed", lambda: control.failed)
        if self._config.metrics.listen:
            self._export(endpoint(self._config.metrics.listen))
        self._state.now_ms = self._generations.now_ms = self._clock.now_ms()
        self._state.open()
        state = heirlooms.pop(handover.STATE, -1)
        deputy, process = heirlooms.pop(handover.DEPUTY, -1), heirlooms.pop(handover.DEPUTY_PROCESS, -1)
        complete = state >= 0
        if state >= 0:
            complete = self._state.inherit(state, Deputy(deputy, process) if deputy >= 0 and process >= 0 else None)
            self._notify.forget(handover.STATE)
        else:
            self._state.restore()
        self._catch_signals()
        self._selector.register(self._links, selectors.EVENT_READ, self._on_links)
        # Packets come as soon as a queue is bound, so the queues are last; the confirming one is ready first.
        settings = self._config.queue
        flags = NFQA_CFG_F_GSO if settings.gso else 0
        if self._config.exception.queue_overflow == "accept":
            flags |= NFQA_CFG_F_FAIL_OPEN
        for queue in (self._confirm, self._track):
            name = handover.queue_name(queue.number)
            fd = heirlooms.pop(name, -1)
            if fd >= 0 and queue.adopt(fd, settings.max_length, settings.socket_buffer, flags, complete):
                log.info("queue_adopted", queue=queue.number)
            else:
                if fd >= 0:
                    os.close(fd)
                queue.bind(settings.max_length, settings.socket_buffer, flags)
            self._packets.register(queue.fileno(), select.EPOLLIN)
            self._notify.store(name, [queue.fileno()])
        for name, fd in heirlooms.items():
            os.close(fd)  # of a queue that is no longer configured
            self._notify.forget(name)
        self._answerer.open()  # after the queues: who may not bind them is told only that
        self._starting = RulesJob(self._config, self._wakeup_write)

    def _export(self, listen: tuple[str, int]) -> None:
        """Open the endpoint for Prometheus. A router without it is better than none: it goes on, and says so.

        What only the endpoint needs is imported now: most routers do without.
        """
        try:
            from conntrackd.daemon.metrics import Metrics

            queues = (self._track, self._confirm)
            metrics = Metrics(version("conntrackd"), self._fw, queues, self._generations, self._health, self._answerer)
            self._exporter = Exporter(listen, self._selector, metrics.text)
        except (ModuleNotFoundError, ExporterError) as error:
            message = str(error)
            if isinstance(error, ModuleNotFoundError):
                message = f"[metrics] needs the Python package {error.name}: `pip install conntrackd[metrics]`."
            log.warning("metrics_off", error=message)
            problem = api.Problem(name="metrics_off", severity=WARNING, message=message)
            self._health.sources.append(lambda: [problem])

    def _catch_signals(self) -> None:
        """Make signals wake the loop and set a flag: a handler that raised would lose the packet in hand."""
        for end in (self._wakeup, self._wakeup_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR2, lambda _number, _frame: self._restart.want())
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)  # losing the terminal is no reason to stop
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_wakeup)
        handover.accept_signals()

    def _on_wakeup(self, _events: int) -> None:
        self._wakeup.recv(64)
        if self._starting is not None and self._starting.done:
            self._started(self._starting)

    def _started(self, job: RulesJob) -> None:
        """Say that we are ready, for packets come now; or end, because they do not."""
        self._starting = None
        if job.error:
            log.error("rules_not_installed", error=job.error)
            self._failed = True
            self._stop = signal.SIGTERM
            return
        self._rules.begin(job.chains, job.installed)
        log.info("ready", queues=list(self._config.queue.numbers))
        self._notify.ready(f"Generation {self._fw.ruleset.generation} is in force, {len(self._config.rule)} rules")

    def _answer(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        for part in self._parts:
            rows = part.rows(asked)
            if rows is not None:
                return rows
        return None

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        self._stop = number

    def _on_links(self, _events: int) -> None:
        before = set(self._links.names.values())
        renamed = self._links.read()
        self._net.broadcasts = self._links.broadcasts
        if renamed:
            self._generations.set_links()
            now = set(self._links.names.values())
            log.info("links_changed", came=sorted(now - before), gone=sorted(before - now), interfaces=sorted(now))

    def _read_clock(self) -> int:
        """Read the clock once for everything that this wake-up does."""
        now_ms = self._clock.now_ms()
        self._track.now_ms = self._confirm.now_ms = now_ms
        return now_ms

    def _set_time(self, now_ms: int) -> None:
        """Tell all that goes by the time besides the packets what time it is."""
        assert self._control is not None
        self._control.now_ms = self._answers.now_ms = self._flow_answers.now_ms = now_ms
        self._status_answers.now_ms = self._policy_answers.now_ms = self._drop_answers.now_ms = now_ms
        self._top_answers.now_ms = self._generations.now_ms = self._state.now_ms = self._restart.now_ms = now_ms
        if self._exporter is not None:
            self._exporter.now_ms = now_ms

    def loop(self) -> int:
        """Serve until a signal says stop; then give verdicts to what waits. Returns the exit code."""
        # Python's collector looks for cycles in every object there is, and would hold the packets up for as long as the
        # table is big. Connections have no cycles: they go when the table lets go of them.
        garbage.freeze()
        garbage.disable()
        while not self._stop:
            try:
                self._serve()
            except MemoryError:
                self._save_memory()
        why = {"error": "rules_not_installed"} if self._failed else {"signal": signal.Signals(self._stop).name}
        log.info("stopping", **why)
        self._notify.stopping()
        self._leave_rules()
        self._drain()
        self._state.now_ms = self._read_clock()
        self._leave_queues()
        self._state.last()
        return EXIT_FAILED if self._failed else EXIT_OK

    def _save_memory(self) -> None:
        """Go on without more memory: the table is as big as it gets, and what was kept for this is given back."""
        self._reserve = b""
        self._net.sysctl.max = max(1, self._net.table.count)
        self._faults.out_of_memory += 1

    def _serve(self) -> None:
        """Turn the loop until a signal says stop."""
        net, fw, track, confirm, tracing = self._net, self._fw, self._track, self._confirm, self._tracing
        track_fd, confirm_fd = track.fileno(), confirm.fileno()
        # The watchdog is fed here and nowhere else: a loop that is stuck is what it is for.
        period_ms = min(TICK_MS, self._notify.watchdog_ms or TICK_MS)
        now_ms = self._read_clock()
        gc_ms = tick_ms = now_ms
        soon_ms = told_seq = 0
        coalescing = Coalescing((track, confirm), now_ms)
        rested = False
        while not self._stop:
            wait_ms = min(gc_ms, tick_ms, now_ms + soon_ms) - now_ms
            ready = self._packets.poll(wait_ms / 1000 if wait_ms > 0 else 0, EVENTS_MAX)
            now_ms = self._read_clock()
            confirm_waits = track_waits = others_wait = False
            for fd, _ in ready:
                if fd == track_fd:
                    track_waits = True
                elif fd == confirm_fd:
                    confirm_waits = True
                else:
                    others_wait = True
            emptied = True
            if confirm_waits:
                emptied = confirm.turn(CONFIRM_BUDGET)
            if track_waits:
                emptied = track.turn(TRACK_BUDGET) and emptied
            if fw.answers or fw.logs:
                self._answer_and_log()
            if now_ms >= gc_ms:
                gc_ms = gc(net, now_ms)
            if net.events.seq + tracing.seq != told_seq:
                told_seq = net.events.seq + tracing.seq
                self._tell(now_ms)
            rested |= emptied
            ticks = now_ms >= tick_ms
            if ticks:
                self._tick(now_ms, rested)
                rested = False
                tick_ms = now_ms + period_ms
            # Only clients, signals, links and the tick begin what then goes on beside the packets.
            if others_wait or ticks or soon_ms < IDLE_MS:
                soon_ms = self._go_on(now_ms)
            if now_ms >= coalescing.look_ms:
                coalescing.look(now_ms)
            if coalescing.pause_s and emptied:
                time.sleep(coalescing.pause_s)

    def _go_on(self, now_ms: int) -> int:
        """Go on with all that is under way beside the packets; returns after how many milliseconds to come back."""
        assert self._control is not None
        control, generations, state, restart = self._control, self._generations, self._state, self._restart
        self._set_time(now_ms)
        if control.waits():
            control.resume()
        for key, events in self._selector.select(0):
            key.data(events)
        soon_ms = SOON_MS if control.waits() else IDLE_MS
        if generations.busy():
            generations.turn()
            self._track.accept_on_error = self._confirm.accept_on_error = generations.accept_on_error
            soon_ms = 0 if self._fw.rejudging else SOON_MS
        if state.busy():
            state.turn()
            soon_ms = min(soon_ms, 1)
        if restart.busy():
            restart.turn()
            if self._starting is None and not self._rules.busy() and restart.due(control.answering()):
                self._become_next()
            soon_ms = min(soon_ms, SOON_MS)
        return soon_ms

    def _answer_and_log(self) -> None:
        """Send and write what packets of this turn have left to be sent and written."""
        self._answerer.send(self._fw.answers)
        packetlog.write(self._fw, self._links.interface)

    def _tell(self, now_ms: int) -> None:
        """Wake the clients that wait for something to happen."""
        assert self._control is not None
        self._control.now_ms = now_ms
        self._control.wake()

    def _tick(self, now_ms: int, rested: bool) -> None:
        """Do what is to be done about once a second; `rested` is whether the queues were ever empty meanwhile."""
        assert self._control is not None
        self._faults.tick(now_ms, rested, self._clock.look())
        self._track.send()
        self._confirm.send()
        self._set_time(now_ms)
        self._control.tick()
        if self._exporter is not None:
            self._exporter.tick()
        self._watch.tick()
        if not self._restart.busy():  # iptables would be left alone by us, in the middle of its work
            self._rules.tick(now_ms, self._generations.config().rules)
        self._huge_pages.tick()
        self._top_answers.tick()
        self._health.tick(now_ms)
        self._generations.tick()
        self._state.tick()
        self._notify.alive()
        if now_ms >= self._status_ms:
            self._status_ms = now_ms + STATUS_MS
            self._notify.status(f"{self._net.table.count} flows, {self._health.packets_per_second} packets/s")

    def _leave_queues(self) -> None:
        """Let go of the queues before the disk is waited for: what comes now is dropped, or passes, as the rules say.

        Where the service manager keeps them it waits for the next process, which gets the state, too.
        """
        if not self._notify.keeps():
            self._track.unbind()
            self._confirm.unbind()
            return
        self._track.leave()
        self._confirm.leave()
        state = self._state.freezing(self._state.nothing_passes())
        with handover.in_memory(state.pieces(unconfirmed=True), self._notify.progress) as file:
            self._notify.store(handover.STATE, [file.fileno()])

    def _become_next(self) -> None:
        """Become the new program, with all that it goes on with; returns only if that failed."""
        assert self._control is not None
        log.info("handing_over", flows=self._net.table.count)
        self._drain()
        self._state.now_ms = self._read_clock()
        self._sink.flush()
        deputy = appoint(self._stand_in, self._fork)
        listener, lock = self._control.fds()
        state = self._state.freezing(exact=True)
        pieces = state.pieces(unconfirmed=True) if deputy is None else state.base()
        with handover.in_memory(pieces, self._notify.progress) as file:
            fds = {handover.queue_name(queue.number): queue.fileno() for queue in (self._track, self._confirm)}
            fds |= {handover.STATE: file.fileno(), handover.LISTENER: listener, handover.LOCK: lock}
            if deputy is not None:
                fds[handover.DEPUTY], fds[handover.DEPUTY_PROCESS] = deputy.fds()
            self._sink.flush()
            self._restart.failed(handover.become_next(fds, self._notify.environment()))
        if deputy is not None:
            self._state.now_ms = self._read_clock()
            self._state.catch_up(deputy)

    def _stand_in(self, sock: socket.socket) -> None:
        """Do the deputy's work, in its process: judge packets until it is relieved, and tell what has changed."""
        since_ms = self._state.now_ms
        self._notify.close()
        keep_only({sock.fileno(), self._track.fileno(), self._confirm.fileno(), *self._answerer.fds()})
        self._sink.begin()
        log.info("deputy_begins", pid=os.getpid())
        ended = serve(sock, self._track, self._confirm, self._fw, self._read_clock, self._answer_and_log)
        self._drain()
        ended.collect()
        self._answer_and_log()
        self._state.now_ms = self._read_clock()
        changes = self._state.freezing(exact=True).changes(since_ms, iter(ended.rows))
        with handover.in_memory(changes, self._notify.progress) as file:
            socket.send_fds(sock, [b"!"], [file.fileno()])
        self._sink.flush()

    def _leave_rules(self) -> None:
        """Keep the kernel's rules or take them out, as the configuration in force says."""
        if self._starting is not None:
            self._starting.wait()
        self._rules.wait()
        if self._generations.config().rules.at_stop == "keep":
            return
        try:
            rules.remove()
        except rules.RulesError as error:
            log.warning("rules_not_removed", error=str(error))
            self._failed = True

    def _drain(self) -> None:
        """Give verdicts until nothing waits, or for DRAIN_MS when there is no end of it."""
        end_ms = self._read_clock() + DRAIN_MS
        # What the tracking queue lets pass comes to the confirming one, so that is asked last.
        while not (self._track.turn(TRACK_BUDGET) and self._confirm.turn(CONFIRM_BUDGET)):
            if self._read_clock() >= end_ms:
                return

    def close(self) -> None:
        """Let go of everything that `open` took hold of."""
        self._track.unbind()
        self._confirm.unbind()
        self._state.close()
        if self._control is not None:
            self._control.close()
        if self._exporter is not None:
            self._exporter.close()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # Python takes its handlers away while it ends, and we are ending
        self._wakeup.close()
        self._wakeup_write.close()
        self._notify.close()
        self._answerer.close()
        self._links.close()
        self._packets.close()
        self._selector.close()
