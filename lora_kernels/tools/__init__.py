"""The commands `doctor` and `tune`."""
