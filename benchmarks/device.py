"""Tests, times and training on a CUDA device: samples, truncation, steps, shrinking, and tickets.

    python -m benchmarks.device                      # some minutes and 30 GB of device memory
    python -m benchmarks.device --layers 4           # an eighth of the entries
    python -m benchmarks.device --parts training --data-dir data    # the paper's setting, CIFAR-10
    python -m benchmarks.device --device cpu --layers 1 --width 256 --quick   # does it run at all

Times are medians of device events, rivals in turns with ours; of training, medians of epochs.
Prints tables, and writes JSON after each part, and after each network that is trained, so that a
run that breaks off loses nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks.__main__ import sample_of, table
from benchmarks.shrink import megabytes, resnet18, vgg11, zero_channels
from torch_worm_optim import ParameterSelector, Phase, WormOptimizer, shrink_
from torch_worm_optim.shrinking import ShrinkReport
from torch_worm_optim.truncation import scale_gradients_

PARTS = ["tests", "samples", "steps", "shrunk", "training"]
WINDOW = 5
BATCH = 32  # of the paper
EPOCHS_AFTER = 5  # that a method trains on after the later of the two tickets


def medians(
    works: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each, run in turns."""
    for work in works.values():
        for _ in range(3):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                work()
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def samples(weights: dict[str, Tensor], repeats: int) -> list[dict[str, object]]:
    """One mask and all distances, beside reading the weights once."""
    device = next(iter(weights.values())).device
    n = sum(weight.numel() for weight in weights.values())
    works: dict[str, Callable[[], object]] = {
        "ours": sample_of(weights),
        "reading once": lambda: [weight.sum() for weight in weights.values()],
    }
    times = medians(works, repeats, device)
    return [
        {
            "work": f"sample, {n / 1e6:.0f} M entries",
            "ours, ms": times["ours"],
            "rival": "reading once",
            "rival, ms": times["reading once"],
            "times the rival": times["ours"] / times["reading once"],
        }
    ]


def truncation(weights: dict[str, Tensor], repeats: int) -> list[dict[str, object]]:
    """Scaling of all gradients, beside copying as many bytes as must be read and written."""
    gradients = [torch.randn_like(weight) for weight in weights.values()]
    device, n = gradients[0].device, sum(each.numel() for each in gradients)
    size = gradients[0].element_size()
    multipliers = [torch.ones_like(g) for g in gradients]
    # A gradient is read and written and a multiplier read: a copy reads and writes.
    source = torch.empty(n * 3 * size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: scale_gradients_(gradients, multipliers),
        "floor": lambda: target.copy_(source),
    }
    times = medians(works, repeats, device)
    return [
        {
            "work": f"truncation, {n / 1e6:.0f} M entries",
            "ours, ms": times["ours"],
            "rival": f"floor, {3 * size} bytes an entry",
            "rival, ms": times["floor"],
            "times the rival": times["ours"] / times["floor"],
            "goal": 1.2,
        }
    ]


def steps(device: torch.device, repeats: int, quick: bool) -> list[dict[str, object]]:
    """Whole training steps in bfloat16, with a search that truncates not yet, or does."""
    import timm
    from transformers import BertConfig, BertForSequenceClassification

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = 1 if quick else 12
            self.net = BertForSequenceClassification(BertConfig(num_hidden_layers=layers))

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.net(input_ids=tokens).logits
            return logits

    batch = 2 if quick else 32
    cases: list[tuple[str, Callable[[], nn.Module], Tensor, int]] = [
        (
            "ResNet-18, batch 128",
            lambda: timm.create_model("resnet18", num_classes=10),
            torch.randn(4 if quick else 128, 3, 32 if quick else 224, 32 if quick else 224),
            10,
        ),
        (f"BERT-base, batch {batch}", Bert, torch.randint(1000, (batch, 128)), 2),
    ]
    rows: list[dict[str, object]] = []
    for name, make, inputs, n_classes in cases:
        inputs = inputs.to(device)
        labels = torch.randint(n_classes, (len(inputs),), device=device)
        works: dict[str, Callable[[], object]] = {}
        for kind in ("without", "searching", "truncating"):
            torch.manual_seed(0)
            model = make().to(device)
            opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
            if kind != "without":
                trigger = "always" if kind == "truncating" else "distance"
                opt = worm = WormOptimizer(
                    opt, model, sample_every=None, stopping_point=0, trigger=trigger
                )
                worm.sample()

            works[kind] = partial(_step, model, opt, inputs, labels)
        seconds = medians(works, repeats, device)
        rows += [
            {
                "work": f"training step, {name}, {kind}",
                "ours, ms": seconds[kind],
                "rival": "without WORM",
                "rival, ms": seconds["without"],
                "times the rival": seconds[kind] / seconds["without"],
                "goal": 1.01,
            }
            for kind in ("searching", "truncating")
        ]
    return rows


