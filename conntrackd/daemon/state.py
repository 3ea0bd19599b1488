"""State that survives: a snapshot now and then, one at the end, and what a start finds.

Nothing here holds packets up: rows are made a slice per turn of the loop, and a disk that is slow or full costs the
snapshot, not the packets. Whatever goes wrong is counted, said once, and shown by `status`.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from conntrackd import api
from conntrackd.config import Config
from conntrackd.daemon.deputy import Deputy
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.links import Links
from conntrackd.daemon.restore import Restored, Restoring, nothing
from conntrackd.daemon.snapshot import Freezing, Moment, SnapshotError, boot_id
from conntrackd.daemon.statefile import StateFile, WriteDisk, Writing
from conntrackd.hooks import Firewall

WAITING_MAX: Final = 1 << 22  # bytes that wait for the disk; more are not made before some are written
LAST_S: Final = 5.0  # how long a stopping daemon waits for the disk
PAUSE_S: Final = 0.001

log = structlog.get_logger()


class State:
    """The state directory and what is written there. `now_ms` is set by the loop."""

    def __init__(
        self,
        config: Config,
        fw: Firewall,
        links: Links,
        generations: Generations,
        now_ms: int,
        write: WriteDisk = os.write,
        progress: Callable[[], None] = nothing,
    ) -> None:
        self.now_ms = now_ms
        self._progress = progress
        self._directory = config.state.directory
        self._period_ms = config.state.snapshot
        self._next_ms = now_ms + self._period_ms
        self._fw = fw
        self._links = links
        self._generations = generations
        self._boot_id = boot_id()
        self._write = write
        self._file: StateFile | None = None
        self._freezing: Freezing | None = None
        self._pieces: Iterator[bytes] | None = None
        self._writing: Writing | None = None
        self._begun_ms = 0
        self._sliced_ms = 0
        # Of the last one that was written.
        self._taken_ms = -1
        self._size = 0
        self._flows = 0
        self._taken = 0
        self._failed = 0
        self._error = ""
        self._restored: Restored | None = None
        self._aside = ""  # the file that was no good, and why
        self._aside_reason = ""

    # --- At the start ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take hold of the directory. Without it the daemon runs all the same, and says so."""
        if not self._directory:
            return
        try:
            self._file = StateFile(self._directory, self._write)
        except BlockingIOError:
            self._fail("another conntrackd has it")
        except OSError as error:
            self._fail(error.strerror or str(error))

    def restore(self) -> None:
        """Put back what the snapshot holds, if there is a good one."""
        if self._file is None:
            return
        try:
            with self._file.open() as file:
                self.take(file)
        except FileNotFoundError:
            log.info("snapshot_none", directory=self._directory)
        except SnapshotError as error:
            self._set_aside(str(error))
        except OSError as error:
            self._fail(error.strerror or str(error))

    def inherit(self, fd: int, deputy: Deputy | None) -> bool:
        """Put back what the process before has left in memory; without it, what it has left on the disk.

        With a deputy it has judged packets meanwhile. Says whether we know of all packets that were judged.
        """
        with os.fdopen(fd, "rb") as file:
            try:
                restoring = self.take(file)
            except (SnapshotError, OSError) as error:
                log.warning("handover_state_unusable", error=str(error))
                if deputy is not None:
                    deputy.dismiss()  # what it has changed is told against what was no good
                self.restore()
                return deputy is None
        return deputy is None or self.catch_up(deputy, restoring)

    def catch_up(self, deputy: Deputy, restoring: Restoring | None = None) -> bool:
        """Relieve the deputy, and put back what it has changed; say whether that went well."""
        restoring = restoring or Restoring(self._fw, self._links, self._progress)
        try:
            with deputy.relieve() as file:
                changed = restoring.catch_up(file, self._moment())
        except (SnapshotError, OSError) as error:
            log.warning("handover_changes_lost", error=str(error))
            restoring.remain_behind()
            return False
        self._generations.set_links()
        log.info("handover_caught_up", flows=self._fw.net.table.count, changed=changed.flows, ended=restoring.ended)
        return True

    def take(self, file: BinaryIO) -> Restoring:
        """Put back what a snapshot holds. Raises SnapshotError for one that is no good."""
        now = self._moment()
        restoring = Restoring(self._fw, self._links, self._progress)
        restored = self._restored = restoring.read(file, now)
        self._generations.set_links()  # with those that only restored connections name
        self._generations.resume(restored.generation, restored.config)
        if restored.clock_backwards:
            log.warning("snapshot_clock_backwards", detail="the clock is behind the snapshot: no time is deducted")
        log.info(
            "snapshot_restored",
            flows=restored.flows,
            expired=restored.expired,
            stale=restored.stale,
            refused=restored.refused,
            expectations=restored.expectations,
            addresses=restored.addresses,
            away_seconds=restored.away_ms // 1000,
            same_boot=restored.same_boot,
        )
        return restoring

    def _set_aside(self, reason: str) -> None:
        assert self._file is not None
        try:
            aside = self._aside = self._file.set_aside()
            self._aside_reason = reason
        except OSError as error:
            aside = f"it stays, for it can't be renamed: {error.strerror}"
        log.warning("snapshot_set_aside", file=str(self._file.path), reason=f"it {reason}", kept_as=aside)

    # --- While packets go on --------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Whether the loop is to come back soon: a snapshot is being made."""
        return self._writing is not None

    def tick(self) -> None:
        """Begin a snapshot if it is time; to be called about once a second."""
        if self._period_ms and self.now_ms >= self._next_ms and self._file is not None and not self.busy():
            self._begin()

    def turn(self) -> None:
        """Make the next slice, at most one in a millisecond; to be called in every turn of the loop while `busy`."""
        writing = self._writing
        assert writing is not None
        if writing.done:
            self._end(writing)
        elif self._pieces is not None and self.now_ms != self._sliced_ms and writing.waiting() < WAITING_MAX:
            self._sliced_ms = self.now_ms
            self._give(writing, next(self._pieces, None))

    def _give(self, writing: Writing, piece: bytes | None) -> None:
        if piece is None:
            writing.give(b"")
            self._pieces = None
        elif piece:
            writing.give(piece)

    def _begin(self, exact: bool = False) -> None:
        assert self._file is not None
        self._begun_ms = self.now_ms
        self._next_ms = self.now_ms + self._period_ms
        try:
            self._writing = self._file.write()
        except (OSError, RuntimeError) as error:
            self._fail(str(error))
            return
        self._freezing = self.freezing(exact)
        self._pieces = self._freezing.pieces()

    def _end(self, writing: Writing) -> None:
        assert self._freezing is not None
        self._writing = self._pieces = None
        if writing.error:
            self._fail(writing.error)
            return
        if self._error:
            log.info("snapshot_written_again", directory=self._directory, failures=self._failed)
        self._error = ""
        self._taken += 1
        self._taken_ms = self._begun_ms
        self._size = writing.written
        self._flows = self._freezing.flows

    def _fail(self, reason: str) -> None:
        """Count what went wrong, and say it when it is news."""
        self._failed += 1
        if reason != self._error:
            log.warning("snapshot_failed", directory=self._directory, error=reason)
        self._error = reason

    # --- At the end -----------------------------------------------------------------------------------------------

    def last(self) -> None:
        """Write a snapshot to its end, or for LAST_S; no packets are waiting."""
        if self._file is None:
            return
        end_s = time.monotonic() + LAST_S
        if self._writing is not None:
            self._writing.abandon()
            self._writing.wait(LAST_S)
        if self._writing is None or self._writing.done:
            self._begin(self.nothing_passes())
            writing = self._writing
            if writing is None:
                return
            while self._pieces is not None and not writing.done and time.monotonic() < end_s:
                if writing.waiting() < WAITING_MAX:
                    self._give(writing, next(self._pieces, None))
                else:
                    writing.wait(PAUSE_S)
            writing.wait(max(0.0, end_s - time.monotonic()))
            if writing.done:
                self._end(writing)
                return
        self._fail(f"the disk took more than {LAST_S:g} s")

    def nothing_passes(self) -> bool:
        """Whether no packet passes while nobody reads the queues."""
        config = self._generations.config()
        return config.rules.at_stop == "keep" and not config.queue.bypass

    def freezing(self, exact: bool) -> Freezing:
        """Begin a snapshot of what there is now; `exact` if it is the last, and nothing passes after it."""
        return Freezing(
            self._fw, self._links.absent | self._links.names, self._moment(), self._generations.fingerprint, exact
        )

    def _moment(self) -> Moment:
        return Moment(self.now_ms, time.time_ns() // 1_000_000, self._boot_id)

    def close(self) -> None:
        """Let go of the directory."""
        if self._file is not None:
            self._file.close()

    def problems(self) -> Iterator[api.Problem]:
        """Say that nothing is kept though it should be, or that nothing could be restored (Health.sources)."""
        if self._error:
            yield api.Problem(
                name="snapshot_failed",
                severity="warning",
                message=f"No snapshot can be written to {self._directory}: {self._error}. "
                "What has come since the last one would be lost with the daemon.",
            )
        if self._aside and Path(self._aside).exists():
            yield api.Problem(
                name="snapshot_set_aside",
                severity="warning",
                message=f"The daemon began without its flows, for the snapshot was no good: it {self._aside_reason}. "
                f"Look into {self._aside}, and remove it.",
            )

    def status(self) -> api.StateStatus | None:
        """Say how it stands; None where nothing is kept."""
        if not self._directory:
            return None
        return api.StateStatus(
            directory=self._directory,
            period_seconds=self._period_ms // 1000,
            age_seconds=(self.now_ms - self._taken_ms) // 1000 if self._taken else None,
            flows=self._flows,
            bytes=self._size,
            taken=self._taken,
            failed=self._failed,
            error=self._error or None,
            restored=self._restored.flows if self._restored is not None else None,
        )
