"""Train over a grid of options and seeds, and compare the options with intervals.

    hf-rft study my_study.yaml --jobs 2             # makes the runs that are missing, then the report
    hf-rft study my_study.yaml --ray_address auto   # the same on the nodes of a Ray cluster
    hf-rft study report outputs/my_study            # the report alone, from results.csv
    hf-rft study report outputs/my_study --compare schedule --baseline linear75

my_study.yaml names flags of `hf-rft train` that all runs share, the factors that vary with the flags of their options,
and seeds; docs/how_to/study.md shows one. Each run is an ordinary `hf-rft train` in a folder of its own. A study that
was killed goes on with the same command; a run that fails is listed in failures.csv and does not stop the others.

Writes into --output_dir: results.csv (a row per run), curves.csv (a row per run and epsilon), failures.csv, report.md
with its figures, and runs/ with the folders of the runs.
"""

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..studies.grid import KEYS, Study
from ..studies.report import write_report
from ..studies.runs import folder_of, make_study, with_ray, with_threads, write_recipe
from ..utils.files import check_writable
from .exits import PREEMPTED, exit_with
from .parsing import Parser, read_config
from .recipes import find_file
from .train import parse_arguments


def read_recipe(name: str) -> dict:
    """The flags of a recipe; their names are checked with all others, when the run is."""
    return read_config(find_file("config:", name), argument="config:")


def check_runs(study: Study, output_dir: Path) -> None:
    """Let `hf-rft train` read the flags of every run, so that a mistake ends the study before it begins."""
    with TemporaryDirectory() as scratch:
        for run in study.runs:
            recipe = Path(scratch, "recipe.yaml")
            write_recipe(run, recipe)
            try:
                with contextlib.redirect_stdout(None):  # it says which file it reads
                    parse_arguments(["--config", str(recipe), "--output_dir", str(folder_of(run, output_dir))])
            except SystemExit:
                print(f"in the run {run}", file=sys.stderr)
                raise


def add_run_arguments(parser: Parser, output_dir: str) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="Where runs and results go.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Runs at a time on this machine.")
    parser.add_argument(
        "--ray_address", metavar="TEXT", help='Of a Ray cluster that makes the runs; "auto": the one here.'
    )
    parser.add_argument("--delete_weights", action="store_true", help="Of each run, once its numbers are read.")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the study in order, as Ctrl-C does, so that no training goes on without it."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_study(study: Study, args) -> None:
    """Make the runs that are missing, and the report."""
    if args.jobs < 1:
        exit_with(f"--jobs {args.jobs} must be at least 1.")
    if args.ray_address is not None and importlib.util.find_spec("ray") is None:
        exit_with('--ray_address needs ray: pip install "hf_rft[ray]"')
    check_writable("--output_dir", args.output_dir)
    output_dir = args.output_dir.resolve()
    check_runs(study, output_dir)
    if args.ray_address is None:
        cpus = int(study.cpus or max(1, (os.cpu_count() or 1) // args.jobs))
        scheduler = partial(with_threads, jobs=args.jobs)
    else:
        cpus = int(study.cpus or 1)
        scheduler = partial(with_ray, address=args.ray_address, cpus=cpus, gpus=study.gpus)
    with ended_by_sigterm():
        failed = make_study(study, output_dir, scheduler, cpus=cpus, keeps_weights=not args.delete_weights)
    if failed < len(study.runs):
        print(write_report(output_dir))
    if failed:
        sys.exit(
            f"{failed} of {len(study.runs)} runs failed; see {args.output_dir / 'failures.csv'}. The same command "
            "makes them again."
        )


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["report"]:
        report(words[1:])
        return
    parser = Parser(description=__doc__)
    parser.add_argument("file", help="YAML file that describes the study.")
    add_run_arguments(parser, "outputs/study")
    args = parser.parse_args(words)
    description = read_config(find_file("file:", args.file), KEYS, "file:")
    run_study(Study.from_description(description, read_recipe), args)


def report(words: list[str]) -> None:
    parser = Parser(prog="hf-rft study report", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="Folder with results.csv.")
    parser.add_argument(
        "--compare", metavar="FACTOR", help="Factor whose options are compared. Default: the last one."
    )
    parser.add_argument("--baseline", metavar="OPTION", help="What they are compared with. Default: the first one.")
    args = parser.parse_args(words)
    print(write_report(args.output_dir, compare=args.compare, baseline=args.baseline))
