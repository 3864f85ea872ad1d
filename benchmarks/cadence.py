"""Compare cadences: how often a mask is drawn, and what ticket that comes to.

    python -m benchmarks.cadence                     # two minutes on one core
    python -m benchmarks.cadence --scope layer       # each layer ranked by itself

The network of the quickstart on digits: two hidden layers of 128, SGD without momentum, 30 steps an
epoch, all else default. At one seed, runs differ in the cadence alone and see the same batches.
Each is pruned at the end of the epoch in which its ticket was found, and trains on until all have
had as many epochs. Tickets are compared with that of one mask an epoch at the same seed. Prints a
table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from benchmarks.__main__ import table
from benchmarks.min_keep import BATCH, Data, accuracy, digits, mlp, train_epoch
from torch_worm_optim import WormOptimizer


def run(
    sample_every: int, seed: int, data: Data, args: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """Search, prune, train on; and the ticket, or the newest mask if none was found."""
    torch.manual_seed(seed)
    model = mlp(data, 128)
    sgd = SGD(model.parameters(), lr=0.02)
    opt = WormOptimizer(sgd, model, sample_every=sample_every, scope=args.scope, fade=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scales tie where hardly anything was trained
        for _ in range(args.epochs):
            train_epoch(model, opt, data)
            if opt.converged:
                opt.prune()
    assert opt.candidate_mask is not None
    masks = opt.candidate_mask.values()
    row = {"sample_every": sample_every, "seed": seed, "converged": opt.converged}
    row |= {"step": opt.history[-1].step, "kept": [int(mask.sum()) for mask in masks]}
    return row | {"accuracy": accuracy(model, data)}, torch.cat(list(masks))


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample-every", type=int, nargs="*", default=[1, 3, 10, 30, 60])
    parser.add_argument("--scope", choices=["global", "layer"], default="global")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40, help="of each run, search included")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_cadence.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        _, usual = run(len(data.labels) // BATCH, seed, data, args)
        for sample_every in args.sample_every:
            row, mask = run(sample_every, seed, data, args)
            rows.append(row | {"differs": float((mask != usual).float().mean())})
    lines: list[dict[str, object]] = []
    for sample_every in args.sample_every:
        group = [row for row in rows if row["sample_every"] == sample_every]
        steps = [row["step"] for row in group if row["converged"]]
        lines.append(
            {
                "work": f"a mask every {sample_every} steps",
                "tickets": f"{len(steps)} of {len(group)}",
                "at step": f"{min(steps)} to {max(steps)}" if steps else None,
                "differs, mean": mean(row["differs"] for row in group),
                "least": min(row["differs"] for row in group),
                "most": max(row["differs"] for row in group),
                "kept of the first layer": mean(row["kept"][0] for row in group),
                "accuracy, mean": mean(row["accuracy"] for row in group),
                "worst": min(row["accuracy"] for row in group),
            }
        )
    print(table(lines))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "arguments": vars(args), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
