"""What ranks do in the tests of sharding; a job returns plain data, the same on all of them."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from torch_worm_optim import (
    BatchNormSelector,
    ParameterSelector,
    QueryKeySelector,
    Representative,
    WormOptimizer,
)
from torch_worm_optim.ticket import apply_ticket_


class Attention(nn.Module):
    """Attention over a sentence with separate or fused projections."""

    def __init__(self, width: int, n_heads: int, fused: bool) -> None:
        super().__init__()
        self.n_heads, self.fused = n_heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        projected = (
            self.qkv(x).chunk(3, -1)
            if self.fused
            else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k, v = (each.unflatten(-1, (-1, 8)).transpose(1, 2) for each in projected)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Convolution with BatchNorm, then attention: sizes that two, three and four do not divide."""

    def __init__(self, fused: bool = False, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(5)
        self.up = nn.Conv1d(5, width, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.attn = Attention(width, 2, fused)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.bn2(self.up(x))).transpose(1, 2)
        return self.head((x + self.attn(x)).mean(1))


def new_net(fused: bool = False, width: int = 16) -> Net:
    """The same weights on every call, with some scores equal."""
    torch.manual_seed(0)
    net = Net(fused, width)
    for bn in (net.bn, net.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
    with torch.no_grad():
        net.bn2.weight[2:6] = net.bn.weight[1]  # ties over several representatives
        net.attn.out_proj.weight.copy_(net.attn.out_proj.weight.mul(8).round() / 8)
    return net


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, on every rank the same."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, generator=generator)
    return x, (x.mean((1, 2)) * 6).round().clamp(-1, 1).long() + 1


def train(net: nn.Module, opt: Any, steps: range) -> None:
    """The usual loop."""
    for step in steps:
        x, y = batch_of(step)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()


SELECTORS: dict[str, tuple[bool, Callable[[nn.Module], list[Representative]]]] = {
    "scales": (False, BatchNormSelector()),
    "queries and keys": (False, QueryKeySelector()),
    "fused": (True, QueryKeySelector(layouts={"Attention": {"qkv": "2 * (q k v)"}})),
    "ties": (False, ParameterSelector("*out_proj.weight") | BatchNormSelector(bias=False)),
    "all": (False, ParameterSelector("*.weight")),
    "heads and rows": (
        False,
        QueryKeySelector(granularity="head", value=True)
        | ParameterSelector("head.weight", granularity="row"),
    ),
}


def shard(net: nn.Module, layout: str) -> nn.Module:
    """Shard in one of the ways in which people do."""
    if layout == "plain":
        return net
    n = torch.distributed.get_world_size()
    if layout == "fsdp":
        fully_shard(net)
    elif layout == "blocks":  # an inner module of its own, the rest in the root
        fully_shard(net.attn)
        fully_shard(net)
    elif layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(net, mesh=mesh)
    elif layout in ("tp", "tp+fsdp"):
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("dp", "tp"))
        columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
        parallelize_module(net.attn, mesh["tp"], {**columns, "out_proj": RowwiseParallel()})
        if layout == "tp+fsdp":
            fully_shard(net, mesh=mesh["dp"])
    else:
        raise ValueError(layout)
    return net


def build(
    layout: str = "plain", which: str = "scales", after: bool = False, **options: Any
) -> tuple[nn.Module, WormOptimizer]:
    """A net, sharded, and its wrapped optimizer."""
    fused, selector = SELECTORS[which]
    net = new_net(fused)
    if not after:
        shard(net, layout)
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    settings = {"sample_every": 2, "window": 3, "stopping_point": 0.0, "margin": 0.4}
    opt = WormOptimizer(base, net, selector, **{**settings, **options})
    if after:
        old = [name for name, _ in net.named_parameters()]
        shard(net, layout)
        new = dict(net.named_parameters())
        base.param_groups[0]["params"] = [new[name] for name in old]
    return net, opt


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def outcome(net: nn.Module, opt: WormOptimizer) -> dict[str, Any]:
    """All that must be equal."""
    masks = opt.candidate_mask or {}
    return {
        "weights": {name: whole(p) for name, p in net.named_parameters()},
        "masks": {name: whole(mask) for name, mask in masks.items()},
        "history": [(*s[:4], s.phase.value) for s in opt.history],
        "phase": opt.phase.value,
        "summary": opt.summary(),
    }


def drawn(layout: str, which: str, cases: list[dict[str, Any]], after: bool = False) -> list[Any]:
    """Masks of the first weights, and of weights with many at zero, for several settings."""
    results = []
    for case in cases:
        net, opt = build(layout, which, after, sample_every=None, **case)
        with torch.no_grad():  # an evaluation leaves whole parameters in FSDP's root module
            net.eval()(batch_of(0)[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.sample()
            masks = [outcome(net, opt)["masks"]]
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_((parameter.abs() > 0.1).to(parameter.dtype))
            opt.sample()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1 + 2**-6)
            opt.sample()
            masks.append(outcome(net, opt)["masks"])
        ties = [str(w.message).split(":")[0] for w in caught if "tie for" in str(w.message)]
        results.append((masks, outcome(net, opt)["history"], ties))
    return results


def trained(
    layout: str,
    which: str,
    steps: int,
    after: bool = False,
    prune: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train, and prune after the ticket if asked."""
    net, opt = build(layout, which, after, **options)
    for step in range(steps):
        train(net, opt, range(step, step + 1))
        if step == steps // 2:
            with torch.no_grad():
                net.eval()(batch_of(0)[0])
            net.train()
        if prune and opt.converged and step > steps - 6:
            opt.prune()
    return outcome(net, opt)


OPTIONS = {"trigger": "always", "truncation": 0.1, "prune_ratio": 0.4}
OPTIONS |= {"stopping_point": 0.012, "window": 5, "fade": 0.1, "scope": "layer"}
"""A search that truncates and fades from the first mask on; its ticket comes within 20 steps."""


def saved(
    layout: str, which: str, steps: int, folder: str, prune: bool = False, **how: bool
) -> dict[str, Any]:
    """Train, prune if asked, and save with torch.distributed.checkpoint."""
    net, opt = build(layout, which, **OPTIONS)
    train(net, opt, range(steps))
    if prune:
        opt.prune()
        train(net, opt, range(steps, steps + 2))
    options = dcp_state.StateDictOptions(**how)
    state = {
        "net": dcp_state.get_model_state_dict(net, options=options),
        "opt": dcp_state.get_optimizer_state_dict(net, opt, options=options),
    }
    dcp.save(state, checkpoint_id=folder)
    return outcome(net, opt)


def resumed(
    layout: str, which: str, steps: range, folder: str, **how: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what :func:`saved` saved, on however many ranks, and train on."""
    net, opt = build(layout, which, **OPTIONS)
    options = dcp_state.StateDictOptions(**how)
    state = {
        "net": dcp_state.get_model_state_dict(net, options=options),
        "opt": dcp_state.get_optimizer_state_dict(net, opt, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    dcp_state.set_model_state_dict(net, state["net"], options=options)
    dcp_state.set_optimizer_state_dict(net, opt, state["opt"], options=options)
    loaded = outcome(net, opt)
    train(net, opt, steps)
    return loaded, outcome(net, opt)


def whole_state(layout: str, which: str, steps: int) -> dict[str, Any]:
    """Train, and gather everything on the host of rank 0, as for one file."""
    net, opt = build(layout, which, **OPTIONS)
    train(net, opt, range(steps))
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "net": dcp_state.get_model_state_dict(net, options=options),
        "opt": dcp_state.get_optimizer_state_dict(net, opt, options=options),
    }


def from_whole_state(
    layout: str, which: str, steps: range, state: dict[str, Any], broadcast: bool
) -> dict[str, Any]:
    """Load what :func:`whole_state` returned, from every rank's copy or rank 0's, and train on."""
    net, opt = build(layout, which, **OPTIONS)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    if broadcast and torch.distributed.get_rank():
        state = {"net": {}, "opt": {}}
    dcp_state.set_model_state_dict(net, state["net"], options=options)
    dcp_state.set_optimizer_state_dict(net, opt, state["opt"], options=options)
    train(net, opt, steps)
    return outcome(net, opt)


def killed(layout: str, which: str, folder: str) -> None:
    """Train with a checkpoint every four steps, until a rank is killed in the ninth."""
    net, opt = build(layout, which, **OPTIONS)
    for step in range(9):
        if step == 8 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(net, opt, range(step, step + 1))
        if step in (3, 7):
            state = {
                "net": dcp_state.get_model_state_dict(net),
                "opt": dcp_state.get_optimizer_state_dict(net, opt),
            }
            dcp.save(state, checkpoint_id=f"{folder}/{step}")


class _Gathers(TorchDispatchMode):
    """Counts the entries that each gathering returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it gathers."""
        out = func(*args, **(kwargs or {}))
        if "all_gather" in str(func):
            self.numels.append(out.numel())
        return out


def gathered(scope: str) -> tuple[int, int]:
    """How often one sample gathers, and how many entries at most at a time."""
    _, opt = build("fsdp", "queries and keys", sample_every=None, scope=scope)
    with _Gathers() as gathers:
        opt.sample()
    return len(gathers.numels), max(gathers.numels)


def bad_weights(layout: str) -> list[str]:
    """What each rank is told when one entry that one rank holds is NaN, and what comes of it."""
    net, opt = build(layout, "queries and keys", **OPTIONS)
    train(net, opt, range(4))
    before = outcome(net, opt)["history"]
    if torch.distributed.get_rank() > 0:
        with torch.no_grad():
            net.attn.q_proj.weight.to_local()[-1:].fill_(torch.nan)
    messages = []
    for _ in range(2):
        try:
            opt.sample()
        except ValueError as error:
            messages.append(str(error))
    assert outcome(net, opt)["history"] == before
    return messages


LARGE = {"sample_every": None, "prune_ratio": 0.7, "scope": "global"}


def large(layout: str) -> dict[str, Tensor]:
    """A mask for which entries are set aside in a layer of which ranks hold unequal parts."""
    net = nn.Sequential(nn.Linear(128, 513, bias=False), nn.Linear(513, 60, bias=False))
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.uniform_(generator=torch.Generator().manual_seed(seed))
        net[0].weight.mul_(1e-9)
    if layout == "fsdp":
        fully_shard(net)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    opt = WormOptimizer(base, net, ParameterSelector("*"), **LARGE)
    opt.sample()
    return outcome(net, opt)["masks"]


def still(layout: str) -> tuple[list[str], list[str], int]:
    """What is said of zeros at the start, and of a search whose learning rate becomes 0."""
    net = new_net()
    for parameter in (net.bn.weight, net.attn.k_proj.weight):
        nn.init.zeros_(parameter)
    shard(net, layout)
    base = torch.optim.SGD(net.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = WormOptimizer(base, net, SELECTORS["all"][1], sample_every=2, **OPTIONS)
    zeros = [str(each.message).split(".")[0] for each in caught]
    train(net, opt, range(4))
    base.param_groups[0]["lr"] = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, opt, range(4, 10))
    return zeros, [str(each.message).split(",")[0] for each in caught], len(opt.history)


def forgotten() -> str:
    """What is said where the base optimizer was left with parameters from before sharding."""
    net = new_net()
    opt = WormOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net)
    fully_shard(net)
    try:
        opt.sample()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def refused() -> dict[str, str]:
    """What is said of what cannot work."""
    messages = {}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except (RuntimeError, ValueError) as error:
            messages[name] = str(error)

    def partial_sums() -> None:
        net = new_net()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        weight = DTensor.from_local(net.head.weight.detach(), mesh, [Partial()])
        net.head.weight = nn.Parameter(weight)
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        WormOptimizer(base, net, ParameterSelector("head.weight"))

    def fsdp1() -> None:
        net = FullyShardedDataParallel(new_net(), device_id=torch.device("cpu"))
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        WormOptimizer(base, net, ParameterSelector("*"))

    for work in (partial_sums, fsdp1):
        attempt(work.__name__, work)
    return messages


def resharded() -> tuple[dict[str, Any], dict[str, Any]]:
    """A mask of scales whose shifts are not sharded, before and after they are sharded anew."""
    net = new_net()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    net.bn2.weight = nn.Parameter(distribute_tensor(net.bn2.weight.detach(), mesh, [Shard(0)]))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    opt = WormOptimizer(sgd, net, sample_every=None, scope="layer")
    opt.sample()
    before = outcome(net, opt)["masks"]
    weight = net.bn2.weight.detach().redistribute(placements=[Replicate()])
    net.bn2.weight = nn.Parameter(weight * 1.5)
    opt.param_groups[0]["params"] = list(net.parameters())
    opt.sample()
    return before, outcome(net, opt)["masks"]


def applied(layout: str) -> dict[str, Tensor]:
    """Weights after a ticket that is whole, and one that is sharded, were applied."""
    _, opt = build(layout, "queries and keys", sample_every=None)
    opt.sample()
    ticket = opt.candidate_mask
    plain = {name: whole(mask) for name, mask in ticket.items()}
    results = {}
    for name, each in (("sharded", ticket), ("whole", plain)):
        other = shard(new_net(), layout)
        with torch.no_grad():  # after which FSDP's root module holds whole parameters
            other(batch_of(0)[0])
        apply_ticket_(other, each)
        if layout != "plain":
            other.reshard()
        results[name] = whole(other.attn.q_proj.weight)
    return results


def consolidated(steps: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save a search on top of ZeRO's optimizer, load it elsewhere, and train both on."""
    # Some releases of torch warn of themselves when this is imported.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    outcomes = []
    path = f"{folder}/checkpoint.pt"
    for resume in (False, True):
        net = new_net()
        base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
        opt = WormOptimizer(base, net, QueryKeySelector(), **{**OPTIONS, "sample_every": 2})
        if resume:
            checkpoint = torch.load(path, weights_only=True)
            net.load_state_dict(checkpoint["net"])
            opt.load_state_dict(checkpoint["opt"])
        else:
            train(net, opt, range(steps))
            opt.consolidate_state_dict(to=0)
            if torch.distributed.get_rank() == 0:
                torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
            torch.distributed.barrier()
        train(net, opt, range(steps, 2 * steps))
        outcomes.append(outcome(net, opt))
    return tuple(outcomes)


def replicated(steps: int, zero: bool, **options: Any) -> dict[str, Any]:
    """Train under DDP, with the state of the base optimizer spread over ranks if asked."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = new_net()
    ddp = nn.parallel.DistributedDataParallel(net)
    if zero:
        base: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9
        )
    else:
        base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    opt = WormOptimizer(base, ddp, QueryKeySelector(), sample_every=2, **options)
    reduce = torch.distributed.all_reduce

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a replicated search sends something")

    for step in range(steps):
        x, y = batch_of(step)
        opt.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        torch.distributed.all_reduce = forbidden
        opt.step()
        torch.distributed.all_reduce = reduce
    if opt.converged:
        opt.prune()
        train(ddp, opt, range(steps, steps + 2))
    return outcome(net, opt)
