"""Helpers that at least two plugins use, and nothing else."""
