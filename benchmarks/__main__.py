"""Time a sample and a step against their rivals, in one run.

    python -m benchmarks                    # some minutes on two cores
    python -m benchmarks --threads 1 --out results.json

Every ratio is the median over rounds in which each work is done once, in this process, so that what
else the machine does hits both sides. Prints a table and writes JSON. Memory is the peak of the
process while one sample is drawn, over what it held before; it needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_worm_optim import ParameterSelector, WormOptimizer
from torch_worm_optim.search import Scores, Window, compute_mask

WINDOW = 5
# Query and key weights of BERT: layers, width. BatchNorm scales: channels of each layer.
BERT = {"BERT-base": (12, 768), "BERT-large": (24, 1024)}
VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
RESNET50 = [64] + [
    width
    for planes, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
    for block in range(n_blocks)
    for width in ([planes, planes, 4 * planes] + ([4 * planes] if block == 0 else []))
]


# Seconds of each work in every round.
Times = dict[str, list[float]]


def in_turns(
    works: dict[str, Callable[[], object]],
    repeats: int,
    before_each: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of each in every round; what is done before each is not counted.

    Every round has an order of its own: what comes after the work that moves most memory, or after
    the same one always, is slower for that by some percent.
    """
    shuffled = random.Random(0)
    for work in works.values():
        work()
    times: Times = {name: [] for name in works}
    for _ in range(repeats):
        for name in shuffled.sample(list(works), len(works)):
            before_each()
            start = time.perf_counter()
            works[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median_ms(times: Sequence[float]) -> float:
    """The median of times in seconds, in milliseconds."""
    return statistics.median(times) * 1e3


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of all rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def give_back() -> None:
    """Give memory that was freed back to the system.

    glibc does so in somebody's next large allocation, so that after a rival has freed hundreds of
    megabytes the next work pays for that: 20 to 31 ms where it takes 50.
    """
    ctypes.CDLL(None).malloc_trim(0)


def sample_of(weights: dict[str, Tensor]) -> Callable[[], object]:
    """One exact mask, put into a full window, and all distances, as `WormOptimizer.sample` does."""
    scores = [
        Scores(name, weight.numel(), weight.dtype, lambda weight=weight: weight)
        for name, weight in weights.items()
    ]
    window = Window(sum(weight.numel() for weight in weights.values()), WINDOW)

    def work() -> tuple[float, ...]:
        window.push(np.concatenate(compute_mask(scores, 0.5).kept))
        return window.distances()

    return work


def global_unstructured(weights: dict[str, Tensor]) -> Callable[[], object]:
    """PyTorch's own pruning, as people use it to draw a mask."""

    def work() -> None:
        modules = []
        for weight in weights.values():
            module = nn.Module()
            module.weight = nn.Parameter(weight)
            modules.append((module, "weight"))
        prune.global_unstructured(modules, prune.L1Unstructured, amount=0.5)

    return work


def kthvalue(weights: dict[str, Tensor]) -> Callable[[], object]:
    """One flat copy, its median, and a comparison: the mask only."""

    def work() -> Tensor:
        scores = torch.cat([weight.flatten() for weight in weights.values()]).abs_()
        return scores > scores.kthvalue(scores.numel() // 2).values

    return work


def sorting(weights: dict[str, Tensor]) -> Callable[[], object]:
    """The mask and four distances of the original Early-Bird search, on one flat copy."""
    held: list[Tensor] = []

    def work() -> list[float]:
        scores = torch.cat([weight.flatten() for weight in weights.values()]).abs_()
        threshold = scores.sort().values[scores.numel() // 2]
        held.append(scores.gt(threshold).float())
        del held[:-WINDOW]
        return [float((held[-1] != older).float().mean()) for older in held[:-1]]

    return work


def sorting_by_layer(weights: dict[str, Tensor]) -> Callable[[], object]:
    """The same as the original is written: copied layer by layer, compared layer by layer."""
    held: list[Tensor] = []

    def work() -> list[float]:
        n = sum(weight.numel() for weight in weights.values())
        scores, mask = torch.zeros(n), torch.zeros(n)
        start = 0
        for weight in weights.values():
            scores[start : start + weight.numel()] = weight.detach().abs().clone()
            start += weight.numel()
        threshold = scores.sort().values[n // 2]
        start = 0
        for weight in weights.values():
            kept = weight.detach().abs().clone().gt(threshold).float()
            mask[start : start + weight.numel()] = kept.view(-1)
            start += weight.numel()
        held.append(mask)
        del held[:-WINDOW]
        return [1 - float((held[-1] == older).sum()) / n for older in held[:-1]]

    return work


def peak_of(work: Callable[[], object]) -> float:
    """MiB that the process grew by at most while it worked."""
    gc.collect()
    give_back()  # what was freed before must not hide what is made now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return max(0.0, _status("VmHWM") - before)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def samples(repeats: int) -> list[dict[str, object]]:
    """One mask and all distances."""
    rows = []
    torch.manual_seed(0)
    for name, (n_layers, width) in BERT.items():
        weights = {str(i): torch.randn(width, width) * 0.02 for i in range(2 * n_layers)}
        ours = sample_of(weights)
        works = {
            "ours": ours,
            "prune.global_unstructured": global_unstructured(weights),
            "cat + kthvalue": kthvalue(weights),
            "reading once": lambda weights=weights: [w.sum() for w in weights.values()],
        }
        times = in_turns(works, repeats, give_back)
        goals = {"prune.global_unstructured": 3, "cat + kthvalue": None, "reading once": None}
        rows += [_row(f"sample, {name}", times, rival, goal) for rival, goal in goals.items()]
        n = sum(w.numel() for w in weights.values())
        rows.append(
            {
                "work": f"peak memory of a sample, {name}",
                "bytes per entry": peak_of(ours) * 2**20 / n,
                "goal": None,
            }
        )
    for name, widths in (("VGG-16", VGG16), ("ResNet-50", RESNET50)):
        weights = {str(i): torch.rand(width) for i, width in enumerate(widths)}
        works = {
            "ours": sample_of(weights),
            "sort, as written": sorting_by_layer(weights),
            "sort, one flat copy": sorting(weights),
        }
        times = in_turns(works, 20 * repeats)
        goals = {"sort, as written": None, "sort, one flat copy": None}
        rows += [
            _row(f"sample, BatchNorm of {name}", times, rival, goal)
            for rival, goal in goals.items()
        ]
    for n in (1, 4, 16, 64, 200):
        weights = {"w": torch.randn(n << 20)}
        times = in_turns({"ours": sample_of(weights)}, max(3, repeats // 2))
        spent = median_ms(times["ours"]) * 1e6 / (n << 20)
        rows.append({"work": f"sample, {n} Mi entries", "ns per entry": spent})
    return rows


def _row(work: str, times: Times, rival: str, goal: float | None) -> dict[str, object]:
    return {
        "work": work,
        "ours, ms": median_ms(times["ours"]),
        "rival": rival,
        "rival, ms": median_ms(times[rival]),
        "ratio": ratio(times[rival], times["ours"]),
        "goal": goal,
    }


def steps(repeats: int) -> list[dict[str, object]]:
    """`step()` in each phase, over the base optimizer's own."""
    rows = []
    torch.manual_seed(0)
    channels = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5  # ResNet-18's convolutions, roughly
    layers: list[nn.Module] = []
    for before, after in zip([64, *channels], channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after)]
    encoder = nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(24))
    norms = nn.Sequential(*(nn.BatchNorm1d(128) for _ in range(300)))
    for name, model, selector in (
        ("ResNet-18's BatchNorm", nn.Sequential(*layers), None),
        ("BERT-base's queries and keys", encoder, ParameterSelector("*")),
        ("300 BatchNorms", norms, None),
    ):
        works = {}
        for kind in ("base", "searching", "truncating", "pruned"):
            own = copy.deepcopy(model)
            for parameter in own.parameters():
                parameter.grad = torch.randn_like(parameter)
            sgd = torch.optim.SGD(own.parameters(), lr=1e-9, momentum=0.9)
            works[kind] = sgd.step
            if kind != "base":
                trigger = "always" if kind == "truncating" else "distance"
                options = {"sample_every": None, "stopping_point": 0, "trigger": trigger}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # freshly made scales tie
                    opt = WormOptimizer(sgd, own, selector, **options)
                    opt.sample()
                works[kind] = opt.step
                if kind == "pruned":
                    opt.prune(force=True)
        times = in_turns(works, 20 * repeats)
        for kind, goal in (("searching", 1.1), ("truncating", None), ("pruned", 2.0)):
            rows.append(
                {
                    "work": f"step() while {kind}, {name}",
                    "ours, ms": median_ms(times[kind]),
                    "rival": "base step",
                    "rival, ms": median_ms(times["base"]),
                    "times the rival": ratio(times[kind], times["base"]),
                    "goal": goal,
                }
            )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The rows as text."""
    lines = []
    for row in rows:
        cells = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key != "work" and value is not None
        ]
        lines.append(f"{row['work']:52}  " + ", ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = samples(args.repeats) + steps(args.repeats)
    print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
    }
    args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
