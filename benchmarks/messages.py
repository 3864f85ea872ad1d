"""Count what ranks send each other for one mask of sharded weights.

    torchrun --nproc-per-node 2 -m benchmarks.messages        # seconds, on CPUs
    torchrun --nproc-per-node 4 -m benchmarks.messages

Two matrices with 524,288 entries together, and a window of five masks that is full. On four ranks
both are cut by tensor parallel and `fully_shard`, on any other number by `fully_shard` alone, in
several cases. Counts depend on no speed. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD

from benchmarks.__main__ import table
from torch_worm_optim import ParameterSelector, WormOptimizer

WINDOW = 5


def sparse(weight: Tensor) -> Tensor:
    """Three of five entries zero."""
    return weight * (torch.rand_like(weight) > 0.6)


# How the weights of a case are made of random ones, and the arguments of the search.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "nothing special": (lambda weight: weight, {}),
    "float64": (Tensor.double, {}),
    "weights rounded to bfloat16": (lambda weight: weight.bfloat16().float(), {}),
    "60 % of the weights zero": (sparse, {}),
    'scope="layer"': (lambda weight: weight, {"scope": "layer"}),
    "min_keep steps in": (lambda weight: weight, {"min_keep": 0.6, "prune_ratio": 0.5}),
}


def count(case: str, mesh_shape: tuple[int, ...]) -> dict[str, object]:
    """The reductions of one mask."""
    prepare, options = CASES[case]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    for layer in net:
        layer.weight = nn.Parameter(prepare(layer.weight.detach()))
    names = ("dp", "tp")[: len(mesh_shape)]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    if "tp" in names:
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    sgd = SGD(net.parameters(), lr=0.1)
    opt = WormOptimizer(
        sgd,
        net,
        ParameterSelector("*.weight"),
        sample_every=None,
        window=WINDOW,
        stopping_point=0,
        **options,
    )
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    for mask in range(WINDOW):
        dist.all_reduce = reduce if mask < WINDOW - 1 else counting
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some cases have many equal weights
            for weight in net.parameters():
                weight.mul_(2)  # no mask is drawn unless a weight has changed
            opt.sample()
    dist.all_reduce = reduce
    assert opt.history[-1].distances
    work = case if len(mesh_shape) == 1 else "tensor parallel and fully_shard"
    return {"work": work, "all-reduces": len(sent), "bytes": sum(sent)}


def main() -> None:
    """Count all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_messages.json"))
    args = parser.parse_args()
    dist.init_process_group("gloo")
    n = dist.get_world_size()
    cases = [("nothing special", (2, 2))] if n == 4 else [(case, (n,)) for case in CASES]
    rows = [count(*each) for each in cases]
    if dist.get_rank() == 0:
        print(table(rows))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"torch": torch.__version__, "ranks": n, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
