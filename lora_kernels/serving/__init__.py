"""Serving many adapters over one base: `AdapterPool`, and the programs that it works with."""
