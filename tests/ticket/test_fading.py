"""The soft landing: from the ticket to zero on a straight line, against a line drawn by hand."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import (
    BASES,
    SCALES,
    SHIFTS,
    loss_of,
    same,
    sample_twice,
    small_cnn,
    train,
    weights_of,
)

from torch_worm_optim import Phase, WormOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises gradients")

# Truncating from step 2 on; the ticket is the third mask, of step 6, wherever it lies: masks that
# remove less than half never differ everywhere.
SEARCH = {"sample_every": 2, "window": 3, "stopping_point": 1.0, "trigger": "always"}
SEARCH |= {"prune_ratio": 0.4}


def at_ticket(make=BASES["SGD momentum"], dtype=torch.float32, **options):
    """A small network and its wrapped optimizer, which has just found its ticket."""
    model = small_cnn(dtype)
    opt = WormOptimizer(make(model.parameters()), model, **{**SEARCH, **options})
    train(model, opt, range(6))
    assert opt.phase is Phase.CONVERGED
    return model, opt


def with_momentum_and_decay(base):
    """Makes a base optimizer that moves entries of which the gradient is zero."""

    def make(parameters):
        optimizer = BASES[base](parameters)
        for group in optimizer.param_groups:
            group.update({key: 0.9 for key in ("momentum",) if key in group}, weight_decay=0.1)
        return optimizer

    return make


def removed_of(model, opt):
    """Every parameter that the ticket reaches, with what it removes of it."""
    return [
        (model.get_parameter(name), ~opt.final_mask[scale])
        for names in (SCALES, SHIFTS)
        for name, scale in zip(names, SCALES, strict=True)
    ]


def steps_left(opt):
    """How many steps of a fade are left."""
    return opt.state_dict()["param_groups"][0]["worm"]["fading_steps"]


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("base", BASES)
def test_removed_entries_go_to_zero_on_a_line(base, truncate, n):
    """Under any base, momentum and weight decay, t of n steps leave (n - t) / n of the start."""
    model, opt = at_ticket(with_momentum_and_decay(base), torch.double, truncate=truncate)
    start = [entries[removed].detach() for entries, removed in removed_of(model, opt)]
    ticket, history = opt.final_mask, opt.history
    assert sum(int(each.count_nonzero()) for each in start) == 16
    opt.prune(over=n)

    for t in range(1, n + 1):
        assert opt.phase is Phase.FADING
        before = copy.deepcopy(model)
        train(model, opt, range(6 + t, 7 + t))
        for (entries, removed), first in zip(removed_of(model, opt), start, strict=True):
            line = first * (n - t) / n
            torch.testing.assert_close(entries.detach()[removed], line, rtol=1e-12, atol=0)
        for name in (*SCALES, *SHIFTS):
            kept = ticket[name.replace("bias", "weight")]
            assert (model.get_parameter(name) != before.get_parameter(name))[kept].all()
        assert opt.converged
        assert opt.sample() == history[-1]
        assert opt.history == history
        for masks in (opt.final_mask, opt.candidate_mask):
            assert same(list(masks.values()), list(ticket.values()))
    assert opt.phase is Phase.PRUNED


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("base", BASES)
def test_fading_is_the_base_optimizers_training_with_the_line_drawn_by_hand(base, truncate):
    """With gradients zeroed and entries put on the line by hand, every weight has the same bits."""
    model, opt = at_ticket(with_momentum_and_decay(base), truncate=truncate)
    twin = small_cnn()
    twin.load_state_dict(model.state_dict())
    plain = with_momentum_and_decay(base)(twin.parameters())
    plain.load_state_dict(copy.deepcopy(opt.base_optim.state_dict()))
    by_hand = removed_of(twin, opt)

    opt.prune(over=5)
    train(model, opt, range(6, 11))
    for t in range(1, 6):
        plain.zero_grad()
        loss_of(twin, 5 + t).backward()
        line = []
        for entries, removed in by_hand:
            entries.grad[removed] = 0
            line.append(entries.detach()[removed] * ((5 - t) / (6 - t)))
        plain.step()
        with torch.no_grad():
            for (entries, removed), values in zip(by_hand, line, strict=True):
                entries[removed] = values
    # Once pruned, the optimizer remembers nothing of what is gone.
    for entries, removed in by_hand:
        for value in plain.state.get(entries, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == entries.shape:
                value[removed] = 0

    assert same(weights_of(twin), weights_of(model))
    for ours, theirs in zip(opt.state.values(), plain.state.values(), strict=True):
        # Loading moves NAdam's product of momenta to the parameter's device.
        assert all(torch.equal(value.cpu(), theirs[key].cpu()) for key, value in ours.items())


@pytest.mark.parametrize("base", BASES)
def test_pruning_over_no_steps_is_pruning_at_once(base):
    """prune(over=0) is prune(): zeros before the next step, and the same bits ever after."""
    runs = [at_ticket(BASES[base]) for _ in range(2)]
    runs[0][1].prune()
    runs[1][1].prune(over=0)

    for model, opt in runs:
        assert opt.phase is Phase.PRUNED
        for entries, removed in removed_of(model, opt):
            assert torch.equal(entries != 0, ~removed)
        train(model, opt, range(6, 12))
    assert same(weights_of(runs[0][0]), weights_of(runs[1][0]))


@settings(max_examples=25)
@given(st.integers(1, 8), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=9))
def test_further_calls_shorten_a_fade_and_never_lengthen_it(n, calls):
    """A call leaves as many steps as it says or as there were, whichever are fewer."""
    model, opt = at_ticket(BASES["AdamW"])
    opt.prune(over=n)
    left = n
    for step, over in enumerate(calls):
        if over is not None:
            opt.prune(over)
            left = min(left, over)
        assert steps_left(opt) == left
        assert opt.phase is (Phase.FADING if left else Phase.PRUNED)
        before = [entries[removed].detach() for entries, removed in removed_of(model, opt)]
        train(model, opt, range(6 + step, 7 + step))
        share = (left - 1) / left if left else 0.0
        left = max(left - 1, 0)
        for (entries, removed), old in zip(removed_of(model, opt), before, strict=True):
            assert torch.equal(entries[removed], old * share)


@pytest.mark.parametrize("base", BASES)
def test_a_fade_with_closures_is_one_without(base):
    """step(closure) fades as backward() and step() do, bit for bit."""
    plain_model, plain = at_ticket(BASES[base])
    plain.prune(over=4)
    train(plain_model, plain, range(6, 12))

    model, opt = at_ticket(BASES[base])
    opt.prune(over=4)
    for step in range(6, 12):

        def closure(step=step):
            opt.zero_grad()
            loss_of(model, step).backward()

        opt.step(closure)

    assert same(weights_of(plain_model), weights_of(model))
    assert opt.phase is Phase.PRUNED


def test_an_optimizer_that_evaluates_often_fades_one_step_a_step():
    """However often LBFGS moves entries to and fro, a step takes them one step along the line."""
    model = small_cnn(torch.double)
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    opt = WormOptimizer(base, model, window=2, stopping_point=1.0, sample_every=1)
    evaluations = []
    for step in range(6):
        if step == 2:
            start = [entries[removed].detach() for entries, removed in removed_of(model, opt)]
            opt.prune(over=4)

        def closure(step=step):
            evaluations.append(step)
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        opt.step(closure)
        if step >= 2:
            for (entries, removed), first in zip(removed_of(model, opt), start, strict=True):
                line = first * (5 - step) / 4
                torch.testing.assert_close(entries.detach()[removed], line, rtol=1e-12, atol=0)

    assert len(evaluations) > 12
    assert opt.phase is Phase.PRUNED


@pytest.mark.parametrize("over", [0, 3, 9])
def test_a_closure_may_prune(over):
    """A training step that prunes runs in a closure under Lightning, and fades or ends the fade."""
    model, opt = at_ticket()
    for step in range(6, 8):

        def closure(step=step):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.prune(5 if step == 6 else over)

        opt.step(closure)
        if step == 6:  # which began before the fade did
            assert steps_left(opt) == 5
            before = [entries[removed].detach() for entries, removed in removed_of(model, opt)]

    left = min(over, 5)
    assert steps_left(opt) == max(left - 1, 0)
    assert opt.phase is (Phase.FADING if left else Phase.PRUNED)
    for (entries, removed), old in zip(removed_of(model, opt), before, strict=True):
        assert torch.equal(entries[removed], old * ((left - 1) / left if left else 0.0))


def test_a_step_that_the_scaler_skips_is_none_of_the_fade():
    """Where gradients overflow nothing moves, removed entries included."""
    model, opt = at_ticket()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.prune(over=5)
    for step, left in ((6, 4), (7, 4), (8, 3)):
        before = weights_of(model)
        opt.zero_grad()
        scaler.scale(loss_of(model, step) * (torch.inf if step == 7 else 1)).backward()
        buffers = weights_of(model)
        scaler.step(opt)
        scaler.update()
        assert steps_left(opt) == left
        assert same(buffers, weights_of(model)) == (step == 7)
        assert not same(before, weights_of(model))


def test_a_step_that_only_initialises_state_is_none_of_the_fade():
    """torch.distributed.checkpoint steps with learning rate 0 and gradients of zero to save."""
    model, opt = at_ticket(BASES["SGD"])
    opt.prune(over=5)
    before = weights_of(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.step()

    assert same(before, weights_of(model))
    assert steps_left(opt) == 5
    model[0].weight.grad[0] = 1  # at the end of a schedule there are gradients, and it is a step
    opt.step()
    assert steps_left(opt) == 4


def test_what_is_infinite_in_removed_entries_reaches_no_weight():
    """Infinite gradients and moves of removed entries are undone whole, not scaled to NaN."""

    class Wild(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for entries, removed in removed_of(model, opt):
                    entries[removed] = torch.inf

    model, opt = at_ticket(BASES["SGD"])
    line = [entries.detach()[removed] * 0.5 for entries, removed in removed_of(model, opt)]
    opt.base_optim.__class__ = Wild
    opt.prune(over=2)
    loss_of(model, 6).backward()
    for entries, removed in removed_of(model, opt):
        entries.grad[removed] = torch.inf
    opt.step()

    assert same(line, [entries.detach()[removed] for entries, removed in removed_of(model, opt)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 2000])
def test_a_fade_in_half_precision_ends_in_zero_on_time(dtype, n):
    """Rounding may hold entries back in the beginning; none is ever larger than the one before."""
    model = torch.nn.BatchNorm1d(8, dtype=dtype)
    torch.nn.init.uniform_(model.weight, 0.5, 1.5)
    opt = WormOptimizer(torch.optim.SGD(model.parameters()), model, sample_every=None, window=2)
    sample_twice(opt), opt.prune(over=n)
    last, removed = model.weight.detach().clone(), ~opt.final_mask["weight"]
    for _ in range(n):
        assert opt.phase is Phase.FADING
        assert model.weight[removed].all()
        opt.step()
        assert (model.weight <= last).all()
        last = model.weight.detach().clone()

    assert opt.phase is Phase.PRUNED
    assert torch.equal(last == 0, removed)


def test_both_ends_of_a_fade_are_logged(caplog):
    """Where it begins and where it ends is one INFO record each, with the step."""
    with caplog.at_level(logging.INFO, logger="torch_worm_optim"):
        model, opt = at_ticket()
        for step in range(6, 12):
            opt.prune(over=3)
            train(model, opt, range(step, step + 1))
        other_model, other = at_ticket()
        other.prune(over=3), train(other_model, other, range(6, 7)), other.prune()

    changes = [record.getMessage().split(" (")[0] for record in caplog.records]
    begin, end = "step 6: converged -> fading", "fading -> pruned"
    assert changes[2:4] == [begin, f"step 9: {end}"]
    assert changes[6:] == [begin, f"step 7: {end}"]
    assert len(changes) == 8


def test_repr_tells_how_many_steps_are_left():
    """Whoever prints the optimizer sees how long the fade takes, and nothing of it after."""
    model, opt = at_ticket()
    assert "steps left" not in repr(opt)
    opt.prune(over=3)
    train(model, opt, range(6, 7))
    assert "phase: fading (steps left: 2)\n" in repr(opt)
    train(model, opt, range(7, 9))
    assert "phase: pruned\n" in repr(opt)


@pytest.mark.parametrize(
    ("over", "error", "rule"),
    [
        (-1, ValueError, "at least 0, got -1"),
        (2.5, ValueError, r"a whole number, got 2\.5"),
        ("3", TypeError, "a whole number, got '3' of type str"),
        (True, TypeError, "a whole number, got True of type bool"),
    ],
)
def test_what_is_no_number_of_steps_is_refused(over, error, rule):
    """The message gives the argument, the rule and the value, and nothing has begun."""
    model, opt = at_ticket()
    before = weights_of(model)

    with pytest.raises(error, match=f"`over` must be {rule}"):
        opt.prune(over)

    assert opt.phase is Phase.CONVERGED
    assert same(before, weights_of(model))
