"""Stopping and going on, copies, and checkpoints that cannot be loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import training
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from training import (
    BASES,
    SEARCH,
    at_phase,
    record_of,
    same,
    sample_twice,
    small_cnn,
    through_a_file,
    train,
    weights_of,
    with_record,
    wrapped,
)

from torch_worm_optim import (
    BatchNormSelector,
    ParameterSelector,
    Part,
    Phase,
    QueryKeySelector,
    Representative,
    WormOptimizer,
    load_shrunk_,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:The search has truncated for"
)

N_STEPS = 36


def uninterrupted(base, prune_at, force, **options):
    """A run that is never stopped, and prunes as soon as it can from some step on."""
    model, opt = wrapped(base, **options)
    for step in range(N_STEPS):
        train(model, opt, range(step, step + 1))
        if step >= prune_at and (opt.converged or (force and opt.history)):
            opt.prune(force)
    return model, opt


@settings(max_examples=15)
@given(
    st.sampled_from(["SGD momentum", "AdamW", "RMSprop"]),
    st.sampled_from(["gradient", "update"]),
    st.sets(st.integers(0, N_STEPS - 1), max_size=5),
    st.integers(0, N_STEPS),
    st.booleans(),
    st.sampled_from([2, 4, 9]),
    st.sampled_from([1, 0.1]),
)
@example("SGD momentum", "gradient", set(range(N_STEPS)), 30, False, 4, 1)
@example("AdamW", "update", set(range(N_STEPS)), 12, True, 4, 0.1)
def test_stopping_and_going_on_equals_not_stopping(
    base, truncate, stops, prune_at, force, window, fade
):
    """At whatever points a run is saved and loaded, weights, masks and history keep their bits."""
    options = {"truncate": truncate, "window": window, "fade": fade}
    twin, through = uninterrupted(base, prune_at, force, **options)

    model, opt = wrapped(base, **options)
    for step in range(N_STEPS):
        if step in stops:
            saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
            model, opt = wrapped(base, **options)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
        train(model, opt, range(step, step + 1))
        if step >= prune_at and (opt.converged or (force and opt.history)):
            opt.prune(force)

    assert same(weights_of(twin), weights_of(model))
    assert through.history == opt.history
    assert through.phase is opt.phase
    assert same(list(through.candidate_mask.values()), list(opt.candidate_mask.values()))


def test_a_saved_state_does_not_change_under_training():
    """The record in a state_dict is a snapshot; later masks are not written into it."""
    model, opt = wrapped(sample_every=1)
    train(model, opt, range(3))
    saved = opt.state_dict()
    before = copy.deepcopy(saved["param_groups"])
    train(model, opt, range(3, 6))

    assert before == saved["param_groups"]
    assert len(record_of(saved)["history"]) == 3


def test_a_plain_checkpoint_loads_and_the_search_starts_afresh():
    """The base optimizer's own checkpoint restores its state; masks are forgotten."""
    model, opt = wrapped()
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
    assert record_of(opt.state_dict())["search"]["rows"] == []
    train(model, opt, range(3))
    assert [sample.step for sample in opt.history] == [3]


def test_our_checkpoint_loads_into_the_plain_base_optimizer():
    """Whoever goes back to the plain optimizer trains on as the wrapped one would."""
    model, opt = wrapped(stopping_point=1.0)
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
    identity = record_of(opt.state_dict())["search"]["identity"]
    assert "module" not in str(identity)

    bare = small_cnn()
    other = WormOptimizer(BASES["SGD"](bare.parameters()), bare, **SEARCH)
    other.load_state_dict(opt.state_dict())
    opt.load_state_dict(other.state_dict())


def without(*keys):
    """Takes something out of a record."""

    def spoil(record):
        *path, last = keys
        for key in path:
            record = record[key]
        del record[last]

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("version"), "cannot be read"),
        (without("step"), "cannot be read"),
        (without("phase"), "cannot be read"),
        (without("history"), "cannot be read"),
        (without("search"), "cannot be read"),
        (without("ticket"), "cannot be read"),
        (without("search", "rows"), "cannot be read"),
        (without("search", "fingerprints"), "cannot be read"),
        (without("search", "identity", "window"), "saved for other masks: its `window` is None"),
        (lambda record: record.update(version=99), "version 99, this release reads 3"),
        (lambda record: record.update(step=None), "cannot be read"),
        (lambda record: record.update(phase="fading"), "cannot be read.*'fading'"),
        (lambda record: record["search"].update(identity=None), "cannot be read"),
        (lambda record: record["search"].update(rows=[[True]]), "cannot be read"),
        (lambda record: record["history"].append([1, [0.5], 0.5]), "cannot be read"),
        (lambda record: record.update(ticket={}), "cannot be read"),
    ],
)
def test_a_spoilt_record_is_refused_and_changes_nothing(spoil, message):
    """A truncated or foreign record raises, with optimizer, search and model as they were."""
    model, opt = wrapped()
    train(model, opt, range(14))
    saved = through_a_file(opt.state_dict())
    record = record_of(saved)
    spoil(record)
    is_refused(model, opt, with_record(saved, record), message)


