"""From the description of a study to its runs.

common: {norm: linf, num_train_epochs: 4}           # flags of `hf-rft train` that all runs share
factors:                                            # what varies: factor -> option -> flags
  data:
    emoji: {dataset_name: "bundled:emoji", label_column_name: group}
    fashion_mnist: {dataset_name: "bundled:fashion_mnist_5k"}
  schedule:
    constant: {epsilon_schedule_type: constant}
    hinge: {config: emoji/efficientnet_lite0_hinge} # a recipe; flags win over it
seeds: [0, 1, 2]
grids:                                              # parts of the whole grid; a factor left out: all its options
  - {}
  - {data: [emoji], seeds: [3, 4]}
resources: {cpus: 1, gpus: 0}                       # of each run
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..training.arguments import TIED
from ..utils.values import COUNT, NOT_NEGATIVE, SEED
from .results import COLUMNS


KEYS = {"common", "factors", "seeds", "grids", "resources"}
# Flags that a study sets itself: what they say is not part of what a run computes.
SET_BY_STUDY = {"output_dir", "resume", "resume_from_checkpoint", "seed"}
# Columns of the tables, beside those of the factors, and a key of `grids`.
RESERVED = {*COLUMNS, "option", "pair", "at", "at_number", "accuracy", "reason", "common", "seeds"}


@dataclass(frozen=True, eq=False)
class Run:
    """One training: which option of each factor, which seed, and the flags that follow."""

    options: Mapping[str, str]
    seed: int
    flags: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of everything that the run is told to compute; names of factors and options are not part of it."""
        told = json.dumps({**self.flags, "seed": self.seed}, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return ", ".join([*self.options.values(), f"seed {self.seed}"])


@dataclass(frozen=True)
class Study:
    """Runs that are to be compared, in the order in which to make them."""

    factors: list[str]
    runs: list[Run]
    cpus: int | None = None  # cores of each run; None: an equal share for runs at the same time
    gpus: float = 0  # for Ray

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], read_recipe: Callable[[str], Mapping[str, Any]]
    ) -> "Study":
        """The study that a YAML file describes.

        Args:
            description (`Mapping`):
                See the top of this file.
            read_recipe (`Callable`):
                Returns the flags of a recipe by its name.

        Raises:
            ValueError: naming the entry at fault, and the remedy.
        """
        common, factors = description.get("common") or {}, description.get("factors")
        if not isinstance(factors, dict) or not factors:
            raise ValueError("`factors` must hold what varies, as `factor: {option: {flag: value}}`.")
        for factor, options in {"common": {"": common}, **factors}.items():
            if not isinstance(options, dict) or not options:
                raise ValueError(f"`{factor}` must hold its options, as `option: {{flag: value}}`, got {options!r}.")
            if odd := [key for key in (factor, *options) if key is None or isinstance(key, bool)]:
                raise ValueError(f"`{factor}` has the key {odd[0]}, as YAML reads `on`, `no` and the like; quote it.")
            if len(set(map(str, options))) < len(options):
                raise ValueError(f"`{factor}` has options that are written alike: {list(options)}; rename one.")
            for option, flags in options.items():
                name = f"`{factor}: {option}`" if option else f"`{factor}`"
                if not isinstance(flags, dict) or not all(isinstance(flag, str) for flag in flags):
                    raise ValueError(f"{name} must hold flags of `hf-rft train`, got {flags!r}.")
                if own := sorted(SET_BY_STUDY & set(flags)):
                    raise ValueError(f"{name} sets {own[0]!r}, which the study sets for each run; leave it out.")
        if taken := [factor for factor in factors if factor in RESERVED]:
            raise ValueError(f"`factors` has {taken[0]!r}, a column of the results; give the factor another name.")
        resources = description.get("resources") or {}
        if not isinstance(resources, dict) or not set(resources) <= {"cpus", "gpus"}:
            raise ValueError(f"`resources: {resources}` may hold `cpus` and `gpus`.")
        for name, value in resources.items():
            if value not in (allowed := COUNT if name == "cpus" else NOT_NEGATIVE):
                raise ValueError(f"`resources: {name}: {value}` must be {allowed}.")
        grids = description.get("grids") or [{}]
        if not isinstance(grids, list):
            raise ValueError(f"`grids` must be a list of `{{factor: [options], seeds: [...]}}`, got {grids!r}.")

        runs: dict[str, Run] = {}
        for grid in grids:
            for run in _runs_of(grid, factors, common, description.get("seeds", [0]), read_recipe):
                other = runs.setdefault(run.key, run)
                if other.options != run.options:
                    raise ValueError(
                        f"The runs {other} and {run} have the same flags, so they would be one run under two names; "
                        "drop one, or let their options differ."
                    )
        return cls(list(factors), list(runs.values()), resources.get("cpus"), resources.get("gpus", 0))


def _runs_of(
    grid: Any,
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]],
    common: Mapping[str, Any],
    seeds: Any,
    read_recipe: Callable[[str], Mapping[str, Any]],
) -> Iterable[Run]:
    """The runs of one part of the grid: first all with the first seed, so that a study cut short is balanced."""
    if not isinstance(grid, dict):
        raise ValueError(f"`grids` must be a list of `{{factor: [options], seeds: [...]}}`, got {grid!r}.")
    chosen = {factor: list(options) for factor, options in factors.items()}
    for factor, options in grid.items():
        if factor == "seeds":
            continue
        if factor not in factors:
            raise ValueError(f"`grids`: {factor!r} is not a factor; there are {list(factors)}.")
        options = options if isinstance(options, list) else [options]
        if unknown := [option for option in options if option not in factors[factor]]:
            raise ValueError(f"`grids`: {factor!r} has no option {unknown[0]!r}; it has {list(factors[factor])}.")
        chosen[factor] = options
    seeds = grid.get("seeds", seeds)
    if not isinstance(seeds, list) or not seeds or any(seed not in SEED for seed in seeds):
        raise ValueError(f"`seeds: {seeds}` must be a list of seeds, each {SEED}.")
    for seed, *options in itertools.product(seeds, *chosen.values()):
        parts = [common, *(factors[factor][option] for factor, option in zip(factors, options, strict=True))]
        # As on the command line, flags win over recipes.
        recipes = [read_recipe(part["config"]) for part in parts if "config" in part]
        flags: dict[str, Any] = {}
        for part in (*recipes, *parts):
            for first, second in TIED.items():
                if first in part:
                    flags.pop(second, None)
            flags |= part
        flags = {name: value for name, value in flags.items() if name not in ("config", *SET_BY_STUDY)}
        if secret := [flag for flag, value in flags.items() if flag.endswith("token") and value is not None]:
            raise ValueError(
                f"{secret[0]!r} is set, and a study keeps its flags in files; log in with `hf auth login` or set "
                "HF_TOKEN instead."
            )
        yield Run(dict(zip(factors, map(str, options), strict=True)), seed, flags)
