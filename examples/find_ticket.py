"""Find the winning ticket of a CNN while it trains: WORM, EB Train, a random ticket, and none.

Four networks start from the same weights and see the same batches, for as many epochs. One stays
dense. Two search, by WORM and by EB Train (here its stopping rule, on training that nothing is
truncated in), and at their tickets are pruned, shrunk to what is left, and trained on. The last
loses as many channels as EB Train's, at the same step, but any. The table compares what that cost
and what was gained.

    python examples/find_ticket.py        # 8x8 digits, nothing to download
    python examples/find_ticket.py --data cifar10 --data-dir data
    python examples/find_ticket.py --data cifar10 --data-dir data --model vgg11_bn --seeds 7

Needs `pip install "torch-worm-optim[examples]"`, and torchvision for downloading CIFAR-10 (timm
brings it). Writes into --out, after each training: results.json, results.csv, WORM's ticket.pt, its
shrunk network small.pt, what it keeps of each layer as kept.png, masks.pt with all tickets, and at
the end three more pictures. Exits with 1 when a search runs out of epochs before its rule is met,
with 2 when an argument is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import report
import timm
import torch
from report import Run, at_least, between
from timm.models import VGG, ResNet
from torch import Tensor, nn
from tqdm import tqdm

from torch_worm_optim import ShrinkReport, WormOptimizer, plot_kept, shrink_

METHODS = ("dense", "EB Train", "WORM", "random ticket")
# Channels and side of the images, of ten classes; epochs that leave some after the tickets.
IMAGES = {"digits": (1, 8), "cifar10": (3, 32)}
EPOCHS = {"digits": 12, "cifar10": 30}


@dataclass
class Data:
    """Images of shape (N, C, H, W), scaled to mean 0 and deviation 1, and labels, on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mirrored: bool  # whether a mirror image shows the same class

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order; where classes allow it, half of the images are mirrored."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        # A last batch of one image has no variance for BatchNorm to divide by.
        for chosen in order[: self.steps(size) * size].split(size):
            images = self.train_images[chosen.to(self.train_images.device)]
            if self.mirrored:
                flip = torch.rand(len(chosen), generator=generator).to(images.device) < 0.5
                images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            yield images, self.train_labels[chosen.to(images.device)]

    def steps(self, size: int) -> int:
        """Batches in an epoch."""
        return len(self.train_labels) // size


