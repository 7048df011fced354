"""Plans: how one launch of a GPU kernel cuts its work into tiles.

`tiles`, `quant_tiles` and `sm90` hold data: the types and the built-in tables. `store` finds the plans that ``python -m
lora_kernels verify --tune`` measured on this machine. `choose` picks a plan for a call. Each module imports only those
named before it.
"""
