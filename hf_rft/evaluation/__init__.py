"""Measuring robustness on a fixed grid of epsilons."""
