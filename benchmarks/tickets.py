"""What tickets cost and what they are worth, beside dense training, on CIFAR-10.

    python -m benchmarks.tickets --data-dir DIR --width 0.25 --limit 5000      # hours on one core
    python -m benchmarks.tickets --data-dir DIR --device cuda --multiple-of 8
    python -m benchmarks.tickets --data-dir DIR --model vgg11 --sweep          # the paper's Table 1
    python -m benchmarks.tickets --quick               # does it run at all, on digits

A case is a network, a momentum, a strength of L1 on the scales, and a seed. All methods of a case
are one training until they part, so that they differ in nothing else, and end after as many epochs:

dense            nothing is taken out; with --l1 the term is there until EB Train's ticket
EB Train         pruned and shrunk at the ticket of a search that truncates nothing
EB at WORM's     the same network, pruned with its newest mask at the epoch of WORM's ticket
WORM             the search with truncated gradients, from the trigger point on
WORM, update     the same with truncated updates (equal to WORM for SGD without momentum)
random           as many channels as EB Train's ticket, at the same epoch, but any, which is about
                 the same share of each layer

With ``--sweep`` gradients are truncated from the first mask on, by each of six strengths.

Of each case a JSON file is written to --out after each method, and a case whose file is complete is
skipped, so that a break loses little, and several processes with different --seeds or --model may
share the folder; ``benchmarks.ticket_tables`` makes tables of it. Seconds are processor time of one
thread on a CPU, and of the wall on a device; they are those of steps and masks, without the
shuffling before an epoch and the accuracy after it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from benchmarks.shrink import resnet18, vgg11
from benchmarks.ticket_tables import read, tables
from torch_worm_optim import Phase, WormOptimizer

NETWORKS: dict[str, Callable[[float], nn.Module]] = {"resnet18": resnet18, "vgg11": vgg11}
STRENGTHS = (1, 0.5, 0.1, 0.05, 0.01, 0.003)  # of truncation, in the paper's Table 1 and section 5
METHODS = ["dense", "EB Train", "WORM", "random", "EB at WORM's", "update"]
BATCH = 32  # of the paper, as are the learning rate and the window
WINDOW = 5


@dataclass(frozen=True)
class Case:
    """What is trained by all methods."""

    model: str
    momentum: float
    l1: float
    seed: int

    def __str__(self) -> str:
        l1 = f", L1 {self.l1:g}" if self.l1 else ""
        return f"{self.model}, momentum {self.momentum:g}{l1}, seed {self.seed}"


class Images:
    """Images, normalised and with the channels last, and their labels, on the device."""

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        """Load CIFAR-10 from a .npz or a folder with one, or else digits of the same size."""
        if path is None:
            from sklearn.datasets import load_digits

            digits = load_digits()
            pixels = digits.images[:, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
            test = np.arange(len(pixels)) % 4 == 3
            arrays = [pixels[~test], digits.target[~test], pixels[test], digits.target[test]]
        else:
            with np.load(path if path.suffix == ".npz" else next(path.glob("*.npz"))) as packed:
                arrays = [packed[name] for name in ("xtr", "ytr", "xte", "yte")]
        arrays[:2] = (each[:limit] for each in arrays[:2])
        arrays[2:] = (each[:test_limit] for each in arrays[2:])
        tensors = [torch.from_numpy(array).to(device) for array in arrays]
        self.train, self.test = (
            (each.permute(0, 3, 1, 2) if each.shape[-1] == 3 else each).float()
            for each in tensors[::2]
        )
        deviation, mean = torch.std_mean(self.train, (0, 2, 3), keepdim=True)
        self.train, self.test = (
            ((each - mean) / deviation).contiguous(memory_format=torch.channels_last)
            for each in (self.train, self.test)
        )
        self.train_labels, self.test_labels = (each.long() for each in tensors[1::2])
        self.mirrored = path is not None  # A mirrored digit is no digit.


class Training:
    """A network that is trained an epoch at a time, with its accuracies and times.

    On a CUDA device forward and backward are one graph, and a step follows each replay.

    Args:
        model: The network.
        opt: Its optimizer.
        images: What it is trained on.
        case: The order of the images follows from its seed and the number of the epoch.
        deadline: When all has to be over, as `time.perf_counter()` counts.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: WormOptimizer,
        images: Images,
        case: Case,
        deadline: float,
    ) -> None:
        self.model, self.opt, self.images, self.case = model, opt, images, case
        self.device, self.deadline = images.train.device, deadline
        self.n_steps = len(images.train) // BATCH
        self.seconds: list[float] = []
        self.accuracies: list[float] = []
        self.wall = 0.0  # seconds of the last epoch and of the accuracy after it
        self.compute: Callable[[], object] | None = None
        self.order = torch.zeros(self.n_steps, BATCH, dtype=torch.long, device=self.device)
        self.flips = torch.zeros(self.n_steps, BATCH, dtype=torch.bool, device=self.device)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)  # the step in this epoch
        self.penalise()

    @property
    def epochs(self) -> int:
        """How many it was trained for."""
        return len(self.accuracies)

    def penalise(self) -> None:
        """Add network slimming's L1 term to gradients of scales once truncation is done."""
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        scales = [norm.weight for norm in norms] if self.case.l1 else []

        def add_signs(*_: object) -> None:
            for scale in scales:
                if scale.grad is not None:
                    scale.grad.add_(scale.detach().sign(), alpha=self.case.l1)

        self.penalty = self.opt.base_optim.register_step_pre_hook(add_signs)

    def fits(self, epochs: int) -> bool:
        """Whether so many more epochs end in time."""
        return time.perf_counter() + epochs * self.wall < self.deadline

    def fork(self) -> Training:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin.model, twin.opt = copy.deepcopy((self.model, self.opt))
        twin.order, twin.flips, twin.at = (
            each.clone() for each in (self.order, self.flips, self.at)
        )
        twin.seconds, twin.accuracies = list(self.seconds), list(self.accuracies)
        twin.compute = None  # which computes gradients of this network, not of the twin
        twin.penalise()  # Optimizers do not copy their hooks.
        return twin

    def forward_and_backward(self) -> None:
        """Compute the gradients of the next batch."""
        # Without gradients to add to, backward makes new ones, which each replay overwrites.
        for parameter in self.model.parameters():
            parameter.grad = None
        chosen, flipped = (each.index_select(0, self.at)[0] for each in (self.order, self.flips))
        self.at += 1
        images = self.images.train.index_select(0, chosen)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = self.images.train_labels.index_select(0, chosen)
        # Weights change between replays, so a replay has to cast them anew.
        with self.precision(cache_enabled=False):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()

    def precision(self, **options: Any) -> torch.autocast:
        """Bfloat16 on a device, single precision on a CPU."""
        enabled = self.device.type != "cpu"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, **options)

    def capture(self) -> None:
        """Have `compute` compute gradients, by a graph of the network as it is now if possible."""
        if self.device.type != "cuda":
            self.compute = self.forward_and_backward
            return
        gc.collect()  # Nothing that holds another graph may be freed during the capture.
        before = copy.deepcopy(self.model.state_dict())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.at.zero_()
                self.forward_and_backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.opt.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward_and_backward()
        self.model.load_state_dict(before)
        self.compute = graph.replay

    def epoch(self) -> None:
        """Train for an epoch."""
        if self.compute is None:
            self.capture()
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * self.case.seed + self.epochs)
        order = torch.randperm(len(self.images.train), generator=generator)
        self.order.copy_(order[: self.n_steps * BATCH].view(-1, BATCH))
        flips = torch.rand(self.order.shape, generator=generator) < 0.5 * self.images.mirrored
        self.flips.copy_(flips)
        self.at.zero_()
        start = self.clock()
        for _ in range(self.n_steps):
            self.compute()
            self.opt.step()
        self.seconds.append(self.clock() - start)
        self.accuracies.append(self.accuracy(self.model))
        self.wall = time.perf_counter() - begin

    def clock(self) -> float:
        """Seconds that this process has computed, or a device has."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def search(self, n_epochs: int) -> None:
        """Train until the ticket is found, for so many epochs at most."""
        while not self.opt.converged and self.epochs < n_epochs and self.fits(1):
            self.epoch()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Test images that a network classifies right, in %."""
        model.eval()
        batches = zip(
            self.images.test.split(2000), self.images.test_labels.split(2000), strict=True
        )
        with self.precision():
            right = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
        model.train()
        return 100 * int(right) / len(self.images.test)

    def recomputed(self) -> nn.Module:
        """A copy of the network with BatchNorm statistics of its own weights."""
        twin = copy.deepcopy(self.model)
        with self.precision():
            update_bn(self.images.train[:20_000].split(500), twin)
        return twin


