"""The checks of tests/distributed/test_processes.py, in processes of their own.

Usage, with tests/helpers on PYTHONPATH: python -m support.distributed.worker FOLDER

The command imports once. Then, before any thread or tensor exists, it forks groups of two, four and one process, each
over gloo. Every group writes {check: error or null} to FOLDER/<size>.json after each check. A check that fails ends its
group.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.distributed import data as distributed_data
from support.distributed import frozen as distributed_frozen
from support.distributed import gradients as distributed_gradients
from support.distributed import meta as distributed_meta
from support.distributed import residual as distributed_residual
from support.distributed import restarts as distributed_restarts
from support.distributed import shared as distributed_shared
from support.distributed import tensor as distributed_tensor
from support.distributed.models import CHECKS, SKIPPED

__all__ = [
    "SKIPPED",
    "checks_of",
    "distributed_data",
    "distributed_frozen",
    "distributed_gradients",
    "distributed_meta",
    "distributed_residual",
    "distributed_restarts",
    "distributed_shared",
    "distributed_tensor",
    "main",
]


def checks_of(size: int) -> list[str]:
    return [name for name, (sizes, _) in CHECKS.items() if size in sizes]


def run(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    patience = datetime.timedelta(seconds=30)
    store.set_timeout(patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    results: dict[str, str | None] = {}
    for name in checks_of(size):
        if name in SKIPPED:
            continue
        try:
            CHECKS[name][1](folder)
            store.set(f"{name}/{rank}", "")
        except Exception:
            store.set(f"{name}/{rank}", f"in process {rank} of {size}:\n{traceback.format_exc()}")
        # The results go through the store, because after a failure the other processes may be in any collective.
        said = [store.get(f"{name}/{other}").decode() for other in range(size)]
        results[name] = "\n".join(filter(None, said)) or None
        if rank == 0:
            (folder / f"{size}.json").write_text(json.dumps(results))
        if results[name]:
            break
    os._exit(0)  # an orderly end of the group may hang


def main(folder: Path) -> None:
    for size in (2, 4, 1):
        processes = [mp.get_context("fork").Process(target=run, args=(rank, size, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
