"""Time training and inference of networks that are dense, pruned, and shrunk.

    python -m benchmarks.shrink                    # a quarter of an hour on one core
    python -m benchmarks.shrink --only transformers
    python -m benchmarks.shrink --quick            # does it run at all

Convolutional: ResNet-18 and VGG-11 with BatchNorm for images of 32 x 32, SGD with momentum. A share
of all BatchNorm channels is zero, chosen by random scales under one threshold; shrunk without and
with scatter. Transformers: two layers of BERT's base shape, ViT-Ti, two layers of Llama's shape
with grouped heads, AdamW. A share of all heads and of all feed-forward rows is zero, chosen by
random weights; shrunk with heads alone zero, with rows alone, and with both. Times are taken in
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
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.__main__ import in_turns, median_ms, peak_of, ratio, table
from torch_worm_optim import FeedForwardSelector, QueryKeySelector, Selector, WormOptimizer
from torch_worm_optim.shrink import ShrinkReport, shrink_
from torch_worm_optim.ticket import apply_ticket_

HEADS = QueryKeySelector(value=True, granularity="head")
ROWS = FeedForwardSelector()
# What was done to a network: the network, and the report if it was shrunk.
Networks = dict[str, tuple[nn.Module, ShrinkReport | None]]


def resnet18(width: float = 1) -> nn.Module:
    """ResNet-18 whose stem leaves the resolution of small images alone."""
    channels = tuple(int(n * width) for n in (64, 128, 256, 512))
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False, channels=channels)
    # timm's stem has 64 channels whatever the width.
    n, block = channels[0], model.layer1[0]
    model.conv1, model.bn1 = nn.Conv2d(3, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
    block.conv1, block.downsample = nn.Conv2d(n, n, 3, padding=1, bias=False), None
    model.maxpool = nn.Identity()
    return model


def vgg11(width: float = 1) -> nn.Module:
    """VGG-11 with BatchNorm and one linear layer, as it is used for CIFAR-10."""
    layers: list[nn.Module] = []
    before = 3
    for n in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if n == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        after = int(n * width)
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


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


def bert() -> nn.Module:
    """Two layers of BERT's base shape; its embeddings are not trained."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = BertForSequenceClassification(config)
    model.bert.embeddings.requires_grad_(False)
    return model


def llama() -> nn.Module:
    """Two layers of Llama's shape, with four query heads for each of four key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def zero_lowest(model: nn.Module, selector: Selector, share: float) -> None:
    """Set a share of the units of each selector to zero; biases are so in a new network."""
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        selector,
        prune_ratio=share,
        scope="selector",
        sample_every=None,
    )
    opt.sample()
    apply_ticket_(model, opt.candidate_mask or {})


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> None:
    """Forward, backward and a step."""
    optimizer.zero_grad()
    loss(model(**batch)).backward()
    optimizer.step()


def loss(output: Any) -> Tensor:
    """Something to minimise, which costs next to nothing."""
    return getattr(output, "logits", output).square().mean()


def megabytes(model: nn.Module) -> float:
    """The size of a checkpoint."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def convolutional(make: Callable[[], nn.Module], share: float, batch: dict[str, Any]) -> Networks:
    """A network with BatchNorm, by what was done to it."""
    dense = make()
    pruned = copy.deepcopy(dense)
    zero_channels(pruned, share)
    networks: Networks = {"dense": (dense, None), "pruned": (pruned, None)}
    for kind, scatter in (("shrunk", False), ("shrunk, scatter", True)):
        model = copy.deepcopy(pruned)
        networks[kind] = (model, shrink_(model, (), batch, scatter=scatter))
    return networks


def transformer(make: Callable[[], nn.Module], share: float, batch: dict[str, Any]) -> Networks:
    """A transformer, by what was done to it."""
    dense = make()
    networks: Networks = {"dense": (dense, None)}
    for kind, selector in (("both", ROWS | HEADS), ("heads", HEADS), ("rows", ROWS)):
        model = copy.deepcopy(dense)
        zero_lowest(model, selector, share)
        if kind == "both":
            networks["pruned"] = (copy.deepcopy(model), None)
        networks[f"shrunk, {kind}"] = (model, shrink_(model, (), batch))
    return networks


def rows_of(
    name: str,
    networks: Networks,
    batch: dict[str, Any],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    repeats: int,
) -> list[dict[str, object]]:
    """One network at one share."""
    steps, passes = {}, {}
    for kind, (model, _) in networks.items():
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[kind] = partial(training_step, model, optimizer(trained), batch)
        passes[kind] = partial(model, **batch)
    training = in_turns(steps, repeats)
    peaks = {kind: peak_of(step) for kind, step in steps.items()}
    for model, _ in networks.values():
        model.eval()
    with torch.no_grad():
        inference = in_turns(passes, repeats)
    return [
        {
            "work": f"{name}, {kind}",
            "step, ms": median_ms(training[kind]),
            "times faster": ratio(training["dense"], training[kind]),
            "inference, times faster": ratio(inference["dense"], inference[kind]),
            "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
            "MMAC": report.macs[1] / 1e6 if report else None,
            "peak of a step, MB": peaks[kind],
            "checkpoint, MB": megabytes(model),
        }
        for kind, (model, report) in networks.items()
    ]


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="images of 32 x 32")
    parser.add_argument("--sequences", type=int, default=2, help="sequences, or large images")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--only", choices=["convolutional", "transformers"])
    parser.add_argument("--quick", action="store_true", help="one share, a small batch")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks_shrink.json"))
    args = parser.parse_args()
    if args.quick:
        args.batch, args.sequences, args.tokens, args.repeats, args.shares = 4, 1, 16, 1, [0.5]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=1e-6, momentum=0.9)
    adamw = partial(torch.optim.AdamW, lr=1e-6)
    small = torch.randn(args.batch, 3, 32, 32)
    image = {"x": torch.randn(args.sequences, 3, 224, 224)}
    text = {"input_ids": torch.randint(1000, (args.sequences, args.tokens))}
    vit = partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10)
    rows: list[dict[str, object]] = []
    for name, make, build, batch, optimizer in (
        ("ResNet-18", resnet18, convolutional, {"x": small}, sgd),
        ("VGG-11-BN", vgg11, convolutional, {"input": small}, sgd),
        ("BERT, 2 layers", bert, transformer, text, adamw),
        ("ViT-Ti", vit, transformer, image, adamw),
        ("Llama, 2 layers", llama, transformer, text, adamw),
    ):
        for share in args.shares:
            if args.only in (None, "convolutional" if build is convolutional else "transformers"):
                networks = build(make, share, batch)
                rows += rows_of(f"{name}, p = {share:g}", networks, batch, optimizer, args.repeats)
    print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
