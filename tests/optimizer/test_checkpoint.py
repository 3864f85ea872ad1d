"""Stopping and going on, copies, and checkpoints that cannot be loaded."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from training import BASES, same, sample_twice, small_cnn, train, weights_of, window_of

from torch_worm_optim import (
    BatchNormSelector,
    ParameterSelector,
    Part,
    Phase,
    QueryKeySelector,
    Representative,
    WormOptimizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises gradients")

SEARCH = {"sample_every": 3, "window": 4, "stopping_point": 0.06, "margin": 0.2}
N_STEPS = 36


def build(base: str = "SGD momentum", **options):
    """A small network and its wrapped optimizer, the same on every call."""
    model = small_cnn()
    return model, WormOptimizer(BASES[base](model.parameters()), model, **{**SEARCH, **options})


def through_a_file(value):
    """What comes back from disk, read in the safe way."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def uninterrupted(base, truncate, prune_at, over, window):
    """Weights, history and phase of a run that is never stopped."""
    model, opt = build(base, truncate=truncate, window=window)
    for step in range(N_STEPS):
        train(model, opt, range(step, step + 1))
        if step >= prune_at and opt.converged:
            opt.prune(over)
    return model, opt


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(BASES)),
    st.sampled_from(["gradient", "update"]),
    st.sets(st.integers(0, N_STEPS - 1), max_size=5),
    st.integers(0, N_STEPS),
    st.sampled_from([0, 3, 20]),
    st.sampled_from([2, 4, 9]),
)
@example("SGD momentum", "gradient", set(range(N_STEPS)), 30, 0, 4)
@example("SGD momentum", "gradient", set(range(N_STEPS)), 30, 3, 4)
@example("AdamW", "update", set(range(N_STEPS)), 30, 0, 4)
@example("AdamW", "update", set(range(N_STEPS)), 30, 20, 4)
def test_stopping_and_going_on_equals_not_stopping(base, truncate, stops, prune_at, over, window):
    """At whatever points a run is saved and loaded, weights, masks and history keep their bits."""
    twin, through = uninterrupted(base, truncate, prune_at, over, window)

    model, opt = build(base, truncate=truncate, window=window)
    for step in range(N_STEPS):
        if step in stops:
            saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
            model, opt = build(base, truncate=truncate, window=window)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
        train(model, opt, range(step, step + 1))
        if step >= prune_at and opt.converged:
            opt.prune(over)

    assert same(weights_of(twin), weights_of(model))
    assert through.history == opt.history
    assert through.phase is opt.phase
    assert same(list(through.candidate_mask.values()), list(opt.candidate_mask.values()))


def test_a_saved_state_does_not_change_under_training():
    """The window in a state_dict is a snapshot; later masks are not written into it."""
    model, opt = build(sample_every=1)
    train(model, opt, range(3))
    saved = opt.state_dict()
    window = window_of(saved)
    train(model, opt, range(3, 6))

    assert torch.equal(window, window_of(saved))
    assert len(json.loads(saved["param_groups"][0]["worm"]["history"])) == 3


def test_a_plain_checkpoint_loads_and_the_search_starts_afresh():
    """The base optimizer's own checkpoint restores its state; masks are forgotten."""
    model, opt = build()
    train(model, opt, range(14))
    plain = BASES["SGD momentum"](model.parameters())
    train(model, plain, range(2))

    opt.load_state_dict(through_a_file(plain.state_dict()))

    assert opt.phase is Phase.SEARCHING
    assert opt.history == []
    assert opt.candidate_mask is None
    parameter = model[0].weight
    assert torch.equal(
        opt.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"]
    )
    assert all("worm" in group for group in opt.param_groups)
    assert not window_of(opt.state_dict()).any()
    train(model, opt, range(3))
    assert [sample.step for sample in opt.history] == [3]


def test_our_checkpoint_loads_into_the_plain_base_optimizer():
    """Whoever goes back to the plain optimizer trains on as the wrapped one would."""
    model, opt = build(stopping_point=1.0)
    train(model, opt, range(14))
    twin = small_cnn()
    twin.load_state_dict(model.state_dict())
    plain = BASES["SGD momentum"](twin.parameters())
    plain.load_state_dict(through_a_file(opt.state_dict()))

    train(model, opt, range(14, 20))
    train(twin, plain, range(14, 20))

    assert same(weights_of(model), weights_of(twin))


