"""Run a function on several ranks, each a process of its own, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# One process imports torch, and those of the ranks are forked from it.
_PRELOADED = [
    "torch",
    "torch._dynamo",  # sharding imports it, which takes each rank more than a second
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "sharded_jobs",
]
_PATIENCE = 120.0


def run_on_ranks(n: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``job(*args)`` returns on each of ``n`` ranks; an error on any of them is raised here.

    Args:
        n: How many ranks.
        job: A function of a module that can be imported.
        args: What can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_work, args=(rank, n, folder, job, args), daemon=True)
            for rank in range(n)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + _PATIENCE
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
            if any(rank.exitcode for rank in ranks):  # the others will wait for it in vain
                deadline = min(deadline, time.monotonic() + 3)
        hanging = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        failures = sorted(Path(folder).glob("*.error"))
        if failures:
            raise AssertionError("\n".join(each.read_text() for each in failures))
        if hanging or any(rank.exitcode for rank in ranks):
            raise AssertionError(f"Ranks {hanging} of {n} hang in {job}{args}.")
        return [
            torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(n)
        ]


def _work(rank: int, n: int, folder: str, job: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n
        )
        torch.manual_seed(0)
        torch.save(job(*args), Path(folder) / f"{rank}.result")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        sys.stdout.flush()
        # The others wait for this one in a collective call, and would for half an hour.
        os._exit(1)
