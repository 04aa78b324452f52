"""Helpers of at least two plugins of this package, and nothing else."""