@pytest.mark.parametrize("phase", [Phase.TRUNCATING, Phase.PRUNED])
def test_a_record_that_is_cut_short_is_refused(phase):
    """Wherever a file ends, what is left of the record cannot be read."""
    model, opt = at_phase(phase)
    saved = opt.state_dict()
    first, *others = saved["param_groups"]
    n = len(first["worm"])
    for length in (0, 1, 4, 100, n // 3, n // 2, n - 100, n - 4, n - 1):
        group = {**first, "worm": first["worm"][:length]}
        is_refused(model, opt, {**saved, "param_groups": [group, *others]}, "cannot be read")


@pytest.mark.parametrize("record", [{"version": 2, "step": 3}, ["a"], 1.0, b"bytes"])
def test_a_record_of_another_form_is_refused(record):
    """Such as those of releases before this one, which were dicts; the message says what to do."""
    model, opt = wrapped()
    train(model, opt, range(14))
    saved = through_a_file(opt.state_dict())
    saved["param_groups"][0]["worm"] = record
    message = rf"is a {type(record).__name__}, not a string\. Delete 'worm' from its first param"
    is_refused(model, opt, saved, message)

    del saved["param_groups"][0]["worm"]
    opt.load_state_dict(saved)
    assert opt.history == []


def is_refused(model, opt, bad, message):
    """Loading raises this, and optimizer, search and model are as they were."""
    bad["param_groups"][0]["lr"] = 77.0
    before, weights = copy.deepcopy(opt.state_dict()), weights_of(model)
    phase, history, masks = opt.phase, opt.history, opt.candidate_mask
    opt.register_load_state_dict_pre_hook(lambda _, saved: saved.update(note=1))

    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(bad)

    assert "note" not in bad
    assert opt.param_groups[0]["lr"] == 0.05
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    for ours, theirs in zip(
        opt.state_dict()["state"].values(), before["state"].values(), strict=True
    ):
        assert same(list(ours.values()), list(theirs.values()))
    assert (opt.phase, opt.history) == (phase, history)
    assert same(list(opt.candidate_mask.values()), list(masks.values()))
    assert same(weights_of(model), weights)


def test_a_ticket_loads_wherever_its_parameters_fit():
    """Whatever search it came from; another shape, or a name that is not there, is refused."""
    for phase in (Phase.CONVERGED, Phase.PRUNED):
        model, opt = at_phase(phase)
        saved = through_a_file(opt.state_dict())
        ways = [{"prune_ratio": 0.3, "window": 9, "scope": "layer"}, {}]
        ways += [{"selector": ParameterSelector("8.*")}, {"ticket": small_ticket()}]
        for options in ways:
            other_model, other = wrapped(**options)
            other_model.load_state_dict(model.state_dict())
            other.load_state_dict(copy.deepcopy(saved))
            assert other.phase is phase
            assert other.history == opt.history
            assert other.kept_counts() == opt.kept_counts()
            assert same(list(other.final_mask.values()), list(opt.final_mask.values()))
            other.prune()
            assert not any(
                other_model.get_parameter(name)[~mask].any()
                for name, mask in opt.final_mask.items()
            )

    wide, renamed = small_cnn(), nn.Sequential(nn.Identity(), *small_cnn())
    wide[4] = nn.BatchNorm2d(24)
    for network, message in (
        (wide, r"'4\.weight' has shape \(12,\); it has \(24,\) in this one"),
        (renamed, r"'1\.weight' has shape \(8,\); it has \(8, 1, 3, 3\) in this one"),
    ):
        other = wrapped(model=network)[1]
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(copy.deepcopy(saved))
        assert other.state_dict() == before
        assert other.phase is Phase.SEARCHING


def small_ticket():
    """A ticket of one shift."""
    return {"1.bias": torch.arange(8) > 0}


def test_a_search_does_not_load_where_a_ticket_was_given():
    """There is nothing that could draw its masks; the message says what to build."""
    _, opt = at_phase(Phase.TRUNCATING)
    other = wrapped(ticket=small_ticket())[1]
    before = other.state_dict()

    with pytest.raises(ValueError, match="Build the network and WormOptimizer anew, without `tick"):
        other.load_state_dict(opt.state_dict())
    assert other.state_dict() == before
    assert other.phase is Phase.PRUNED


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_a_truncated_state_dict_is_refused(key):
    """A state_dict without one of its two keys says which is missing."""
    _, opt = wrapped()
    bad = opt.state_dict()
    del bad[key]

    with pytest.raises(ValueError, match=f"truncated: it has no '{key}'"):
        opt.load_state_dict(bad)


def test_what_is_not_a_state_dict_is_refused():
    """Loading a path or a model is a mix-up."""
    _, opt = wrapped()

    with pytest.raises(TypeError, match="must be a dict, got str"):
        opt.load_state_dict("checkpoint.pt")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"prune_ratio": 0.3}, "prune_ratio"),
        ({"window": 5}, "window"),
        ({"scope": "layer"}, "scope"),
        ({"min_keep": 2}, "min_keep"),
        ({"selector": lambda model: BatchNormSelector()(model)[::-1]}, "representatives"),
        ({"selector": BatchNormSelector(bias=False)}, "representatives"),
        (
            {"selector": lambda _: [Representative(Part("8.weight", index=(slice(0, 2),)))]},
            "representatives",
        ),
    ],
)
def test_masks_drawn_otherwise_are_refused(options, key):
    """Masks of another rule cannot stand in one window with ours; the message says which."""
    _, opt = wrapped()
    other_model, other = wrapped(**options)
    train(other_model, other, range(3))
    before = opt.state_dict()

    with pytest.raises(ValueError, match=f"saved for other masks: its `{key}`"):
        opt.load_state_dict(other.state_dict())
    assert opt.state_dict() == before


