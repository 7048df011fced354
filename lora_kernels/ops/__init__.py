"""A call: its checks, its autograd Functions and its registered operators."""
