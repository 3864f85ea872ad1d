"""Compare floors for narrow layers: `min_keep` as a count and as shares, and `scope="layer"`.

    python -m benchmarks.min_keep                    # digits, six minutes on one core
    python -m benchmarks.min_keep --data cifar10 --data-dir cifar10.npz    # a quarter of an hour

An MLP with two hidden layers and a CNN with three convolutions, all of one width and each followed
by BatchNorm and ReLU; the CNN alone on CIFAR-10, whose images are halved to 16 x 16. SGD without
momentum, all else default, one mask an epoch. Each run searches until converged, prunes at once and
trains on. At one seed, runs differ in the floor alone and see the same batches. `cifar10.npz` holds
`xtr`, `ytr`, `xte` and `yte`, images as uint8 of shape (n, 3, 32, 32). Prints a table and writes
JSON after each run.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.__main__ import table
from torch_worm_optim import WormOptimizer

BATCH = 50
SETTINGS: dict[str, dict[str, Any]] = {
    "min_keep=1": {"min_keep": 1},
    "min_keep=0.05": {"min_keep": 0.05},
    "min_keep=0.1": {"min_keep": 0.1},
    "min_keep=0.2": {"min_keep": 0.2},
    'scope="layer"': {"scope": "layer"},
}


class Data(NamedTuple):
    """Images and labels to train on and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Data:
    """The first 1,500 of scikit-learn's digits, and the other 297 to test on."""
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(source.target)
    return Data(images[:1500], labels[:1500], images[1500:], labels[1500:])


def cifar10(path: Path, n_train: int, n_test: int) -> Data:
    """The first images of CIFAR-10, every four pixels averaged to one."""
    arrays = np.load(path)

    def halved(key: str, n: int) -> Tensor:
        images = torch.from_numpy(arrays[key][:n]).float() / 255
        return nn.functional.avg_pool2d((images - 0.5) / 0.25, 2)

    def labels(key: str, n: int) -> Tensor:
        return torch.from_numpy(arrays[key][:n].astype(np.int64))

    return Data(
        halved("xtr", n_train), labels("ytr", n_train), halved("xte", n_test), labels("yte", n_test)
    )


def mlp(data: Data, width: int) -> nn.Module:
    """Two hidden layers."""
    n_inputs = data.images[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (n_inputs, width):
        layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(data: Data, width: int) -> nn.Module:
    """Three convolutions, each of which halves the resolution."""
    layers: list[nn.Module] = []
    for before in (data.images.shape[1], width, width):
        layers += [
            nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS = {"MLP": mlp, "CNN": cnn}


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of test images that are classified correctly."""
    model.eval()
    return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


def train_epoch(model: nn.Module, optimizer: WormOptimizer, data: Data) -> None:
    """One epoch in a new order."""
    model.train()
    for batch in torch.randperm(len(data.labels)).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()


def run(
    network: str, width: int, setting: str, seed: int, data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    """Search, prune and train on; no ticket is found if the search reaches the cap."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    model = NETWORKS[network](data, width)
    optimizer = WormOptimizer(
        SGD(model.parameters(), lr=0.02),
        model,
        prune_ratio=args.prune_ratio,
        sample_every=-(-len(data.labels) // BATCH),
        fade=1,
        **{"scope": "global", **SETTINGS[setting]},
    )
    row: dict[str, Any] = {"network": network, "width": width, "setting": setting, "seed": seed}
    epochs = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # narrow layers are what this is about
        while not optimizer.converged and epochs < args.cap:
            train_epoch(model, optimizer, data)
            epochs += 1
        row |= {"converged": optimizer.converged, "epochs": epochs}
        row["before"] = accuracy(model, data)
        if optimizer.final_mask is not None:
            row["kept"] = [int(mask.sum()) for mask in optimizer.final_mask.values()]
            optimizer.prune()
            row["pruned"] = accuracy(model, data)
            for _ in range(args.after):
                train_epoch(model, optimizer, data)
            row["after"] = accuracy(model, data)
    row["seconds"] = time.perf_counter() - start
    return row


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, object]]:
    """Mean and worst over the seeds, for each network, width and setting."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["width"], row["setting"]), []).append(row)
    for network, width, setting in sorted(
        groups, key=lambda key: (key[0], key[1], list(SETTINGS).index(key[2]))
    ):
        group = groups[network, width, setting]
        found = [row for row in group if row["converged"]]
        line: dict[str, object] = {"work": f"{network} {width}, {setting}"}
        line["tickets"] = f"{len(found)} of {len(group)}"
        if found:
            line |= {
                "epochs": mean(row["epochs"] for row in found),
                "before": mean(row["before"] for row in found),
                "after, mean": mean(row["after"] for row in found),
                "after, worst": min(row["after"] for row in found),
                "least share kept": min(min(row["kept"]) for row in found) / width,
            }
        yield line


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="the .npz with CIFAR-10")
    parser.add_argument("--n-train", type=int, default=3000, help="images of CIFAR-10")
    parser.add_argument("--n-test", type=int, default=5000)
    parser.add_argument("--networks", choices=list(NETWORKS), nargs="*", default=list(NETWORKS))
    parser.add_argument("--prune-ratio", type=float, default=0.5)
    parser.add_argument("--widths", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cap", type=int, default=60, help="epochs that a search may take")
    parser.add_argument("--after", type=int, default=10, help="epochs after pruning")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_min_keep.json"))
    args = parser.parse_args()
    if args.data == "cifar10" and args.data_dir is None:
        parser.error("--data cifar10 needs --data-dir")
    torch.set_num_threads(1)
    n_images = args.n_train, args.n_test
    data = digits() if args.data == "digits" else cifar10(args.data_dir, *n_images)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    networks = args.networks if args.data == "digits" else ["CNN"]
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for width in args.widths:
            for network in networks:
                for setting in SETTINGS:
                    rows.append(run(network, width, setting, seed, data, args))
                    record = {"torch": torch.__version__, "arguments": vars(args), "rows": rows}
                    args.out.write_text(json.dumps(record, indent=1, default=str))
    print(table(list(summary(rows))))


if __name__ == "__main__":
    main()
