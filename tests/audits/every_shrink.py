"""Shrink every network of timm that has BatchNorm, and say what came of it.

    python tests/audits/every_shrink.py --out runs/every_shrink.jsonl            # some hours
    python tests/audits/every_shrink.py --models resnet18 dla34 --scatter

Half of all BatchNorm channels are zero, chosen by random scales under one threshold, at least
one of each layer kept. Outputs in evaluation and in training mode are compared before and after. A
network is one line of JSON; networks that are in the file already are passed over.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_worm_optim.shrink import shrink_


def zero_half(model: nn.Module, seed: int = 0) -> None:
    """Set half of the BatchNorm channels to zero, and give statistics some values."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
    scales = [torch.rand(len(norm.weight), generator=generator) for norm in norms]
    every = torch.cat(scales)
    threshold = every.kthvalue(max(1, len(every) // 2)).values
    with torch.no_grad():
        for norm, scale in zip(norms, scales, strict=True):
            kept = scale > threshold
            kept[scale.argmax()] = True
            shift = torch.randn(len(scale), generator=generator) * 0.1
            norm.weight.copy_(scale * kept)
            norm.bias.copy_(shift * kept)
            if norm.running_mean is not None:
                norm.running_mean.normal_(0, 0.1, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)


def first_tensor(output: object) -> Tensor:
    """The tensor of an output, or its first."""
    return output if isinstance(output, Tensor) else first_tensor(next(iter(output)))


def training_difference(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """The largest difference in training mode over the largest output, without dropout."""
    outputs = []
    for model in (before, after):
        model.train()
        for module in model.modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
            if isinstance(getattr(module, "drop_rate", None), float):  # of a function, not a module
                module.drop_rate = 0.0
        with torch.no_grad(), torch.random.fork_rng():
            outputs.append(first_tensor(model(images)).double())
    a, b = outputs
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def try_one(name: str, scatter: bool, largest: int) -> dict[str, object]:
    """What came of one network."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    wanted = model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    for size in dict.fromkeys((64, 128, wanted)):
        if size > largest:
            break
        try:
            with torch.no_grad():
                model(torch.randn(2, 3, size, size))
            break
        except Exception:  # too small for this network
            continue
    if size > largest:
        return {"name": name, "outcome": "not tried", "why": f"needs images of {size} pixels"}
    zero_half(model)
    before = copy.deepcopy(model)
    row: dict[str, object] = {"name": name, "size": size}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = shrink_(model, torch.randn(2, 3, size, size), scatter=scatter)
    except RuntimeError as error:
        return {**row, "outcome": "refused", "why": str(error)}
    row["seconds"] = round(time.perf_counter() - start, 2)
    row |= report.as_dict()
    try:
        images = torch.randn(4, 3, size, size)
        difference, limit = training_difference(before, model, images), 1e-4
        if difference > limit:  # many layers blow rounding up, but not that of double precision
            twins = before.double(), model.double()
            difference, limit = training_difference(*twins, images.double()), 1e-9
        row["train_difference"] = difference
    except Exception as error:
        return {**row, "outcome": "not trained", "why": f"{type(error).__name__}: {error}"}
    exact = report.max_difference < 1e-4 and difference < limit
    cut = "exact" if report.kept else "pinned whole"
    return {**row, "outcome": cut if exact else "inexact"}


def main() -> None:
    """Run, and append to the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", help="names or patterns (default: all of timm)")
    parser.add_argument("--scatter", action="store_true")
    parser.add_argument("--most", type=float, default=150, help="millions of parameters, at most")
    parser.add_argument("--largest", type=int, default=288, help="pixels of an image, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/every_shrink.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.out.exists():
        done = {json.loads(line)["name"] for line in args.out.read_text().splitlines()}
    for name in args.models or timm.list_models():
        if name in done:
            continue
        with torch.device("meta"):
            try:
                model = timm.create_model(name, num_classes=10)
            except Exception as error:
                row = {"name": name, "outcome": "not built", "why": str(error)[:200]}
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                continue
        if not any(isinstance(m, _BatchNorm) and m.weight is not None for m in model.modules()):
            continue
        n_millions = sum(p.numel() for p in model.parameters()) / 1e6
        if n_millions > args.most:
            row = {"name": name, "outcome": "not tried", "why": f"{n_millions:.0f} M parameters"}
        else:
            try:
                row = try_one(name, args.scatter, args.largest)
            except Exception as error:
                row = {"name": name, "outcome": "failed", "why": f"{type(error).__name__}: {error}"}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
