"""Train with every optimizer of torch and timm, plain and wrapped, and write the page on that.

    PYTHONPATH=tests python tests/audits/every_optimizer.py > docs/optimizers.md

Names are not written down here: what torch.optim and ``timm.optim.list_optimizers()`` hold is what
is tried, so that a new optimizer is tried the day it is released.
"""

from __future__ import annotations

import inspect
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from training import PAPER, loss_of, same, through_a_file, weights_of

from torch_worm_optim import ParameterSelector, Phase, Selector, WormOptimizer
from torch_worm_optim.ticket import is_normalising

# With the third mask the window is full, and any two masks are closer than the stopping point: the
# phases are the same for every optimizer, whatever it does to the weights.
SEARCH: dict[str, Any] = {
    "sample_every": 2,
    "window": 3,
    "stopping_point": 1.0,
    "trigger": "always",
    "truncation": 0.0,
    **PAPER,
}
PHASES = [Phase.SEARCHING] * 2 + [Phase.TRUNCATING] * 4 + [Phase.CONVERGED]
PHASES += [Phase.PRUNED] * 3
STOPS = (1, 3, 6, 8)  # one in each phase

# The learning rate of all; small enough for the greediest of them, large enough to see it move.
RATE = 0.01


class UnavailableError(Exception):
    """An optimizer that cannot be built here, with the reason in words."""


class Verdict(NamedTuple):
    """What a wrapped optimizer did.

    Attributes:
        plain: With a truncation of 1, weights and state are those of the plain optimizer, bit for
            bit, in both ways to truncate.
        gradient: With ``truncate="gradient"`` and a truncation of 0 all phases are passed; while
            truncating, gradients of removed entries are 0; when pruned, the entries are 0.
        update: With ``truncate="update"`` and a truncation of 0 all phases are passed; while
            truncating, removed entries keep their bits; when pruned, they are 0.
        fade: The same with a fade of 1/4 from one mask to the next, two steps later: in each step
            removed entries are halved. It resumes to the bit, too.
        closure: Steps with a closure do bit for bit what steps without one do.
        resumes: Stopped in each phase and resumed from a file, a run keeps its bits.
    """

    plain: bool
    gradient: bool
    update: bool
    fade: bool
    closure: bool
    resumes: bool


# ---- which there are, and how to build them


def torch_names() -> list[str]:
    """All optimizer classes that torch.optim exports, and their ways to run that can be chosen."""
    kinds = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }
    names = []
    for name, kind in sorted(kinds.items()):
        names.append(f"torch.{name}")
        options = inspect.signature(kind).parameters
        names += [f"torch.{name} {option}" for option in ("foreach", "fused") if option in options]
    return names


def timm_names() -> list[str]:
    """All optimizers that timm knows by name; none without timm."""
    try:
        from timm.optim import list_optimizers
    except ImportError:
        return []
    return [f"timm.{name}" for name in list_optimizers()]


class _Bins(nn.Module):
    """Pixels to whole numbers below 20, for an embedding to look up."""

    def forward(self, images: Tensor) -> Tensor:
        """One row of numbers for each image."""
        return (images.flatten(1) * 4 + 10).long().clamp(0, 19)


def model_for(name: str) -> nn.Module:
    """A network that the optimizer of that name can train, the same on every call."""
    torch.manual_seed(0)
    if name.startswith("torch.Muon"):  # takes matrices only
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)
        )
    if name.startswith("torch.SparseAdam"):  # takes sparse gradients only
        return nn.Sequential(_Bins(), nn.EmbeddingBag(20, 3, sparse=True))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=3, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),  # lets gradients through to what is pruned, and must be held
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    # Optimizers that step by the sign would leave equal scales equal, and the mask to ties.
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return model


