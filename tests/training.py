"""A small network, something to train it on, and training by hand as the paper words it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import torch
from reference import reference_mask, reference_search
from torch import Tensor, nn

from torch_worm_optim import Phase, WormOptimizer

# `pytest --device cuda` trains the small network there.
DEVICE = torch.device("cpu")

BASES: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
}
"""Base optimizers by what they are called in test names."""


def small_cnn(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions with BatchNorm and a head; 20 scales. The same weights on every call."""
    torch.manual_seed(0)
    model = nn.Sequential(
        # Adam would blow up what rounding leaves of a gradient that BatchNorm makes zero.
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model.to(dtype)
    return model if model[0].weight.is_meta else model.to(DEVICE)


SCALES = ("1.weight", "4.weight")
SHIFTS = ("1.bias", "4.bias")

PAPER = {"fade": 1, "scope": "global"}
"""The algorithm as the papers word it: nothing fades, and all entries are ranked together."""

SEARCH = {"sample_every": 3, "window": 4, "stopping_point": 0.06, "margin": 0.2, **PAPER}
"""A search that goes through all phases, and finds the small network's ticket in 60 steps."""


def wrapped(
    base: str = "SGD momentum", model: nn.Module | None = None, **options: object
) -> tuple[nn.Module, WormOptimizer]:
    """A small network and its wrapped optimizer."""
    model = small_cnn() if model is None else model
    return model, WormOptimizer(BASES[base](model.parameters()), model, **{**SEARCH, **options})


def at_phase(
    phase: Phase, base: str = "SGD momentum", **options: object
) -> tuple[nn.Module, WormOptimizer]:
    """A search that has just reached this phase."""
    model, opt = wrapped(base, **options)
    for step in range(300):
        if phase is Phase.PRUNED and opt.converged:
            opt.prune()
        if opt.phase is phase:
            return model, opt
        train(model, opt, range(step, step + 1))
    raise AssertionError(f"never reached {phase}: {opt}")


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Loss on the batch of that step; a function of the step, so that any run can be resumed."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 1, 6, 6, generator=generator).to(parameter)
    labels = (images.mean((1, 2, 3)) * 8).round().clamp(-1, 1).long() + 1
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The loop that everybody writes."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@torch.no_grad()
def sample_twice(optimizer: torch.optim.Optimizer) -> None:
    """Draw two masks; all weights grow a little in between, so that the second one counts."""
    optimizer.sample()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.mul_(1 + 2**-6)
    optimizer.sample()


def weights_of(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters and buffers."""
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    n_steps: int,
    *,
    sample_every: int,
    prune_ratio: float,
    truncation: float,
    truncate: str,
    fade: float,
    scope: str,
    **rule: object,
) -> list[tuple[tuple[float, ...], str]]:
    """Train a :func:`small_cnn` with WORM spelled out; distances and phase of every mask drawn."""
    parameters = dict(model.named_parameters())
    drawn: list[list[bool]] = []
    results: list[tuple[tuple[float, ...], str]] = []
    for step in range(n_steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        truncating = bool(results) and results[-1][1] == "truncating"
        if truncating:
            mask = torch.tensor(drawn[-1]).split([8, 12])
            targets = [
                (parameters[name], kept)
                for names in (SCALES, SHIFTS)
                for name, kept in zip(names, mask, strict=True)
            ]
        if truncating and truncate == "gradient":
            for parameter, kept in targets:
                parameter.grad[~kept] *= truncation
        if truncating and truncate == "update":
            old = [parameter.detach().clone() for parameter, _ in targets]
        optimizer.step()
        if truncating and truncate == "update":
            with torch.no_grad():
                for (parameter, kept), before in zip(targets, old, strict=True):
                    moved = before + truncation * (parameter - before)
                    parameter[~kept] = moved[~kept]
        if truncating and fade < 1:
            with torch.no_grad():
                for parameter, kept in targets:
                    parameter[~kept] *= fade ** (1 / sample_every)
        if (step + 1) % sample_every == 0 and (not results or results[-1][1] != "converged"):
            scores = [parameters[name].detach().abs().tolist() for name in SCALES]
            drawn.append(reference_mask(scores, prune_ratio, scope, 1))
            results = reference_search(drawn, **rule)
    return results


def through_a_file(value: object) -> object:
    """What comes back from disk, read in the safe way."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def record_of(state_dict: dict[str, object]) -> dict[str, object]:
    """What a search wrote into what an optimizer's ``state_dict()`` returned."""
    packed = base64.b64decode(state_dict["param_groups"][0]["worm"])
    return torch.load(io.BytesIO(packed), weights_only=True)


def with_record(state_dict: dict[str, object], record: object) -> dict[str, object]:
    """The same ``state_dict`` with another record in it."""
    file = io.BytesIO()
    torch.save(record, file)
    packed = base64.b64encode(file.getvalue()).decode()
    first, *others = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, "worm": packed}, *others]}
