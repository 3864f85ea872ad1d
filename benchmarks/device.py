"""Tests and times on a CUDA device: samples, truncation, and steps dense, pruned and shrunk.

    python -m benchmarks.device                      # some minutes and 30 GB of device memory
    python -m benchmarks.device --layers 4           # an eighth of the entries
    python -m benchmarks.device --device cpu --layers 1 --width 256 --quick   # does it run at all

Times are medians of device events, rivals in turns with ours. Prints tables, and writes JSON after
each part, so that a run that breaks off loses nothing.
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
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.__main__ import sample_of, table
from benchmarks.shrink import megabytes, resnet18, vgg11, zero_channels
from torch_worm_optim import ParameterSelector, WormOptimizer, shrink_
from torch_worm_optim.truncation import scale_gradients_

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


def training(device: torch.device, repeats: int, quick: bool) -> list[dict[str, object]]:
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
            for kind, scatter in (("shrunk", False), ("shrunk, scatter", True)):
                models[kind] = copy.deepcopy(models["pruned"]).to(device)
                shrink_(models[kind], images[:1], scatter=scatter)
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


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", default=["tests", "samples", "steps", "shrunk"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_device.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    parts: dict[str, Callable[[], list[dict[str, object]]]] = {
        "tests": lambda: tests(device),
        "samples": lambda: search(device, args.layers, args.width, args.repeats),
        "steps": lambda: training(device, args.repeats, args.quick),
        "shrunk": lambda: shrunk(device, args.repeats, args.quick),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results: dict[str, object] = {"torch": torch.__version__, "device": name}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        start = time.perf_counter()
        rows = parts[part]()
        print(f"{table(rows)}\n-- {part}: {time.perf_counter() - start:.0f} s", flush=True)
        results[part] = rows
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
