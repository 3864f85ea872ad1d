"""A second search over what a first one has pruned, and holds at zero."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import IMAGES, Residual, loss_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import BASES, same, through_a_file, weights_of

from torch_worm_optim import Phase, WormOptimizer, load_shrunk_

SOON = {"sample_every": 2, "window": 2, "stopping_point": 1.0, "truncate": "update"}
bases = pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])


def train(model, opt, steps):
    """Train on batches that depend on the step."""
    model.train()
    for step in steps:
        opt.zero_grad()
        loss_of(model, (IMAGES[0].double(),), step).backward()
        opt.step()


def pruned_once(base="SGD momentum", model=None):
    """A residual network, and a search that has pruned a third of it."""
    torch.manual_seed(0)
    model = Residual().double() if model is None else model
    first = WormOptimizer(BASES[base](model.parameters()), model, prune_ratio=0.3, **SOON)
    train(model, first, range(4))
    first.prune()
    return model, first


def second_of(first, **options):
    """A search for more."""
    return WormOptimizer(first, first.model, **{**SOON, "prune_ratio": 0.6, **options})


def zeros_of(model, ticket):
    """What a ticket removes, all its entries as they are now."""
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].detach()[~mask] for name, mask in ticket.items()])


def bits(tensor):
    """The memory of a tensor of doubles, so that -0 is not 0."""
    return tensor.view(torch.int64)


@pytest.mark.filterwarnings("ignore:.*normalises gradients")
@bases
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_zeros_of_the_first_stay(base, truncate):
    """In every step of the second, with momentum and decay, and after it has pruned more."""
    model, first = pruned_once(base)
    second = second_of(first, truncate=truncate, sample_every=3, window=3, trigger="always")
    ticket = first.final_mask
    for step in range(4, 14):
        train(model, second, range(step, step + 1))
        assert not bits(zeros_of(model, ticket)).any()
    assert second.converged
    assert second.phase is Phase.CONVERGED
    more = second.final_mask
    second.prune()
    train(model, second, range(14, 18))

    assert not bits(zeros_of(model, ticket)).any()
    assert not bits(zeros_of(model, more)).any()
    assert all(not (more[name] & ~mask).any() for name, mask in ticket.items())
    assert sum(int((~mask).sum()) for mask in more.values()) > sum(
        int((~mask).sum()) for mask in ticket.values()
    )
    assert first.phase is second.phase is Phase.PRUNED


def test_the_second_search_is_one_over_a_pruned_network():
    """Masks and steps are those of a search by hand whose every step puts the zeros back."""
    model, first = pruned_once()
    twin = copy.deepcopy(model)
    base = BASES["SGD momentum"](twin.parameters())
    base.load_state_dict(copy.deepcopy(first.base_optim.state_dict()))
    by_hand = WormOptimizer(base, twin, prune_ratio=0.6, truncation=1, **SOON)
    second = second_of(first, truncation=1)
    ticket = first.final_mask
    train(model, second, range(4, 8))
    for step in range(4, 8):
        by_hand.zero_grad()
        loss_of(twin, (IMAGES[0].double(),), step).backward()
        for name, parameter in twin.named_parameters():
            if name in ticket:
                parameter.grad[~ticket[name]] = 0
        by_hand.step()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name in ticket:
                    parameter[~ticket[name]] = 0

    assert [each.step for each in second.history] == [2, 4]
    assert all(
        torch.equal(mask, by_hand.final_mask[name]) for name, mask in second.final_mask.items()
    )
    assert same(weights_of(model), weights_of(twin))


@bases
@pytest.mark.parametrize("stop", [5, 9, 12])
def test_a_checkpoint_restores_both(base, stop):
    """Stopped while it searches, at its ticket or pruned twice, a run goes on bit for bit."""

    def act(second, step):
        if step == 10:
            second.prune()

    model, first = pruned_once(base)
    second = second_of(first, sample_every=3)
    for step in range(4, 16):
        if step == stop:
            saved = through_a_file({"model": model.state_dict(), "opt": second.state_dict()})
        act(second, step)
        train(model, second, range(step, step + 1))

    torch.manual_seed(1)
    fresh = Residual().double()
    fresh.load_state_dict(saved["model"])
    again = WormOptimizer(BASES[base](fresh.parameters()), fresh, prune_ratio=0.3, **SOON)
    again.load_state_dict(saved["opt"])
    assert again.phase is Phase.PRUNED
    other = second_of(again, sample_every=3)
    other.load_state_dict(saved["opt"])
    for step in range(stop, 16):
        act(other, step)
        train(fresh, other, range(step, step + 1))

    assert other.history == second.history
    assert other.phase is second.phase is Phase.PRUNED
    assert again.history == first.history
    assert same(weights_of(fresh), weights_of(model))
    assert through_a_file(other.state_dict())["param_groups"] == second.state_dict()["param_groups"]


def test_a_checkpoint_of_the_first_starts_the_second_afresh():
    """One of before the first has pruned is refused, and everything is as it was."""
    model, first = pruned_once()
    saved = first.state_dict()
    second = second_of(first)
    train(model, second, range(4, 7))
    assert second.history
    second.load_state_dict(saved)
    assert second.history == []
    assert first.phase is Phase.PRUNED

    unpruned = Residual().double()
    base = BASES["SGD momentum"](unpruned.parameters())
    searching = WormOptimizer(base, unpruned, prune_ratio=0.3, **SOON)
    history, before = list(first.history), weights_of(model)
    for each in (searching, searching.base_optim):
        with pytest.raises(ValueError, match="before the network was pruned"):
            second.load_state_dict(each.state_dict())
    assert first.history == history
    assert same(weights_of(model), before)
    train(model, second, range(7, 9))
    assert not bits(zeros_of(model, first.final_mask)).any()


@pytest.mark.filterwarnings("ignore:.* start at zero")  # of which a whole branch is pruned
@bases
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_the_twice_pruned_network_is_shrunk(base, scatter, early):
    """Exactly, before the second search too; state is cut once, and both tickets are held on."""
    model, first = pruned_once(base)
    images = IMAGES[0].double()
    if early:
        first.shrink(images, scatter=scatter)
    second = second_of(first)
    train(model, second, range(4, 8))
    second.prune()
    train(model, second, range(8, 10))
    twin = copy.deepcopy(second)
    expected = model.eval()(images)["logits"]
    report = second.shrink(images, scatter=scatter)
    # A BatchNorm that writes by index already stays as wide as it is.
    assert report.parameters[1] < report.parameters[0] or (scatter and early)
    assert first.is_shrunk
    assert second.is_shrunk
    torch.testing.assert_close(model(images)["logits"], expected)
    for parameter, state in second.state.items():
        assert all(
            each.shape == parameter.shape for each in state.values() if getattr(each, "dim", int)()
        )

    train(model, second, range(10, 14))
    train(twin.model, twin, range(10, 14))
    torch.testing.assert_close(
        model.eval()(images)["logits"], twin.model.eval()(images)["logits"], rtol=1e-6, atol=1e-9
    )
    saved = through_a_file({"model": model.state_dict(), "opt": second.state_dict()})
    fresh = Residual().double()
    load_shrunk_(fresh, saved["model"])
    again = WormOptimizer(BASES[base](fresh.parameters()), fresh, **SOON)
    again.load_state_dict(saved["opt"])
    other = second_of(again)
    other.load_state_dict(saved["opt"])
    for each, opt in ((model, second), (fresh, other)):
        train(each, opt, range(14, 18))
    assert same(weights_of(model), weights_of(fresh))


def test_weights_put_back_are_pruned_by_both():
    """Called again, prune() applies both tickets."""
    model, first = pruned_once()
    second = second_of(first)
    train(model, second, range(4, 8))
    second.prune()
    tickets = first.final_mask, second.final_mask
    model.load_state_dict(Residual().double().state_dict())
    second.prune()
    assert not any(zeros_of(model, ticket).any() for ticket in tickets)


def test_hooks_schedules_and_closures_see_one_step():
    """Global hooks fire once a step, on the outermost; schedules of all three count."""
    model, first = pruned_once()
    second = second_of(first, sample_every=None)
    seen = []
    handle = register_optimizer_step_pre_hook(lambda opt, *_: seen.append(opt))
    first.register_step_pre_hook(lambda *_: seen.append("first"))
    rates = [
        torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (second, first, first.base_optim)
    ]
    try:

        def closure():
            second.zero_grad()
            loss = loss_of(model, (IMAGES[0].double(),), 4)
            loss.backward()
            return loss

        assert second.step(closure) is not None
    finally:
        handle.remove()
    for rate in rates:
        rate.step()
    assert seen == [second, "first"]
    assert second.param_groups[0]["lr"] == pytest.approx(0.05 / 8)
    assert not bits(zeros_of(model, first.final_mask)).any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(how):
    """Of both searches and their model."""
    model, first = pruned_once()
    second = second_of(first)
    train(model, second, range(4, 6))
    other = copy.deepcopy(second) if how == "deepcopy" else pickle.loads(pickle.dumps(second))
    for each in (second, other):
        train(each.model, each, range(6, 9))
        each.prune()
    assert other.history == second.history
    assert same(weights_of(other.model), weights_of(model))
    assert "kept" in second.summary()
    assert second.param_groups is first.param_groups is first.base_optim.param_groups
    assert second.state is first.state is first.base_optim.state


def test_a_third_search():
    """One holds two, and all three are restored."""
    model, first = pruned_once()
    second = second_of(first)
    train(model, second, range(4, 8))
    second.prune()
    third = second_of(second, prune_ratio=0.7, min_keep=3)
    train(model, third, range(8, 11))
    saved = through_a_file({"model": model.state_dict(), "opt": third.state_dict()})
    fresh = Residual().double()
    fresh.load_state_dict(saved["model"])
    opt = BASES["SGD momentum"](fresh.parameters())
    for ratio in (0.3, 0.6, 0.7):
        min_keep = 3 if ratio == 0.7 else 1
        opt = WormOptimizer(opt, fresh, prune_ratio=ratio, min_keep=min_keep, **SOON)
        opt.load_state_dict(saved["opt"])
    for each, optimizer in ((model, third), (fresh, opt)):
        train(each, optimizer, range(11, 14))
    assert opt.history == third.history
    assert same(weights_of(model), weights_of(fresh))


def test_what_is_not_pruned_or_of_another_model_is_refused():
    """Two searches at a time would count the same steps; names are of one model."""
    model, first = pruned_once()
    other = nn.Sequential(model)
    searching = WormOptimizer(BASES["SGD"](model.parameters()), model)
    for base, of in ((searching, model), (first, other)):
        with pytest.raises(TypeError, match=r"WormOptimizer already.* prune\(\) first"):
            WormOptimizer(base, of)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore")  # torch warns of itself here, otherwise in each release
def test_distributed_checkpoint_restores_both(tmp_path):
    """Which takes state_dicts apart, and steps once to create state."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint import state_dict as dcp_state

    model, first = pruned_once()
    second = second_of(first)
    train(model, second, range(4, 7))
    second.zero_grad()
    saved = {
        "model": model.state_dict(),
        "opt": dcp_state.get_optimizer_state_dict(model, second),
    }
    dcp.save(saved, checkpoint_id=tmp_path)

    other_model, other_first = pruned_once()
    other = second_of(other_first)
    other.zero_grad()
    target = {
        "model": other_model.state_dict(),
        "opt": dcp_state.get_optimizer_state_dict(other_model, other),
    }
    dcp.load(target, checkpoint_id=tmp_path)
    other_model.load_state_dict(target["model"])
    dcp_state.set_optimizer_state_dict(other_model, other, target["opt"])
    for each, opt in ((model, second), (other_model, other)):
        train(each, opt, range(7, 10))
    assert other.history == second.history
    assert other_first.phase is Phase.PRUNED
    assert same(weights_of(model), weights_of(other_model))


def test_shrinking_cuts_what_either_search_has_removed():
    """Though each ticket holds another layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1)),
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    halves = [{"1.weight": torch.arange(8) < 4}, {"4.weight": torch.arange(12) < 6}]
    first = WormOptimizer(sgd, model, ticket=halves[0])
    second = WormOptimizer(first, model, ticket=halves[1])

    second.shrink(IMAGES[0])

    assert (model[0].out_channels, model[3].out_channels) == (4, 6)