def selector_for(name: str) -> Selector | None:
    """What to rank in that network."""
    if name.startswith(("torch.Muon", "torch.SparseAdam")):
        return ParameterSelector("*.weight")
    return None


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name over all parameters of a network.

    Raises:
        UnavailableError: If it lives in a package that is not installed, or needs a CUDA device.
    """
    package, _, kind = name.partition(".")
    kind, _, option = kind.partition(" ")
    if package == "torch":
        options: dict[str, Any] = {option: True} if option else {}
        if kind == "LBFGS":
            options["max_iter"] = 3
        return getattr(torch.optim, kind)(model.parameters(), lr=RATE, **options)
    from timm.optim import create_optimizer_v2, get_optimizer_info

    if kind.startswith(("bnb", "fused")) and not torch.cuda.is_available():
        # timm says so with an assertion, which could be about anything.
        raise UnavailableError(f"needs a CUDA device: {get_optimizer_info(kind).description}")
    return create_optimizer_v2(model, kind, lr=RATE, weight_decay=0.01, momentum=0.9)


# ---- one step, and a whole run


def take_step(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    closures: bool = False,
) -> None:
    """One step of training; a function of the step, random numbers included."""
    torch.default_generator.manual_seed(step)  # torch.manual_seed() is slow without a CUDA device
    # AdaHessian differentiates the gradients once more.
    create_graph = name == "timm.adahessian"

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward(create_graph=create_graph)
        return loss

    if closures or name == "torch.LBFGS":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def start(name: str, **options: Any) -> tuple[nn.Module, WormOptimizer]:
    """A network and its wrapped optimizer."""
    model = model_for(name)
    optimizer = optimizer_for(name, model)
    return model, WormOptimizer(optimizer, model, selector_for(name), **{**SEARCH, **options})


def run(
    name: str,
    *,
    truncate: str,
    fade: float = 1,
    closures: bool = False,
    stops: tuple[int, ...] = (),
) -> tuple[list[Tensor], bool]:
    """Train through all phases; the weights then, and whether each step did what its phase says.

    At each of the `stops` everything is saved to a file, and started anew from it.
    """
    model, opt = start(name, truncate=truncate, fade=fade)
    fine = True
    for step, phase in enumerate(PHASES):
        if phase is Phase.PRUNED and opt.phase is not phase:
            opt.prune()
        if step in stops:
            saved = through_a_file([model.state_dict(), opt.state_dict()])
            model, opt = start(name, truncate=truncate, fade=fade)
            model.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
        mask = opt.candidate_mask or {}
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        fine = fine and opt.phase is phase
        take_step(name, model, opt, step, closures)
        if phase is Phase.TRUNCATING:
            fine = fine and is_truncated(model, mask, before, truncate, math.sqrt(fade))
        if phase is Phase.PRUNED:
            fine = fine and is_pruned(model, mask)
    return weights_of(model), fine


def is_truncated(
    model: nn.Module,
    mask: dict[str, Tensor],
    before: dict[str, Tensor],
    truncate: str,
    share: float,
) -> bool:
    """Whether gradients are 0 where the mask removes, or weights the share of what they were.

    And whether it is otherwise somewhere where the mask keeps.
    """
    moved = {
        key: parameter.grad.to_dense() != 0
        if truncate == "gradient" and parameter.grad is not None
        else parameter.detach() != before[key] * share
        for key, parameter in model.named_parameters()
    }
    return not any(bool(moved[key][~kept].any()) for key, kept in mask.items()) and any(
        bool(moved[key][kept].any()) for key, kept in mask.items()
    )


def is_pruned(model: nn.Module, mask: dict[str, Tensor]) -> bool:
    """Whether the entries that the mask removes are zero, and no others of those parameters."""
    return all(torch.equal(model.get_parameter(key) != 0, kept) for key, kept in mask.items())


# ---- the verdict


def equals_plain(name: str) -> bool:
    """Whether wrapped runs that truncate by 1 are the plain run, weights and state."""
    plain_model = model_for(name)
    plain = optimizer_for(name, plain_model)
    before = weights_of(plain_model)
    steps = range(PHASES.index(Phase.PRUNED))
    for step in steps:
        take_step(name, plain_model, plain, step)
    equal = not same(before, weights_of(plain_model))
    for truncate in ("gradient", "update"):
        model, opt = start(name, truncation=1, truncate=truncate)
        for step in steps:
            take_step(name, model, opt, step)
        equal = (
            equal
            and opt.phase is Phase.CONVERGED
            and same(weights_of(plain_model), weights_of(model))
            and all(
                same(flat(plain.state.get(p)), flat(opt.state.get(q)))
                for p, q in zip(plain_model.parameters(), model.parameters(), strict=True)
            )
        )
    return equal


def flat(value: Any) -> list[Tensor]:
    """All numbers and tensors in nested state, as tensors."""
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in flat(item)]
    return [] if value is None else [torch.as_tensor(value)]


def plain_resumes(name: str) -> bool:
    """Whether the plain optimizer keeps its bits when it is stopped and resumed."""
    results = []
    for stops in ((), STOPS):
        model = model_for(name)
        optimizer = optimizer_for(name, model)
        for step in range(len(PHASES)):
            if step in stops:
                saved = through_a_file([model.state_dict(), optimizer.state_dict()])
                model = model_for(name)
                optimizer = optimizer_for(name, model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            take_step(name, model, optimizer, step)
        results.append(weights_of(model))
    return same(*results)


def judge(name: str) -> Verdict:
    """Train with the optimizer of that name in every way.

    Raises:
        UnavailableError: If it cannot be built here.
    """
    by_gradient, gradient = run(name, truncate="gradient")
    by_update, update = run(name, truncate="update")
    faded, fade = run(name, truncate="update", fade=0.25)
    faded_on, _ = run(name, truncate="update", fade=0.25, stops=STOPS)
    resumed = [run(name, truncate=truncate, stops=STOPS) for truncate in ("gradient", "update")]
    with_closures, _ = run(name, truncate="gradient", closures=True)
    return Verdict(
        plain=equals_plain(name),
        gradient=gradient,
        update=update,
        fade=fade and (same(faded, faded_on) or not same(by_update, resumed[1][0])),
        closure=same(by_gradient, with_closures),
        resumes=same(by_gradient, resumed[0][0]) and same(by_update, resumed[1][0]),
    )


# ---- the page


# What the page calls each part of a verdict.
WAYS = {
    "plain": "with `truncation=1`",
    "gradient": 'with `truncate="gradient"`',
    "update": 'with `truncate="update"`',
    "fade": "with `fade`",
    "closure": "with `step(closure)`",
    "resumes": "when stopped and resumed",
}

PAGE = """\
% Written by: PYTHONPATH=tests python tests/audits/every_optimizer.py > docs/optimizers.md

