"""Find the winning ticket of a small vision transformer on several ranks, and go on on others.

    torchrun --nproc-per-node 2 examples/distributed.py

It trains on scikit-learn's digits until the ticket is found, prunes, and trains on. Ranks shard the
network (FSDP2). With `--mode ddp` each holds all of it, with `--mode tp` pairs of ranks split heads
and hidden units, and what is split is sharded over the pairs. With a GPU for each rank this runs on
NCCL, else on gloo.

Each epoch ends with a checkpoint in --out. Stop the run when you like, with Ctrl-C or by killing a
rank, and go on from the last epoch on any number of ranks that divides the batch, in any mode:

    torchrun --nproc-per-node 4 examples/distributed.py --resume --mode tp

However many ranks there are, together they see the same batches in the same order, so that the run
is the same but for the rounding of sums.

With `--shrink` the network is a convolutional one, whose BatchNorms are searched. Once it is pruned
the removed channels are cut out, and the smaller network trains on, in `--mode fsdp` or `ddp`.

Needs `pip install "torch-worm-optim[examples]"`. Writes
results.json and ticket.pt into --out, too. Exits with 1 when the search runs out of epochs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torch_worm_optim import Phase, WormOptimizer

WIDTH, HEAD, DEPTH = 64, 16, 2


class Attention(nn.Module):
    """Attention of as many heads as this rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (each.unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in projected)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two layers for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to each patch is added."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A vision transformer for images of 8x8 pixels, in patches of 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.places = nn.Parameter(torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(x).mean(1))


def new_network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network before it is spread; one with BatchNorms if it is to be shrunk."""
    if not args.shrink:
        return Transformer().to(device)
    widths, layers = (1, 32, 64, 64), nn.Sequential()
    for n_in, n_out in itertools.pairwise(widths):
        layers.extend([nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()])
    layers.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10)])
    return layers.to(device)


def new_optimizer(args: argparse.Namespace, net: nn.Module, sample_every: int) -> WormOptimizer:
    """AdamW with a search, the same in every mode; under DDP of the network inside."""
    return WormOptimizer(
        torch.optim.AdamW(net.parameters(), args.lr),
        net,  # its BatchNorm scales are ranked, or queries and keys where it has none
        prune_ratio=args.prune_ratio,
        stopping_point=args.stopping_point,
        margin=args.margin,
        truncate="update",
        sample_every=sample_every,
    )


def join() -> torch.device:
    """Join the other ranks; returns the device of this one."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start with: torchrun --nproc-per-node 2 examples/distributed.py")
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def spread(net: nn.Module, mode: str, mesh: DeviceMesh) -> nn.Module:
    """The network on all ranks."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    columns = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.0")
    plan = dict.fromkeys(columns, ColwiseParallel())
    plan |= dict.fromkeys(("attn.out_proj", "mlp.2"), RowwiseParallel())
    for block in net.blocks if isinstance(net, Transformer) else ():
        if mode == "tp":
            parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(net, mesh=mesh["dp"])


def shrink(
    args: argparse.Namespace,
    net: nn.Module,
    opt: WormOptimizer,
    batch: Tensor,
    mesh: DeviceMesh,
    sample_every: int,
) -> tuple[nn.Module, nn.Module, WormOptimizer]:
    """Cut out of the network what is pruned, and spread the smaller one over all ranks."""
    if args.mode == "ddp":
        opt.shrink(batch)
        return net, spread(net, args.mode, mesh), opt
    whole = StateDictOptions(full_state_dict=True)
    weights, search = get_state_dict(net, opt, options=whole)
    net = new_network(args, batch.device)
    opt = new_optimizer(args, net, sample_every)
    set_state_dict(net, opt, model_state_dict=weights, optim_state_dict=search, options=whole)
    opt.shrink(batch)
    search = get_optimizer_state_dict(net, opt, options=whole)
    model = spread(net, args.mode, mesh)
    opt = new_optimizer(args, net, sample_every)
    set_optimizer_state_dict(net, opt, search, options=whole)
    return net, model, opt


def load_data(device: torch.device) -> tuple[TensorDataset, Tensor, Tensor]:
    """Digits to train on; images and labels of every fourth one for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None], dtype=torch.float32, device=device)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target, device=device)
    test = torch.arange(len(labels), device=device) % 4 == 3
    return TensorDataset(images[~test], labels[~test]), images[test], labels[test]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Images that are classified right, in %; every rank looks at all of them."""
    return 100 * int((model(images).argmax(1) == labels).sum()) / len(labels)


def state_of(model: nn.Module, opt: WormOptimizer, scores: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint holds. The search travels with the optimizer."""
    weights, search = get_state_dict(model, opt)
    return {"model": weights, "opt": search, "scores": scores}


