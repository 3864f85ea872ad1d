"""Measure what truncation leaves of an update, by optimizer and by step since it began.

    python -m benchmarks.truncation                  # a minute on one core

Two entries see the same constant gradient, in double precision, and the mask removes one of them.
What is reported is the update of the removed entry, divided by that of the kept one: after ordinary
steps, or truncated from the first step on. Optimizers have torch's default settings, but for
momentum and no weight decay. *Overshoot* is the largest such ratio after truncation has ended.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from benchmarks.__main__ import table
from torch_worm_optim import ParameterSelector, Phase, WormOptimizer

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda weights: SGD(weights),
    "SGD, momentum 0.9": lambda weights: SGD(weights, momentum=0.9),
    "Adam": lambda weights: Adam(weights),
    "AdamW": lambda weights: AdamW(weights, weight_decay=0),
    "RMSprop": lambda weights: RMSprop(weights),
}


def run(optimizer: str, truncate: str, before: int, args: argparse.Namespace) -> dict[str, Any]:
    """Ordinary steps, truncated ones, and ordinary ones again."""
    model = nn.ParameterDict({"weight": torch.tensor([0.0, 1e4], dtype=torch.float64)})
    weight = model["weight"]
    weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of under Adam is what this is about
        opt = WormOptimizer(
            OPTIMIZERS[optimizer]([weight]),
            model,
            selector=ParameterSelector("weight"),
            truncation=args.truncation,
            truncate=truncate,
            trigger="always",
            fade=1,
            window=2,
            sample_every=None,
        )

    def ratios(n_steps: int) -> list[float]:
        found = []
        for _ in range(n_steps):
            old = weight.detach().clone()
            weight.grad.fill_(1)  # truncation scales it in place
            opt.step()
            removed, kept = (weight.detach() - old).tolist()
            found.append(removed / kept)
        return found

    ratios(before)
    opt.sample()
    assert opt.phase is Phase.TRUNCATING
    truncated = ratios(max(args.steps))
    opt.sample()  # the same mask again, which ends the search
    assert opt.phase is Phase.CONVERGED
    start = f"after {before:,} steps" if before else "from the first step"
    row: dict[str, Any] = {"work": f"{optimizer}, {truncate}, {start}"}
    row |= {f"step {step:,}": truncated[step - 1] for step in args.steps}
    return row | {"overshoot": max(ratios(args.after))}


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--truncation", type=float, default=0.003)
    parser.add_argument("--before", type=int, default=5000, help="ordinary steps before")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 10, 100, 1000, 5000])
    parser.add_argument("--after", type=int, default=2000, help="ordinary steps after")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_truncation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        run(optimizer, truncate, before, args)
        for truncate in ("gradient", "update")
        for before in (args.before, 0)
        for optimizer in OPTIMIZERS
    ]
    print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "arguments": vars(args), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
