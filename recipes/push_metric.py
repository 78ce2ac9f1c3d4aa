"""`hf-rft push-metric` as a file."""

import sys

from hf_rft.cli.main import run


if __name__ == "__main__":
    run("push-metric", sys.argv[1:])
