"""What schedulers, scalers, hooks and checkpointers expect of an optimizer."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from training import (
    BASES,
    SEARCH,
    loss_of,
    same,
    small_cnn,
    train,
    weights_of,
    wrapped,
)

from torch_worm_optim import Phase, WormOptimizer


def test_it_is_an_optimizer_that_shares_its_base():
    """Groups, state and defaults are the base optimizer's own, also after both were replaced."""
    model, opt = wrapped()
    train(model, opt, range(2))

    assert isinstance(opt, torch.optim.Optimizer)
    assert list(inspect.signature(opt.load_state_dict).parameters) == ["state_dict"]
    for _ in range(2):
        for name in ("param_groups", "state", "defaults"):
            assert getattr(opt, name) is getattr(opt.base_optim, name)
        opt.load_state_dict(opt.state_dict())
    opt.param_groups = groups = [dict(group) for group in opt.param_groups]
    opt.state = state = opt.state.copy()
    assert opt.base_optim.param_groups is groups
    assert opt.base_optim.state is state


def test_nothing_is_written_into_the_state_of_the_base():
    """State is empty before the first step, so that lazy initialisation still happens."""
    model, opt = wrapped("SGD", sample_every=1)
    assert len(opt.state) == 0
    train(model, opt, range(9))

    assert opt.history
    assert all(set(values) <= {"momentum_buffer"} for values in opt.state.values())


