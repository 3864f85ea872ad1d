"""WormOptimizer: what training with it does, against training by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings

import pytest
import torch
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import prune_ratios, scopes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import (
    BASES,
    PAPER,
    SCALES,
    SEARCH,
    SHIFTS,
    at_phase,
    loss_of,
    record_of,
    same,
    sample_twice,
    small_cnn,
    train,
    train_by_hand,
    weights_of,
    wrapped,
)

from torch_worm_optim import (
    BatchNormSelector,
    ParameterSelector,
    Part,
    Phase,
    Representative,
    WormOptimizer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:The search has truncated for"
)

THREE = ("SGD momentum", "AdamW", "RMSprop")
"""Base optimizers: with momentum, with two moments and decay, and with a moment and momentum."""


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("base", THREE)
@pytest.mark.parametrize("trigger", ["distance", "always"])
@pytest.mark.parametrize(
    "how", [PAPER, {"fade": 0.1, "scope": "layer", "stopping_point": 0.0}], ids=["paper", "fade"]
)
def test_training_equals_training_by_hand(base, truncate, trigger, how):
    """Weights, distances and phases are those of WORM spelled out around the base optimizer."""
    options = {"prune_ratio": 0.4, "truncation": 0.01, "truncate": truncate, "trigger": trigger}
    options |= how
    # In double, so that two ways to round one formula cannot part the trajectories.
    model, opt = wrapped(base, small_cnn(torch.double), **options)
    train(model, opt, range(60))

    twin = small_cnn(torch.double)
    results = train_by_hand(twin, BASES[base](twin.parameters()), 60, **{**SEARCH, **options})

    assert results == [(sample.distances, sample.phase.value) for sample in opt.history]
    assert "truncating" in {phase for _, phase in results}
    if truncate == "gradient":
        assert same(weights_of(twin), weights_of(model))
    torch.testing.assert_close(weights_of(twin), weights_of(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", THREE)
def test_every_step_before_the_trigger_is_the_base_optimizers(base):
    """Until the first truncating mask, weights equal the base optimizer's bit for bit."""
    model, opt = wrapped(base, margin=0.0, stopping_point=0.0)
    plain = small_cnn()
    train(model, opt, range(40))
    train(plain, BASES[base](plain.parameters()), range(40))

    assert len(opt.history) == 13
    assert same(weights_of(plain), weights_of(model))


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("base", THREE)
def test_a_truncation_of_one_is_eb_train(base, truncate):
    """With r = 1 the whole search leaves the weights as the base optimizer makes them."""
    model, opt = wrapped(base, truncation=1, truncate=truncate, trigger="always")
    plain = small_cnn()
    train(model, opt, range(60))
    train(plain, BASES[base](plain.parameters()), range(60))

    assert Phase.TRUNCATING in {sample.phase for sample in opt.history}
    assert same(weights_of(plain), weights_of(model))


def test_after_convergence_every_step_is_the_base_optimizers():
    """The ticket is frozen, no mask is drawn, and training goes on untouched."""
    model, opt = at_phase(Phase.CONVERGED)
    plain = small_cnn()
    plain.load_state_dict(model.state_dict())
    base = BASES["SGD momentum"](plain.parameters())
    base.load_state_dict(copy.deepcopy(opt.base_optim.state_dict()))
    n_masks, ticket = len(opt.history), opt.final_mask

    train(model, opt, range(300, 320))
    train(plain, base, range(300, 320))

    assert same(weights_of(plain), weights_of(model))
    assert n_masks == len(opt.history)
    assert opt.sample() == opt.history[-1]
    assert same(list(ticket.values()), list(opt.final_mask.values()))


