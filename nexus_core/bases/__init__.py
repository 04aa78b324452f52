"""What plugin authors derive from: `Loss`, `Schedule`, `Logger`, `Parallel`, `ResumableLoader`."""
