"""How long does training with two hinges take, and with fewer attack steps while epsilon is small, against a constant
epsilon?

    OMP_NUM_THREADS=1 python benchmarks/run_time.py --seeds 0 1 2

On a shared machine, two runs one after the other differ by more than what is to be measured. So here one run of the
main job's recipe takes its steps in turns from three schedules, each at the same progress: what the machine does meets
all three. A step lasts from the end of the one before to its own: data, attack, update and optimizer. The alarms'
probes are timed apart, since not every schedule would meet as many; the recipe's run, of 384 steps, makes ten of them.
*Counted* are the passes forward and backward of all steps: the ratio if nothing else took time.
(What is learned in between is of no use: `hf-rft study recipes/study/attack_steps.yaml` has that.)
"""

import argparse
import statistics
import tempfile
import time
from functools import partial

from instruments import median_and_range
from transformers import TrainerCallback

from hf_rft import RobustTrainer, get_epsilon_schedule
from hf_rft.cli import recipes
from hf_rft.cli import train as run_rft
from hf_rft.schedules import scaled_steps
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.training.probe import LEAST_PROBES


RECIPE = str(recipes.FOLDER / "fashion_mnist" / "efficientnet_lite0_{}.yaml")
# Schedule of each arm, and whether it takes fewer steps while epsilon is small.
ARMS = {"constant": ("constant", False), "hinge": ("hinge", False), "hinge_fewer_steps": ("hinge", True)}
HINGES = {"start": 0.25, "end": 0.75}  # of the recipe
SCHEDULES = {"constant": get_epsilon_schedule("constant"), "hinge": get_epsilon_schedule("hinge", **HINGES)}
NAMES = list(ARMS)
RUN_STEPS = 384  # of the recipe


def attack_at(arm: str, progress: float, attack_steps: int) -> tuple[float, int]:
    """Multiplier of epsilon and attack steps; there is no attack where the first is 0."""
    recipe, takes_fewer = ARMS[arm]
    multiplier = SCHEDULES[recipe](progress)
    return multiplier, scaled_steps(attack_steps, multiplier) if takes_fewer else attack_steps


def counted_passes(arm: str, attack_steps: int, total: int = 10_000) -> float:
    """Passes forward and backward of an average training step."""
    attacks = [attack_at(arm, step / total, attack_steps) for step in range(total)]
    return 1 + sum(steps for multiplier, steps in attacks if multiplier > 0) / total


def arm_of(step: int) -> str:
    """Whose turn the step is that follows after `step` steps."""
    return NAMES[step % len(NAMES)]


class InTurns(RobustTrainer):
    """Its steps belong to the schedules in turn."""

    @property
    def _attack_due(self) -> tuple[float, int]:
        progress = (self.state.global_step // len(NAMES)) / (self.state.max_steps // len(NAMES))
        return attack_at(arm_of(self.state.global_step), progress, self.args.attack_steps)

    @property
    def share_of_epsilon(self) -> float:
        return self._attack_due[0]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        strength = self.adversary.strength
        self.adversary.strength = lambda share: (strength(share)[0], self._attack_due[1] if share else 0)


class Stopwatch(TrainerCallback):
    """Seconds of the clock, and of the processor, that the steps of each schedule took together."""

    def __init__(self):
        self.steps = {name: [0.0, 0.0] for name in NAMES}
        self.probes: list[list[float]] = []

    def start(self) -> None:
        self._last = (time.perf_counter(), time.process_time())

    def lap(self) -> list[float]:
        last = self._last
        self.start()
        return [now - before for now, before in zip(self._last, last, strict=True)]

    def add(self, name: str) -> None:
        self.steps[name] = [so_far + more for so_far, more in zip(self.steps[name], self.lap(), strict=True)]

    def seconds_of_run(self, name: str, rounds: int) -> float:
        probe = statistics.mean(seconds for seconds, _ in self.probes)
        return RUN_STEPS * self.steps[name][0] / rounds + LEAST_PROBES * probe

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.add(arm_of(state.global_step - 1))


class Stopped(Exception):
    """Training is over, and nothing else is of interest."""


def run(seed: int, args: argparse.Namespace, extra: list[str]) -> Stopwatch:
    stopwatch = Stopwatch()

    class Timed(InTurns):
        def train(self, *train_args, **kwargs):
            self.add_callback(stopwatch)
            callback = next(one for one in self.callback_handler.callbacks if isinstance(one, AlarmCallback))
            callback._probe = partial(self._timed, callback._probe)
            super().train(*train_args, **kwargs)
            raise Stopped

        def _timed(self, probe):
            stopwatch.add(arm_of(self.state.global_step))
            found = probe()
            stopwatch.probes.append(stopwatch.lap())
            return found

    run_rft.RobustTrainer = Timed
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", RECIPE.format("constant"), "--seed", str(seed), "--output_dir", folder]
        flags += ["--max_steps", str(len(NAMES) * args.rounds), "--attack_steps", str(args.attack_steps)]
        try:
            run_rft.main([*flags, "--eval_strategy", "no", "--disable_tqdm", "True", *extra])
        except Stopped:
            return stopwatch
        finally:
            run_rft.RobustTrainer = RobustTrainer
    raise AssertionError("`train` ends with `Stopped`")


def table(runs: list[Stopwatch], args: argparse.Namespace) -> str:
    """Ratios are to constant epsilon in the same run."""
    lines = [
        "| epsilon | s / step | to constant (range) | by CPU time | with ten probes | counted passes |",
        "| --- " * 6 + "|",
    ]
    for name in NAMES:
        clock, processor = ([one.steps[name][i] / one.steps["constant"][i] for one in runs] for i in range(2))
        both = [one.seconds_of_run(name, args.rounds) / one.seconds_of_run("constant", args.rounds) for one in runs]
        seconds = statistics.median(one.steps[name][0] / args.rounds for one in runs)
        counted = counted_passes(name, args.attack_steps) / counted_passes("constant", args.attack_steps)
        columns = [median_and_range(one) for one in (clock, processor, both)]
        lines.append(f"| {name} | {seconds:.3f} | {' | '.join(columns)} | {counted:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Stopwatch]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=64, help="Steps of each schedule.")
    parser.add_argument("--attack_steps", type=int, default=7)
    args, extra = parser.parse_known_args(arguments)  # other flags are those of `hf-rft train`
    runs = [run(seed, args, extra) for seed in args.seeds]
    print(
        f"\nPGD-{args.attack_steps}, {args.rounds} steps of each schedule, seeds {args.seeds}\n\n{table(runs, args)}"
    )
    return runs


if __name__ == "__main__":
    main()