def test_another_part_of_the_same_size_is_refused():
    """Two parts of one parameter are two searches, however alike their sizes."""
    parts = [slice(0, 1), slice(1, 2)]
    one, other = (
        wrapped(selector=lambda _, part=part: [Representative(Part("8.weight", index=(part,)))])[1]
        for part in parts
    )

    with pytest.raises(ValueError, match="saved for other masks: its `representatives`"):
        one.load_state_dict(other.state_dict())


def test_loading_while_truncating_truncates_by_the_loaded_mask():
    """The multipliers of the mask before are not used with the mask that was loaded."""
    options = {"truncation": 0.0, "trigger": "always", "stopping_point": 0.0}
    model, opt = wrapped("SGD", **options)
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
@pytest.mark.parametrize("phase", [Phase.TRUNCATING, Phase.PRUNED])
def test_loading_replaces_all_that_came_from_the_masks_before(truncate, phase):
    """What steps derived from the newest mask they derive anew from the one that is loaded."""
    options = {"truncation": 0.0, "trigger": "always", "truncate": truncate}
    converges = phase is not Phase.TRUNCATING
    options |= {"sample_every": None, "stopping_point": float(converges), "window": 2}
    options |= {"selector": lambda _: [Representative("1.weight")]}
    runs = []
    for flip in (False, True):
        model, opt = wrapped("SGD", **options)
        with torch.no_grad():
            model[1].weight.copy_(torch.arange(8.0, 0.0, -1.0) if flip else torch.arange(1.0, 9.0))
        sample_twice(opt)
        if converges:
            opt.prune()
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
    assert opt.phase is phase
    assert torch.equal(after[~mask], before[~mask] * (phase is Phase.TRUNCATING))
    assert not (after[mask] == before[mask]).any()