@pytest.mark.filterwarnings("ignore:.* leaves little of")
@settings(max_examples=25)
@given(prune_ratios, scopes, st.integers(0, 2))
def test_the_ticket_is_the_mask_of_the_weights_at_convergence(ratio, scope, min_keep):
    """`final_mask` removes the smallest scales, and exactly as many as promised."""
    model, opt = wrapped(
        prune_ratio=ratio,
        scope=scope,
        min_keep=min_keep,
        stopping_point=1.0,
        sample_every=1,
        window=3,
    )
    train(model, opt, range(2))
    assert opt.final_mask is None
    train(model, opt, range(2, 3))

    ticket = opt.final_mask
    assert list(ticket) == [name for pair in zip(SCALES, SHIFTS, strict=True) for name in pair]
    if scope == "global":
        promised = min(round(ratio * 20), 20 - 2 * min_keep)
    else:
        promised = min(round(ratio * 8), 8 - min_keep) + min(round(ratio * 12), 12 - min_keep)
    assert promised == sum(int((~ticket[name]).sum()) for name in SCALES)
    for name, shift in zip(SCALES, SHIFTS, strict=True):
        mask, scale = ticket[name], model.get_parameter(name).detach().abs()
        assert torch.equal(ticket[shift], mask)
        assert mask.shape == scale.shape
        if mask.any() and not mask.all():
            assert scale[mask].min() >= scale[~mask].max()


def test_masks_that_are_handed_out_are_copies():
    """Whoever writes into a mask does not write into the search."""
    _model, opt = at_phase(Phase.CONVERGED)

    opt.final_mask["1.weight"].fill_(False)
    opt.history.clear()

    assert opt.final_mask["1.weight"].any()
    assert opt.history


def test_the_first_mask_is_drawn_after_training_began():
    """step() steps first and draws then, so that equal initial scales are never ranked."""
    model, opt = wrapped(sample_every=1)
    train(model, opt, range(1))

    assert opt.history[0].step == 1
    scales = torch.cat([model.get_parameter(name).detach().abs() for name in SCALES])
    assert len(scales.unique()) > 1
    assert torch.equal(
        torch.cat([opt.candidate_mask[name] for name in SCALES]), scales > scales.sort().values[9]
    )


@pytest.mark.parametrize("sample_every", [4, lambda step: step in (2, 3, 9), None])
def test_masks_are_drawn_when_the_schedule_says_so(sample_every):
    """Every n steps, when a callable says so, or only by hand."""
    model, opt = wrapped(sample_every=sample_every, stopping_point=0.0)
    train(model, opt, range(10))
    by_hand = opt.sample()

    steps = [sample.step for sample in opt.history]
    expected = {4: [4, 8], None: []}.get(
        sample_every if sample_every in (4, None) else 0, [2, 3, 9]
    )
    assert [*expected, 10] == steps
    assert by_hand == opt.history[-1]


