"""The judge of results, and timing: shared by the tests, the bench, `tune` and `doctor`."""