def resume(folder: Path, model: nn.Module, opt: WormOptimizer, scores: dict[str, float]) -> int:
    """Load the last whole checkpoint, and say after which epoch it was saved."""
    # Its .metadata is what a checkpoint gets last.
    whole = sorted(path.parent for path in folder.glob("epoch-*/.metadata"))
    if not whole:
        raise SystemExit(f"There is no checkpoint in {folder}. Start without --resume.")
    state = state_of(model, opt, scores)
    dcp.load(state, checkpoint_id=whole[-1])
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    return int(whole[-1].name.removeprefix("epoch-"))


def parse() -> argparse.Namespace:
    """Arguments; those of the search suit these digits, with one mask an epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=["ddp", "fsdp", "tp"], default="fsdp", help="what a rank holds")
    add("--shrink", action="store_true", help="cut what is pruned out of a convolutional network")
    add("--out", type=Path, default=Path("runs/distributed"), help="folder that all ranks see")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--max-epochs", type=int, default=40, help="give up the search after so many")
    add("--retrain-epochs", type=int, default=5, help="epochs after pruning")
    add("--batch-size", type=int, default=48, help="images in a batch, over all ranks")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    add("--prune-ratio", type=float, default=0.7, help="p: share of entries to remove")
    add("--stopping-point", type=float, default=0.05, help="s: converged when all are below")
    add("--margin", type=float, default=0.025, help="delta: truncation starts below s + delta")
    return parser.parse_args()


def main() -> None:
    """Search, prune and train on, on all ranks."""
    args, device = parse(), join()
    if args.shrink and args.mode == "tp":
        raise SystemExit("--shrink needs --mode fsdp or ddp: its network has nothing to split.")
    first = dist.get_rank() == 0
    n_tp = 2 if args.mode == "tp" and dist.get_world_size() % 2 == 0 else 1
    shape = (dist.get_world_size() // n_tp, n_tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
    n_shares, share = mesh["dp"].size(), mesh["dp"].get_local_rank()
    if args.batch_size % n_shares:
        raise SystemExit(f"--batch-size {args.batch_size} cannot be cut into {n_shares}.")
    train, *test = load_data(device)
    sampler = DistributedSampler(train, n_shares, share, drop_last=True)
    loader = DataLoader(train, args.batch_size // n_shares, sampler=sampler, drop_last=True)

    torch.manual_seed(0)
    net = new_network(args, device)
    n_parameters = sum(p.numel() for p in net.parameters())
    model = spread(net, args.mode, mesh)
    opt = new_optimizer(args, net, sample_every=len(loader))

    epoch, scores = 0, dict.fromkeys(("before pruning", "after pruning", "in the end"), 0.0)
    if args.resume:
        epoch = resume(args.out, model, opt, scores)
    elif first:
        for old in args.out.glob("epoch-*"):
            shutil.rmtree(old)
    found = opt.history[-1].step // len(loader) if opt.converged else None
    small = False
    while epoch < (args.max_epochs if found is None else found + args.retrain_epochs):
        if args.shrink and opt.phase is Phase.PRUNED and not small:
            net, model, opt = shrink(args, net, opt, test[0][:1], mesh, len(loader))
            small = True
        sampler.set_epoch(epoch)
        for images, labels in loader:
            opt.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            opt.step()
        epoch += 1
        scores["in the end"] = accuracy(model, *test)
        if first:
            distance = opt.history[-1].max_distance
            more = f", largest distance {distance:.4f}" if distance and found is None else ""
            score = f"{scores['in the end']:.1f} % right"
            print(f"epoch {epoch}: {opt.phase.value}, {score}{more}", flush=True)
        if opt.phase is Phase.CONVERGED:
            found, scores["before pruning"] = epoch, scores["in the end"]
            opt.prune()
            scores["after pruning"] = accuracy(model, *test)
        if not small:  # a network is resumed in the sizes that it has, and shrunk then
            dcp.save(state_of(model, opt, scores), checkpoint_id=args.out / f"epoch-{epoch:03}")

    ticket = {  # every rank gathers it, one writes it
        name: (mask.full_tensor() if isinstance(mask, DTensor) else mask).cpu()
        for name, mask in (opt.final_mask or {}).items()
    }
    if first:
        distances = [[s.step, s.max_distance, s.mean_distance, s.phase.value] for s in opt.history]
        sizes = [n_parameters, sum(p.numel() for p in net.parameters())]
        results = {"ranks": dist.get_world_size(), "epochs": epoch, "scores": scores}
        results["parameters"] = sizes
        (args.out / "results.json").write_text(json.dumps(results | {"distances": distances}))
        torch.save(ticket, args.out / "ticket.pt")
        if opt.converged:
            print(*(f"{score:.1f} % {when}" for when, score in scores.items()), sep=", ")
            if small:
                print(f"{sizes[0]} -> {sizes[1]} parameters")
        else:
            print(f"No ticket within {epoch} epochs. Raise --max-epochs.", file=sys.stderr)
    dist.barrier()  # torchrun ends the others as soon as one exits with 1
    dist.destroy_process_group()
    sys.exit(0 if opt.converged else 1)


if __name__ == "__main__":
    main()