def load_digits(args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Scikit-learn's 1,797 images of handwritten digits, every fourth one for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    test = np.arange(len(images)) % 4 == 3
    return images[~test], bunch.target[~test], images[test], bunch.target[test]


def load_cifar10(args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """CIFAR-10 from a .npz with xtr, ytr, xte, yte if there is one, else through torchvision."""
    packed = (
        [args.data_dir] if args.data_dir.suffix == ".npz" else sorted(args.data_dir.glob("*.npz"))
    )
    if packed:
        with np.load(packed[0]) as arrays:
            return tuple(arrays[name] for name in ("xtr", "ytr", "xte", "yte"))
    from torchvision.datasets import CIFAR10

    halves = [CIFAR10(args.data_dir, train=train, download=True) for train in (True, False)]
    return tuple(array for half in halves for array in (half.data, np.array(half.targets)))


def load(args: argparse.Namespace) -> Data:
    """The data set that was asked for, on the device."""
    arrays = {"digits": load_digits, "cifar10": load_cifar10}[args.data](args)
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(a) for a in arrays)
    if args.limit:
        train_images, train_labels = train_images[: args.limit], train_labels[: args.limit]
    if train_images.shape[-1] in (1, 3):  # torchvision keeps colours last
        train_images, test_images = (x.permute(0, 3, 1, 2) for x in (train_images, test_images))
    mean = train_images.float().mean((0, 2, 3), keepdim=True)
    deviation = train_images.float().std((0, 2, 3), keepdim=True)
    if len(train_labels) < args.batch_size:
        raise SystemExit(f"{len(train_labels)} images do not fill a batch of {args.batch_size}.")
    return Data(
        ((train_images - mean) / deviation).to(args.device),
        train_labels.long().to(args.device),
        ((test_images - mean) / deviation).to(args.device),
        test_labels.long().to(args.device),
        mirrored=args.data == "cifar10",
    )


def build(
    name: str,
    *,
    n_channels: int,
    side: int,
    width: float = 1.0,
    stem: str = "cifar",
    pretrained: bool = False,
) -> nn.Module:
    """A timm network for ten classes of images with so many channels, and pixels a side."""
    options = {}
    if width != 1:
        options["channels"] = tuple(int(n * width) for n in (64, 128, 256, 512))
    model = timm.create_model(
        name, in_chans=n_channels, num_classes=10, pretrained=pretrained, **options
    )
    if stem == "cifar" and isinstance(model, ResNet):
        # A stem made for 224 pixels divides the side by four before the first block.
        model.conv1 = nn.Conv2d(n_channels, model.conv1.out_channels, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif stem == "cifar" and isinstance(model, VGG):
        # Five poolings and a 7x7 classifier want 224 pixels; as many stay as the side allows.
        pools = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
        for i in pools[max(0, side.bit_length() - 1) :]:
            model.features[i] = nn.Identity()
        model.pre_logits = nn.Identity()
        model.head.fc = nn.Linear(512, 10)
    if not pretrained:
        # timm starts the last scale of every residual branch at 0, which a ranking by magnitude
        # takes for unimportance: most branches would go before they had a chance.
        for norm in norms(model):
            nn.init.ones_(norm.weight)
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorms, whose scales are ranked."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test images that are classified right, in %."""
    model.eval()
    pairs = zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    model.train()
    return 100 * right / len(data.test_labels)


def wrap(args: argparse.Namespace, sgd, model: nn.Module, **options) -> WormOptimizer:
    """The one line that changes, with all that can be set in it."""
    return WormOptimizer(
        sgd,
        model,
        prune_ratio=args.prune_ratio,
        stopping_point=args.stopping_point,
        margin=args.margin,
        window=args.window,
        scope=args.scope,
        min_keep=args.min_keep,
        truncate=args.truncate,
        trigger=args.trigger,
        fade=args.fade,
        **options,
    )


def random_ticket(args: argparse.Namespace, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The mask that a search would draw if scales were random, shifts included."""
    model = copy.deepcopy(model)
    generator = torch.Generator(args.device).manual_seed(seed)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, generator=generator)
    opt = wrap(args, torch.optim.SGD(model.parameters(), 0.1), model, sample_every=None)
    opt.sample()
    return opt.candidate_mask


class Clock:
    """Seconds of training, which it is stopped for evaluation to leave out."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def start(self) -> None:
        """Go on."""
        self.since = time.perf_counter()

    def stop(self) -> float:
        """Wait for the device; all seconds until now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.since
        return self.seconds


def train(args: argparse.Namespace, data: Data, method: str, seed: int, prune_at: int) -> tuple:
    """The loop that everybody writes; a random ticket comes at step ``prune_at``."""
    torch.manual_seed(seed)
    model = build(**network(args), pretrained=args.pretrained).to(args.device)
    steps = data.steps(args.batch_size)
    opt = sgd = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    search = method in ("EB Train", "WORM")
    if search:
        # With nothing truncated, EB Train's stopping rule is left.
        truncation = args.truncation if method == "WORM" else 1
        every = args.sample_every or steps
        opt = wrap(args, sgd, model, truncation=truncation, sample_every=every)
    scales = [norm.weight for norm in norms(model)] if args.l1 and method != "dense" else []

    def penalise(*_: object) -> None:
        for scale in scales:
            scale.grad.add_(scale.sign(), alpha=args.l1)

    # A term of the loss would be truncated with it: the removed scales would stay, the kept ones
    # would shrink below them, and no two masks would agree. Here it comes after truncation.
    penalty = sgd.register_step_pre_hook(penalise)
    run = Run(method, seed, scores={}, steps_per_epoch=steps, found=False if search else None)
    order = torch.Generator().manual_seed(seed)
    clock = Clock(args.device)
    step, pruned = 0, False
    name = f"seed {seed}, {method}"
    with tqdm(desc=name, total=args.epochs * steps, unit="step", disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            clock.start()
            for images, labels in data.batches(args.batch_size, order):
                opt.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                opt.step()
                step += 1
                bar.update()
                if not pruned and (opt.converged if search else step == prune_at):
                    penalty.remove()
                    run.search_epochs, run.search_seconds = step / steps, clock.stop()
                    opt = prune_and_shrink(args, data, model, sgd, opt, run, clock)
                    pruned = True
                    clock.start()
            run.curve.append((step / steps, clock.stop(), accuracy(model, data)))
            line = f"epoch {epoch} of {args.epochs}: accuracy {run.curve[-1][2]:.2f} %"
            if search and not pruned and opt.history and opt.history[-1].distances:
                line += f", largest distance {opt.history[-1].max_distance:.3f}"
            bar.set_postfix_str(line.partition(": ")[2])
            if bar.disable:  # nobody looks at a terminal
                print(f"{name}, {line}, {clock.seconds:.1f} s", flush=True)

    run.seconds = clock.seconds
    run.scores["at the end"] = run.curve[-1][2]
    if search:
        run.found, run.history = opt.converged, opt.history
    if search and not run.found:
        run.search_epochs, run.search_seconds = step / steps, clock.seconds
        run.ticket = opt.candidate_mask or {}
    if method == "dense":
        # Nothing goes, but what there is is counted.
        counted = shrink_(copy.deepcopy(model), (data.train_images[:1],))
        run.sizes = {name: (before,) for name, (before, _) in sizes(counted).items()}
    if run.sizes:
        run.sizes["seconds, fastest epoch"] = fastest_epochs(run)
    return run, model, opt


def prune_and_shrink(
    args: argparse.Namespace, data: Data, model: nn.Module, sgd, opt, run: Run, clock: Clock
) -> WormOptimizer:
    """Take out what goes, and measure what that does."""
    run.scores["before pruning"] = accuracy(model, data)
    run.curve.append((run.search_epochs, clock.seconds, run.scores["before pruning"]))
    clock.start()
    if run.found is None:
        opt = WormOptimizer(sgd, model, ticket=random_ticket(args, model, run.seed))
    else:
        opt.prune()
    run.curve.append((run.search_epochs, clock.stop(), accuracy(model, data)))
    run.scores["after pruning"] = run.curve[-1][2]
    # In a copy, so that training goes on as if nobody had looked.
    recomputed = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(data.train_images.split(500), recomputed)
    run.scores["after pruning, BatchNorm recomputed"] = accuracy(recomputed, data)
    run.ticket = opt.final_mask
    clock.start()
    cut = opt.shrink(data.train_images[:1], scatter=args.scatter, multiple_of=args.multiple_of)
    clock.stop()
    run.sizes = sizes(cut)
    before, after = run.sizes["M parameters"]
    tqdm.write(
        f"seed {run.seed}, {run.method}: pruned after {run.search_epochs:g} epochs, "
        f"{run.search_seconds:.1f} s; shrunk from {before:.2f} to {after:.2f} M parameters"
    )
    return opt


def sizes(cut: ShrinkReport) -> dict[str, tuple[float, ...]]:
    """Of the network before and after."""
    return {
        "M parameters": tuple(n / 1e6 for n in cut.parameters),
        "MMAC an image": tuple(n / 1e6 for n in cut.macs),
    }


def fastest_epochs(run: Run) -> tuple[float, ...]:
    """Seconds of the fastest whole epoch before and after; what else a computer does slows some."""
    at = run.search_epochs or math.inf
    whole = [(p, q) for p, q in pairwise([(0, 0, 0), *run.curve]) if q[0] - p[0] == 1]
    before = [q[1] - p[1] for p, q in whole if q[0] <= at]
    after = [q[1] - p[1] for p, q in whole if p[0] >= at]
    return (min(before), *([min(after)] if after else [])) if before else ()


def compare(args: argparse.Namespace, data: Data, runs: list[Run]) -> None:
    """All trainings that are not among the runs yet; what is done is saved after each."""
    for seed in range(args.seeds):
        for method in METHODS:
            done = {(run.method, run.seed): run for run in runs}
            eb_train = done.get(("EB Train", seed))
            if (method, seed) in done:
                continue
            if method == "random ticket" and not eb_train.found:
                continue  # there is no step to apply it at
            prune_at = eb_train.history[-1].step if method == "random ticket" else 0
            run, model, opt = train(args, data, method, seed, prune_at)
            if method == "WORM" and run.found and not (args.out / "small.pt").exists():
                state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
                torch.save(state, args.out / "small.pt")
                plot_kept(opt).figure.savefig(args.out / "kept.png")
            runs.append(run)
            report.save(runs, args)


def network(args: argparse.Namespace) -> dict[str, object]:
    """What to call :func:`build` with."""
    n_channels, side = IMAGES[args.data]
    options = {"name": args.model, "n_channels": n_channels, "side": side}
    return options | {"width": args.width, "stem": args.stem}


def reload_lines(args: argparse.Namespace) -> str:
    """How small.pt is used elsewhere."""
    options = ", ".join(f"{name}={value!r}" for name, value in network(args).items())
    small = str(args.out / "small.pt")
    return f"""import sys; sys.path.append({os.path.relpath(Path(__file__).parent)!r})
import find_ticket, torch, torch_worm_optim
model = find_ticket.build({options})
torch_worm_optim.load_shrunk_(model, torch.load({small!r}, weights_only=True))"""


def title(args: argparse.Namespace) -> str:
    """What was run, in a line."""
    width = "" if args.width == 1 else f", width {args.width:g}"
    return (
        f"{args.model}{width} on {args.data}, p = {args.prune_ratio:g}, window {args.window}, "
        f"r = {args.truncation:g} ({args.truncate})" + (f", L1 {args.l1:g}" if args.l1 else "")
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments; those of the search have the paper's values as defaults."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__.split("\n\n")[0],
        formatter_class=report.HelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=IMAGES, default="digits", help="what to train on")
    add("--data-dir", metavar="DIR", type=Path, help="where CIFAR-10 is, or may be downloaded to")
    add("--limit", metavar="N", type=at_least(2), help="train on the first N images only")
    add("--batch-size", metavar="N", type=at_least(2), default=32, help="images in a batch")

    add = parser.add_argument_group("network and training").add_argument
    add("--model", metavar="NAME", default="resnet18", help="any timm CNN with BatchNorm")
    add("--stem", choices=["cifar", "original"], default="cifar", help="of ResNets and VGGs")
    add(
        "--width",
        metavar="X",
        type=between(0.02, 16),
        help="multiplies the channels of a ResNet (default: 0.25 for digits, 1 for CIFAR-10)",
    )
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights")
    add("--lr", metavar="X", type=between(0, math.inf), default=0.01, help="learning rate of SGD")
    momentum = between(0, 1, below=True)
    add("--momentum", metavar="X", type=momentum, default=0.9, help="momentum of SGD")
    decay = between(0, math.inf)
    add("--weight-decay", metavar="X", type=decay, default=0.0, help="weight decay of SGD")
    add("--seeds", metavar="N", type=at_least(1), default=1, help="so many, counted from 0")
    add(
        "--device",
        metavar="NAME",
        type=report.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train",
    )

    group = parser.add_argument_group("search")
    report.add_search_arguments(group, window=5, stopping_point=0.1, margin=0.05)
    add = group.add_argument
    add("--truncate", choices=["gradient", "update"], default="gradient", help="what r scales")
    add(
        "--l1",
        metavar="X",
        type=between(0, math.inf),
        default=0.0,
        help="strength of network slimming's L1 term on BatchNorm scales until the ticket, added "
        "behind --truncate gradient; EB Train's published scripts have 1e-4",
    )

    add = parser.add_argument_group("what comes after").add_argument
    add(
        "--epochs",
        metavar="N",
        type=at_least(1),
        help="of every training, search included (default: 12 for digits, 30 for CIFAR-10)",
    )
    add("--scatter", action="store_true", help="narrow norms that write into residual streams")
    add(
        "--multiple-of",
        metavar="N",
        type=at_least(1),
        default=1,
        help="of what sizes stay multiples when shrunk",
    )

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", type=Path, default=Path("runs/find_ticket"), help="for all files")
    add("--resume", action="store_true", help="skip what --out has, where a run was broken off")

    args = parser.parse_args(arguments)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What only shows when arguments are seen together."""
    if not timm.is_model(args.model):
        parser.error(f"--model: timm has no {args.model!r}; timm.list_models() lists what it has")
    is_resnet = timm.model_entrypoint(args.model).__module__ == "timm.models.resnet"
    if args.width not in (None, 1) and (args.pretrained or not is_resnet):
        what = "--pretrained weights" if is_resnet else args.model
        parser.error(f"--width is for ResNets without pretrained weights, not for {what}")
    if args.width is None:
        args.width = 0.25 if args.data == "digits" and is_resnet and not args.pretrained else 1.0
    if args.epochs is None:
        args.epochs = EPOCHS[args.data]
    with torch.device("meta"):
        if not norms(build(**network(args))):
            parser.error(f"--model: {args.model} has no BatchNorm2d, whose scales are ranked here")
    if args.data == "cifar10" and args.data_dir is None:
        parser.error(
            "--data cifar10 needs --data-dir DIR: a .npz with xtr, ytr, xte, yte, a folder that "
            "holds one, or a folder that torchvision may download CIFAR-10 to"
        )
    if args.sample_every is None and args.epochs < args.window:
        parser.error(f"--epochs {args.epochs} draw too few masks to fill a --window {args.window}")
    if args.limit and args.limit < args.batch_size:
        parser.error(f"--limit {args.limit} does not fill a --batch-size {args.batch_size}")
    if args.resume and not (args.out / "results.json").exists():
        parser.error(f"--resume: there is no {args.out / 'results.json'} to go on from")
    if args.resume:
        then = json.loads((args.out / "results.json").read_text())["arguments"]
        now = report.arguments(args)
        other = [name for name in now if then.get(name) != now[name]]
        other = [name for name in other if name not in ("out", "resume", "seeds")]
        if other:
            was = ", ".join(f"{name} {then.get(name)}, not {now[name]}" for name in other)
            parser.error(f"--resume: {args.out} was made with {was}; choose another --out")


def main() -> None:
    """Train, prune, train on, compare."""
    args = parse()
    data = load(args)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = report.restore(args.out) if args.resume else []
    if not args.resume:
        for name in ("results.json", "small.pt", "kept.png"):
            (args.out / name).unlink(missing_ok=True)  # of another run
    compare(args, data, runs)

    report.plot_trajectory(runs, args, title(args), args.out / "trajectory.png")
    report.plot_accuracy(runs, title(args), args.out / "accuracy.png")
    report.plot_channels(runs, title(args), args.out / "channels.png")
    if (args.out / "small.pt").exists():
        print(f"\nWORM's shrunk network is loaded by these lines:\n\n{reload_lines(args)}")
    n_seeds = len({run.seed for run in runs})
    threads = f", {torch.get_num_threads()} thread(s)" if args.device.type == "cpu" else ""
    text = f"{title(args)}, {args.epochs} epochs, {n_seeds} seed(s), {args.device}{threads}"
    report.write(runs, args, f"{text}\n\n{report.table(runs, 'accuracy, %,')}", "--epochs")


if __name__ == "__main__":
    main()
