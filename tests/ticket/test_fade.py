"""Removed entries fade while they are truncated: against the formula, spelled out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from reference import reference_mask, reference_search
from training import (
    BASES,
    SCALES,
    SHIFTS,
    loss_of,
    same,
    small_cnn,
    through_a_file,
    train,
    weights_of,
)

from torch_worm_optim import Phase, WormOptimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:The search has truncated for"
)

SEARCH = {"window": 4, "stopping_point": 0.06, "margin": 0.2, "prune_ratio": 0.4}
CADENCES = {
    "every third step": lambda step: step % 3 == 0,
    "unevenly": lambda step: step in (1, 2, 5, 9, 10, 17, 25, 26, 27, 33, 40, 41),
}


def fading(base="SGD momentum", model=None, **options):
    """A small network in double precision and its wrapped optimizer, which fades."""
    model = small_cnn(torch.double) if model is None else model
    options = {"sample_every": CADENCES["unevenly"], "trigger": "always", **SEARCH, **options}
    return model, WormOptimizer(BASES[base](model.parameters()), model, **options)


@torch.no_grad()
def trained_by_hand(
    base, n_steps, is_due, *, fade, truncate, truncation, trigger, prune_ratio, **s
):
    """Weights, masks, distances and phases of the formula, w <- f^(1/n) w, one entry at a time."""
    model = small_cnn(torch.double)
    optimizer = BASES[base](model.parameters())
    parameters = dict(model.named_parameters())
    masks, steps, results = [], [0], []
    for step in range(1, n_steps + 1):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(model, step - 1).backward()
        removed = []
        if results and results[-1][1] == "truncating":
            for names in (SCALES, SHIFTS):
                of_entries = [(name, i) for name in names for i in range(len(parameters[name]))]
                pairs = zip(of_entries, masks[-1], strict=True)
                removed += [(parameters[name], i) for (name, i), kept in pairs if not kept]
        before = [parameter[i].clone() for parameter, i in removed]
        for parameter, i in removed if truncate == "gradient" else ():
            parameter.grad[i] *= truncation
        optimizer.step()
        for (parameter, i), old in zip(removed, before, strict=True):
            if truncate == "update":
                parameter[i] = old.lerp(parameter[i], truncation)
            parameter[i] *= fade ** (1 / (steps[-1] - steps[-2]))
        if is_due(step) and (not results or results[-1][1] != "converged"):
            scores = [parameters[name].abs().tolist() for name in SCALES]
            masks.append(reference_mask(scores, prune_ratio, "layer", 1))
            steps.append(step)
            results = reference_search(masks, trigger=trigger, **s)
    return weights_of(model), masks, results


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("trigger", ["distance", "always"])
@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("fade", [1, 0.1, 0.9])
def test_a_search_that_fades_is_the_formula(fade, cadence, trigger, truncate):
    """Bit for bit in weights, masks, distances and phases; `fade=1` is the paper's algorithm."""
    options = {"fade": fade, "trigger": trigger, "truncate": truncate, "truncation": 0.01}
    is_due = CADENCES[cadence]
    model, opt = fading(sample_every=is_due, **options)
    train(model, opt, range(42))
    weights, masks, results = trained_by_hand("SGD momentum", 42, is_due, **{**SEARCH, **options})

    assert results == [(sample.distances, sample.phase.value) for sample in opt.history]
    assert "truncating" in {phase for _, phase in results}
    newest = torch.cat([opt.candidate_mask[name] for name in SCALES])
    assert newest.tolist() == masks[-1]
    assert same(weights, weights_of(model))


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_optimizer_fades(base, truncate):
    """What truncates and fades under any of them is the formula around it."""
    options = {"fade": 0.1, "trigger": "always", "truncate": truncate, "truncation": 0.01}
    is_due = CADENCES["every third step"]
    model, opt = fading(base, sample_every=3, **options)
    train(model, opt, range(20))
    weights, _, results = trained_by_hand(base, 20, is_due, **{**SEARCH, **options})

    assert [sample.phase.value for sample in opt.history] == [phase for _, phase in results]
    torch.testing.assert_close(weights, weights_of(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", BASES)
def test_a_truncation_of_one_does_not_fade(base):
    """EB Train's search leaves weights, state and masks as they are, whatever `fade` is."""
    model, opt = fading(base, truncation=1, fade=0.01)
    other, other_opt = fading(base, truncation=1, fade=1)
    plain = small_cnn(torch.double)
    optimizer = BASES[base](plain.parameters())
    for each, its in ((model, opt), (other, other_opt), (plain, optimizer)):
        train(each, its, range(30))

    assert Phase.TRUNCATING in {sample.phase for sample in opt.history}
    assert opt.history == other_opt.history
    assert same(weights_of(plain), weights_of(model))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert same(tensors(optimizer.state[a]), tensors(opt.state[b]))


def tensors(state):
    """The numbers of one parameter's state."""
    return [torch.as_tensor(state[key]) for key in sorted(state) if state[key] is not None]


@pytest.mark.parametrize("base", BASES)
def test_kept_entries_and_the_optimizers_state_are_not_faded(base):
    """A step is the base optimizer's on truncated gradients, but for the weights that go."""
    model, opt = fading(base, truncate="gradient", truncation=0.0, fade=0.3, sample_every=5)
    train(model, opt, range(7))
    mask = opt.candidate_mask
    twin, plain = copy.deepcopy((model, opt.base_optim))

    for each, optimizer in ((model, opt), (twin, plain)):
        optimizer.zero_grad()
        loss_of(each, 7).backward()
        for name in mask if optimizer is plain else ():
            each.get_parameter(name).grad[~mask[name]] = 0
        optimizer.step()

    share = 0.3 ** (1 / 5)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        kept = mask.get(name, torch.ones_like(a, dtype=torch.bool))
        assert torch.equal(a[kept], b[kept])
        assert torch.equal(a[~kept], b[~kept] * share)
        assert same(tensors(opt.state[a]), tensors(plain.state[b]))


def closure_of(model, opt, step):
    """A closure that evaluates the batch of a step."""

    def closure():
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_closure_fades_as_a_backward_does(truncate):
    """Once a step, bit for bit."""
    model, opt = fading(truncate=truncate)
    other, other_opt = fading(truncate=truncate)
    train(model, opt, range(20))
    for step in range(20):
        other_opt.step(closure_of(other, other_opt, step))

    assert opt.history == other_opt.history
    assert same(weights_of(model), weights_of(other))


def test_an_optimizer_that_evaluates_often_fades_once_a_step():
    """LBFGS calls its closure many times."""
    model = small_cnn(torch.double)
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    options = {"sample_every": 2, "trigger": "always", "stopping_point": 0.0, "truncation": 0.0}
    opt = WormOptimizer(lbfgs, model, truncate="update", fade=0.25, **options)
    for step in range(6):
        before, mask = copy.deepcopy(model), opt.candidate_mask or {}
        opt.step(closure_of(model, opt, step))
        for name, kept in mask.items():
            old, new = before.get_parameter(name), model.get_parameter(name)
            assert torch.equal(new[~kept], old[~kept] * 0.5)
            assert (new[kept] != old[kept]).all()
    assert len(opt.history) == 3


def test_a_step_that_a_scaler_skips_fades_nothing():
    """Nor does it count among the steps between masks."""
    model, opt = fading(model=small_cnn(), sample_every=2, stopping_point=0.0)
    other, other_opt = fading(model=small_cnn(), sample_every=2, stopping_point=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    for step in range(9):
        if step % 3 == 2:  # a step in between that overflows
            before = weights_of(model)[:2]
            opt.zero_grad()
            scaler.scale(model(torch.ones(2, 1, 6, 6)).sum() * torch.inf).backward()
            scaler.step(opt)
            scaler.update(2.0)
            assert same(before, weights_of(model)[:2])
            for bn in (1, 4):  # the forward pass alone has moved the statistics
                model[bn].load_state_dict(other[bn].state_dict())
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(opt)
        scaler.update(2.0)
        train(other, other_opt, range(step, step + 1))

    assert [sample.step for sample in opt.history] == [2, 4, 6, 8]
    assert opt.phase is Phase.TRUNCATING
    assert opt.history == other_opt.history
    assert same(weights_of(model), weights_of(other))


def by_hand_twice(model, opt, steps):
    """Train, and draw two masks at once after some steps; all weights grow in between."""
    for step in steps:
        train(model, opt, range(step, step + 1))
        if step in (0, 3, 4, 9):
            opt.sample()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 2**-6)
            opt.sample()


RUNS = {
    "every third step": (3, train),
    "unevenly": (CADENCES["unevenly"], train),
    "by hand": (None, by_hand_twice),
}


@pytest.mark.filterwarnings("ignore:.* have not moved since")
@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("how", RUNS)
def test_a_search_that_fades_resumes_to_the_bit(how, stop):
    """Stopped at a mask or between two, also where two were drawn at one step."""
    every, run = RUNS[how]
    options = {"sample_every": every, "stopping_point": 0.0}
    model, opt = fading(**options)
    run(model, opt, range(stop))
    resumed, its = fading(**options)
    resumed.load_state_dict(through_a_file(model.state_dict()))
    its.load_state_dict(through_a_file(opt.state_dict()))
    copied, copied_opt = copy.deepcopy((model, opt))
    for each, optimizer in ((model, opt), (resumed, its), (copied, copied_opt)):
        run(each, optimizer, range(stop, 14))

    for each, optimizer in ((resumed, its), (copied, copied_opt)):
        assert optimizer.history == opt.history
        assert same(weights_of(model), weights_of(each))
    assert opt.phase is Phase.TRUNCATING


@pytest.mark.parametrize(("n_steps", "share"), [(0, 1), (1, 0.1), (4, 0.1**0.25)])
def test_masks_at_one_step_are_one_interval(n_steps, share):
    """So that nothing is divided by zero. Before the first step nothing says how fast to fade."""
    model, opt = fading("SGD", truncation=0.0, truncate="update", sample_every=None)
    train(model, opt, range(n_steps))
    with torch.no_grad():
        for name in SCALES:
            model.get_parameter(name).uniform_(0.5, 1.5)
    for _ in range(3):
        opt.sample()
        with torch.no_grad():
            model[1].weight.mul_(1.5)
    before, mask = copy.deepcopy(model), opt.candidate_mask
    train(model, opt, range(n_steps, n_steps + 1))

    assert opt.phase is Phase.TRUNCATING
    for name, kept in mask.items():
        old, new = before.get_parameter(name), model.get_parameter(name)
        assert torch.equal(new[~kept], old[~kept] * share)
        assert not kept.all()


def test_what_fades_is_smaller_at_each_mask_by_the_fade():
    """Whatever the steps between them: that is what the number means."""
    model, opt = fading("SGD", truncation=0.0, truncate="update", fade=0.2, stopping_point=0.0)
    before, removed = None, None
    for step in range(28):
        n_masks = len(opt.history)
        train(model, opt, range(step, step + 1))
        if len(opt.history) == n_masks or n_masks == 0:
            continue
        *_, older, newest = [0, *(sample.step for sample in opt.history[:-1])]
        if removed is not None:
            now = torch.cat([model.get_parameter(name).detach() for name in SCALES])
            n = opt.history[-1].step - newest
            left = 0.2 ** (n / (newest - older))
            torch.testing.assert_close(now[removed], before[removed] * left)
        before = torch.cat([model.get_parameter(name).detach() for name in SCALES])
        removed = ~torch.cat([opt.candidate_mask[name] for name in SCALES])
    assert removed is not None


@pytest.mark.parametrize(
    ("fade", "error"),
    [
        *((value, ValueError) for value in (0, -1, 1.5, math.nan, math.inf)),
        *((value, TypeError) for value in (True, "a", None)),
    ],
)
def test_a_fade_is_a_share_above_zero(fade, error):
    """Anything else is refused, with the rule and the value."""
    with pytest.raises(error, match=r"`fade` must be .*\(0, 1\], got") as caught:
        fading(fade=fade)
    assert repr(fade) in str(caught.value)
