"""Measuring robustness at fixed epsilons."""
