"""Each NEXUS module on a dedicated puzzle: the data and plots of the preset `modules`."""
