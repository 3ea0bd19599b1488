"""The command: python -m tests.differential --seconds 60 (see docs/differential.md)."""

import argparse
import contextlib
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence

from tests.differential.compare import Mismatch, Tally, Twin, replay, run
from tests.differential.generate import PROTOCOLS, generate
from tests.differential.generate.path import Conversation
from tests.differential.live import Outcome, live
from tests.differential.packets import describe
from tests.differential.profiles import PROFILES
from tests.differential.shrink import shrink

_BATCH = 20_000  # conversations between two comparisons of the whole tables
_TOO_MANY = 200  # mismatches after which it is no use to go on


def differ(seed: int, *, seconds: float = 0, packets: int = 0, protocols: Sequence[str] = PROTOCOLS) -> Tally:
    """Compares until either limit is reached; 0 is no limit."""
    tally = Tally()
    begun = told = time.monotonic()

    def tick() -> bool:
        nonlocal told
        now = time.monotonic()
        if now - told >= 5:
            told = now
            rate = tally.packets / (now - begun)
            print(
                f"{tally.packets} packets, {tally.conversations} conversations, {len(tally.mismatches)} mismatches, "
                f"{rate:.0f} packets/s",
                file=sys.stderr,
            )
        if seconds and now - begun >= seconds:
            return False
        return not (packets and tally.packets >= packets) and len(tally.mismatches) < _TOO_MANY

    def conversations(batch: int) -> Iterator[Conversation]:
        for index in range(batch * _BATCH, (batch + 1) * _BATCH):
            yield generate(seed, index, protocols)

    with contextlib.ExitStack() as stack:
        twins = {name: stack.enter_context(Twin(name)) for name in PROFILES}
        for batch in itertools.count():
            run(twins, conversations(batch), tally, tick)
            if not tick():
                return tally
    raise AssertionError("unreachable")


def report(tally: Tally) -> None:
    """The closing summary, on stdout."""
    rate = tally.packets / tally.seconds if tally.seconds else 0
    print(
        f"{tally.packets} packets in {tally.conversations} conversations compared, {rate:.0f} packets/s; "
        f"{tally.unseen} packets that the IP stack kept; {tally.ambiguous} conversations given up near a deadline; "
        f"{len(tally.mismatches)} mismatches, {len(tally.strays)} stray entries"
    )
    for title, counts in (
        ("packets per protocol", tally.protocols),
        ("packets per ctinfo", tally.ctinfo),
        ("packets per state after them", tally.states),
    ):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for line in tally.strays[:20]:
        print(f"stray {line}")


def show(mismatch: Mismatch) -> None:
    """A mismatch for people: the conversation, both answers, how to see it again."""
    conversation = mismatch.conversation
    print(f"\nMISMATCH {conversation.protocol}, settings {conversation.profile!r}: {mismatch.about}")
    for number, step in enumerate(conversation.steps[: mismatch.step + 1]):
        wait = f"+{step.delay_ms}ms " if step.delay_ms else ""
        print(f"  {number:3} {'>' if step.side == 0 else '<'} {wait}{describe(step.data)}")
    print(f"  kernel: {mismatch.kernel}")
    print(f"  ours:   {mismatch.ours}")
    print(f"  again:  --conversation {conversation.seed}:{conversation.index}")


def explain(mismatches: Sequence[Mismatch], limit: int) -> int:
    """Shrinks and shows one of each kind, the shortest first; returns how many did not come back."""
    kinds: dict[tuple[str, ...], Mismatch] = {}
    for mismatch in sorted(mismatches, key=lambda each: each.step):
        kinds.setdefault(mismatch.signature(), mismatch)
    lost = 0
    for mismatch in list(kinds.values())[:limit]:
        shortest = shrink(mismatch)
        if shortest is None:
            lost += 1
            print("\nDid not come back when replayed alone:")
        show(shortest or mismatch)
    return lost


def live_report(outcome: Outcome) -> int:
    """The closing summary of a live run, on stdout; returns the exit code."""
    print(
        f"{outcome.packets} packets in {outcome.conversations} conversations compared with the running daemon; "
        f"{outcome.given_up} conversations given up, at a wanted difference or for lack of speed; "
        f"{len(outcome.mismatches)} mismatches"
    )
    for mismatch in outcome.mismatches[:5]:
        show(mismatch)
    return 1 if outcome.mismatches else 0


def again(seed: int, index: int, protocols: Sequence[str]) -> int:
    """Replays one conversation, with the classification of every packet."""
    conversation = generate(seed, index, protocols)
    lines = iter(conversation.steps)

    def say(answer: str) -> None:
        print(f"  {describe(next(lines).data)}: {answer}")

    with Twin(conversation.profile) as twin:
        mismatch = replay(twin, conversation, say)
    if mismatch is None:
        print("no difference")
        return 0
    show(shrink(mismatch) or mismatch)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0, help="stop beginning conversations after this long")
    parser.add_argument("--packets", type=int, default=0, help="stop beginning conversations after this many packets")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--protocol", action="append", choices=PROTOCOLS, help="only these (repeatable)")
    parser.add_argument("--conversation", metavar="SEED:INDEX", help="replay one; give --protocol as in its run")
    parser.add_argument("--live", action="store_true", help="the whole daemon in a twin router instead of the core")
    parser.add_argument("--shrink", type=int, default=5, help="kinds of mismatch to shrink and show (default 5)")
    arguments = parser.parse_args()
    protocols = tuple(arguments.protocol or PROTOCOLS)
    if arguments.conversation:
        seed, index = map(int, arguments.conversation.split(":"))
        return again(seed, index, protocols)
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr)
    seconds = arguments.seconds or (0 if arguments.packets else 60)
    if arguments.live:
        return live_report(live(seed, seconds or 60, protocols))
    tally = differ(seed, seconds=seconds, packets=arguments.packets, protocols=protocols)
    report(tally)
    explain(tally.mismatches, arguments.shrink)
    return 1 if tally.mismatches or tally.strays else 0


if __name__ == "__main__":
    sys.exit(main())