def test_names_are_saved_without_what_wrappers_add():
    """A search saved from a wrapped model loads into the bare one, and the other way round."""
    inner = small_cnn()
    model = nn.Sequential()
    model.add_module("module", inner)
    opt = WormOptimizer(BASES["SGD"](model.parameters()), model, **SEARCH)
    identity = json.loads(opt.state_dict()["param_groups"][0]["worm"]["identity"])
    assert identity["parameters"] == [["1.weight"], ["4.weight"]]

    bare = small_cnn()
    other = WormOptimizer(BASES["SGD"](bare.parameters()), bare, **SEARCH)
    other.load_state_dict(opt.state_dict())
    opt.load_state_dict(other.state_dict())


def spoil_window(record):
    """Cut the window short."""
    record["window"]["4.weight"] = [row[:7] for row in record["window"]["4.weight"]]


def spoil_rows(record):
    """Take the window of one parameter out."""
    del record["window"]["1.weight"]


def spoil_history(record):
    """Make the last row of the history too short."""
    rows = json.loads(record["history"])
    record["history"] = json.dumps([*rows[:-1], rows[-1][:2]])


def spoil_text(record):
    """Cut the history short."""
    record["history"] = record["history"][:-3]


def spoil_phase(record):
    """Name a phase that there is not."""
    record["history"] = record["history"].replace("searching", "lost")


def spoil_distances(record):
    """Add a mask that was compared with fewer than the window holds."""
    rows = json.loads(record["history"])
    record["history"] = json.dumps([*rows, [1, [0.5], 0.5, 0.5, "searching"]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.pop("window"), "truncated: it has no window"),
        (lambda record: record.pop("history"), "truncated: it has no history"),
        (lambda record: record.clear(), "truncated: it has no version, step"),
        (lambda record: record.update(version=99), "version 99, this release reads 2"),
        (lambda record: record.update(step=None), "cannot be read"),
        (lambda record: record.update(identity=None), "cannot be read"),
        (lambda record: record.update(identity="{}"), "saved for other masks"),
        (spoil_text, "cannot be read"),
        (lambda record: record.update(pruned=True), "ticket is applied, and has none"),
        (lambda record: record.update(fading_steps=2), "ticket is applied, and has none"),
        (lambda record: record.update(fading_steps=-1), "cannot be read"),
        (lambda record: record.update(fading_steps=None), "cannot be read"),
        (lambda record: record.update(fading_steps=2, pruned=True), "cannot be read"),
        (spoil_window, r"no 1 tensors of shape \(12,\) for '4.weight'"),
        (spoil_rows, r"no 1 tensors of shape \(8,\) for '1.weight'"),
        (spoil_history, "cannot be read"),
        (spoil_phase, "cannot be read"),
        (spoil_distances, "does not fit"),
    ],
)
def test_a_spoilt_record_is_refused_and_changes_nothing(spoil, message):
    """A truncated or foreign record raises, with optimizer, search and model as they were."""
    model, opt = build()
    train(model, opt, range(14))
    bad = through_a_file(opt.state_dict())
    bad["param_groups"][0]["lr"] = 77.0
    spoil(bad["param_groups"][0]["worm"])
    before = copy.deepcopy(opt.state_dict())
    opt.register_load_state_dict_pre_hook(lambda _, saved: saved.update(note=1))

    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(bad)
    assert "note" not in bad

    after = opt.state_dict()
    assert before["param_groups"][0]["lr"] == after["param_groups"][0]["lr"] == 0.05
    assert torch.equal(window_of(before), window_of(after))
    was, now = (each["param_groups"][0]["worm"] for each in (before, after))
    was.pop("window"), now.pop("window")
    assert was == now


def test_a_record_from_before_there_was_a_fade_loads():
    """What it lacks is that nothing fades, whether its ticket was applied or not."""
    for pruned in (False, True):
        model, opt = build(stopping_point=1.0)
        train(model, opt, range(14))
        if pruned:
            opt.prune()
        saved = through_a_file(opt.state_dict())
        del saved["param_groups"][0]["worm"]["fading_steps"]
        _, other = build(stopping_point=1.0)
        other.load_state_dict(saved)

        assert other.phase is opt.phase is (Phase.PRUNED if pruned else Phase.CONVERGED)
        assert other.history == opt.history


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_a_truncated_state_dict_is_refused(key):
    """A state_dict without one of its two keys says which is missing."""
    _, opt = build()
    bad = opt.state_dict()
    del bad[key]

    with pytest.raises(ValueError, match=f"truncated: it has no '{key}'"):
        opt.load_state_dict(bad)