@pytest.mark.parametrize("bias", [True, False])
def test_truncation_reaches_followers(bias):
    """The shift of a scale that goes is truncated with it, unless the selector leaves it out."""
    model, opt = at_phase(
        Phase.TRUNCATING, base="SGD", truncation=0.0, selector=BatchNormSelector(bias=bias)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    removed = {name: ~mask for name, mask in opt.candidate_mask.items()}
    train(model, opt, range(100, 101))

    for scale, shift in zip(SCALES, SHIFTS, strict=True):
        moved = {name: model.get_parameter(name) != before[name] for name in (scale, shift)}
        assert not moved[scale][removed[scale]].any()
        assert moved[scale][~removed[scale]].all()
        assert moved[shift][removed[scale]].any() == (not bias)


def test_part_of_a_parameter_can_be_ranked():
    """Entries outside the part are never masked, truncated or pruned."""
    model = small_cnn()
    part = Part("3.weight", view=(3, 4, 8, 3, 3), index=(slice(None), slice(1, 3)))
    chosen = lambda _: [Representative(part)]  # noqa: E731
    model, opt = wrapped("SGD", model, selector=chosen, truncation=0.0, trigger="always")
    train(model, opt, range(3))
    before = model.get_parameter("3.weight").detach().clone()
    mask = opt.candidate_mask["3.weight"]
    train(model, opt, range(3, 4))

    assert mask.view(3, 4, -1)[:, [0, 3]].all()
    assert int((~mask).sum()) == round(0.5 * 3 * 2 * 72)
    after = model.get_parameter("3.weight").detach()
    assert torch.equal((after == before), ~mask)


@pytest.mark.parametrize("base", THREE)
def test_pruned_entries_are_held_at_zero(base):
    """Momentum and weight decay move nothing that is pruned, and names and objects stay."""
    model, opt = wrapped(base, stopping_point=1.0, window=3)
    train(model, opt, range(9))
    names, parameters = list(model.state_dict()), list(model.parameters())
    opt.prune()
    opt.prune()

    for step in range(9, 30):
        train(model, opt, range(step, step + 1))
        for scale, shift in zip(SCALES, SHIFTS, strict=True):
            removed = ~opt.final_mask[scale]
            assert model.get_parameter(scale)[removed].count_nonzero() == 0
            assert model.get_parameter(shift)[removed].count_nonzero() == 0
            assert model.get_parameter(scale)[~removed].count_nonzero() == (~removed).sum()
    assert opt.phase is Phase.PRUNED
    assert opt.converged
    assert list(model.state_dict()) == names
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


def test_weights_that_are_nan_at_a_sample_raise_and_leave_the_search_alone():
    """The message names the parameter; phase, history and candidate stay as they were."""
    model, opt = at_phase(Phase.TRUNCATING)
    history, candidate = opt.history, opt.candidate_mask
    saved = opt.state_dict()
    with torch.no_grad():
        model.get_parameter("4.weight")[3] = math.nan

    with pytest.raises(ValueError, match=r"'4\.weight': it has NaN or infinite entries"):
        opt.sample()

    assert history == opt.history
    assert same(list(candidate.values()), list(opt.candidate_mask.values()))
    assert opt.phase is Phase.TRUNCATING
    assert saved["param_groups"] == opt.state_dict()["param_groups"]


def test_equal_scales_warn_once():
    """A mask that position decides says why and what to do, one time."""
    _model, opt = wrapped(sample_every=None)

    with pytest.warns(UserWarning, match=r"20 of 20 entries tie.*BatchNorm.*`sample_every`"):
        opt.sample()
    with torch.no_grad():
        for name in SCALES:
            _model.get_parameter(name).mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.sample()


def shaken(n_masks, **options):
    """A search with scales drawn anew before each mask, and what it is told at which."""
    settings = {"sample_every": None, "trigger": "always", "stopping_point": 0.01, "window": 3}
    model, opt = wrapped(**{**settings, **options})
    said = {}
    for n in range(1, n_masks + 1):
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in SCALES:
                model.get_parameter(name).uniform_()
            opt.sample()
        for each in caught:
            if "has truncated for" in str(each.message):
                assert n not in said
                said[n] = str(each.message)
    return said


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"fade": 1}, "`fade=0.1`"),
        ({"fade": 0.1}, "a smaller `fade` than 0.1"),
        ({"fade": 0.1, "scope": "layer", "truncate": "update"}, "a smaller `fade` than 0.1"),
    ],
)
def test_a_search_that_truncates_for_two_windows_says_once_what_can_be_done(options, way):
    """At the next mask: how many there were, how far apart they are, and the ways out."""
    said = shaken(20, **options)
    assert list(said) == [7]
    for part in ("for 7 masks", way, "`stopping_point` is 0.01", "`opt.prune(force=True)`"):
        assert part in said[7]
    assert not shaken(6, **options)


@pytest.mark.parametrize(
    "options", [{"truncation": 1}, {"stopping_point": 0.0}, {"trigger": "distance", "margin": 0}]
)
def test_a_search_that_truncates_nothing_or_is_not_to_stop_is_told_nothing(options):
    """Nor one that has not reached the trigger point."""
    assert not shaken(20, **options)


