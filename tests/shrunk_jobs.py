"""What ranks do in the tests of shrinking on several of them; a job returns plain data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_jobs import batch_of, new_net, outcome, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_worm_optim import BatchNormSelector, WormOptimizer

PRUNED_AT, SHRUNK_AT, END = 6, 9, 16


def wrapped(model: nn.Module, base: torch.optim.Optimizer | None = None) -> WormOptimizer:
    """The optimizer of every run, with a ticket as soon as there are two masks."""
    if base is None:
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    return WormOptimizer(
        base, model, BatchNormSelector(), sample_every=2, window=2, stopping_point=1.0
    )


def pruned(model: nn.Module, opt: WormOptimizer) -> None:
    """Train, prune, and train on until it is time to shrink."""
    train(model, opt, range(PRUNED_AT))
    opt.prune()
    train(model, opt, range(PRUNED_AT, SHRUNK_AT))


def alone(shrinking: bool = True) -> dict[str, Any]:
    """One process, whose network is shrunk or stays as large as it is."""
    net = new_net()
    opt = wrapped(net)
    pruned(net, opt)
    report = opt.shrink(batch_of(0)[0][:1]) if shrinking else None
    train(net, opt, range(SHRUNK_AT, END))
    return {**outcome(net, opt), "kept": report and report.kept}


def replicated(built_with: str, old_stays: bool) -> dict[str, Any]:
    """Under DDP, with an optimizer built with the network or with what DDP has around it."""
    net = new_net()
    ddp = old = DistributedDataParallel(net)
    opt = wrapped(net if built_with == "module" else ddp)
    pruned(ddp, opt)
    if built_with == "wrapper":
        with pytest.raises(RuntimeError, match=r"build it with `\.module`"):
            opt.shrink(batch_of(0)[0][:1])
        search = opt.state_dict()
        opt = wrapped(net, opt.base_optim)
        opt.load_state_dict(search)
    if not old_stays:
        del ddp, old
    reduce = torch.distributed.all_reduce

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shrinking sends something")

    torch.distributed.all_reduce = forbidden
    report = opt.shrink(batch_of(0)[0][:1])
    torch.distributed.all_reduce = reduce
    train(DistributedDataParallel(net), opt, range(SHRUNK_AT, END))
    return {**outcome(net, opt), "kept": report.kept}
