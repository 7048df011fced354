"""The operands of a call, the dropout rule and the version: every other folder may import these."""
