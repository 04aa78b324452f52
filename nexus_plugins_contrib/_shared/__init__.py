"""Helpers that at least two plugins of this package use, and nothing else."""
