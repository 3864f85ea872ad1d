"""Every learning-rate scheduler of torch, on the wrapper."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import training
from torch.optim import lr_scheduler, swa_utils
from training import loss_of, same, small_cnn, through_a_file, train, weights_of

from torch_worm_optim import Phase, WormOptimizer
from torch_worm_optim.ticket import apply_ticket_

# In torch 2.4 SequentialLR does what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")

N_STEPS = 24
SEARCH = {"sample_every": 3, "window": 3, "stopping_point": 1.0, "trigger": "always"}


def warm_up(step):
    """A rate that starts at 0; at the top of the module, to be pickled."""
    return min(1.0, step / 5)


def shrink(_):
    """A factor for each step."""
    return 0.97


MAKE = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, warm_up),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, shrink),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=N_STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=7),
}


# One that is given a function, one that cycles momentum, and one that looks at a loss.
KINDS = ("LambdaLR", "OneCycleLR", "ReduceLROnPlateau")


def test_no_scheduler_is_forgotten():
    """Every scheduler class of torch is made here; a new one makes this fail until it is."""
    of_torch = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }

    assert set(MAKE) == of_torch - {"LRScheduler", "_LRScheduler"}


def plain_optimizer(model):
    """Two groups, so that each may have a rate of its own, and momentum, to be cycled."""
    half = len(list(model.parameters())) // 2
    groups = [
        {"params": list(model.parameters())[:half]},
        {"params": list(model.parameters())[half:], "lr": 0.02},
    ]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def build(name, wrapped=True, **options):
    """A small network, its optimizer and a scheduler on it."""
    model = small_cnn()
    optimizer = plain_optimizer(model)
    if wrapped:
        optimizer = WormOptimizer(optimizer, model, **{**SEARCH, **options})
    return model, optimizer, MAKE[name](optimizer)


def advance(model, optimizer, scheduler, steps):
    """Train with a scheduler step after each step; the rates and momenta that were used."""
    used = []
    for step in steps:
        used.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        train(model, optimizer, range(step, step + 1))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)  # a loss that never gets better
        else:
            scheduler.step()
    return used


@pytest.mark.parametrize("name", MAKE)
def test_a_scheduler_drives_the_base(name):
    """Rates, momenta and weights are those of the plain optimizer with the same scheduler."""
    plain = build(name, wrapped=False)
    model, opt, scheduler = build(name, truncation=1)
    expected = advance(*plain, range(N_STEPS))

    assert advance(model, opt, scheduler, range(N_STEPS)) == expected
    assert len({str(used) for used in expected}) > 1
    assert scheduler.get_last_lr() == plain[2].get_last_lr()
    assert same(weights_of(plain[0]), weights_of(model))
    assert opt.phase is Phase.CONVERGED


@pytest.mark.parametrize("name", KINDS)
def test_a_scheduled_search_resumes(name):
    """Saved with its scheduler in each phase and loaded, a run keeps its bits, rates included."""
    whole = build(name)
    model, opt, _ = whole
    used = advance(*whole, range(12))
    opt.prune()
    used += advance(*whole, range(12, N_STEPS))

    other, resumed, its_scheduler = build(name)
    rates = []
    for stop, go_on in ((0, 2), (2, 5), (5, 10), (10, 12), (12, 14), (14, N_STEPS)):
        saved = through_a_file([each.state_dict() for each in (other, resumed, its_scheduler)])
        other, resumed, its_scheduler = build(name)
        for each, state in zip((other, resumed, its_scheduler), saved, strict=True):
            each.load_state_dict(state)
        if stop == 12:
            resumed.prune()
        rates += advance(other, resumed, its_scheduler, range(stop, go_on))

    assert rates == used
    assert resumed.phase is opt.phase is Phase.PRUNED
    assert resumed.history == opt.history
    assert same(weights_of(model), weights_of(other))


# Before 2.6, torch warned of its own way to unpickle a tensor.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", KINDS)
def test_a_copy_with_its_scheduler_goes_its_own_way(name, how):
    """Model, optimizer and scheduler copied together train as the originals, and leave them be."""
    model, opt, scheduler = originals = build(name)
    advance(*originals, range(5))

    copies = copied(originals, how)
    before, rate = weights_of(model), [group["lr"] for group in opt.param_groups]
    used = advance(*copies, range(5, N_STEPS))
    assert same(before, weights_of(model))
    assert rate == [group["lr"] for group in opt.param_groups]

    assert used == advance(*originals, range(5, N_STEPS))
    assert same(weights_of(model), weights_of(copies[0]))
    assert opt.history == copies[1].history
    assert scheduler.get_last_lr() == copies[2].get_last_lr()


def copied(value, how):
    """A copy of everything together."""
    if how == "deepcopy":
        return copy.deepcopy(value)
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_averaged_weights_follow_a_pruned_model():
    """AveragedModel averages what is trained, and an average of pruned weights is pruned."""
    averages = []
    for wrapped in (True, False):
        model, opt, scheduler = build("SWALR", wrapped, truncation=1)
        averaged = swa_utils.AveragedModel(model)
        for step in range(12):
            advance(model, opt, scheduler, range(step, step + 1))
            averaged.update_parameters(model)
        averages.append(weights_of(averaged))
    assert same(*averages)

    model, opt, scheduler = build("SWALR")
    advance(model, opt, scheduler, range(12))
    opt.prune()
    averaged = swa_utils.AveragedModel(model)
    for step in range(12, 15):
        advance(model, opt, scheduler, range(step, step + 1))
        averaged.update_parameters(model)
    swa_utils.update_bn([torch.randn(4, 1, 6, 6, device=training.DEVICE)], averaged)
    for name, mask in opt.final_mask.items():
        assert torch.equal(averaged.module.get_parameter(name) != 0, mask)


def timm_average(model):
    """The average of timm's training script."""
    return pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)


