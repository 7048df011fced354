"""What tests, bench, `verify` and `doctor` share: the judge of results, timing, tables, descriptions of a machine."""