# Optimizers

{all_but}

Each trained a small network through all phases, from the first mask to pruned.

`truncation=1`
: Weights and state are bit for bit those of the plain optimizer, with both values of `truncate`.

`truncate="gradient"`, `truncate="update"`
: With `truncation=0`: while truncating, the gradients of removed entries are 0, or these entries
  keep their bits; once pruned, they are zero after every step.

`fade=0.25`
: With `truncate="update"`, `truncation=0` and two steps between masks: while truncating, each step
  halves removed entries.

`step(closure)`
: It does bit for bit what a backward and `step()` do. LBFGS always needs its closure.

Stopped and resumed
: Saved in each phase, read with `torch.load(weights_only=True)` and loaded, the run keeps its bits.

Those of torch that take `foreach=True` or `fused=True` were tried with them, too.

## Which of them normalise

Optimizers that divide a gradient by its own size undo a truncated one, and with
`truncate="gradient"` the wrapper [warns](caveats.md#adam-and-its-kin). It does so for all of them
but these:

{quiet}

## What some of them ask for

`torch.LBFGS` has one parameter group and needs a closure. It is truncated at each evaluation, and
counted once a step.

`torch.Muon` takes matrices only. Give the other parameters to another optimizer, and select among
the matrices, for example with `ParameterSelector("*.weight")`. The Muon optimizers of timm take all
parameters and need no such care.

`torch.SparseAdam` takes sparse gradients only, as of `nn.Embedding(..., sparse=True)`; select those
tables. Sparse gradients are truncated as they are, without making them dense.

`timm.adahessian` needs `backward(create_graph=True)`, and differentiates the gradients as they were
before truncation. It keeps the state of its random numbers out of its checkpoint, so that a resumed
run draws others, wrapped or not.

`timm.kron` compiles parts of itself; here it ran without.

With those of timm that step by the sign of the gradient, such as Lion, scales that start equal stay
equal for long, and [tie for the mask](caveats.md#freshly-made-batchnorm-scales-are-all-1).

## Not tried

Optimizers that take several steps in one, such as SAM, and those that step during backward.
{missing}"""


def page() -> str:
    """The page that says what came of every optimizer."""
    import timm

    tried, quiet, exceptions = [], [], []
    missing: dict[str, list[str]] = {}
    for name in torch_names() + timm_names():
        try:
            verdict = judge(name)
        except UnavailableError as reason:
            missing.setdefault(str(reason).partition(":")[0], []).append(name)
            continue
        failed = [WAYS[what] for what, passed in verdict._asdict().items() if not passed]
        if failed:
            plain = "" if verdict.resumes or plain_resumes(name) else ", nor without the wrapper"
            exceptions.append(f"`{name}` (not {', '.join(failed)}{plain})")
        if " " in name:  # a way to run one that is counted already
            continue
        tried.append(name)
        if not is_normalising(optimizer_for(name, model_for(name))):
            quiet.append(name)
    n_torch = sum(name.startswith("torch.") for name in tried)
    all_but = (
        "Any `torch.optim.Optimizer` can be wrapped. "
        f"All {n_torch} that torch.optim exports and all {len(tried) - n_torch} that "
        "`timm.optim.list_optimizers()` names and a CPU can run do what is listed here, with torch "
        f"{torch.__version__.split('+')[0]} and timm {timm.__version__}"
        f"{', except ' if exceptions else ''}{', '.join(exceptions)}."
    )
    return PAGE.format(
        all_but=_filled(all_but),
        quiet=_filled(f"{_listed(quiet)}."),
        missing="".join(
            "\n" + _filled(f"{why[0].upper()}{why[1:]}: {_listed(which)}.") + "\n"
            for why, which in missing.items()
        ),
    )


def _listed(names: Sequence[str]) -> str:
    """Names in one line."""
    return ", ".join(f"`{name}`" for name in names)


def _filled(paragraph: str) -> str:
    """A paragraph in lines of the width of a page."""
    return textwrap.fill(paragraph, 100, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    import timm.optim.kron

    timm.optim.kron.has_dynamo = False  # It would compile itself for longer than it runs.
    warnings.simplefilter("ignore")  # Tests see to warnings; this page is about results.
    torch.set_num_threads(1)
    print(page(), end="")