@pytest.mark.parametrize("later", [Phase.CONVERGED, Phase.PRUNED])
def test_an_earlier_checkpoint_takes_the_search_back(later):
    """A ticket that was found since is forgotten, and training repeats itself bit for bit."""
    model, opt = at_phase(Phase.TRUNCATING)
    saved = copy.deepcopy([model.state_dict(), opt.state_dict()])
    runs = []
    for _ in range(2):
        step = 100
        while not opt.converged:
            train(model, opt, range(step, step + 1))
            step += 1
        if later is Phase.PRUNED:
            opt.prune()
        train(model, opt, range(200, 203))
        runs.append((weights_of(model), opt.history, opt.state_dict()["param_groups"]))
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        assert opt.phase is Phase.TRUNCATING
        assert opt.final_mask is None

    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_what_the_base_optimizer_refuses_changes_nothing():
    """Other parameter groups with a record that fits are torch's own error."""
    model, opt = at_phase(Phase.TRUNCATING)
    other_model = small_cnn()
    groups = [{"params": [p]} for p in other_model.parameters()]
    other = WormOptimizer(torch.optim.SGD(groups, lr=0.1), other_model, **SEARCH)
    train(other_model, other, range(6))
    is_refused(model, opt, other.state_dict(), "different number of parameter groups")


def test_a_checkpoint_of_another_model_is_refused():
    """Another width is another search, even where the base optimizer would not notice."""
    _, opt = wrapped()
    wide = nn.Sequential(*[copy.deepcopy(layer) for layer in small_cnn()])
    wide[4] = nn.BatchNorm2d(24)
    other = WormOptimizer(BASES["SGD momentum"](wide.parameters()), wide, **SEARCH)

    with pytest.raises(ValueError, match="saved for other masks: its `sizes`"):
        opt.load_state_dict(other.state_dict())


def test_thresholds_and_cadence_are_those_of_the_loading_optimizer():
    """Only what the held masks depend on must be the same."""
    model, opt = wrapped()
    train(model, opt, range(14))
    _, other = wrapped(stopping_point=0.9, margin=0.0, truncation=0.5, sample_every=7)

    other.load_state_dict(opt.state_dict())

    assert other.history == opt.history


def copied(pair, how):
    """A copy of model and optimizer, made together."""
    return copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))


# Before 2.6, torch warned of its own way to unpickle a tensor.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_copy_goes_its_own_way(how, with_scheduler, phase):
    """A copy of model and optimizer trains the copy, as the original would, and leaves it alone.

    The record of the search is the same string in both, and in what either goes on to.
    """
    model, opt = at_phase(phase)
    if with_scheduler:
        torch.optim.lr_scheduler.StepLR(opt, 1000)
    steps = []
    opt.register_step_post_hook(lambda *_: steps.append(1))
    train(model, opt, range(100, 102))

    other_model, other = copied((model, opt), how)
    record = opt.state_dict()["param_groups"]
    assert other.state_dict()["param_groups"] == record
    before = weights_of(model)
    train(other_model, other, range(102, 110))
    assert same(before, weights_of(model))
    assert opt.state_dict()["param_groups"] == record
    assert len(steps) == 2  # hooks stay with the original, as those of torch's optimizers do

    train(model, opt, range(102, 110))
    assert same(weights_of(model), weights_of(other_model))
    assert opt.history == other.history
    assert opt.phase is other.phase
    assert opt.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@pytest.mark.parametrize("phase", list(Phase))
def test_the_record_loads_bit_for_bit(phase):
    """Saved, loaded and saved again, in a copy or a new optimizer, it is the same string."""
    model, opt = at_phase(phase)
    saved = opt.state_dict()
    fresh = wrapped()
    for _, other in (fresh, copied((model, opt), "deepcopy"), copied((model, opt), "pickle")):
        other.load_state_dict(through_a_file(saved))
        assert other.state_dict()["param_groups"] == saved["param_groups"]
        assert other.phase is phase

    if phase is Phase.PRUNED:
        opt.shrink(torch.ones(1, 1, 6, 6, device=training.DEVICE))
        saved = opt.state_dict()
        model_again, again = wrapped()
        load_shrunk_(model_again, model.state_dict())
        again.load_state_dict(through_a_file(saved))
        assert again.state_dict()["param_groups"] == saved["param_groups"]
        assert again.is_shrunk
        assert again.summary() == opt.summary()
        with pytest.raises(
            ValueError, match=r"'1\.weight' has shape .*with load_shrunk_\(\) first"
        ):
            wrapped()[1].load_state_dict(through_a_file(saved))


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
    with pytest.raises(ValueError, match="saved for other masks: its `representatives`"):
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
@pytest.mark.filterwarnings("ignore:.* leaves little of")
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

    for masks in (opt.final_mask, opt.final_mask):
        safetensors.save_file(masks, tmp_path / "masks")
        loaded = safetensors.load_file(tmp_path / "masks")
        assert loaded.keys() == masks.keys()
        assert all(torch.equal(mask, masks[name]) for name, mask in loaded.items())
