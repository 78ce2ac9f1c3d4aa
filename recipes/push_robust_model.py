"""`hf-rft push` as a file."""

import sys

from hf_rft.cli.main import run


if __name__ == "__main__":
    run("push", sys.argv[1:])
