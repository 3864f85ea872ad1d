"""From the ticket on: what is pruned stays zero, under everything that moves weights."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from training import (
    BASES,
    at_phase,
    loss_of,
    record_of,
    same,
    small_cnn,
    train,
    weights_of,
    wrapped,
)

from torch_worm_optim import Phase, WormOptimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:The search has truncated for"
)


def at_ticket(make=BASES["SGD momentum"], **options):
    """A small network and its wrapped optimizer, which has found its ticket with the third mask."""
    model = small_cnn()
    quick = {"sample_every": 2, "window": 3, "stopping_point": 1.0, "trigger": "always"}
    opt = WormOptimizer(make(model.parameters()), model, **{**quick, **options})
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
    return [(model.get_parameter(name), ~mask) for name, mask in opt.final_mask.items()]


def is_held(model, opt):
    """Whether what the ticket removes is zero, in weights and state, and nothing else is."""
    return all(
        torch.equal(parameter != 0, ~removed)
        and not any(
            value[removed].any()
            for value in opt.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        )
        for parameter, removed in removed_of(model, opt)
    )


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
def test_a_pruned_run_is_the_base_optimizers_with_zeros_written_by_hand(base):
    """Gradients of removed entries zeroed before a step, and weights after it: the same bits."""
    model, opt = at_ticket(with_momentum_and_decay(base))
    opt.prune()
    assert is_held(model, opt)
    twin = copy.deepcopy(model)
    plain = with_momentum_and_decay(base)(twin.parameters())
    plain.load_state_dict(copy.deepcopy(opt.base_optim.state_dict()))
    by_hand = removed_of(twin, opt)

    train(model, opt, range(6, 12))
    for step in range(6, 12):
        plain.zero_grad()
        loss_of(twin, step).backward()
        for parameter, removed in by_hand:
            parameter.grad[removed] = 0
        plain.step()
        with torch.no_grad():
            for parameter, removed in by_hand:
                parameter[removed] = 0

    assert is_held(model, opt)
    assert same(weights_of(twin), weights_of(model))
    for ours, theirs in zip(opt.state.values(), plain.state.values(), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_steps_with_closures_are_those_without(base):
    """step(closure) holds as backward() and step() do, bit for bit."""
    plain_model, plain = at_ticket(BASES[base])
    plain.prune()
    train(plain_model, plain, range(6, 12))

    model, opt = at_ticket(BASES[base])
    opt.prune()
    for step in range(6, 12):

        def closure(step=step):
            opt.zero_grad()
            loss_of(model, step).backward()

        opt.step(closure)

    assert same(weights_of(plain_model), weights_of(model))


def test_an_optimizer_that_evaluates_often_holds():
    """However often LBFGS moves entries to and fro, after a step they are zero."""
    model = small_cnn(torch.double)
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    opt = WormOptimizer(base, model, window=2, stopping_point=1.0, sample_every=1)
    evaluations = []
    for step in range(6):

        def closure(step=step):
            evaluations.append(step)
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if step == 2:
            opt.prune()
        opt.step(closure)
        if step >= 2:
            assert all(torch.equal(p != 0, ~removed) for p, removed in removed_of(model, opt))

    assert len(evaluations) > 12


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("phase", [Phase.SEARCHING, Phase.TRUNCATING, Phase.CONVERGED])
def test_a_closure_may_prune(phase, truncate):
    """A training step that prunes runs in a closure under Lightning; the step ends held."""
    model, opt = at_phase(phase, truncate=truncate)
    if phase is Phase.SEARCHING:
        train(model, opt, range(3))
        assert opt.phase is phase
    for step in range(100, 104):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            opt.prune(force=True)
            return loss

        opt.step(closure)
        assert opt.phase is Phase.PRUNED
        assert is_held(model, opt)


def test_a_step_that_the_scaler_skips_is_none():
    """Where gradients overflow nothing moves and nothing is counted."""
    model, opt = at_ticket()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.prune()
    for step, n_steps in ((6, 7), (7, 7), (8, 8)):
        opt.zero_grad()
        scaler.scale(loss_of(model, step) * (torch.inf if step == 7 else 1)).backward()
        before = weights_of(model)
        scaler.step(opt)
        scaler.update()
        assert record_of(opt.state_dict())["step"] == n_steps
        assert same(before, weights_of(model)) == (step == 7)
    assert is_held(model, opt)


def test_a_step_that_only_initialises_state_is_none():
    """torch.distributed.checkpoint steps with learning rate 0 and gradients of zero to save."""
    model, opt = at_ticket(BASES["SGD"])
    opt.prune()
    before = weights_of(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.step()

    assert same(before, weights_of(model))
    assert record_of(opt.state_dict())["step"] == 6
    model[0].weight.grad[0] = 1  # at the end of a schedule there are gradients, and it is a step
    opt.step()
    assert record_of(opt.state_dict())["step"] == 7


# ---- prune()


@pytest.mark.parametrize("phase", [Phase.SEARCHING, Phase.TRUNCATING])
def test_without_a_ticket_pruning_must_be_forced(phase):
    """The error names the way out, and changes nothing; forced, the newest mask is the ticket."""
    model, opt = at_phase(phase)
    if phase is Phase.SEARCHING:
        for force in (False, True):
            with pytest.raises(
                RuntimeError, match=r"after 0 masks .* searching\..*opt\.sample\(\)"
            ):
                opt.prune(force=force)
        train(model, opt, range(3))
    before, newest, history = weights_of(model), opt.candidate_mask, opt.history
    message = rf"after {len(history)} masks .*{phase.value}\..*`opt\.prune\(force=True\)`"
    with pytest.raises(RuntimeError, match=message):
        opt.prune()
    assert opt.phase is phase
    assert opt.final_mask is None
    assert opt.history == history
    assert same(before, weights_of(model))

    opt.prune(force=True)
    assert opt.phase is Phase.PRUNED
    assert opt.converged
    assert opt.history == [*history[:-1], history[-1]._replace(phase=Phase.PRUNED)]
    assert opt.final_mask.keys() == newest.keys()
    assert same(list(opt.final_mask.values()), list(newest.values()))
    assert "phase: pruned" in opt.summary()
    assert opt.sample() == opt.history[-1]
    assert is_held(model, opt)
    other_model, other = wrapped()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(3, 12))
    train(other_model, other, range(3, 12))

    assert is_held(model, opt)
    assert same(weights_of(model), weights_of(other_model))
    assert other.history == opt.history


def test_force_changes_nothing_where_there_is_a_ticket():
    """The ticket that the search has found is taken, and its sample stays as it was."""
    runs = []
    for force in (False, True):
        model, opt = at_ticket()
        opt.prune(force=force)
        runs.append((weights_of(model), opt.history))

    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert runs[0][1][-1].phase is Phase.CONVERGED


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_pruning_again_sets_to_zero_once_more(base):
    """Other weights that were loaded into the model, and what the optimizer keeps of them."""
    model, opt = at_ticket(BASES[base])
    unpruned = copy.deepcopy([model.state_dict(), opt.base_optim.state_dict()])
    opt.prune()
    history = opt.history
    model.load_state_dict(unpruned[0])
    opt.base_optim.load_state_dict(unpruned[1])
    assert not is_held(model, opt)
    opt.prune()

    assert opt.phase is Phase.PRUNED
    assert opt.history == history
    assert is_held(model, opt)
    for name, parameter in model.named_parameters():
        expected = unpruned[0][name]
        if name in opt.final_mask:
            expected = torch.where(opt.final_mask[name], expected, torch.zeros_like(expected))
        assert torch.equal(parameter.detach(), expected)
    train(model, opt, range(6, 8))
    assert is_held(model, opt)


def test_phase_changes_are_logged(caplog):
    """Each change is one INFO record with the step; pruning again, or truncation, is none."""
    with caplog.at_level(logging.INFO, logger="torch_worm_optim"):
        model, opt = at_ticket()
        for step in range(6, 9):
            opt.prune()
            train(model, opt, range(step, step + 1))
        _, forced = at_phase(Phase.TRUNCATING)
        forced.prune(force=True)

    assert {record.levelname for record in caplog.records} == {"INFO"}
    changes = [re.sub(r" \(distances .*\)", "", record.getMessage()) for record in caplog.records]
    n = forced.history[-1].step
    assert changes == [
        "step 2: searching -> truncating",
        "step 6: truncating -> converged",
        "step 6: converged -> pruned",
        f"step {n}: searching -> truncating",
        f"step {n}: truncating -> pruned",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_warnings_that_are_errors_leave_the_ticket_whole(force):
    """A ticket that empties a layer warns; where that raises, the phase and the ticket agree."""
    options = {"window": 3 if force else 2, "stopping_point": 1.0, "prune_ratio": 0.55}
    model, opt = wrapped(sample_every=None, **options)
    scales = torch.arange(1.0, 9), torch.arange(1.0, 13) / 100
    for factor in (1, 2):
        with torch.no_grad():
            model[1].weight.copy_(scales[0] * factor)
            model[4].weight.copy_(scales[1] * factor)
        if factor == 1 or force:
            opt.sample()
    with pytest.raises(UserWarning, match="a bottleneck"):
        opt.prune(force=True) if force else opt.sample()

    assert opt.phase is (Phase.PRUNED if force else Phase.CONVERGED)
    assert opt.final_mask["4.weight"].sum() == 1
    assert len(opt.history) == 2
    opt.prune()
    assert not any(p[removed].any() for p, removed in removed_of(model, opt))