def test_what_is_not_a_state_dict_is_refused():
    """Loading a path or a model is a mix-up."""
    _, opt = build()

    with pytest.raises(TypeError, match="must be a dict, got str"):
        opt.load_state_dict("checkpoint.pt")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"prune_ratio": 0.3}, "prune_ratio"),
        ({"window": 5}, "window"),
        ({"scope": "layer"}, "scope"),
        ({"min_keep": 2}, "min_keep"),
        ({"selector": lambda model: BatchNormSelector()(model)[::-1]}, "parameters"),
        ({"selector": BatchNormSelector(bias=False)}, "followers"),
        (
            {"selector": lambda _: [Representative(Part("8.weight", index=(slice(0, 2),)))]},
            "parameters",
        ),
    ],
)
def test_masks_drawn_otherwise_are_refused(options, key):
    """Masks of another rule cannot stand in one window with ours; the message says which."""
    _, opt = build()
    _, other = build(**options)

    with pytest.raises(ValueError, match=f"saved for other masks: its `{key}`"):
        opt.load_state_dict(other.state_dict())


def test_another_part_of_the_same_size_is_refused():
    """Two parts of one parameter are two searches, however alike their sizes."""
    parts = [slice(0, 1), slice(1, 2)]
    one, other = (
        build(selector=lambda _, part=part: [Representative(Part("8.weight", index=(part,)))])[1]
        for part in parts
    )

    with pytest.raises(ValueError, match="saved for other masks: its `parts`"):
        one.load_state_dict(other.state_dict())


def test_loading_while_truncating_truncates_by_the_loaded_mask():
    """The multipliers of the mask before are not used with the mask that was loaded."""
    options = {"truncation": 0.0, "trigger": "always", "stopping_point": 0.0}
    model, opt = build("SGD", **options)
    train(model, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    mask = opt.candidate_mask["1.weight"]
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.flip(0))
    opt.sample()
    train(model, opt, range(3, 4))
    assert not torch.equal(mask, opt.candidate_mask["1.weight"])

    opt.load_state_dict(saved)
    before = model[1].weight.detach().clone()
    train(model, opt, range(4, 5))

    assert torch.equal(model[1].weight.detach() == before, ~mask)


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("phase", [Phase.TRUNCATING, Phase.FADING, Phase.PRUNED])
def test_loading_replaces_all_that_came_from_the_masks_before(truncate, phase):
    """What steps derived from the newest mask they derive anew from the one that is loaded."""
    options = {"truncation": 0.0, "trigger": "always", "truncate": truncate}
    converges = phase is not Phase.TRUNCATING
    options |= {"sample_every": None, "stopping_point": float(converges), "window": 2}
    options |= {"selector": lambda _: [Representative("1.weight")]}
    runs = []
    for flip in (False, True):
        model, opt = build("SGD", **options)
        with torch.no_grad():
            model[1].weight.copy_(torch.arange(8.0, 0.0, -1.0) if flip else torch.arange(1.0, 9.0))
        sample_twice(opt)
        if converges:
            opt.prune(over=6 if phase is Phase.FADING else 0)
        train(model, opt, range(2))
        runs.append((model, opt, copy.deepcopy(opt.state_dict())))
    (model, opt, _), (_, other, saved) = runs
    mask = other.candidate_mask["1.weight"]
    assert not torch.equal(mask, opt.candidate_mask["1.weight"])

    opt.load_state_dict(saved)
    nn.init.uniform_(model[1].weight, 1.0, 2.0)
    before = model[1].weight.detach().clone()
    train(model, opt, range(2, 3))

    assert torch.equal(opt.candidate_mask["1.weight"], mask)
    after = model[1].weight.detach()
    share = {Phase.TRUNCATING: 1.0, Phase.FADING: 0.75, Phase.PRUNED: 0.0}[phase]
    assert opt.phase is phase
    assert torch.equal(after[~mask], before[~mask] * share)
    assert not (after[mask] == before[mask]).any()


def test_a_checkpoint_of_another_model_is_refused():
    """Another width is another search, even where the base optimizer would not notice."""
    _, opt = build()
    wide = nn.Sequential(*[copy.deepcopy(layer) for layer in small_cnn()])
    wide[4] = nn.BatchNorm2d(24)
    other = WormOptimizer(BASES["SGD momentum"](wide.parameters()), wide, **SEARCH)

    with pytest.raises(ValueError, match="saved for other masks: its `sizes`"):
        opt.load_state_dict(other.state_dict())


def test_thresholds_and_cadence_are_those_of_the_loading_optimizer():
    """Only what the held masks depend on must be the same."""
    model, opt = build()
    train(model, opt, range(14))
    _, other = build(stopping_point=0.9, margin=0.0, truncation=0.5, sample_every=7)

    other.load_state_dict(opt.state_dict())

    assert other.history == opt.history


