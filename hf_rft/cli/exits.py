"""How a command ends: one message for what the user can repair, and an exit status that says what happened."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from ..hub.pushing import PushError
from ..training.distributed import leave_process_group


BAD_INPUT, STOPPED, PREEMPTED, INTERRUPTED = 2, 3, 75, 130  # argparse's; ours; EX_TEMPFAIL of sysexits.h; a shell's
PATIENCE = 10  # seconds


def run_program(main: Callable[[], Any]) -> None:
    """Run the main function of a command: what the user can repair ends it with one message, and exit status 2.

    That is what this package refused; and what the operating system, the Hub or a damaged weight file refused, whoever
    asked. Anything else is an error of the program, and keeps its traceback. Ctrl-C ends it with status 130.
    """
    try:
        main()
    except SystemExit:
        leave_process_group()
        raise
    except KeyboardInterrupt:
        try:
            exit_with("interrupted.", status=INTERRUPTED)
        finally:
            leave_process_group(all_do=False)
    except Exception as error:
        if not _is_users_error(error):
            raise  # without waiting for the other processes, which may wait for this one
        try:
            exit_with(error)
        finally:
            leave_process_group(all_do=False)
    leave_process_group()


def _is_users_error(error: Exception) -> bool:
    if isinstance(error, OSError | SafetensorError | PushError):
        return True
    if isinstance(error, ImportError):  # of an optional package: whoever raised it says which
        return not isinstance(error, ModuleNotFoundError)
    # Raised by this package, not by a library below.
    package = Path(__file__).parents[1]
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and package in raised_in.parents


def exit_with(error: BaseException | str, program: str | None = None, status: int = BAD_INPUT) -> NoReturn:
    """End the program with `program: error: message` on standard error.

    Most mistakes are found by all processes of a run, and one message is enough: the others wait a moment, in which
    the launcher ends them if the first one has failed as well.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
    message = re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_...", str(error)) or type(error).__name__  # no tokens
    print(f"{program or Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(status)
