"""`hf-rft compare` as a file."""

import sys

from hf_rft.cli.main import run


if __name__ == "__main__":
    run("compare", sys.argv[1:])