def test_each_hook_sees_one_step_per_step():
    """Hooks of wrapper, base and all optimizers fire once a step, saving and loading included."""
    model, opt = wrapped()
    seen: list[str] = []
    note = lambda what: lambda *_: seen.append(what)  # noqa: E731
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
        opt.base_optim.register_step_pre_hook(note("base pre")),
        opt.base_optim.register_step_post_hook(note("base post")),
        opt.register_state_dict_pre_hook(note("save pre")),
        opt.register_state_dict_post_hook(note("save post")),
        opt.register_load_state_dict_pre_hook(note("load pre")),
        opt.register_load_state_dict_post_hook(note("load post")),
    ]
    try:
        train(model, opt, range(1))
        opt.load_state_dict(opt.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    train(model, opt, range(1, 2))

    assert seen == [
        "global pre",
        "pre",
        "base pre",
        "base post",
        "post",
        "global post",
        "save pre",
        "save post",
        "load pre",
        "load post",
    ]


def test_hooks_of_all_optimizers_survive_what_happens_in_a_step():
    """Removed in a step, a global hook stays away; another optimizer is seen; errors pass."""
    _model, opt = wrapped("SGD")
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    seen: list[object] = []
    kept = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    leaving = register_optimizer_step_pre_hook(lambda *_: seen.append("leaving"))
    opt.base_optim.register_step_pre_hook(lambda *_: leaving.remove())

    def closure():
        other.step()
        raise ArithmeticError

    try:
        with pytest.raises(ArithmeticError):
            opt.step(closure)
        opt.step()
        opt.base_optim.step()
    finally:
        kept.remove()

    assert seen == [opt, "leaving", other, opt, opt.base_optim]


def test_hooks_may_change_what_is_saved_and_loaded():
    """What a state_dict hook returns is what is saved and loaded."""
    _, opt = wrapped()
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, saved: saved["inner"])

    saved = opt.state_dict()
    assert saved["note"] == 1
    opt.load_state_dict({"inner": saved})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_gradient_scaling_skips_infinite_steps(fused, truncate):
    """Under GradScaler the run equals one without it; a skipped step is no step."""

    def build():
        model = small_cnn()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        return model, WormOptimizer(base, model, truncate=truncate, **SEARCH)

    (model, opt), (plain_model, plain) = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    assert not hasattr(opt, "_step_supports_amp_scaling")
    for step in range(24):
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 7:
            model[0].weight.grad[0] = torch.inf
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        scaler.step(opt)
        scaler.update()
        if step == 7:
            loss_of(plain_model, step)  # BatchNorm saw the batch of the skipped step too.
        else:
            train(plain_model, plain, range(step, step + 1))

    assert [sample.step for sample in opt.history] == [sample.step for sample in plain.history]
    assert opt.history == plain.history
    torch.testing.assert_close(weights_of(model), weights_of(plain_model), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*normalises gradients")
@pytest.mark.parametrize("when_infinite", [2, 5, 6])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("base", ["SGD", "SGD fused", "Adam", "Adam fused", "AdamW foreach"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_skipped_step_is_no_step_in_any_phase(device, base, unscale, when_infinite):
    """With r = 1, GradScaler does to the wrapper bit for bit what it does to the plain optimizer.

    Whether the scaler or the fused base sees to the infinite gradients, the step that they cost is
    neither counted nor does it draw the mask that was due.
    """
    kind, _, option = base.partition(" ")
    runs = []
    for is_wrapped in (True, False):
        model = small_cnn().to(device)
        make = getattr(torch.optim, kind)
        optimizer = make(model.parameters(), lr=0.02, **({option: True} if option else {}))
        if is_wrapped:
            optimizer = WormOptimizer(
                optimizer,
                model,
                truncation=1,
                sample_every=3,
                window=3,
                stopping_point=1.0,
                trigger="always",
            )
        scaler = torch.amp.GradScaler(device, init_scale=2.0**6, growth_interval=3)
        scales = []
        for step in range(11):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == when_infinite:
                model[4].weight.grad[3] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert torch.equal(before, model[0].weight) == (step == when_infinite)
        runs.append((weights_of(model), scales))
        if is_wrapped:
            assert [sample.step for sample in optimizer.history] == [3, 6, 9]
            assert optimizer.sample().step == 9

    assert runs[0][1] == runs[1][1]
    if device == "cuda" and base == "SGD fused":  # its kernel rounds otherwise while it unscales
        torch.testing.assert_close(runs[0][0], runs[1][0])
    else:
        assert same(runs[0][0], runs[1][0])


@pytest.mark.filterwarnings("ignore:.*normalises gradients")
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_learning_rate_may_be_a_tensor(truncate):
    """A rate in a tensor is set in place, saved as one, and steps as a number does."""
    runs = []
    for as_tensor in (True, False):
        model = small_cnn()
        rate = torch.tensor(0.02) if as_tensor else 0.02
        opt = WormOptimizer(
            torch.optim.Adam(model.parameters(), lr=rate, foreach=False),
            model,
            truncate=truncate,
            **SEARCH,
        )
        train(model, opt, range(6))
        if as_tensor:
            opt.param_groups[0]["lr"].fill_(0.01)
        else:
            opt.param_groups[0]["lr"] = 0.01
        train(model, opt, range(6, 9))
        saved = opt.state_dict()
        assert type(saved["param_groups"][0]["lr"]) is type(rate)
        opt.load_state_dict(saved)
        train(model, opt, range(9, 20))
        runs.append(weights_of(model))

    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_a_step_that_only_creates_state_does_not_count():
    """Distributed checkpointing steps once with rate 0 and zero gradients; that is no step."""
    model, opt = wrapped(sample_every=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rate, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 0.0
    opt.step(closure=None)
    opt.param_groups[0]["lr"] = rate
    opt.zero_grad()

    assert opt.history == []
    assert opt.state


@pytest.mark.parametrize("case", ["closure", "sparse", "no rate"])
def test_other_steps_without_effect_count(case):
    """With a closure, with sparse gradients that are not zero, or without any rate: a step."""
    model = nn.ModuleDict({"words": nn.Embedding(4, 2, sparse=True), "norm": nn.BatchNorm1d(2)})

    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    make = WithoutRate if case == "no rate" else lambda p: torch.optim.SGD(p, lr=0.0)
    opt = WormOptimizer(make(model.parameters()), model, sample_every=None)
    if case == "sparse":
        model["words"](torch.tensor([1])).sum().backward()
    opt.step(lambda: None) if case == "closure" else opt.step()

    with pytest.warns(UserWarning, match="tie for the mask"):
        assert opt.sample().step == 1


def test_a_warm_up_from_zero_counts():
    """Rate 0 with real gradients is a step of training."""
    model, opt = wrapped(sample_every=None)
    opt.param_groups[0]["lr"] = 0.0
    train(model, opt, range(2))
    opt.param_groups[0]["lr"] = 0.05
    train(model, opt, range(2, 3))

    assert opt.sample().step == 3


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("base", ["SGD", "SGD momentum", "AdamW"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch warns of itself here, otherwise in each release
def test_distributed_checkpoint_restores_a_search(tmp_path, base, flatten, pruned):
    """Saved and loaded by torch.distributed.checkpoint, search or ticket go on bit for bit."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint import state_dict as dcp_state

    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flatten)
    build = functools.partial(wrapped, base, stopping_point=1.0 if pruned else 0.06)
    model, opt = build()
    train(model, opt, range(12))
    if pruned:
        opt.prune()
    train(model, opt, range(12, 17))
    opt.zero_grad()
    saved = {
        "model": model.state_dict(),
        "opt": dcp_state.get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path)

    other_model, other = build()
    target = {
        "model": other_model.state_dict(),
        "opt": dcp_state.get_optimizer_state_dict(other_model, other, options=options),
    }
    dcp.load(target, checkpoint_id=tmp_path)
    other_model.load_state_dict(target["model"])
    dcp_state.set_optimizer_state_dict(other_model, other, target["opt"], options=options)

    assert other.history == opt.history
    train(model, opt, range(17, 40))
    train(other_model, other, range(17, 40))
    assert other.history == opt.history
    assert other.phase is opt.phase
    assert (opt.phase is Phase.PRUNED) == pruned
    assert same(weights_of(model), weights_of(other_model))


def test_base_only_methods_are_reachable_and_private_ones_are_not():
    """train() and eval() of a schedule-free base are; what is not there is an AttributeError."""

    class WithModes(torch.optim.SGD):
        mode = "train"

        def eval(self):
            self.mode = "eval"

    model = small_cnn()
    opt = WormOptimizer(WithModes(model.parameters(), lr=0.1), model)
    opt.eval()

    assert opt.base_optim.mode == opt.mode == "eval"
    for name in ("nothing", "_private"):
        with pytest.raises(AttributeError, match=name):
            getattr(opt, name)


def test_step_can_be_replaced_and_is_a_bound_method():
    """Profilers and schedulers put another step in its place."""
    model, opt = wrapped()
    calls = []
    assert opt.step.__func__
    inner = opt.step
    opt.step = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    train(model, opt, range(3))

    assert len(calls) == 3
    assert len(opt.history) == 1


class Proxy:
    """An instance of the optimizer's class that forwards what it lacks, as trainers make them."""

    def __init__(self, optimizer):
        self.__dict__["optimizer"] = optimizer
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_what_is_called_on_a_proxy_happens_to_the_optimizer():
    """Lightning hands out an object of this class with attributes of its own: state is shared."""
    model, opt = wrapped(sample_every=None, stopping_point=1.0, window=2, trigger="always")
    proxy = Proxy(opt)
    for start in (0, 3):
        train(model, opt, range(start, start + 3))
        proxy.sample()
    proxy.prune()
    train(model, opt, range(6, 8))

    assert isinstance(proxy, WormOptimizer)
    assert opt.phase is proxy.phase is Phase.PRUNED
    assert int(model[1].weight.count_nonzero() + model[4].weight.count_nonzero()) == 10
    saved = opt.state_dict()
    other_model, other = wrapped(sample_every=None, stopping_point=1.0, window=2)
    Proxy(other).load_state_dict(saved)
    train(other_model, other, range(1))
    assert other.phase is Phase.PRUNED
    assert other.history == opt.history


@pytest.mark.parametrize("mark", ["step_was_skipped", "_strategy", "overflow", "loss_scaler"])
@pytest.mark.parametrize("is_optimizer", [False, True])
def test_a_proxy_that_may_not_step_is_refused(mark, is_optimizer):
    """Whatever trainer it is of, and whether it is an optimizer itself."""

    class Prepared(torch.optim.SGD if is_optimizer else object):
        def __init__(self, optimizer):
            if is_optimizer:
                super().__init__(optimizer.param_groups)
            self.optimizer = optimizer
            setattr(self, mark, False)

    model = small_cnn()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"is a Prepared.*Wrap the optimizer first, and prepare"):
        WormOptimizer(Prepared(base), model)


def test_an_optimizer_around_another_that_always_steps_is_wrapped():
    """As Lookahead, which calls what is inside of it `optimizer`."""

    class Around(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, optimizer.defaults)
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = small_cnn()
    opt = WormOptimizer(Around(BASES["SGD"](model.parameters())), model, **SEARCH)
    train(model, opt, range(3))
    assert [sample.step for sample in opt.history] == [3]


def test_groups_can_be_added():
    """A new group is trained by the base; the ranked entries stay the same, and it can be saved."""
    model, opt = wrapped()
    extra = nn.Linear(2, 2)
    opt.add_param_group({"params": extra.parameters(), "lr": 0.5})
    train(model, opt, range(9))

    assert [group["worm"] for group in opt.param_groups] == [None, None]
    assert opt.base_optim.param_groups[1]["lr"] == 0.5
    opt.load_state_dict(opt.state_dict())
    assert len(opt.history) == 3


def test_parameters_that_were_replaced_are_found():
    """New parameter objects under the old names, as sharding and dtype changes make, are used."""
    model, opt = wrapped(stopping_point=1.0, window=2, sample_every=1)
    replaced = {}
    for module in model:
        for name, parameter in list(module.named_parameters()):
            replaced[parameter] = nn.Parameter(parameter.detach().clone())
            setattr(module, name, replaced[parameter])
    for group in opt.param_groups:
        group["params"] = [replaced[parameter] for parameter in group["params"]]
    train(model, opt, range(2))
    opt.prune()

    assert opt.phase is Phase.PRUNED
    assert int(model[1].weight.count_nonzero() + model[4].weight.count_nonzero()) == 10


def test_zero_grad_is_the_bases():
    """Gradients become None, or zero when asked."""
    model, opt = wrapped()
    loss_of(model, 0).backward()
    opt.zero_grad(set_to_none=False)
    assert model[0].weight.grad.count_nonzero() == 0
    opt.zero_grad()
    assert model[0].weight.grad is None
