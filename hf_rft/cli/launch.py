"""Several processes for one command, with their exit status passed on.

`accelerate launch` and `torchrun` turn every status of theirs into a traceback and status 1, which buries the message
of the process that failed.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .exits import INTERRUPTED, PREEMPTED, exit_with
from .recipes import find_file, names_of


ACCELERATE_CONFIGS = "accelerate_configs"
# A launcher ends its processes by the signal that it received: what they end with then, having stopped in order.
STATUS_AFTER = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that [`split_arguments`] takes out."""
    known = ", ".join(names_of(ACCELERATE_CONFIGS))
    parser.add_argument(
        "--accelerate_config",
        metavar="NAME",
        help=f"Start the processes that a configuration of accelerate describes: {known}, or a YAML file.",
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="Start this many processes, each with a GPU if there are any."
    )
    parser.add_argument("--machine_rank", type=int, metavar="N", help="Number of this machine, from 0.")
    parser.add_argument("--main_process_ip", metavar="IP", help="Address of machine 0.")
    parser.add_argument("--main_process_port", type=int, metavar="N", help="Port of machine 0.")


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that say how to launch, checked, and all others.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_launch_arguments(parser)
    try:
        found, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(error) from error
    if found.num_processes is not None and found.num_processes < 1:
        raise ValueError(f"--num_processes {found.num_processes} must be at least 1.")
    flags = {name: value for name, value in vars(found).items() if value is not None}
    if not flags:
        return [], others
    if "LOCAL_RANK" in os.environ:
        raise ValueError(f"--{next(iter(flags))} starts processes, but a launcher has already started this one.")
    if (config := flags.pop("accelerate_config", None)) is not None:
        flags["config_file"] = find_file("--accelerate_config", config, ACCELERATE_CONFIGS)
    elif further := set(flags) - {"num_processes"}:
        raise ValueError(f"--{min(further)} needs --accelerate_config multi_node.")
    return [f"--{name}={value}" for name, value in flags.items()], others


def launch(flags: Sequence[str], program: Sequence[str]) -> NoReturn:
    """Run `python -m *program` as the flags say, and exit as it did.

    Args:
        flags (`Sequence[str]`):
            Of [`split_arguments`].
        program (`Sequence[str]`):
            A module and its arguments.
    """
    # Where accelerate starts a single process: that one shall stop in order and say what it ended with. Ctrl-C reaches
    # it anyway. (Several are started by torch, which handles signals itself.)
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in psutil.Process().children()])
    signal.signal(signal.SIGINT, lambda *_: None)
    logging.disable(logging.ERROR)  # torch repeats the statuses, at length
    try:
        _run(flags, program)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(_status(failure.exitcode, f"Process {rank}"))
    except subprocess.CalledProcessError as error:  # of accelerate's launchers that start a program
        sys.exit(_status(error.returncode, "The process"))
    except SignalException as error:
        sys.exit(STATUS_AFTER.get(error.sigval, 128 + error.sigval))
    sys.exit(0)


def _run(flags: Sequence[str], program: Sequence[str]) -> None:
    if any(flag.startswith("--config_file=") for flag in flags):
        launch_command(launch_command_parser().parse_args([*flags, "--module", *program]))
        return
    (count,) = (int(flag.partition("=")[2]) for flag in flags)
    # torchrun leaves one thread to each process if nothing is said.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    run.run(run.parse_args(["--standalone", f"--nproc_per_node={count}", "--module", *program]))


def _status(code: int, who: str) -> int:
    """As a shell gives it. Nobody else says that a process was killed."""
    if code >= 0:
        return code
    exit_with(f"{who} was ended by {signal.Signals(-code).name}.", status=128 - code)
