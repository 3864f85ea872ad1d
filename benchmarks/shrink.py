"""Time training and inference of a network that is dense, pruned, shrunk, and shrunk with scatter.

    python -m benchmarks.shrink                    # some minutes on one core
    python -m benchmarks.shrink --quick            # does it run at all

ResNet-18 and VGG-11 with BatchNorm for images of 32 x 32, SGD with momentum. A share of all
BatchNorm channels is zero, chosen by random scales under one threshold. Times are taken in
turns in one process; ratios are medians of rounds. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.__main__ import in_turns, median_ms, peak_of, ratio, table
from torch_worm_optim.shrinking import shrink_


def resnet18() -> nn.Module:
    """ResNet-18 whose stem leaves the resolution of small images alone."""
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vgg11() -> nn.Module:
    """VGG-11 with BatchNorm and one linear layer, as it is used for CIFAR-10."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def zero_channels(model: nn.Module, share: float) -> None:
    """Set a share of all BatchNorm channels to zero, at least one of each layer kept."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    scales = [torch.rand(len(norm.weight), generator=generator) for norm in norms]
    threshold = torch.cat(scales).quantile(share)
    with torch.no_grad():
        for norm, scale in zip(norms, scales, strict=True):
            kept = (scale > threshold) | (scale == scale.max())
            norm.weight.mul_(kept)
            norm.bias.mul_(kept)


def training_step(
    model: nn.Module, sgd: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """Forward, backward and a step."""
    sgd.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    sgd.step()


def megabytes(model: nn.Module) -> float:
    """The size of a checkpoint."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def rows_of(
    name: str, make: Callable[[], nn.Module], share: float, batch: int, repeats: int
) -> list[dict[str, object]]:
    """One network at one share."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    dense = make()
    pruned = copy.deepcopy(dense)
    zero_channels(pruned, share)
    models = {"dense": dense, "pruned": pruned}
    reports = {}
    for kind, scatter in (("shrunk", False), ("shrunk, scatter", True)):
        models[kind] = copy.deepcopy(pruned)
        reports[kind] = shrink_(models[kind], images[:1], scatter=scatter)
    steps, passes = {}, {}
    for kind, model in models.items():
        sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        steps[kind] = partial(training_step, model, sgd, images, labels)
        passes[kind] = partial(model, images)
    trained = in_turns(steps, repeats)
    peaks = {kind: peak_of(step) for kind, step in steps.items()}
    for model in models.values():
        model.eval()
    with torch.no_grad():
        inferred = in_turns(passes, repeats)
    return [
        {
            "work": f"{name}, p = {share:g}, {kind}",
            "step, ms": median_ms(trained[kind]),
            "times faster": ratio(trained["dense"], trained[kind]),
            "inference, times faster": ratio(inferred["dense"], inferred[kind]),
            "parameters, M": sum(p.numel() for p in models[kind].parameters()) / 1e6,
            "MMAC": reports[kind].macs[1] / 1e6 if kind in reports else None,
            "peak of a step, MB": peaks[kind],
            "checkpoint, MB": megabytes(models[kind]),
        }
        for kind in models
    ]


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--quick", action="store_true", help="one share, a small batch")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_shrink.json"))
    args = parser.parse_args()
    if args.quick:
        args.batch, args.repeats, args.shares = 4, 1, [0.5]
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name, make in (("ResNet-18", resnet18), ("VGG-11-BN", vgg11)):
        for share in args.shares:
            rows += rows_of(name, make, share, args.batch, args.repeats)
    print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
