"""Base classes for plugins: `Loss`, `Schedule`, `Logger`, `Parallel`, and `ResumableLoader`."""
