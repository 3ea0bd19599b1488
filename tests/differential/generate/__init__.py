"""The seeded generator: (seed, index) determine a conversation to the last byte."""

import random
from collections.abc import Callable, Sequence
from typing import Final

from tests.differential.generate import icmp, other, sctp, tcp, udp
from tests.differential.generate.path import Conversation, Path
from tests.differential.profiles import PROFILES, SLOW

# Weights: TCP has by far the most states to reach.
_PROTOCOLS: Final[dict[str, tuple[int, Callable[[Path], Conversation]]]] = {
    "tcp": (50, tcp.converse),
    "udp": (10, udp.converse),
    "udplite": (4, udp.converse_lite),
    "icmp": (12, icmp.converse),
    "sctp": (14, sctp.converse),
    "gre": (4, other.converse_gre),
    "generic": (2, other.converse_generic),
}
PROTOCOLS: Final = tuple(_PROTOCOLS)


def generate(seed: int, index: int, protocols: Sequence[str] = PROTOCOLS) -> Conversation:
    rng = random.Random(f"{seed}:{index}")
    protocol = rng.choices(protocols, [_PROTOCOLS[name][0] for name in protocols])[0]
    profile = rng.choices(list(PROFILES), [profile.weight for profile in PROFILES.values()])[0]
    conversation = Conversation(seed, index, protocol, profile)
    return _PROTOCOLS[protocol][1](Path(rng, conversation, profile == SLOW))
