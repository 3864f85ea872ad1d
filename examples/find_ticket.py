"""Find the winning ticket of a CNN while it trains, with WORM and with EB Train, side by side.

Both searches start from the same weights and see the same batches. EB Train is here its stopping
rule, on training that nothing is truncated in. Each network is trained until its ticket is found,
pruned, shrunk to what is left, and trained on; the table compares what that cost and what was
gained.

    python examples/find_ticket.py        # 8x8 digits, nothing to download
    python examples/find_ticket.py --data cifar10 --data-dir data
    python examples/find_ticket.py --data cifar10 --data-dir data --model vgg11_bn --seeds 7

Needs `pip install "torch-worm-optim[examples]"`, and torchvision for downloading CIFAR-10 (timm
brings it). Writes results.json, ticket.pt and two pictures into --out. Exits with 1 when a search
runs out of epochs before its rule is met.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib import pyplot as plt
from report import Run, add_search_arguments, plot_trajectory, table, write
from timm.models import VGG, ResNet
from torch import Tensor, nn
from tqdm import tqdm

from torch_worm_optim import WormOptimizer


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
    if args.data_dir is None:
        raise SystemExit(
            "--data cifar10 needs --data-dir DIR: a .npz with xtr, ytr, xte, yte, a folder that "
            "holds one, or a folder that torchvision may download CIFAR-10 to."
        )
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


def build(args: argparse.Namespace, data: Data, seed: int) -> nn.Module:
    """A timm network; for a seed always the same weights."""
    torch.manual_seed(seed)
    n_channels, side = data.train_images.shape[1], data.train_images.shape[-1]
    n_classes = int(data.train_labels.max()) + 1
    options = {}
    if args.width != 1:
        options["channels"] = tuple(int(width * args.width) for width in (64, 128, 256, 512))
    model = timm.create_model(
        args.model,
        in_chans=n_channels,
        num_classes=n_classes,
        pretrained=args.pretrained,
        **options,
    )
    if args.stem == "cifar" and isinstance(model, ResNet):
        # A stem made for 224 pixels divides the side by four before the first block.
        model.conv1 = nn.Conv2d(n_channels, model.conv1.out_channels, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif args.stem == "cifar" and isinstance(model, VGG):
        # Five poolings and a 7x7 classifier want 224 pixels; as many stay as the side allows.
        pools = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
        for i in pools[max(0, side.bit_length() - 1) :]:
            model.features[i] = nn.Identity()
        model.pre_logits = nn.Identity()
        model.head.fc = nn.Linear(512, n_classes)
    if not args.pretrained:
        # timm starts the last scale of every residual branch at 0, which a ranking by magnitude
        # takes for unimportance: most branches would go before they had a chance.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    return model.to(args.device)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test images that are classified right, in %."""
    model.eval()
    pairs = zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    model.train()
    return 100 * right / len(data.test_labels)


def search(args: argparse.Namespace, data: Data, method: str, seed: int, bar: tqdm) -> tuple:
    """Train until the ticket is found; the network, its optimizer, and what is known so far."""
    model = build(args, data, seed)
    steps = data.steps(args.batch_size)
    sgd = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    # The one line that changes. With nothing truncated, EB Train's stopping rule is left.
    opt = WormOptimizer(
        sgd,
        model,
        prune_ratio=args.prune_ratio,
        stopping_point=args.stopping_point,
        margin=args.margin,
        window=args.window,
        truncation=args.truncation if method == "WORM" else 1,
        sample_every=args.sample_every or steps,
        scope=args.scope,
        min_keep=args.min_keep,
        truncate=args.truncate,
        trigger=args.trigger,
    )
    scales = [m.weight for m in model.modules() if args.l1 and isinstance(m, nn.BatchNorm2d)]

    def penalise(*_: object) -> None:
        for scale in scales:
            scale.grad.add_(scale.sign(), alpha=args.l1)

    # A term of the loss would be truncated with it: the removed scales would stay, the kept ones
    # would shrink below them, and no two masks would agree. Here it comes after truncation.
    penalty = sgd.register_step_pre_hook(penalise)
    order = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    epochs = 0
    while not opt.converged and epochs < args.max_epochs:
        train_epoch(args, model, opt, data, order, bar)
        epochs += 1
        if opt.history and opt.history[-1].max_distance is not None:
            bar.set_postfix(max_distance=f"{opt.history[-1].max_distance:.3f}", refresh=False)
    penalty.remove()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    run = Run(
        method=method,
        seed=seed,
        found=opt.converged,
        search_epochs=epochs,
        search_seconds=time.perf_counter() - start,
        scores={"before pruning": accuracy(model, data)},
        history=opt.history,
        steps_per_epoch=steps,
        ticket=opt.final_mask if opt.converged else opt.candidate_mask or {},
    )
    return model, opt, order, run


def train_epoch(args, model, opt, data: Data, order: torch.Generator, bar: tqdm) -> None:
    """The loop that everybody writes."""
    for images, labels in data.batches(args.batch_size, order):
        opt.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        opt.step()
        bar.update()


def progress(what: str, n_steps: int | None = None) -> tqdm:
    """A bar that counts steps; nothing where nobody looks at a terminal."""
    return tqdm(desc=what, total=n_steps, unit="step", disable=None)