def start(args: argparse.Namespace, images: Images, case: Case, deadline: float) -> Training:
    """A new network with a search that truncates nothing, which is EB Train's."""
    torch.manual_seed(case.seed)
    model = NETWORKS[case.model](args.width)
    model.to(images.train.device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=case.momentum)
    opt = WormOptimizer(sgd, model, truncation=1, **settings(args, images))
    return Training(model, opt, images, case, deadline)


def settings(args: argparse.Namespace, images: Images) -> dict[str, Any]:
    """What all searches have in common."""
    return {
        "prune_ratio": args.prune_ratio,
        "stopping_point": args.stopping_point,
        "window": WINDOW,
        "fade": 1,
        "scope": args.scope,
        "min_keep": args.min_keep or 1,
        "sample_every": len(images.train) // BATCH,
    }


def truncated(args: argparse.Namespace, run: Training, **options: Any) -> Training:
    """A copy that goes on with other options of the search."""
    run = run.fork()
    record = copy.deepcopy(run.opt.state_dict())
    run.opt = WormOptimizer(run.opt.base_optim, run.model, **settings(args, run.images), **options)
    run.opt.load_state_dict(record)
    return run


def with_ticket(run: Training, scales: dict[str, Tensor]) -> Training:
    """A copy that has these masks of its scales, and of their shifts, for a ticket."""
    run = run.fork()
    run.penalty.remove()
    run.opt = WormOptimizer(run.opt.base_optim, run.model, ticket=scales)
    return run


