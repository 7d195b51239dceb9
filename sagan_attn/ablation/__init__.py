"""Ablations: a grid of runs, their statistics and their report."""
