"""Studies: the same training over a grid of options and seeds, in tables from which everything else is made."""
