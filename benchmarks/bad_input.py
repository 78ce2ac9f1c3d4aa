"""Is every bad input refused with a message that names it? Fuzzes the recipes' flags and YAML files.

    python benchmarks/bad_input.py --minutes 5 --seed 0

Mutates valid command lines and configurations (wrong names, types, values, files; broken YAML) and calls the recipes'
real entry points, up to the moment where training, evaluation or an upload would start. Each outcome must be
"accepted", or exit status 2 with one message that names the offending argument. Anything else is a finding, printed
with the input that shows it, and ends the run with status 1: another exception, a message without the name, a hang, or
an output folder left behind by a refused run. Needs the extra `dev`.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Before anything of Hugging Face is imported: random names must not be looked up.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "recipes")]

import bad_data  # noqa: E402
import compare  # noqa: E402
import datasets  # noqa: E402
import evaluate_robustness  # noqa: E402
import leaderboard  # noqa: E402
import push_metric  # noqa: E402
import push_robust_model  # noqa: E402
import run_rft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hf_rft import RobustTrainer  # noqa: E402
from hf_rft.cli import run_program  # noqa: E402
from hf_rft.evaluation import evaluate as evaluation  # noqa: E402


SECONDS_PER_EXAMPLE = 30
RECIPES = {
    "run_rft": run_rft,
    "evaluate_robustness": evaluate_robustness,
    "push_metric": push_metric,
    "push_robust_model": push_robust_model,
    "compare": compare,
    "leaderboard": leaderboard,
}


class Reached(BaseException):
    """The work would start now."""


class Hang(BaseException):
    """An example took too long."""


@dataclass(frozen=True)
class Example:
    """A call of a recipe, with what was made wrong in it."""

    recipe: str
    flags: tuple[str, ...]
    config: bytes | None  # content of the file that `--config` names
    offending: tuple[str, ...]  # a message must hold one of these


# --- Inputs ---


def valid_values(place: Path) -> dict[str, dict[str, Any]]:
    """For each recipe, values of flags with which it starts to work."""
    model, images = str(place / "models" / "good"), str(place / "images" / "good")
    common = {"model_name_or_path": model, "seed": 1}
    return {
        "run_rft": {
            **common,
            "train_dir": images,
            "cache_dir": str(place / "cache"),
            "train_val_split": 0.5,
            "epsilon": "4/255",
            "attack": "pgd",
            "attack_steps": 2,
            "epsilon_schedule_type": "hinge",
            "epsilon_schedule_kwargs": {"start": 0.25, "end": 0.75},
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "eval_epsilons": ["0", "4/255"],
            "use_cpu": True,
            "report_to": "none",
        },
        "evaluate_robustness": {**common, "image_dir": images, "epsilons": ["0", "4/255"], "tier": "fast"},
        "push_metric": {"namespace": "me", "metrics": ["robust_accuracy"], "timeout": 5.0},
        "push_robust_model": {"model_dir": model, "report": str(place / "robustness.json"), "repo_id": "me/model"},
        "compare": {"seeds": [0, 1], "jobs": 1},
        "leaderboard": {"sort_by": "clean_accuracy"},
    }


POSITIONAL = {"compare": "{place}/images/a_file", "leaderboard": "{place}/models/good"}
# Flags that are not mutated: they say which machine to use, or where to stop.
LEFT_ALONE = {"help", "config", "local_rank"}


def names_of_flags(module) -> list[str]:
    """From the recipe's own `--help`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return sorted(set(re.findall(r"--([a-z][a-z0-9_]+)", printed.getvalue())) - LEFT_ALONE)


def values(place: Path) -> st.SearchStrategy:
    """Wrong in every way, and sometimes right."""
    numbers = st.one_of(
        st.integers(-3, 300),
        st.sampled_from([2**31, 2**32, 2**63, 10**30, -(10**9)]),
        st.floats(allow_nan=True, allow_infinity=True),
        st.sampled_from([0.0, 1.0, -1.0, 1e-9, 1e300]),
    )
    files = st.sampled_from(
        [str(path) for folder in ("images", "data", "models") for path in (place / folder).iterdir()]
        + ["/proc/no_such_place", "/", "no/such/file", "x" * 300, "bundled:nothing", "a/b", "~", "..", "/dev/null"]
    )
    words = st.sampled_from(
        [
            "",
            " ",
            "true",
            "False",
            "no",
            "none",
            "null",
            "linf",
            "l2",
            "fgsm",
            "trades",
            "mart",
            "steps",
            "epoch",
            "best",
        ]
        + [
            "8/255",
            "8",
            "0",
            "1/0",
            "0x10",
            "1_000",
            "1e5",
            "nan",
            "-inf",
            "{}",
            "{",
            "[]",
            '{"start": 2}',
            '{"a": [1]}',
        ]
        + [
            "cosine",
            "piecewise",
            "adafactor",
            "full_shard",
            "{place}",
            "%s",
            "\u0394",
            "a\nb",
            "--seed",
            "-1",
            "=",
            "'",
        ]
    )
    scalars = st.one_of(numbers, st.booleans(), words, files, st.text(max_size=8))
    return st.one_of(
        scalars,
        scalars,
        st.lists(scalars, max_size=3),
        st.dictionaries(st.sampled_from(["start", "end", "points", "a"]), scalars, max_size=2),
        st.none(),
        st.dates(),
    )


