"""`hf-rft app` as a file."""

import sys

from hf_rft.cli.main import run


if __name__ == "__main__":
    run("app", sys.argv[1:])