def test_a_resumed_search_is_told_once_too():
    """Warnings are not in checkpoints, and this one is not given again."""
    said = []
    model, opt = wrapped(sample_every=None, trigger="always", stopping_point=0.01, window=3)
    for _ in range(12):
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in SCALES:
                model.get_parameter(name).uniform_()
            opt.sample()
        said += [each for each in caught if "has truncated for" in str(each.message)]
        saved = opt.state_dict()
        opt = WormOptimizer(opt.base_optim, model, **dataclasses.asdict(opt.settings))
        opt.load_state_dict(saved)
    assert len(said) == 1


def test_few_ties_do_not_warn():
    """Where training has parted the scores, nothing is said."""
    model, opt = wrapped(sample_every=1)

    train(model, opt, range(3))


@pytest.mark.filterwarnings("default:.*normalises gradients")
def test_a_normalising_base_warns_for_gradients_only():
    """Adam undoes a scaled gradient, and says so once; not for updates, and not for r = 1."""
    model = small_cnn()
    adam = torch.optim.Adam(model.parameters())

    with pytest.warns(
        UserWarning, match='Adam normalises gradients.*`truncate="update"`'
    ) as caught:
        WormOptimizer(adam, model, truncate="gradient")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WormOptimizer(adam, model)
        WormOptimizer(adam, model, truncate="update")
        WormOptimizer(adam, model, truncation=1)


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_missing_gradients_are_inert_and_warn_once_when_all_are(truncate):
    """A frozen representative is passed over; if none has a gradient, one warning says so."""
    model, opt = at_phase(Phase.TRUNCATING, truncate=truncate)
    model.get_parameter("1.weight").requires_grad_(False)
    train(model, opt, range(100, 101))

    for name in (*SCALES, *SHIFTS):
        model.get_parameter(name).requires_grad_(False)
    with pytest.warns(UserWarning, match="No representative parameter has a gradient") as caught:
        train(model, opt, range(101, 103))
    assert len(caught) == 1


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_closure_is_truncated_as_gradients_are(truncate):
    """step(closure) equals backward() and step(): truncation comes after the closure ran."""
    plain_model, plain = wrapped(truncate=truncate, trigger="always")
    train(plain_model, plain, range(20))
    model, opt = wrapped(truncate=truncate, trigger="always")
    for step in range(20):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        loss = opt.step(closure=closure) if step % 2 else opt.step(closure)
        assert loss.item() > 0

    assert same(weights_of(plain_model), weights_of(model))
    assert plain.history == opt.history


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_mask_that_a_closure_draws_is_for_later_steps(truncate):
    """Lightning's training_step runs in a closure, and may sample: that step keeps its own mask."""
    options = {"truncate": truncate, "truncation": 0.0, "trigger": "always", "sample_every": None}
    model, opt = wrapped("SGD", stopping_point=0.0, **options)
    scale = model.get_parameter("1.weight")
    train(model, opt, range(3))
    opt.sample()
    for step in range(3, 6):
        mask, before = opt.candidate_mask["1.weight"], scale.detach().clone()

        def closure(step=step):
            opt.zero_grad()
            loss_of(model, step).backward()
            with torch.no_grad():
                scale.copy_(scale.roll(3))
            opt.sample()

        opt.step(closure)
        assert not torch.equal(mask, opt.candidate_mask["1.weight"])
        if truncate == "gradient":
            assert torch.equal(scale.grad != 0, mask)
        else:
            assert torch.equal(scale[~mask], before[~mask])


