"""`nexus-run compare`: does a change help? Variants against a base on the same data and noise."""
