"""`python -m hf_rft`, which is `hf-rft`."""

from .cli.main import main


main()
