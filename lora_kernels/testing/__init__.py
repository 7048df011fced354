"""What tests, bench, `tune` and `doctor` share: the judge of results, timing, tables, descriptions of a machine."""