def copied(pair, how):
    """A copy of model and optimizer, made together."""
    return copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))


# Before 2.6, torch warned of its own way to unpickle a tensor.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("fading", [False, True])
def test_a_copy_goes_its_own_way(how, with_scheduler, fading):
    """A copy of model and optimizer trains the copy, as the original would, and leaves it alone."""
    model, opt = build(stopping_point=1.0 if fading else 0.06)
    if with_scheduler:
        torch.optim.lr_scheduler.StepLR(opt, 1000)
    steps = []
    opt.register_step_post_hook(lambda *_: steps.append(1))
    train(model, opt, range(12))
    if fading:
        opt.prune(over=10)
    train(model, opt, range(12, 14))

    other_model, other = copied((model, opt), how)
    before = weights_of(model)
    train(other_model, other, range(14, N_STEPS))
    assert same(before, weights_of(model))
    assert len(steps) == 14  # hooks stay with the original, as those of torch's optimizers do

    train(model, opt, range(14, N_STEPS))
    assert same(weights_of(model), weights_of(other_model))
    assert opt.history == other.history
    assert opt.phase is other.phase
    assert (opt.phase is Phase.PRUNED) == fading


def test_a_search_over_units_resumes():
    """Units of several parameters, and biases, go on bit for bit; other units are refused."""

    def build(granularity):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v")})
        model.num_heads = 2
        opt = WormOptimizer(
            torch.optim.SGD(model.parameters(), 0.5),
            model,
            QueryKeySelector(granularity=granularity),
            sample_every=1,
            window=3,
            trigger="always",
            stopping_point=0,
        )
        return model, opt

    def train(model, opt, steps):
        for step in steps:
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            (model["q"](x) * model["k"](x) * model["v"](x)).square().mean().backward()
            opt.step()

    whole, other = build("dim"), build("dim")
    train(*whole, range(8))
    train(*other, range(4))
    saved = io.BytesIO()
    torch.save([other[0].state_dict(), other[1].state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    resumed = build("dim")
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    train(*resumed, range(4, 8))

    assert resumed[1].history == whole[1].history
    for name, parameter in whole[0].named_parameters():
        assert parameter.equal(resumed[0].get_parameter(name))
    with pytest.raises(ValueError, match="saved for other masks: its `parts`"):
        build("head")[1].load_state_dict(state)


class Attention(nn.MultiheadAttention):
    """Attention of a sequence to itself, with a fused matrix of queries, keys and values."""

    def forward(self, x):
        """The mixed values."""
        return super().forward(x, x, x)[0]


def transposed():
    """A Linear layer whose weight is stored column by column."""
    linear = nn.Linear(6, 8)
    linear.weight = nn.Parameter(torch.rand(6, 8).t())
    return linear


SLICED = Representative(Part("weight", index=(slice(0, 4), slice(1, 6, 2))))
INTERLEAVED = Representative(Part("weight", view=(4, 2, 6), index=(slice(None), slice(0, 1))))


@pytest.mark.parametrize(
    ("make", "selector", "shape"),
    [
        (lambda: Attention(8, 2), QueryKeySelector(), (3, 1, 8)),
        (lambda: Attention(8, 2), QueryKeySelector(granularity="head", value=True), (3, 1, 8)),
        (small_cnn, BatchNormSelector(), (4, 1, 6, 6)),
        (
            lambda: small_cnn().to(memory_format=torch.channels_last),
            ParameterSelector("?.weight", granularity="row"),
            (4, 1, 6, 6),
        ),
        (lambda: nn.Linear(6, 8), lambda _: [SLICED], (3, 6)),
        (transposed, lambda _: [INTERLEAVED], (3, 6)),
    ],
)
@pytest.mark.filterwarnings("ignore:The ticket leaves little")
def test_masks_go_into_safetensors(tmp_path, make, selector, shape):
    """Which takes contiguous tensors only, and none that share memory."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = WormOptimizer(sgd, model, selector, sample_every=1, window=2, stopping_point=1.0)
    while not opt.converged:
        opt.zero_grad()
        model(torch.rand(shape)).square().mean().backward()
        opt.step()

    for masks in (opt.final_mask, opt.ticket):
        safetensors.save_file(masks, tmp_path / "masks")
        loaded = safetensors.load_file(tmp_path / "masks")
        assert loaded.keys() == masks.keys()
        assert all(torch.equal(mask, masks[name]) for name, mask in loaded.items())