def newest_mask(args: argparse.Namespace, run: Training) -> dict[str, Tensor]:
    """The mask that the network's scales have now."""
    sgd = torch.optim.SGD(run.model.parameters())
    opt = WormOptimizer(sgd, run.model, **settings(args, run.images))
    opt.sample()
    return opt.candidate_mask or {}


def random_mask(run: Training) -> dict[str, Tensor]:
    """Another mask that removes as many channels as a ticket, at random, and of no layer all."""
    scales = {n: mask for n, mask in (run.opt.final_mask or {}).items() if n.endswith("weight")}
    generator = torch.Generator().manual_seed(run.case.seed)
    ranks = {name: torch.rand(len(mask), generator=generator) for name, mask in scales.items()}
    for each in ranks.values():
        each[each.argmax()] = 1  # more than any other, and so the last to go
    n_removed = sum(int((~mask).sum()) for mask in scales.values())
    highest = torch.cat(list(ranks.values())).sort().values[n_removed - 1]
    return {name: (each > highest).to(scales[name].device) for name, each in ranks.items()}


def methods(args: argparse.Namespace, base: Training) -> Iterator[tuple[str, Training]]:
    """Each method with the training that it goes on from."""
    trigger = ticket = at_worm = worm = None
    dense = "dense" in args.methods
    with_worm = {"WORM", "EB at WORM's"} & set(args.methods)
    with_base = {"EB Train", "random", "EB at WORM's"} & set(args.methods)

    def goes_on() -> bool:
        """Whether some method needs another epoch of the training that nothing disturbs."""
        return dense or trigger is None or bool(with_base and ticket is None)

    while base.epochs < args.epochs and goes_on() and base.fits(1):
        base.epoch()
        if trigger is None and base.opt.phase is not Phase.SEARCHING:
            trigger = base.fork()
            if with_worm:
                worm = truncated(args, trigger, truncation=args.truncation)
                worm.search(args.epochs - 1)
        if worm and worm.opt.converged and base.epochs == worm.epochs:
            at_worm = with_ticket(base, newest_mask(args, base))
        if ticket is None and base.opt.converged:
            base.penalty.remove()
            ticket = base.fork()
            ticket.penalty.remove()
    if dense:
        yield "dense", base
    if worm and "WORM" in args.methods:
        yield "WORM", worm.fork()
    if ticket and "EB Train" in args.methods:
        yield "EB Train", ticket.fork()
    if ticket and "random" in args.methods:
        yield "random", with_ticket(ticket, random_mask(ticket))
    if at_worm and "EB at WORM's" in args.methods:
        yield "EB at WORM's", at_worm
    # Plain SGD's update is the gradient.
    if trigger and "update" in args.methods and base.case.momentum:
        update = truncated(args, trigger, truncation=args.truncation, truncate="update")
        update.search(args.epochs - 1)
        yield "WORM, update", update


def strengths(args: argparse.Namespace, base: Training) -> Iterator[tuple[str, Training]]:
    """The same for searches that truncate from the first mask on."""
    for r in STRENGTHS:
        run = truncated(args, base, truncation=r, trigger="always")
        run.search(args.epochs - 1)
        yield f"r = {r:g}", run


def follow(args: argparse.Namespace, run: Training, row: dict[str, Any]) -> None:
    """Prune with the ticket, shrink, and train on; fill the row with what comes of it."""
    found = run.epochs
    row |= {"accuracies": run.accuracies, "seconds": run.seconds}
    row["distances"] = [list(sample.distances) for sample in run.opt.history]
    if not run.opt.converged:
        if found >= args.epochs - 1:
            row["note"] = f"no ticket in {found} epochs"
        return
    row |= {"ticket epoch": found, "before pruning": run.accuracies[-1]}
    run.penalty.remove()
    run.opt.prune()
    row["after pruning"] = run.accuracy(run.model)
    row["BatchNorm recomputed"] = run.accuracy(run.recomputed())
    scales = [mask for key, mask in (run.opt.final_mask or {}).items() if key.endswith("weight")]
    row["kept"] = [[int(mask.sum()), mask.numel()] for mask in scales]
    begin = run.clock()
    run.compute = None  # Lets go of the graph of what the network was.
    run.opt.zero_grad()
    report = run.opt.shrink(run.images.test[:1], scatter=args.scatter, multiple_of=args.multiple_of)
    row |= {"seconds of shrinking": run.clock() - begin, "shrunk at epoch": run.epochs}
    row |= {"parameters": report.parameters, "MACs": report.macs}
    while run.epochs < args.epochs and run.fits(1):
        run.epoch()
    row["complete"] = run.epochs == args.epochs


