"""What happens to a run, and when: drawn from a seed, in fractions of the run, so that a trial can be repeated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

KILLS = ("kill-one", "kill-all", "kill-in-save")
KINDS = (*KILLS, "sigterm", "full-disk", "bit-flip", "truncation", "nan")
GROUPS = {"kill": KILLS, "all": KINDS}
NUM_RANKS = 2
Victim = Literal["ranks", "everything", "torchrun"] | int
"""One rank, all of them, torchrun that started them, or everything, as when a machine is gone."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL.

    Args:
        moment: fraction of the run's steps.
        victim: a rank, "ranks" or "everything".
        into_save: of the first save begun from then on, the fraction of its usual duration after which it happens.
    """

    moment: float
    victim: Victim
    into_save: float | None = None


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to a rank or to "torchrun", which passes it on."""

    moment: float
    victim: Victim


@dataclass(frozen=True)
class FillDisk:
    """The disk under the run's folder is full for a while.

    Args:
        moment, lasts: fractions of the run's steps.
        room: what stays free, as a fraction of a checkpoint.
    """

    moment: float
    lasts: float
    room: float


@dataclass(frozen=True)
class Damage:
    """Everything is killed, and the newest sealed checkpoint damaged.

    Args:
        moment: fraction of the run's steps.
        how: a bit is flipped, or a file cut off.
        file, position: which file of the checkpoint and where in it, in [0, 1).
    """

    moment: float
    how: Literal["bit-flip", "truncation"]
    file: float
    position: float


Fault = Kill | Terminate | FillDisk | Damage


@dataclass(frozen=True)
class Poison:
    """In one step (a fraction of the run's) the gradients that one rank holds are not numbers."""

    moment: float
    rank: int


@dataclass(frozen=True)
class Trial:
    """One run and what happens to it, in order.

    Args:
        number: counted from 1.
        kind: one of KINDS.
    """

    number: int
    kind: str
    faults: tuple[Fault, ...]
    poison: Poison | None = None


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds in a list with commas, in the order of KINDS; `kill` and `all` stand for several.

    Raises:
        ValueError: there is no such kind.
    """
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in KINDS and name not in GROUPS]
    if unknown:
        raise ValueError(
            f"--kinds: {unknown[0]!r} is not a kind of fault: use some of {', '.join(KINDS)}, "
            f"or kill for {', '.join(KILLS)}, or all"
        )
    chosen = {kind for name in wanted for kind in GROUPS.get(name, (name,))}
    return tuple(kind for kind in KINDS if kind in chosen)


def draw(number: int, kinds: Sequence[str], seed: int) -> Trial:
    """The trial of a number: the kinds take turns, everything else depends on (seed, kind, number)."""
    kind = kinds[(number - 1) % len(kinds)]
    rng = random.Random(f"{seed}/{kind}/{number}")
    if kind in KILLS:
        moments = sorted(rng.random() for _ in range(rng.choice((1, 1, 2))))
        return Trial(number, kind, tuple(_kill(kind, moment, rng) for moment in moments))
    if kind == "sigterm":
        return Trial(number, kind, (Terminate(rng.random(), rng.choice(("torchrun", *range(NUM_RANKS)))),))
    if kind == "full-disk":
        return Trial(number, kind, (FillDisk(rng.random(), rng.uniform(0.1, 0.5), rng.choice((0.0, rng.random()))),))
    if kind == "nan":
        poison = Poison(rng.random(), rng.randrange(NUM_RANKS))
        return Trial(number, kind, (_kill("kill-one", rng.random(), rng),), poison)
    damage: Literal["bit-flip", "truncation"] = "bit-flip" if kind == "bit-flip" else "truncation"
    return Trial(number, kind, (Damage(rng.random(), damage, rng.random(), rng.random()),))


def _kill(kind: str, moment: float, rng: random.Random) -> Kill:
    one: Victim = rng.randrange(NUM_RANKS)
    several: Victim = rng.choice(("ranks", "everything"))
    if kind == "kill-in-save":
        return Kill(moment, rng.choice((one, several)), into_save=rng.random())
    return Kill(moment, one if kind == "kill-one" else several)
