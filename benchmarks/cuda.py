"""Time samples, truncation and whole training steps on a CUDA device, beside what they must read.

    python -m benchmarks.cuda                        # 1.07 G entries in bfloat16, needs some 30 GB
    python -m benchmarks.cuda --layers 4             # an eighth of that
    python -m benchmarks.cuda --device cpu --layers 1 --width 256 --quick   # does it run at all

Times are medians of device events, rivals in turns with ours. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.__main__ import sample_of, table
from torch_worm_optim import ParameterSelector, WormOptimizer
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


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_cuda.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    weights = {
        str(i): torch.randn(args.width, args.width, device=device, dtype=torch.bfloat16) * 0.02
        for i in range(2 * args.layers)
    }
    rows = samples(weights, args.repeats) + truncation(weights, args.repeats)
    if device.type == "cuda":
        rows += waits(weights)
    del weights
    rows += training(device, args.repeats, args.quick)
    print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    args.out.write_text(
        json.dumps(
            {"machine": {"torch": torch.__version__, "device": name}, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
