"""The optimizer under torch.compile: what is compiled, how often, and with which results."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import training
from torch import nn
from training import BASES, same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*normalises gradients"),
    # torch's compiler looks at the gradient of a loss, plain optimizers or not.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

# The first mask starts truncation, and the third, with which the window is full, ends the search.
SEARCH = {"sample_every": 3, "window": 3, "stopping_point": 1.0, "trigger": "always"}
N_STEPS = 18
PRUNED_AFTER = 12


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """What other tests compiled neither counts nor helps."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches():
    """The same images and labels on every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        images = torch.randn(16, 1, 6, 6, generator=generator).to(training.DEVICE)
        yield images, (images.mean((1, 2, 3)) * 8).round().clamp(-1, 1).long() + 1


def train(compiled, base="SGD momentum", scheduled=False, **options):
    """A run through all phases with this part of it compiled; weights and history then."""
    model = small_cnn()
    opt = WormOptimizer(BASES[base](model.parameters()), model, **{**SEARCH, **options})
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, total_iters=20) if scheduled else None
    opt_step = torch.compile(opt.step, backend="eager") if compiled == "opt.step" else opt.step
    phases = []

    def training_step(images, labels):
        opt.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        opt_step()

    def step_with_closure(images, labels):
        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        opt_step(closure)

    take = step_with_closure if compiled == "closure" else training_step
    if compiled in ("training step", "closure"):
        take = torch.compile(take, backend="eager")
    for step, (images, labels) in enumerate(batches()):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            take(images, labels)
        if scheduler is not None:
            scheduler.step()
        phases.append(opt.phase)
        if step == PRUNED_AFTER:
            opt.prune()
    assert list(dict.fromkeys(phases)) == list(Phase)
    return weights_of(model), opt.history


@pytest.mark.parametrize(
    ("truncate", "scheduled"), [("gradient", False), ("gradient", True), ("update", False)]
)
@pytest.mark.parametrize("compiled", ["opt.step", "training step", "closure"])
def test_compiled_steps_are_compiled_once_and_keep_their_bits(compiled, truncate, scheduled):
    """From the third step on nothing is compiled again, whatever mask or phase, or rate, comes."""
    expected = train("nothing", truncate=truncate, scheduled=scheduled)
    weights, history = train(compiled, truncate=truncate, scheduled=scheduled)

    assert same(expected[0], weights)
    assert expected[1] == history


# torch 2.13 meets its own deprecated function while it traces an optimizer.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("base", ["SGD momentum", "Adam"])
def test_the_step_of_the_base_can_be_compiled_by_itself(base):
    """Its kernels are, once; the search around it neither stands in the way nor is traced."""
    runs = []
    for wrapped in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = small_cnn()
        optimizer = BASES[base](model.parameters())
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        if wrapped:
            optimizer = WormOptimizer(optimizer, model, truncation=1, **SEARCH)
        for step, (images, labels) in enumerate(batches()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                optimizer.step()
        runs.append((weights_of(model), torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    (weights, n_graphs), (plain_weights, n_plain_graphs) = runs
    assert n_graphs == n_plain_graphs > 0
    assert same(plain_weights, weights)


def test_a_compiled_step_may_ask_and_prune():
    """A training step that reads the phase, samples and prunes does in compiled form the same."""
    runs = []
    for compiled in (True, False):
        model = small_cnn()
        opt = WormOptimizer(
            BASES["SGD momentum"](model.parameters()), model, **{**SEARCH, "sample_every": None}
        )

        def training_step(images, labels, draw, model=model, opt=opt):
            opt.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            opt.step()
            if draw:
                opt.sample()
            if opt.converged:
                opt.prune()

        take = torch.compile(training_step, backend="eager") if compiled else training_step
        for step, (images, labels) in enumerate(batches()):
            take(images, labels, step % 3 == 2)
        assert opt.phase is Phase.PRUNED
        runs.append((weights_of(model), opt.history))

    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