def compare(args: argparse.Namespace, data: Data, seed: int) -> list[Run]:
    """Both searches of one seed, pruned and trained on to the same number of epochs."""
    searched = []
    for method in ("EB Train", "WORM"):
        with progress(f"seed {seed}, {method}: search") as bar:
            searched.append(search(args, data, method, seed, bar))
    runs = [run for *_, run in searched]
    # The method that stops first has trained less: it may train on until both have had as much.
    total = max((r.search_epochs for r in runs if r.found), default=0) + args.retrain_epochs
    for model, opt, order, run in searched:
        if not run.found:
            continue
        opt.prune()
        run.scores["after pruning"] = accuracy(model, data)
        report = opt.shrink(
            data.train_images[:1], scatter=args.scatter, multiple_of=args.multiple_of
        )
        epochs = total - run.search_epochs
        start = time.perf_counter()
        n_steps = epochs * run.steps_per_epoch
        evaluating = 0.0
        with progress(f"seed {seed}, {run.method}: retrain", n_steps) as bar:
            for epoch in range(1, epochs + 1):
                train_epoch(args, model, opt, data, order, bar)
                if epoch in (1, args.retrain_epochs):
                    pause = time.perf_counter()
                    what = f"{epoch} epoch{'s' * (epoch > 1)} retrained"
                    run.scores[what] = accuracy(model, data)
                    evaluating += time.perf_counter() - pause
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        run.sizes = {
            "M parameters": tuple(n / 1e6 for n in report.parameters),
            "MMAC an image": tuple(n / 1e6 for n in report.macs),
            "seconds an epoch": (
                run.search_seconds / run.search_epochs,
                (time.perf_counter() - start - evaluating) / epochs,
            ),
        }
        run.scores["at equal epochs"] = accuracy(model, data)
    return runs


def plot_channels(runs: list[Run], args: argparse.Namespace, path: Path) -> None:
    """Which channels of which layer go, for both methods of the first seed."""
    shown = [run for run in runs if run.seed == runs[0].seed and run.ticket]
    if not shown:
        return  # the search was over before its first mask
    names = list(shown[0].ticket)
    figure, panels = plt.subplots(
        1,
        len(shown),
        figsize=(5.5 * len(shown), 1.2 + 0.24 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for run, axes in zip(shown, panels[0], strict=True):
        for row, mask in enumerate(run.ticket.values()):
            kept = mask.cpu().numpy()
            # Layers differ in width by a factor of ten: each fills the row.
            edges = np.linspace(0, 1, len(kept) + 1)
            axes.pcolormesh(
                edges, [row - 0.4, row + 0.4], kept[None], cmap="Blues", vmin=-0.15, vmax=1.3
            )
            axes.annotate(
                f"{(~kept).sum()} of {len(kept)}",
                (1.01, row),
                va="center",
                fontsize=7,
                annotation_clip=False,
            )
        axes.set(xlim=(0, 1), xticks=[], title=f"{run.method}: channels that go (light)")
        axes.spines[:].set_visible(False)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0][0].invert_yaxis()
    figure.suptitle(title(args), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def title(args: argparse.Namespace) -> str:
    """What was run, in a line."""
    return (
        f"{args.model} on {args.data}, p = {args.prune_ratio:g}, window {args.window}, "
        f"r = {args.truncation:g} ({args.truncate})" + (f", L1 {args.l1:g}" if args.l1 else "")
    )


def parse() -> argparse.Namespace:
    """Arguments; those of the search have the paper's values as defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=["digits", "cifar10"], default="digits", help="what to train on")
    add("--data-dir", type=Path, help="where CIFAR-10 is, or may be downloaded to")
    add("--model", default="resnet18", help="any timm CNN with BatchNorm")
    add("--stem", choices=["cifar", "original"], default="cifar", help="of ResNets and VGGs")
    add("--width", type=float, default=1.0, help="multiplies the channels of a ResNet")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights")
    add("--limit", type=int, help="train on the first LIMIT images only")
    add("--seeds", type=int, default=1, help="number of seeds, counted from 0")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/find_ticket"), help="folder for results")
    add("--lr", type=float, default=0.01, help="learning rate of SGD")
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--weight-decay", type=float, default=0.0, help="weight decay of SGD")
    add("--batch-size", type=int, default=32, help="images in a batch")
    add("--max-epochs", type=int, default=60, help="give up the search after so many")
    add("--retrain-epochs", type=int, default=3, help="epochs after pruning, at least")
    add(
        "--l1",
        metavar="STRENGTH",
        type=float,
        default=0.0,
        help="strength of network slimming's L1 term on BatchNorm scales during the search, by "
        "either method, added behind --truncate gradient; EB Train's published scripts have 1e-4",
    )
    add("--scatter", action="store_true", help="narrow norms that write into residual streams")
    add("--multiple-of", type=int, default=1, help="of what sizes stay multiples when shrunk")
    add("--truncate", choices=["gradient", "update"], default="gradient", help="what r scales")
    add_search_arguments(parser, window=5, stopping_point=0.1, margin=0.05)
    return parser.parse_args()


def main() -> None:
    """Search, prune, retrain, compare."""
    args = parse()
    args.device = torch.device(args.device)
    data = load(args)
    runs = [run for seed in range(args.seeds) for run in compare(args, data, seed)]

    args.out.mkdir(parents=True, exist_ok=True)
    plot_trajectory(runs, args, title(args), args.out / "trajectory.png")
    plot_channels(runs, args, args.out / "channels.png")
    write(runs, args, f"{title(args)}, {args.seeds} seed(s)\n\n{table(runs, 'accuracy, %,')}")


if __name__ == "__main__":
    main()
