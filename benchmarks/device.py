"""Tests, times and training on a CUDA device: samples, truncation, steps, shrinking, and tickets.

    python -m benchmarks.device --data-dir DIR       # some minutes and 30 GB of device memory
    python -m benchmarks.device --parts samples --layers 4    # an eighth of the entries
    python -m benchmarks.device --parts training --seconds 480 --data-dir DIR
    python -m benchmarks.device --device cpu --seconds 60     # does it run at all; small networks

Times are medians of device events; what is compared is timed in turns. Training is that of
``benchmarks.tickets``. Prints tables, and writes JSON after each part, and after
each method of each training, so that a run that breaks off loses nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ticket_tables, tickets
from benchmarks.__main__ import sample_of, table
from benchmarks.shrink import (
    HEADS,
    ROWS,
    megabytes,
    resnet18,
    vgg11,
    zero_channels,
    zero_lowest,
)
from torch_worm_optim import ParameterSelector, WormOptimizer, shrink_

PARTS = ["tests", "samples", "steps", "shrunk", "transformers", "training"]
WINDOW = 5


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
        "ours": lambda: torch._foreach_mul_(gradients, multipliers),
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


class Bert(nn.Module):
    """BERT's base shape with so many layers, which returns logits of two classes."""

    def __init__(self, n_layers: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        self.net = BertForSequenceClassification(BertConfig(num_hidden_layers=n_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.net(input_ids=tokens).logits
        return logits


def steps(device: torch.device, repeats: int, quick: bool) -> list[dict[str, object]]:
    """Whole training steps in bfloat16, with a search that truncates not yet, or does."""
    import timm

    batch = 2 if quick else 32
    cases: list[tuple[str, Callable[[], nn.Module], Tensor, int]] = [
        (
            "ResNet-18, batch 128",
            lambda: timm.create_model("resnet18", num_classes=10, zero_init_last=False),
            torch.randn(4 if quick else 128, 3, 32 if quick else 224, 32 if quick else 224),
            10,
        ),
        (
            f"BERT-base, batch {batch}",
            partial(Bert, 1 if quick else 12),
            torch.randint(1000, (batch, 128)),
            2,
        ),
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


@dataclass(frozen=True)
class Network:
    """What is timed dense, pruned and shrunk."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Tensor
    zero: Callable[..., None]  # of a network and the share that goes
    kinds: dict[str, dict[str, Any]]  # how it is shrunk, by name


def convolutional(quick: bool) -> list[Network]:
    """Networks with BatchNorm."""
    import timm

    kinds: dict[str, dict[str, Any]] = {
        "shrunk": {},
        "shrunk to eights": {"multiple_of": 8},
        "shrunk to eights, scatter": {"multiple_of": 8, "scatter": True},
        "shrunk to 64s": {"multiple_of": 64},
    }
    cases: list[tuple[str, Callable[[], nn.Module], int, int]] = [
        ("ResNet-18, 32 pixels, batch 128", resnet18, 128, 32),
        ("ResNet-18, 32 pixels, batch 1024", resnet18, 1024, 32),
        ("VGG-11-BN, 32 pixels, batch 128", vgg11, 128, 32),
        ("VGG-11-BN, 32 pixels, batch 1024", vgg11, 1024, 32),
        ("ResNet-50, 224 pixels, batch 128", partial(timm.create_model, "resnet50"), 128, 224),
    ]
    return [
        Network(
            name,
            make,
            torch.randn(4 if quick else batch, 3, side, side).contiguous(
                memory_format=torch.channels_last
            ),
            zero_channels,
            kinds,
        )
        for name, make, batch, side in cases[: 1 if quick else None]
    ]


def transformers(quick: bool) -> list[Network]:
    """BERT-base and ViT-B/16, of which whole heads and feed-forward rows go."""
    import timm

    kinds: dict[str, dict[str, Any]] = {"shrunk": {}, "shrunk to eights": {"multiple_of": 8}}
    zero = partial(zero_lowest, selector=ROWS | HEADS)
    tokens, images = (1, 2) if quick else (256, 256)
    vit = partial(timm.create_model, "vit_base_patch16_224", num_classes=10)
    return [
        Network(
            f"BERT-base, 128 tokens, batch {tokens}",
            partial(Bert, 1 if quick else 12),
            torch.randint(1000, (tokens, 128)),
            zero,
            kinds,
        ),
        Network(
            f"ViT-B/16, 224 pixels, batch {images}",
            partial(vit, depth=1) if quick else vit,
            torch.randn(images, 3, 224, 224),
            zero,
            kinds,
        ),
    ]


def shrunk(
    networks: list[Network], device: torch.device, repeats: int, quick: bool
) -> list[dict[str, object]]:
    """Training steps of networks that are dense, pruned, and shrunk."""
    rows: list[dict[str, object]] = []
    for network in networks:
        inputs = network.inputs.to(device)
        labels = torch.randint(2, (len(inputs),), device=device)
        for share in (0.5,) if quick else (0.3, 0.5, 0.7):
            torch.manual_seed(0)
            models = {"dense": network.make()}
            models["pruned"] = copy.deepcopy(models["dense"])
            network.zero(models["pruned"], share=share)
            for kind, options in network.kinds.items():
                models[kind] = copy.deepcopy(models["pruned"]).to(device)
                shrink_(models[kind], inputs[:1], **options)
            works: dict[str, Callable[[], object]] = {}
            for kind, model in models.items():
                model.to(device, memory_format=torch.channels_last)
                sgd = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
                works[kind] = partial(_step, model, sgd, inputs, labels)
            times = medians(works, repeats, device)
            rows += [
                {
                    "work": f"training step, {network.name}, p = {share:g}, {kind}",
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
    folders = ["tests/optimizer", "tests/ticket", "tests/selectors/test_feed_forward.py"]
    rows: list[dict[str, object]] = []
    for what in (["-m", "cuda", "tests"], folders):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
        # Where pytest-benchmark is installed it warns of xdist, and warnings are errors here.
        command += ["--device", device.type, "-n", "8", "-p", "no:benchmark"]
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


def training(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """The paper's setting, case after case for as long as there is time; a file for each."""
    out = args.out.with_suffix("")  # a folder of its own, beside the JSON
    options = ["--device", str(device), "--seconds", str(args.seconds), "--out", str(out)]
    if device.type == "cuda":
        options += ["--multiple-of", "8"]
    if args.data_dir:
        options += ["--data-dir", str(args.data_dir)]
    if device.type == "cpu":
        options += ["--quick", "--model", "resnet18", "--seeds", "0"]
    tickets.train(tickets.parse(options))
    print(ticket_tables.tables(ticket_tables.read(out)))
    return [{"work": str(path)} for path in sorted(out.glob("*.json"))]


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cuda"))
    add("--parts", nargs="*", choices=PARTS, help="all by default; on a CPU all but the tests")
    add("--layers", type=int, default=32, help="query and key matrices to sample, in pairs")
    add("--width", type=int, default=4096, help="of each of them")
    add("--repeats", type=int, default=20, help="of what is timed")
    add("--seconds", type=float, default=240, help="that training may take")
    add("--data-dir", type=Path, help="CIFAR-10: a .npz of xtr, ytr, xte, yte, or its folder")
    add("--out", type=Path, default=Path("runs/benchmarks_device.json"))
    args = parser.parse_args()
    device = args.device
    quick = device.type == "cpu"
    if quick:
        args.layers, args.width, args.repeats = 1, 256, 1
    torch.manual_seed(0)
    parts: dict[str, Callable[[], list[dict[str, object]]]] = {
        "tests": lambda: tests(device),
        "samples": lambda: search(device, args.layers, args.width, args.repeats),
        "steps": lambda: steps(device, args.repeats, quick),
        "shrunk": lambda: shrunk(convolutional(quick), device, args.repeats, quick),
        "transformers": lambda: shrunk(transformers(quick), device, args.repeats, quick),
        "training": lambda: training(args, device),
    }
    name = tickets.device_name(device)
    results: dict[str, object] = {"torch": torch.__version__, "device": name}
    results["arguments"] = sys.argv[1:]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts or (PARTS[1:] if quick else PARTS):
        start = time.perf_counter()
        results[part] = rows = parts[part]()
        args.out.write_text(json.dumps(results, indent=1))
        print(f"{table(rows)}\n-- {part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