def _step(model: nn.Module, opt: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    opt.zero_grad()
    with torch.autocast(inputs.device.type, torch.bfloat16):
        loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    opt.step()


def search(device: torch.device, layers: int, width: int, repeats: int) -> list[dict[str, object]]:
    """Samples, truncation and waits for so many query and key matrices in bfloat16."""
    weights = {
        str(i): torch.randn(width, width, device=device, dtype=torch.bfloat16) * 0.02
        for i in range(2 * layers)
    }
    rows = samples(weights, repeats) + truncation(weights, repeats)
    return rows + waits(weights) if device.type == "cuda" else rows


def waits(weights: dict[str, Tensor]) -> list[dict[str, object]]:
    """How often a step and a sample wait for the device."""
    model = nn.ParameterDict({f"w{name}": nn.Parameter(w) for name, w in weights.items()})
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-9),
        model,
        ParameterSelector("*"),
        sample_every=None,
        trigger="always",
        stopping_point=0,
    )
    for _ in range(WINDOW):
        opt.sample()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.step()
    rows: list[dict[str, object]] = []
    for name, work, goal in (("step", opt.step, 0), ("sample", opt.sample, None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        n = sum("called a synchronizing" in str(each.message) for each in caught)
        rows.append({"work": f"waits for the device in a {name}", "times": n, "goal": goal})
    return rows


def shrunk(device: torch.device, repeats: int, quick: bool) -> list[dict[str, object]]:
    """Training steps of networks that are dense, pruned, shrunk, and shrunk with scatter."""
    import timm

    rows: list[dict[str, object]] = []
    cases: list[tuple[str, Callable[[], nn.Module], int, int]] = [
        ("ResNet-18, 32 pixels, batch 128", resnet18, 128, 32),
        ("ResNet-18, 32 pixels, batch 1024", resnet18, 1024, 32),
        ("VGG-11-BN, 32 pixels, batch 128", vgg11, 128, 32),
        ("VGG-11-BN, 32 pixels, batch 1024", vgg11, 1024, 32),
        ("ResNet-50, 224 pixels, batch 128", partial(timm.create_model, "resnet50"), 128, 224),
    ]
    for name, make, batch, side in cases[: 1 if quick else None]:
        for share in (0.5,) if quick else (0.3, 0.5, 0.7):
            torch.manual_seed(0)
            shape = (4 if quick else batch, 3, side, side)
            images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
            labels = torch.randint(10, (len(images),), device=device)
            models = {"dense": make()}
            models["pruned"] = copy.deepcopy(models["dense"])
            zero_channels(models["pruned"], share)
            for kind, scatter, multiple_of in (
                ("shrunk", False, 1),
                ("shrunk to eights", False, 8),
                ("shrunk to eights, scatter", True, 8),
                ("shrunk to 64s", False, 64),
            ):
                models[kind] = copy.deepcopy(models["pruned"]).to(device)
                shrink_(models[kind], images[:1], scatter=scatter, multiple_of=multiple_of)
            works: dict[str, Callable[[], object]] = {}
            for kind, model in models.items():
                model.to(device, memory_format=torch.channels_last)
                sgd = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
                works[kind] = partial(_step, model, sgd, images, labels)
            times = medians(works, repeats, device)
            rows += [
                {
                    "work": f"training step, {name}, p = {share:g}, {kind}",
                    "ms": times[kind],
                    "times faster": times["dense"] / times[kind],
                    "peak of a step, MB": peak_of(works[kind], device),
                    "checkpoint, MB": megabytes(models[kind]),
                }
                for kind in models
            ]
    return rows


def peak_of(work: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes of device memory at the peak of some work, over what was held before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def tests(device: torch.device) -> list[dict[str, object]]:
    """The whole suite's tests that need the device, and the others on the device."""
    files = ["optimizer", "fading", "truncation", "wrapper", "checkpoint", "compile", "schedulers"]
    rows: list[dict[str, object]] = []
    for what in (["-m", "cuda", "tests"], [f"tests/test_{name}.py" for name in files]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
        command += ["--device", device.type, "-n", "8"]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        print(result.stdout[-4000:], flush=True)
        rows.append(
            {
                "work": " ".join(["tests", *what])[:50],
                "outcome": result.stdout.splitlines()[-1] if result.stdout else result.stderr,
                "seconds": time.perf_counter() - start,
            }
        )
    return rows


class Images:
    """Images, normalised and with the channels last, and their labels, on the device."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
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
        seed: The order of the images follows from it and the number of the epoch.
        deadline: When all has to be over, as `time.perf_counter()` counts.
    """

    def __init__(
        self, model: nn.Module, opt: WormOptimizer, images: Images, seed: int, deadline: float
    ) -> None:
        self.model, self.opt, self.images, self.seed = model, opt, images, seed
        self.device, self.deadline = images.train.device, deadline
        self.n_steps = len(images.train) // BATCH
        self.seconds: list[float] = []
        self.accuracies: list[float] = []
        self.wall = 0.0  # seconds of the last epoch and of the accuracy after it
        self.compute: Callable[[], object] | None = None
        self.chosen = torch.zeros(BATCH, dtype=torch.long, device=self.device)
        self.flipped = torch.zeros(BATCH, dtype=torch.bool, device=self.device)

    @property
    def epochs(self) -> int:
        """How many it was trained for."""
        return len(self.seconds)

    def fits(self, epochs: int) -> bool:
        """Whether so many more epochs end in time."""
        return time.perf_counter() + epochs * self.wall < self.deadline

    def fork(self) -> Training:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin.model, twin.opt = copy.deepcopy((self.model, self.opt))
        twin.seconds, twin.accuracies = list(self.seconds), list(self.accuracies)
        twin.compute = None  # which computes gradients of this network, not of the twin
        return twin

    def forward_and_backward(self) -> None:
        """Compute the gradients of the batch that `chosen` and `flipped` describe."""
        # Without gradients to add to, backward makes new ones, which each replay overwrites.
        for parameter in self.model.parameters():
            parameter.grad = None
        images = self.images.train.index_select(0, self.chosen)
        images = torch.where(self.flipped[:, None, None, None], images.flip(-1), images)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = self.images.train_labels.index_select(0, self.chosen)
        # Weights change between replays, so a replay has to cast them anew.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()

    def capture(self) -> None:
        """Have `compute` compute gradients, by a graph of the network as it is now if possible."""
        if self.device.type != "cuda":
            self.compute = self.forward_and_backward
            return
        gc.collect()  # Nothing that holds another graph may be freed during the capture.
        before = copy.deepcopy(self.model.state_dict())
        torch.backends.cudnn.benchmark = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward_and_backward()
        torch.cuda.current_stream().wait_stream(stream)
        # Convolutions are chosen now, and one that is not must not be tried out in a capture.
        torch.backends.cudnn.benchmark = False
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
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epochs)
        order = torch.randperm(len(self.images.train), generator=generator)
        order = order[: self.n_steps * BATCH].view(-1, BATCH).to(self.device)
        flips = torch.rand(order.shape, generator=generator) < 0.5 * self.images.mirrored
        flips = flips.to(self.device)
        self._synchronize()
        start = time.perf_counter()
        for chosen, flipped in zip(order, flips, strict=True):
            self.chosen.copy_(chosen)
            self.flipped.copy_(flipped)
            self.compute()
            self.opt.step()
        self._synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.accuracies.append(self.accuracy(self.model))
        self.wall = time.perf_counter() - begin

    def search(self, phases: set[Phase], n_epochs: int) -> None:
        """Train while the search is in one of the phases, to so many epochs, and in time."""
        while self.opt.phase in phases and self.epochs < n_epochs and self.fits(1):
            self.epoch()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Test images that a network classifies right, in %."""
        model.eval()
        batches = zip(
            self.images.test.split(1000), self.images.test_labels.split(1000), strict=True
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            right = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
        model.train()
        return 100 * int(right) / len(self.images.test)

    def recomputed(self) -> nn.Module:
        """A copy of the network with BatchNorm statistics of its own weights."""
        twin = copy.deepcopy(self.model)
        with torch.autocast(self.device.type, torch.bfloat16):
            update_bn(self.images.train[:20_000].split(500), twin)
        return twin

    def shrink(self) -> ShrinkReport:
        """Cut the network, and let go of the graph of what it was."""
        self.compute = None
        self.opt.zero_grad()
        return self.opt.shrink(self.images.test[:1], multiple_of=8)

    def _synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def training(
    args: argparse.Namespace,
    device: torch.device,
    save: Callable[[list[dict[str, object]]], None],
) -> list[dict[str, object]]:
    """The paper's setting, seed after seed for as long as there is time: tickets, and their worth.

    Until the trigger point all methods are one training, and it is done once. They end after the
    same number of epochs.
    """
    deadline = time.perf_counter() + args.seconds
    # In full precision shrinking is checked by outputs, which TF32 would round.
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        torch.set_num_threads(1)  # Threads that share a core wait for each other in every operator.
    images = Images(args.data_dir, device)
    if args.quick:
        images.train, images.train_labels = images.train[:480], images.train_labels[:480]
    rows: list[dict[str, object]] = []
    search_seconds = 0.0
    for seed, momentum in ((seed, each) for seed in itertools.count() for each in args.momentum):
        if time.perf_counter() + search_seconds > deadline:
            break
        search_seconds = trial(args, images, seed, momentum, deadline, rows, save)
    return rows


def trial(
    args: argparse.Namespace,
    images: Images,
    seed: int,
    momentum: float,
    deadline: float,
    rows: list[dict[str, object]],
    save: Callable[[list[dict[str, object]]], None],
) -> float:
    """All methods from one initialisation, the most telling first; the seconds of the searches."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = narrow_resnet18() if args.quick else resnet18()
    model.to(images.train.device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    settings = {
        "prune_ratio": 0.5,
        "stopping_point": 0.15 if args.quick else 0.1,
        "window": WINDOW,
        "sample_every": len(images.train) // BATCH,
    }
    opt = WormOptimizer(sgd, model, truncation=1, **settings)
    base = Training(model, opt, images, seed, deadline)
    base.search({Phase.SEARCHING}, args.max_epochs)
    trigger = base.fork()
    base.search({Phase.SEARCHING, Phase.TRUNCATING}, args.max_epochs)
    ticket = base.fork()

    def truncated(truncate: str, n_epochs: int) -> Training:
        """The search with truncation, from the trigger point on."""
        run = trigger.fork()
        run.opt = WormOptimizer(run.opt.base_optim, run.model, truncate=truncate, **settings)
        run.opt.load_state_dict(copy.deepcopy(trigger.opt.state_dict()))
        run.search({Phase.SEARCHING, Phase.TRUNCATING}, n_epochs)
        return run

    worm = truncated("gradient", args.max_epochs)
    searched = time.perf_counter() - begin
    tickets = [run.epochs for run in (ticket, worm) if run.opt.converged]
    total = max(tickets) + EPOCHS_AFTER if tickets else base.epochs

    def at_random() -> Training:
        """The network at EB Train's ticket, with a random one."""
        run = ticket.fork()
        drawn = random_ticket(ticket.opt.ticket, seed)
        run.opt = WormOptimizer(run.opt.base_optim, run.model, ticket=drawn)
        return run

    methods: dict[str, Callable[[], Training]] = {
        "EB Train": ticket.fork,
        "WORM": lambda: worm,
        "dense": lambda: base,
        "random": at_random,
        "EB Train, faded": ticket.fork,
        "WORM, update": lambda: truncated("update", total - 1),
    }
    if not ticket.opt.converged:
        del methods["random"], methods["EB Train, faded"]
    if not momentum:
        del methods["WORM, update"]  # Plain SGD's update is the gradient, so it would be WORM.
    for name, start in methods.items():
        if not base.fits(3):
            break
        row: dict[str, object] = {"work": f"seed {seed}, momentum {momentum:g}, {name}"}
        rows.append(row)
        try:
            follow(start(), row, total, name)
        except Exception as error:  # What breaks one method shall not keep others from their turn.
            row["note"] = repr(error)
        save(rows)
        print(f"{table(without_lists([row]))}, {time.perf_counter() - begin:.0f} s in", flush=True)
    return searched


def follow(run: Training, row: dict[str, object], total: int, name: str) -> None:
    """Prune with the ticket, shrink, and train on, and fill the row with what comes of it."""
    found = run.epochs
    row |= {"accuracies, %": run.accuracies, "s of epochs": run.seconds}
    if name == "dense":
        if not run.fits(total - run.epochs):
            row["note"] = "no time to train on"
            return
    else:
        row["distances"] = [list(sample.distances) for sample in run.opt.history]
        if not run.opt.converged:
            row["note"] = f"no ticket in {found} epochs"
            return
        row |= {"ticket epoch": found, "ticket step": found * run.n_steps}
        row["before pruning, %"] = run.accuracies[-1]
        if name == "EB Train, faded":
            run.opt.prune(over=run.n_steps)
            run.epoch()
        run.opt.prune()
        row["after pruning, %"] = run.accuracy(run.model)
        row["BatchNorm recomputed, %"] = run.accuracy(run.recomputed())
        scales = [mask for key, mask in run.opt.ticket.items() if key.endswith("weight")]
        shares = [float(mask.float().mean()) for mask in scales]
        row |= {"shares kept": shares, "least kept of a layer": min(shares)}
        dense_epochs = run.epochs
        report = run.shrink()
        for what, numbers in (("M parameters", report.parameters), ("MMAC", report.macs)):
            row |= {f"{what} before": numbers[0] / 1e6, f"{what} after": numbers[1] / 1e6}
        if not run.fits(total - run.epochs + 1):
            row["note"] = "no time to train on"
            return
    while run.epochs < total:
        run.epoch()
    if name != "dense":
        row["1 epoch later, %"] = run.accuracies[found]
        row["s an epoch after"] = statistics.median(run.seconds[dense_epochs:])
    row |= {
        "epochs": total,
        "last three epochs, %": statistics.mean(run.accuracies[:total][-3:]),
        "last epoch, %": run.accuracies[total - 1],
        "s an epoch before": statistics.median(run.seconds[:found]),
        "s of training": sum(run.seconds[:total]),
    }


def random_ticket(ticket: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Another ticket that removes as many channels, at random, and of no layer all."""
    scales = {name: mask for name, mask in ticket.items() if name.endswith("weight")}
    generator = torch.Generator().manual_seed(seed)
    ranks = {name: torch.rand(len(mask), generator=generator) for name, mask in scales.items()}
    for each in ranks.values():
        each[each.argmax()] = 1  # more than any other, and so the last to go
    n_removed = sum(int((~mask).sum()) for mask in scales.values())
    highest = torch.cat(list(ranks.values())).sort().values[n_removed - 1]
    kept = {name: (each > highest).to(scales[name].device) for name, each in ranks.items()}
    return kept | {name.removesuffix("weight") + "bias": mask for name, mask in kept.items()}


def narrow_resnet18() -> nn.Module:
    """ResNet-18 with an eighth of the channels, at an eighth of the resolution."""
    import timm

    return timm.create_model(
        "resnet18", num_classes=10, zero_init_last=False, channels=(8, 16, 32, 64)
    )


def without_lists(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """What of the rows fits into a table."""
    return [
        {key: value for key, value in row.items() if not isinstance(value, list)} for row in rows
    ]


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", default=PARTS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--seconds", type=float, default=300, help="that training may take")
    parser.add_argument("--momentum", type=float, nargs="*", default=[0, 0.9], help="of training")
    parser.add_argument("--max-epochs", type=int, default=25, help="of a search")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10: a .npz of xtr, ytr, xte, yte")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_device.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    parts: dict[str, Callable[[], list[dict[str, object]]]] = {
        "tests": lambda: tests(device),
        "samples": lambda: search(device, args.layers, args.width, args.repeats),
        "steps": lambda: steps(device, args.repeats, args.quick),
        "shrunk": lambda: shrunk(device, args.repeats, args.quick),
        "training": lambda: training(args, device, partial(save, "training")),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results: dict[str, object] = {"torch": torch.__version__, "device": name}
    results["arguments"] = sys.argv[1:]
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save(part: str, rows: list[dict[str, object]]) -> None:
        """Write what there is."""
        results[part] = rows
        args.out.write_text(json.dumps(results, indent=1))

    for part in args.parts:
        start = time.perf_counter()
        rows = parts[part]()
        save(part, rows)
        took = time.perf_counter() - start
        print(f"{table(without_lists(rows))}\n-- {part}: {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