def as_words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value, default=str)]
    return [f"--{name}"] if value is None else [f"--{name}", str(value)]


@st.composite
def command_lines(draw, place: Path, recipe: str, flags: list[str]) -> Example:
    """Valid flags with one or two changed; a word may be dropped, doubled, misspelt or strange."""
    given_values, offending = dict(valid_values(place)[recipe]), []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(flags))
        given_values[name] = draw(values(place))
        offending.append(name)
    words = [word for name, value in given_values.items() for word in as_words(name, value)]
    words += [POSITIONAL[recipe].format(place=place)] if recipe in POSITIONAL else []
    match draw(st.sampled_from(["nothing", "nothing", "nothing", "double", "misspell", "stray", "equals"])):
        case "double":
            name = draw(st.sampled_from(sorted(given_values)))
            words += as_words(name, given_values[name])
            offending.append(name)
        case "misspell":
            word = draw(st.sampled_from([word for word in words if word.startswith("--") and len(word) > 5]))
            place_of_letter = draw(st.integers(3, len(word) - 1))
            changed = word[:place_of_letter] + word[place_of_letter + 1 :]
            words[words.index(word)] = changed
            offending += [changed, word]
        case "stray":
            word = draw(st.text(min_size=1, max_size=6).filter(lambda word: word.strip("-")))
            words.insert(draw(st.integers(0, len(words))), word)
            # It may become the value of any flag that takes several or a further one, or belong to none.
            offending += ["belong to no flag", "unrecognized arguments", "Unknown flag", *given_values]
        case "equals":
            words.append(f"--{draw(st.sampled_from(flags))}={draw(st.text(max_size=4))}")
            offending.append(words[-1][2:].partition("=")[0])
    offending += [word for word in words if words.count(word) > 1 and word.startswith("--")]
    offending += ["--seed"] * ("--seed" in words and "seed" not in given_values)  # a value that looks like a flag
    return Example(recipe, tuple(words), None, (*offending, *["configs", "entries"] * (recipe in POSITIONAL)))


@st.composite
def config_files(draw, place: Path, recipe: str, flags: list[str]) -> Example:
    """A valid file with changed values, or changed letters, in whatever encoding."""
    entries, offending = dict(valid_values(place)[recipe]), []
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.one_of(st.sampled_from(flags), st.text(max_size=5), st.integers(0, 9)))
        entries[name] = draw(values(place))
        offending.append(str(name))
    text = yaml.safe_dump(entries, allow_unicode=draw(st.booleans()), sort_keys=False)
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(text)))
        broken = st.sampled_from(
            list("\t:-{}[]&*!|>#'\"%@,?\n\0\ufffe") + ["&a ", "*a", "!!set ", "<<: ", "---\n", "..."]
        )
        new = draw(
            st.one_of(broken, st.just(""), st.sampled_from(["!!python/object:os.system ", "2020-13-41", "1:30"]))
        )
        text = text[:position] + new + text[position + draw(st.integers(0, 3)) :]
        offending += [*map(str, entries), "--config"]  # a letter more may change any entry, or the whole file
    if draw(st.integers(0, 9)) == 0:
        line = draw(st.sampled_from(text.splitlines() or [""]))
        text += f"\n{line}\n"
        offending += ["--config", line.partition(":")[0]]
    encoding = draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "latin-1"]))
    if encoding != "utf-8":
        offending += ["--config", *map(str, entries)]
    return Example(recipe, (), text.encode(encoding, errors="replace"), (*offending, "--config"))


# --- Outcomes ---


