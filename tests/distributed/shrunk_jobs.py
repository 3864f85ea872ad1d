"""What ranks do in the tests of shrinking on several of them; a job returns plain data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sharded_jobs import batch_of, new_net, outcome, shard, train
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn.parallel import DistributedDataParallel

from torch_worm_optim import BatchNormSelector, WormOptimizer, load_shrunk_

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


WHOLE = dcp_state.StateDictOptions(full_state_dict=True)


def sharded(layout: str) -> tuple[nn.Module, WormOptimizer, dict[str, Any]]:
    """Gather on every rank, shrink there, shard the smaller network, and train on."""
    model = shard(new_net(), layout)
    opt = wrapped(model)
    pruned(model, opt)
    weights, search = dcp_state.get_state_dict(model, opt, options=WHOLE)

    net = new_net()
    opt = wrapped(net)
    dcp_state.set_state_dict(
        net, opt, model_state_dict=weights, optim_state_dict=search, options=WHOLE
    )
    report = opt.shrink(batch_of(0)[0][:1])
    search = dcp_state.get_optimizer_state_dict(net, opt, options=WHOLE)
    shard(net, layout)
    opt = wrapped(net)
    dcp_state.set_optimizer_state_dict(net, opt, search, options=WHOLE)
    with torch.no_grad():  # an evaluation leaves whole parameters in FSDP's root module
        net.eval()(batch_of(0)[0])
    net.train()
    return net, opt, report.kept


def gathered(layout: str) -> dict[str, Any]:
    """The end of a run that is sharded, shrunk and sharded again."""
    net, opt, kept = sharded(layout)
    train(net, opt, range(SHRUNK_AT, END))
    return {**outcome(net, opt), "kept": kept}


def saved(layout: str, steps: int) -> dict[str, Any]:
    """What one file holds of a sharded run some steps after it was shrunk."""
    net, opt, _ = sharded(layout)
    train(net, opt, range(SHRUNK_AT, SHRUNK_AT + steps))
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip("ms", dcp_state.get_state_dict(net, opt, options=options), strict=True))


def resumed(layout: str, steps: int, file: dict[str, Any]) -> dict[str, Any]:
    """Load such a file into a network built anew, spread over ranks or not, and train on."""
    file = copy.deepcopy(file)  # ranks share its memory, and optimizers take tensors as they are
    net = new_net()
    load_shrunk_(net, file["m"])
    search, options = file["s"], WHOLE
    if layout == "from rank 0":
        layout = "fsdp"
        options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        search = {} if torch.distributed.get_rank() else search
    model = DistributedDataParallel(net) if layout == "ddp" else shard(net, layout)
    opt = wrapped(model)
    for _ in range(2):  # also into a search that is shrunk already
        dcp_state.set_optimizer_state_dict(model, opt, search, options=options)
    train(model, opt, range(SHRUNK_AT + steps, END))
    return outcome(net, opt)


def spread() -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What is said where ranks hold parts of the base optimizer's state, and what comes of it."""
    # Some releases of torch warn of themselves when this is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = new_net()
    base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    opt = wrapped(net, base)
    pruned(net, opt)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError) as raised:
        opt.shrink(batch_of(0)[0][:1])
    return str(raised.value), dict(net.state_dict()), dict(before)
