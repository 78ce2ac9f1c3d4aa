"""`hf-rft evaluate` as a file, for `accelerate launch`."""

import sys

from hf_rft.cli.main import run


if __name__ == "__main__":
    run("evaluate", sys.argv[1:])