def trial(args: argparse.Namespace, images: Images, case: Case, deadline: float) -> None:
    """All methods of a case."""
    path = args.out / f"{str(case).replace(', ', '_').replace(' ', '')}.json"
    varied = ("model", "momentum", "l1", "seeds", "seconds", "out")
    arguments = {name: str(value) for name, value in vars(args).items() if name not in varied}
    if path.exists():
        before = json.loads(path.read_text())
        if before["settings"] != arguments:
            raise SystemExit(f"{path} was made with other arguments; choose another --out.")
        if before["complete"]:
            print(f"{case}: is in {path} already", flush=True)
            return
    rows: dict[str, dict[str, Any]] = {}
    result = vars(case) | {"torch": torch.__version__, "device": device_name(args.device)}
    result |= {"settings": arguments, "methods": rows, "complete": False}

    def save() -> None:
        path.write_text(json.dumps(result, indent=1))

    base = start(args, images, case, deadline)
    for name, run in (strengths if args.sweep else methods)(args, base):
        row = rows[name] = {}
        if name == "dense":
            row |= {"accuracies": run.accuracies, "seconds": run.seconds}
            row["distances"] = [list(sample.distances) for sample in run.opt.history]
            row["complete"] = run.epochs == args.epochs
        else:
            follow(args, run, row)
        save()
        end = statistics.mean(row.get("accuracies", [])[-3:] or [math.nan])
        found = f", ticket at epoch {row['ticket epoch']}" if "ticket epoch" in row else ""
        print(f"{case}, {name}: {end:.2f} %{found} {row.get('note', '')}", flush=True)
    ended = [row.get("complete") or "note" in row for row in rows.values()]
    result["complete"] = bool(ended) and all(ended)
    save()


def device_name(device: torch.device) -> str:
    """What it ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments; those of the search have the paper's values as defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="CIFAR-10: a .npz of xtr, ytr, xte, yte, or its folder")
    add("--limit", type=int, help="train on the first so many images")
    add("--test-limit", type=int, help="test on the first so many images")
    add("--model", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    add("--width", type=float, default=1, help="multiplies the channels")
    add("--momentum", type=float, nargs="*", default=[0.0, 0.9])
    add(
        "--l1", type=float, nargs="*", default=[0.0], help="strength on the scales until the ticket"
    )
    add("--seeds", type=int, nargs="*", default=[0, 1, 2])
    add("--epochs", type=int, default=20, help="of every method, search included")
    add("--methods", nargs="*", choices=METHODS, default=METHODS)
    add("--sweep", action="store_true", help="truncate from the first mask on, by six strengths")
    add("--prune-ratio", type=float, default=0.5)
    add("--stopping-point", type=float, default=0.1)
    add("--truncation", type=float, default=0.003)
    add("--scope", choices=["global", "layer"], default="global", help="what is ranked together")
    add("--min-keep", type=float, default=0, help="share of each layer that stays; 0 is a channel")
    add("--scatter", action="store_true", help="narrow norms that write into residual streams")
    add("--multiple-of", type=int, default=1, help="of what sizes stay multiples when shrunk")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--seconds", type=float, default=math.inf, help="when to stop")
    add("--quick", action="store_true", help="few digits, narrow networks")
    add("--out", type=Path, default=Path("runs/tickets"))
    args = parser.parse_args(arguments)
    if any(args.l1) and "update" in args.methods:
        parser.error("--l1 is truncated with the update; leave out update from --methods")
    if args.quick:
        args.width, args.limit, args.stopping_point, args.epochs = 0.125, 480, 0.15, 14
    return args


def train(args: argparse.Namespace) -> None:
    """Train all cases that there is time for."""
    # In full precision shrinking is checked by outputs, which TF32 would round.
    torch.backends.cudnn.allow_tf32 = False
    if args.device.type == "cpu":
        # Threads that share a core wait for each other in every operator.
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.seconds
    images = Images(args.data_dir, args.device, args.limit, args.test_limit)
    for each in itertools.product(args.model, args.momentum, args.l1, args.seeds):
        trial(args, images, Case(*each), deadline)


def main() -> None:
    """Train all cases and print the tables."""
    args = parse()
    train(args)
    print(tables(read(args.out)))


if __name__ == "__main__":
    main()
