"""Plans: how one launch of a GPU kernel cuts its work into tiles.

`tiles`, `quant_tiles` and `sm90` hold data: the types and the built-in tables. `store` reads and writes the file of
plans that ``python -m lora_kernels tune`` measured on this machine. `choose` picks a plan for a call. Each module
imports only those named before it.
"""