def test_a_closure_runs_with_gradients_enabled():
    """A base that leaves gradients off around its closure gets gradients all the same."""

    class Careless(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            loss = closure()
            super().step()
            return loss

    model = small_cnn()
    opt = WormOptimizer(
        Careless(model.parameters(), lr=0.1), model, trigger="always", sample_every=1
    )
    for step in range(3):

        def closure(step=step):
            opt.zero_grad()
            with torch.enable_grad() if step == 0 else contextlib.nullcontext():
                loss = loss_of(model, step)
            loss.backward()
            return loss

        opt.step(closure)

    assert len(opt.history) == 3


def test_an_optimizer_that_evaluates_often_counts_one_step():
    """LBFGS calls its closure many times; each evaluation is truncated, the step counts once."""
    model = small_cnn()
    opt = WormOptimizer(
        torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4),
        model,
        truncation=0.0,
        trigger="always",
        sample_every=1,
        **PAPER,
    )
    evaluations = []
    for step in range(4):
        # LBFGS carries directions from before; pairs of them would move truncated entries too.
        opt.state.clear()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        mask = opt.candidate_mask

        def closure(step=step):
            evaluations.append(step)
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        opt.step(closure)
        if mask is not None:
            for (name, now), then in zip(model.named_parameters(), before, strict=True):
                if name in mask:
                    assert torch.equal(now[~mask[name]], then[~mask[name]])

    assert len(evaluations) > 4
    assert [sample.step for sample in opt.history] == [1, 2, 3, 4]


def test_a_schedule_is_not_asked_after_convergence():
    """Once the ticket is found nothing is drawn, and nobody asks whether to."""
    asked = []
    model, opt = wrapped(
        sample_every=lambda step: asked.append(step) or True, stopping_point=1.0, window=2
    )
    train(model, opt, range(6))

    assert asked == [1, 2]


def test_a_search_may_start_on_the_meta_device():
    """Wrapped before its weights exist, a network is searched once they do."""
    with torch.device("meta"):
        model = small_cnn()
    opt = WormOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sample_every=1)
    model.to_empty(device=training.DEVICE)
    model.load_state_dict(small_cnn().state_dict())
    opt.param_groups[0]["params"] = list(model.parameters())
    train(model, opt, range(3))

    assert len(opt.history) == 3


def test_the_default_device_does_not_matter():
    """With another default device masks are drawn where the weights are."""
    model, opt = wrapped(sample_every=1, scope="layer", stopping_point=0.0)
    torch.set_default_device("meta")
    try:
        for _ in range(6):
            for parameter in model.parameters():
                parameter.grad = torch.rand(parameter.shape, device=training.DEVICE)
            opt.step()
        opt.prune(force=True)
        opt.load_state_dict(opt.state_dict())
        opt.step()
    finally:
        torch.set_default_device(None)

    assert len(opt.history[-1].distances) == 3
    for name, mask in opt.final_mask.items():
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_masks_may_be_drawn_in_inference_mode(truncate):
    """A mask drawn in inference mode, after validation, leaves nothing that is read-only."""
    model, opt = wrapped(truncate=truncate, trigger="always", sample_every=None, stopping_point=0.0)
    for step in range(4):
        train(model, opt, range(step, step + 1))
        with torch.inference_mode():
            opt.sample()
        train(model, opt, range(step, step + 1))
        opt.sample()

    assert len(opt.history) == 8


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_step_may_be_taken_in_inference_mode(truncate):
    """What a step makes there is made anew outside of it."""
    model, opt = at_phase(Phase.TRUNCATING, truncate=truncate)
    train(model, opt, range(99, 100))
    opt.sample()
    with torch.inference_mode():
        opt.step()
    train(model, opt, range(100, 102))

    assert opt.phase.value in ("truncating", "converged")


@pytest.mark.parametrize("n_equal", [50, 51])
def test_more_than_a_twentieth_must_tie_for_a_warning(n_equal):
    """Fifty of a thousand entries are 5 %, which is not more than 5 %; fifty-one are."""
    model = nn.BatchNorm1d(1000)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 1001.0))
        model.weight[480 : 480 + n_equal] = 500.0
    opt = WormOptimizer(torch.optim.SGD(model.parameters()), model, sample_every=None)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.sample()
    assert len(caught) == (n_equal == 51)


