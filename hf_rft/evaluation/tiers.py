"""Named sets of attacks: how hard an evaluation tries."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..attacks import ATTACKS, Attack
from ..attacks.base import attack_name, checked
from ..threat_model import NORMS
from ..utils.values import COUNT


class AttackRun(NamedTuple):
    """One attack of an evaluation."""

    attack: Attack
    steps: int
    restarts: int = 1


@dataclass(frozen=True)
class Tier:
    """A named list of attacks. An example counts as robust only if it withstands all of them.

    Args:
        name (`str`):
            `"custom"` for any list not in [`TIERS`].
        attacks (`tuple[AttackRun, ...]`):
            In the order in which they run, cheap ones first.
        guess_steps (`int`):
            Steps of the minimum-norm search for nearer adversarial examples; 0 for no search.
    """

    name: str
    attacks: tuple[AttackRun, ...]
    guess_steps: int = 0

    def __repr__(self) -> str:
        runs = (
            f"{attack_name(run.attack)} {run.steps}" + f" x {run.restarts}" * (run.restarts > 1)
            for run in self.attacks
        )
        return f"Tier({self.name}: {', '.join(runs)})"

    def describe(self) -> dict[str, Any]:
        """What to record with a result, as JSON values."""
        return {
            "tier": self.name,
            "attacks": [
                {**run._asdict(), "attack": attack_name(run.attack), **_options(run.attack)} for run in self.attacks
            ],
            "guess_steps": self.guess_steps,
        }


# In L1, APGD finds more from several sparse starts; elsewhere one run is nearly as good (benchmarks/README.md).
_RESTARTS = {("l1", "apgd"): 5}


def _tier(name: str, *runs: tuple[str, int]) -> dict[str, Tier]:
    """The tier for each norm."""
    return {
        norm: Tier(
            name,
            tuple(AttackRun(ATTACKS[attack], steps, _RESTARTS.get((norm, attack), 1)) for attack, steps in runs),
            guess_steps=20,
        )
        for norm in NORMS
    }


# By name and norm. As in AutoAttack (Croce and Hein 2020; 2021 for L1), but with FMN instead of FAB and with nine
# targets for every norm; `lean` aims at the three nearest ones, at half the cost (benchmarks/README.md).
TIERS = {
    "fast": _tier("fast", ("apgd", 100)),
    "lean": _tier("lean", ("apgd", 100), ("malt", 100)),
    "standard": _tier("standard", ("apgd", 100), ("apgd_targeted", 100)),
    "full": _tier("full", ("apgd", 100), ("apgd_targeted", 100), ("fmn", 100), ("square", 5000)),
}


def _options(attack: Any) -> dict[str, Any]:
    """Numbers of classes that an attack aims at and compares; `options` that `functools.partial` binds to it."""
    parameters = inspect.signature(attack).parameters
    counts = {name: parameters[name].default for name in ("targets", "candidates") if name in parameters}
    found = {name: count for name, count in counts.items() if isinstance(count, int)}
    options = {}
    attack = inspect.unwrap(attack)
    while isinstance(attack, partial):
        options = {**{name: str(value) for name, value in attack.keywords.items()}, **options}
        attack = inspect.unwrap(attack.func)
    return {**found, "options": options} if options else found


def make_tier(tier: str | Sequence, norm: str | None = None) -> Tier:
    """A tier by name, or a `"custom"` one from a list of `(attack, steps)` or `(attack, steps, restarts)`.

    An attack is a name in `ATTACKS` or a callable with the signature of [`hf_rft.attacks.Attack`]. The tier behind a
    name depends on the norm; a list needs no norm.

    Raises:
        ValueError: for an unknown name, an empty list, a number of steps or restarts below 1, or a callable with
            another signature.
    """
    if isinstance(tier, Tier):
        return tier
    if isinstance(tier, str):
        if tier not in TIERS:
            raise ValueError(f"`tier={tier!r}` is unknown; choose one of {list(TIERS)}, or give a list of attacks.")
        return TIERS[tier][norm]
    if not isinstance(tier, Iterable):
        raise ValueError(f"`tier={tier!r}` must be one of {list(TIERS)}, or a list of (attack, steps).")
    runs = []
    for entry in tier:
        if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
            raise ValueError(
                f"`tier` holds {entry!r}; an attack is given as (attack, steps) or (attack, steps, restarts)."
            )
        run = AttackRun(*entry)
        if isinstance(run.attack, str):
            if run.attack not in ATTACKS:
                raise ValueError(f"`tier` holds the unknown attack {run.attack!r}; choose among {list(ATTACKS)}.")
            run = run._replace(attack=ATTACKS[run.attack])
        elif not callable(run.attack):
            raise ValueError(f"`tier` holds {run.attack!r}, which is not an attack; give a callable or a name.")
        elif run.attack not in ATTACKS.values():
            run = run._replace(attack=checked(run.attack))
        for name, value in (("steps", run.steps), ("restarts", run.restarts)):
            if value not in COUNT:
                raise ValueError(f"`tier` holds {name} {value!r} for {attack_name(run.attack)}; give {COUNT}.")
        runs.append(run)
    if not runs:
        raise ValueError("`tier` is an empty list; an evaluation needs at least one attack.")
    return Tier("custom", tuple(runs))