def run(example: Example, folder: Path) -> str | None:
    """None if the input was accepted, "" if it was refused as it should be, else what is wrong."""
    output_dir = folder / "out"
    flags = list(example.flags)
    if example.config is not None:
        (folder / "recipe.yaml").write_bytes(example.config)
        flags += ["--config", str(folder / "recipe.yaml")]
    has_own = any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in flags)
    if example.recipe not in ("push_metric", "push_robust_model") and not has_own:
        flags += ["--output_dir", str(output_dir)]
    environment, errors = dict(os.environ), io.StringIO()
    sys.argv = [f"{example.recipe}.py"]
    before = {path.name for path in folder.iterdir()}
    signal.alarm(SECONDS_PER_EXAMPLE)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            run_program(lambda: RECIPES[example.recipe].main(flags))
        return None
    except Reached:
        return None
    except Hang:
        return f"hang: more than {SECONDS_PER_EXAMPLE} seconds"
    except SystemExit as end:
        return None if end.code in (0, None) else judge(end.code, errors.getvalue(), example, folder, before)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} from {frame.filename}:{frame.lineno}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
        os.environ.clear()
        os.environ.update(environment)
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def judge(code: Any, printed: str, example: Example, folder: Path, before: set[str]) -> str:
    """What is wrong with a refusal, "" if nothing."""
    left = {path.name for path in folder.iterdir()} - before
    if left:
        return f"a refused run left {sorted(left)}"
    if isinstance(code, str):  # Python prints it and ends with status 1: input in order, but the work failed
        return "" if any(name in code for name in (*example.offending, *example.flags)) else f"message: {code[:300]}"
    messages = [part for part in re.split(rf"^{example.recipe}\.py: error: ", printed, flags=re.MULTILINE)[1:]]
    if code != 2 or len(messages) != 1 or "Traceback" in printed:
        return f"status {code}, {len(messages)} messages: {printed[-300:]}"
    message = messages[0].replace("-", "_")
    if not any(name.replace("-", "_").removeprefix("no_") in message for name in example.offending):
        return f"the message names none of {example.offending}: {messages[0][:300]}"
    return ""


def make_report(place: Path) -> None:
    """Evidence for the valid model."""
    folder = place / "models" / "good"
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = datasets.load_dataset("imagefolder", data_dir=str(place / "images" / "good"), split="train")
    options = {"norm": "linf", "epsilons": ["0", "1/255"], "tier": [("pgd", 1)], "progress_bar": False}
    evaluation.evaluate_robustness(model, images, processor, **options).save(place / "robustness.json")


def stop_before_the_work() -> None:
    def reached(*args, **options):
        raise Reached

    RobustTrainer.train = reached
    evaluation.find_breaking_points = reached
    for module in (push_metric, push_robust_model):
        module.push_folder = reached
    compare.run = reached


def signature(finding: str) -> str:
    """Findings of one cause have the same."""
    return re.sub(r"'[^']*'|[\d.]+|\([^)]*\)", "_", finding)[:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def on_alarm(number, frame):
        raise Hang

    signal.signal(signal.SIGALRM, on_alarm)
    counts: Counter[str] = Counter()
    findings: dict[str, tuple[str, Example]] = {}
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        place, folder = Path(scratch, "place"), Path(scratch, "runs")
        folder.mkdir()
        for name in ("images", "datasets", "models"):
            make = getattr(bad_data, f"make_{'image_folders' if name == 'images' else name}")
            target = place / ("data" if name == "datasets" else name)
            target.mkdir(parents=True)
            make(target)
        make_report(place)
        os.chdir(folder)  # for relative output folders, which are removed after each example
        stop_before_the_work()
        flags = {recipe: names_of_flags(module) for recipe, module in RECIPES.items()}
        with_files = ["run_rft", "evaluate_robustness", "push_metric", "push_robust_model"]
        inputs = st.one_of(
            *(command_lines(place, recipe, flags[recipe]) for recipe in ["run_rft"] * 5 + [*RECIPES]),
            *(config_files(place, recipe, flags[recipe]) for recipe in ["run_rft"] * 4 + with_files),
        )

        def check(example: Example) -> None:
            if time.monotonic() > end:
                return
            found = run(example, folder)
            kind = "accepted" if found is None else "refused" if not found else "findings"
            counts[f"{example.recipe} {'flags' if example.config is None else 'YAML'}: {kind}"] += 1
            counts[kind] += 1
            if found and signature(found) not in findings:
                findings[signature(found)] = found, example
                print(f"\nFINDING {found}\n  {example}", flush=True)

        batch = 0
        while time.monotonic() < end:
            run_batch = given(inputs)(check)
            run_batch = settings(
                max_examples=200,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(run_batch)
            seed(1000 * args.seed + batch)(run_batch)()
            batch += 1
    for name, count in sorted(counts.items(), key=lambda item: (":" in item[0], item[0])):
        print(f"{name:<40}{count}")
    print(f"{len(findings)} different findings in {args.minutes:g} minutes, seed {args.seed}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
