"""Shrinks a mismatch to the shortest conversation that still differs, by replaying parts of it against the kernel."""

from dataclasses import replace

from tests.differential.compare import AmbiguousTimingError, Mismatch, Twin, replay
from tests.differential.generate.path import Conversation, Step

_TRIES = 3


def reproduce(conversation: Conversation) -> Mismatch | None:
    """Replays alone in a fresh namespace; None if nothing differs (a few tries, if the timing is ambiguous)."""
    for _ in range(_TRIES):
        try:
            with Twin(conversation.profile) as twin:
                return replay(twin, conversation)
        except AmbiguousTimingError:
            continue
    return None


def shrink(mismatch: Mismatch) -> Mismatch | None:
    """The shortest that differs in the same way, or None if the mismatch does not come back."""

    def differs(steps: list[Step]) -> Mismatch | None:
        found = reproduce(replace(mismatch.conversation, steps=steps))
        return found if found and found.about == mismatch.about else None

    best = differs(mismatch.conversation.steps[: mismatch.step + 1])
    if best is None:
        return None
    size = len(best.conversation.steps) // 2
    while size:
        start = 0
        while start < len(best.conversation.steps):
            steps = best.conversation.steps
            shorter = differs(steps[:start] + steps[start + size :])
            if shorter:
                best = shorter
            else:
                start += size
        size //= 2
    without_waits = differs([replace(step, delay_ms=0) for step in best.conversation.steps])
    return without_waits or best
