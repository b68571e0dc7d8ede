"""How badly the world behaves: rates drawn from the seed, many of them zero."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from stoker_sim.dice import Dice

OFTEN = 0.25
SELDOM = 0.03


@dataclass(frozen=True)
class Faults:
    """Probabilities, per call if nothing else is said."""

    disk_full: float = 0.0
    disk_error: float = 0.0
    rot: float = 0.0  # a chunk that was just written is not what was written
    read_error: float = 0.0  # of a chunk, into the pool
    disk_silent: float = 0.0  # a load's reads do not end in time
    source_breaks: float = 0.0  # per piece
    source_wrong: float = 0.0  # per read, of models whose digests are known
    peer_breaks: float = 0.0  # per piece
    peer_wrong: float = 0.0  # per read
    peer_lost: float = 0.0  # a question to a peer is never answered

    def capped(self, most: float) -> Faults:
        return replace(self, **{field.name: min(getattr(self, field.name), most) for field in fields(self)})


NONE = Faults()


def drawn(dice: Dice) -> Faults:
    """Of one seed: half of the faults do not occur, most others seldom."""

    def rate() -> float:
        if dice.chance(0.5):
            return 0.0
        return OFTEN if dice.chance(0.2) else SELDOM

    return Faults(**{field.name: rate() for field in fields(Faults)})