@pytest.mark.parametrize("fade", [1, 0.9])
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_search_with_sparse_gradients_is_that_with_dense_ones(truncate, fade):
    """Rows that are looked up are truncated by the newest mask, whatever those before it were."""
    runs = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Embedding(9, 4, sparse=sparse)
        opt = WormOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.5),
            model,
            ParameterSelector("*"),
            sample_every=1,
            stopping_point=0.0,
            trigger="always",
            truncation=0.25,  # an exact factor, so that bits do not depend on when rows are added
            truncate=truncate,
            fade=fade,
        )
        masks = []
        for step in range(12):
            opt.zero_grad()
            rows = torch.tensor([step % 9, 3, 3, (step * 5) % 9])
            (model(rows) * torch.arange(16.0).view(4, 4).cos()).sum().backward()
            opt.step()
            masks.append(opt.candidate_mask["weight"])
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 3
        runs.append((model.weight.detach(), opt.history))

    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_step_is_not_captured_in_a_cuda_graph(monkeypatch):
    """A replay would run no search; the error says what to capture, and nothing has changed."""
    model, opt = wrapped()
    loss_of(model, 0).backward()
    before = weights_of(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    with pytest.raises(
        RuntimeError, match="Capture forward and backward, and call step\\(\\) after"
    ):
        opt.step()

    assert same(before, weights_of(model))
    assert record_of(opt.state_dict())["step"] == 0


def test_pruning_that_fails_leaves_everything_as_it_was():
    """A layer that was cut by another tool stops prune(); put back, the ticket is applied."""
    model, opt = at_phase(Phase.CONVERGED)
    before, old = weights_of(model), model[4]
    model[4] = nn.BatchNorm2d(5)

    with pytest.raises(RuntimeError, match=r"'4.weight' has shape \(5,\), and had \(12,\)"):
        opt.prune()

    model[4] = old
    assert opt.phase is Phase.CONVERGED
    assert same(before, weights_of(model))
    opt.prune()
    assert opt.phase is Phase.PRUNED
    for name, mask in opt.final_mask.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_an_error_inside_a_property_is_not_the_bases():
    """A module that is gone is named, not the base optimizer, which never had a ticket."""
    model, opt = at_phase(Phase.CONVERGED)
    model[4] = nn.Identity()

    for use in (lambda: opt.final_mask, lambda: opt.candidate_mask, opt.prune):
        with pytest.raises(RuntimeError, match=r"'4.weight' is gone, .* Build WormOptimizer after"):
            use()


@pytest.mark.parametrize("phase", [Phase.SEARCHING, Phase.TRUNCATING, Phase.PRUNED])
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_further_arguments_of_step_reach_the_base(phase, truncate):
    """Second-order optimizers take their curvature as an argument of step()."""

    class SecondOrder(torch.optim.SGD):
        def step(self, closure=None, *, hessian=None):
            seen.append(hessian)
            return super().step(closure)

    seen = []
    model = small_cnn()
    base = SecondOrder(model.parameters(), lr=0.1)
    opt = WormOptimizer(
        base, model, window=2, sample_every=None, truncate=truncate, trigger="always"
    )
    loss_of(model, 0).backward()
    opt.step(hessian="first")
    if phase is Phase.TRUNCATING:
        opt.sample()
    if phase is Phase.PRUNED:
        sample_twice(opt), opt.prune()
    assert opt.phase is phase
    opt.step(hessian="second")
    opt.step(lambda: 1.0, hessian="third")

    assert seen == ["first", "second", "third"]


def test_warnings_point_at_the_users_line():
    """Whoever reads a warning sees a line of their own, however deep it came up."""
    model = small_cnn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adam = torch.optim.Adam(model.parameters())
        adam = WormOptimizer(adam, model, sample_every=1, truncate="gradient")
        torch.optim.lr_scheduler.StepLR(adam, 1)
        other = WormOptimizer(
            torch.optim.SGD(model.parameters()), model, trigger="always", sample_every=1
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in (*SCALES, *SHIFTS))
        for _ in range(3):
            loss_of(model, 0).backward()
            other.step()

    topics = ("normalises gradients", "tie for the mask", "has a gradient", "has moved since")
    assert [sum(topic in str(each.message) for each in caught) for topic in topics] == [1] * 4
    assert {each.filename for each in caught} == {__file__}


class _Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_a_step_between_samples_waits_for_nothing(truncate):
    """What truncation adds to a step are views and operators on the device, and no read-back."""
    model, opt = at_phase(Phase.TRUNCATING, truncate=truncate, sample_every=3)
    plain = small_cnn()
    base = BASES["SGD momentum"](plain.parameters())
    train(plain, base, range(2))
    train(model, opt, range(100, 101))
    loss_of(model, 0).backward()
    loss_of(plain, 0).backward()

    with _Recorder() as with_worm:
        opt.step()
    with _Recorder() as without:
        base.step()

    added = list(with_worm.operators)
    for name in without.operators:
        added.remove(name)
    views = {"aten::detach", "aten::view", "aten::slice", "aten::alias"}
    on_device = {
        "gradient": {"aten::_foreach_mul_"},
        "update": {
            "aten::clone",
            "aten::lerp_",
            *(f"aten::bitwise_{name}" for name in ("not", "and_", "or_")),
        },
    }[truncate]
    assert on_device & set(added)
    assert {name for name in added if not name.startswith("profiler")} <= views | on_device


@pytest.mark.parametrize(
    "options",
    [{"margin": 0.0, "stopping_point": 0.0}, {"trigger": "always", "truncation": 1}],
    ids=["searching", "EB Train"],
)
def test_a_step_that_truncates_nothing_runs_nothing_more(options):
    """While searching, and in EB Train, a step runs the base optimizer's operators alone."""
    model, opt = wrapped(**options)
    plain = small_cnn()
    base = BASES["SGD momentum"](plain.parameters())
    for each, optimizer in ((model, opt), (plain, base)):
        train(each, optimizer, range(3))
        loss_of(each, 3).backward()

    with _Recorder() as with_worm:
        opt.step()
    with _Recorder() as without:
        base.step()

    # The profiler's label stands around the step of each optimizer: one more for the wrapper.
    assert [name for name in with_worm.operators if not name.startswith("profiler")] == [
        name for name in without.operators if not name.startswith("profiler")
    ]


def test_repr_tells_phase_and_distances():
    """Whoever prints the optimizer sees how far it is."""
    _, opt = wrapped()
    assert "phase: searching" in repr(opt)
    assert "max_distance" not in repr(opt)

    _, opt = at_phase(Phase.TRUNCATING)
    text = repr(opt)
    assert "phase: truncating" in text
    assert f"max_distance: {opt.history[-1].max_distance:.4f} (converged below 0.06)" in text
    assert "base_optim: SGD" in text


def test_several_devices_or_dtypes_share_one_mask():
    """Half-precision scales beside full ones are ranked together."""
    model = small_cnn()
    model[4].to(torch.bfloat16)
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        ParameterSelector("*.weight"),
        sample_every=1,
    )
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    opt.step()

    n = sum(mask.numel() for mask in opt.candidate_mask.values())
    assert sum(int((~mask).sum()) for mask in opt.candidate_mask.values()) == round(0.5 * n)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.cuda
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_cuda_steps_between_samples_do_not_wait(truncate):
    """On CUDA, a truncated step never synchronises with the host."""
    model = small_cnn().cuda()
    model, opt = wrapped(model=model, truncate=truncate, trigger="always", sample_every=50)
    train(model, opt, range(51))
    assert opt.phase is Phase.TRUNCATING
    loss_of(model, 51).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
