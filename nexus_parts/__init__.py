"""What families of plugins are built from: losses, loggers, schedules, loaders, groups."""