def torch_average(model):
    """An exponential one of torch."""
    return swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )


@pytest.mark.parametrize("update", ["update_parameters", "update"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_ticket_prunes_an_average_of_before_it(update, whole):
    """Applied once, to the average or its module, it holds through updates, shifts included."""
    model, opt, scheduler = build("SWALR")
    averaged = (timm_average if update == "update" else torch_average)(model)
    for step in range(12):
        advance(model, opt, scheduler, range(step, step + 1))
        getattr(averaged, update)(model)
    opt.prune()
    assert all(averaged.module.get_parameter(name).all() for name in opt.final_mask)
    apply_ticket_(averaged if whole else averaged.module, opt.final_mask)
    for step in range(12, 15):
        advance(model, opt, scheduler, range(step, step + 1))
        getattr(averaged, update)(model)
        for name, mask in opt.final_mask.items():
            assert torch.equal(averaged.module.get_parameter(name) != 0, mask)

    report = opt.shrink(torch.randn(1, 1, 6, 6, device=training.DEVICE))
    report.apply_(averaged.module)
    advance(model, opt, scheduler, range(15, 16))
    getattr(averaged, update)(model)
    assert [p.shape for p in averaged.module.parameters()] == [p.shape for p in model.parameters()]


def test_schedule_free_weights_are_pruned_in_both_modes():
    """Its second copy of the weights holds the ticket, so that the average of both does."""
    schedulefree = pytest.importorskip("schedulefree")
    model = small_cnn()
    base = schedulefree.SGDScheduleFree(model.parameters(), lr=0.5)
    opt = WormOptimizer(base, model, **SEARCH)
    opt.train()
    train(model, opt, range(12))
    opt.prune()
    train(model, opt, range(12, 16))
    for change_mode in (opt.eval, opt.train):
        change_mode()
        for name, mask in opt.final_mask.items():
            assert not model.get_parameter(name)[~mask].any()
        assert all(model.get_parameter(name)[mask].all() for name, mask in opt.final_mask.items())


def test_a_scheduler_warns_of_the_wrong_order_and_only_then():
    """Stepped before the optimizer the scheduler warns, as on a plain optimizer."""
    _model, _opt, scheduler = build("StepLR")
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_two_schedulers_count_one_step():
    """A second scheduler on the same optimizer leaves each step a single step."""
    model, opt, scheduler = build("StepLR", sample_every=None)
    lr_scheduler.ExponentialLR(opt, 0.9)
    loss_of(model, 0).backward()
    opt.step()
    scheduler.step()

    assert opt.sample().step == 1
