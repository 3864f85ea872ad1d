"""A search is about what is trained, and a ticket reaches what is saved."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import reference_mask
from torch import nn
from training import (
    BASES,
    PAPER,
    SCALES,
    SHIFTS,
    loss_of,
    same,
    sample_twice,
    small_cnn,
    train,
    weights_of,
)

from torch_worm_optim import BatchNormSelector, ParameterSelector, Phase, WormOptimizer
from torch_worm_optim.search import Scores, compute_mask, fingerprint, unpack
from torch_worm_optim.ticket import apply_ticket_

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises gradients")

SEARCH = {"sample_every": 2, "window": 3, "stopping_point": 1.0, "trigger": "always", **PAPER}


def searched(base="SGD momentum", model=None, **options):
    """A small network and its wrapped optimizer."""
    model = small_cnn() if model is None else model
    return model, WormOptimizer(BASES[base](model.parameters()), model, **{**SEARCH, **options})


def at_ticket(base="SGD momentum", **options):
    """The same with its ticket found."""
    model, opt = searched(base, **options)
    train(model, opt, range(6))
    assert opt.phase is Phase.CONVERGED
    return model, opt


def n_alive(model, ticket):
    """How many entries that a ticket removes are not zero."""
    named = dict(model.named_parameters())
    return sum(int((named[name][~mask] != 0).sum()) for name, mask in ticket.items())


# ---- what moves

NUMBERS = st.floats(-1e3, 1e3, width=16)
DTYPES = st.sampled_from([torch.float16, torch.float32, torch.float64, torch.complex64])


@given(st.lists(NUMBERS, min_size=1, max_size=20), DTYPES, st.data())
@example([1.0, 1.0], torch.float32, None)
def test_a_fingerprint_tells_any_change_from_none(numbers, dtype, data):
    """Of one entry, its sign, or the places of two; copies and other memory have the same."""
    tensor = torch.tensor(numbers).to(dtype)
    before = fingerprint([tensor])
    other = tensor.clone()
    if data is None:  # two signs at once
        other = -other
    else:
        i, j = (data.draw(st.integers(0, len(numbers) - 1)) for _ in range(2))
        other[i], other[j] = -tensor[j], tensor[i]

    assert fingerprint([tensor.clone()]) == before
    assert fingerprint([tensor.repeat_interleave(2)[::2]]) == before
    bits = (torch.view_as_real(x) if x.is_complex() else x for x in (tensor, other))
    a, b = (x.contiguous().view(torch.uint8) for x in bits)
    assert (fingerprint([other]) == before) == torch.equal(a, b)


def test_a_fingerprint_tells_tensors_apart():
    """The same entries in another tensor, or behind one another, are something else."""
    a, b = torch.rand(70_000), torch.rand(70_000)
    marks = {fingerprint(each) for each in ([a, b], [b, a], [a], [b])}
    assert len(marks) == 4
    moved = a.clone()
    moved[66_000] += 1e-7
    assert fingerprint([moved]) != fingerprint([a])


STILL = {
    "learning rate 0": lambda model, opt: opt.param_groups[0].update(lr=0.0, weight_decay=0.0),
    "frozen": lambda model, opt: [model.get_parameter(n).requires_grad_(False) for n in SCALES],
}


@pytest.mark.parametrize("options", [{"trigger": "distance"}, {"fade": 0.1, "scope": "layer"}])
@pytest.mark.parametrize("how", STILL)
def test_what_does_not_move_is_no_ticket(how, options):
    """One warning, no mask and no ticket until it moves; then the search goes on as it was.

    That removed entries fade is no training.
    """
    model, opt = searched("SGD", stopping_point=0.9, **options)
    train(model, opt, range(4))
    history, rate = opt.history, opt.param_groups[0]["lr"]
    STILL[how](model, opt)
    with pytest.warns(UserWarning, match="'1.weight' for one, so no mask is drawn") as caught:
        train(model, opt, range(4, 20))
    assert len(caught) == 1
    assert opt.history == history
    assert opt.sample() == history[-1]

    opt.param_groups[0]["lr"] = rate
    for name in SCALES:
        model.get_parameter(name).requires_grad_(True)
    train(model, opt, range(20, 22))
    assert [sample.step for sample in opt.history] == [2, 4, 22]


@pytest.mark.parametrize("fade", [1, 0.1])
def test_a_resumed_search_knows_what_the_last_mask_was_of(fade):
    """Nothing moves between saving and the next mask, so that is not drawn."""
    model, opt = searched("SGD", stopping_point=0.0, fade=fade)
    train(model, opt, range(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other, other_opt = searched("SGD", stopping_point=0.0, fade=fade)
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(torch.load(file, weights_only=True))

    with pytest.warns(UserWarning, match="has moved since the last mask"):
        assert other_opt.sample() == opt.history[-1]


def neck_alone(**options):
    """A backbone with a learning rate of 0, and a neck that trains."""
    model = small_cnn()
    model[7] = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.BatchNorm1d(12))
    for name in (*SCALES, "7.2.weight"):
        nn.init.uniform_(model.get_parameter(name), 0.5, 1.5)
    groups = [{"params": model[:7].parameters(), "lr": 0.0}, {"params": model[7:].parameters()}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    settings = {"sample_every": 2, "window": 4, "stopping_point": 0.0, "margin": 1.0, **options}
    return model, WormOptimizer(sgd, model, **settings)


@pytest.mark.parametrize("trigger", ["distance", "always"])
@pytest.mark.parametrize("fade", [1, 0.1])
def test_representatives_that_never_move_are_named_once(fade, trigger):
    """When the window is full: how many, what share of the entries, and what to do."""
    model, opt = neck_alone(fade=fade, trigger=trigger)
    train(model, opt, range(7))
    with pytest.warns(UserWarning, match="not moved since the first mask") as caught:
        train(model, opt, range(7, 30))
    assert len(caught) == 1
    said = str(caught[0].message)
    assert said.startswith("2 of 3 representatives, 62 % of the ranked entries")
    assert "'1.weight' for one" in said
    assert "learning rate of 0" in said


@pytest.mark.parametrize("at", [3, 6])
def test_representatives_that_move_between_two_masks_are_not_named(at):
    """Early or late: what was trained has had its say."""
    model, opt = neck_alone()
    for step in range(12):
        opt.param_groups[0]["lr"] = 0.1 * (step == at)
        train(model, opt, range(step, step + 1))
    assert len(opt.history) == 6


def test_a_resumed_search_does_not_say_that_nothing_has_moved():
    """What moved before the checkpoint is not known, and nothing is made up."""
    model, opt = neck_alone()
    opt.param_groups[0]["lr"] = 0.1
    train(model, opt, range(5))
    opt.param_groups[0]["lr"] = 0.0
    other, other_opt = neck_alone()
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, optimizer in ((model, opt), (other, other_opt)):
        train(each, optimizer, range(5, 12))
    assert len(other_opt.history) == 6
    assert other_opt.history == opt.history


# ---- what starts at zero


def branches(width=8, zero=True):
    """A network of residual branches; their last scales start at zero, or the shifts alone."""
    model = small_cnn()
    model.append(nn.Linear(3, width))
    model.append(nn.BatchNorm1d(width))
    if zero:
        nn.init.zeros_(model[10].weight)
    return model


def of_sgd(model, selector=None, **options):
    """A search of a model."""
    return WormOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, selector, **options)


def test_scales_that_start_at_zero_are_named():
    """In one warning, with an example, the reason and the ways out."""
    with pytest.warns(UserWarning, match="start at zero") as caught:
        of_sgd(branches())
    assert len(caught) == 1
    said = str(caught[0].message)
    assert said.startswith("1 of 3 representatives start at zero, '10.weight' for one.")
    for way in ("`zero_init_last=False`", "`zero_init_residual=False`", "after some epochs"):
        assert way in said
    assert caught[0].filename == __file__


def lora():
    """A low-rank update of which one factor starts at zero."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False))
    nn.init.zeros_(model[1].weight)
    return model


@pytest.mark.parametrize(
    ("make", "selector", "n_of"),
    [
        (lora, ParameterSelector("*.weight"), "1 of 2"),
        (lora, ParameterSelector("*.weight", granularity="row"), "1 of 2"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(30)), None, "1 of 2"),
    ],
)
def test_whatever_is_ranked_is_looked_at(make, selector, n_of):
    """Weights and rows, and what is zero but for an entry."""
    model = make()
    if selector is None:
        nn.init.zeros_(model[1].weight)
        model[1].weight.data[3] = 1
    with pytest.warns(UserWarning, match=f"{n_of} representatives start at zero"):
        of_sgd(model, selector)


def half_zero():
    """Half of the entries are zero, as of a network that was pruned before."""
    model = branches(zero=False)
    model[10].weight.data[:4] = 0
    return model


def zero_shifts():
    """A new network, whose shifts are zero."""
    return branches(zero=False)


def frozen_zero():
    """Zero scales that are not trained, and so not ranked."""
    model = branches()
    model[10].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [half_zero, zero_shifts, frozen_zero])
def test_what_is_not_zero_is_not_named(make):
    """Nor what is not ranked."""
    of_sgd(make())
    of_sgd(make().to("meta"))


def test_what_another_search_has_pruned_is_not_named():
    """A ticket that is given, and a search over what one inside has set to zero."""
    model, opt = searched(sample_every=None, prune_ratio=0.8, min_keep=0)
    model[1].weight.data[:] = torch.arange(8) / 100
    nn.init.uniform_(model[4].weight)
    with pytest.warns(UserWarning, match="'1.weight' \\(0 of 8\\), a bottleneck"):
        opt.sample()
    opt.prune(force=True)
    assert not model[1].weight.any()
    WormOptimizer(opt, model, prune_ratio=0.5)
    with pytest.warns(UserWarning, match="start at zero"):  # who knows what these are
        of_sgd(copy.deepcopy(model))
    of_sgd(copy.deepcopy(model), ticket=opt.final_mask)


# ---- what is replaced


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: model.__setitem__(1, nn.BatchNorm2d(8)),
    ],
)
def test_new_parameters_in_the_model_are_an_error_at_the_next_mask(change):
    """The optimizer trains the old ones, of which nothing is left in the model."""
    model, opt = searched()
    train(model, opt, range(3))
    change(model)

    with pytest.raises(RuntimeError, match=r"does not train '1.weight', .* put the new parameters"):
        opt.sample()
    opt.param_groups[0]["params"] = list(model.parameters())
    nn.init.uniform_(model[1].weight)
    opt.sample()


# ---- what requires a gradient


def test_an_optimizer_of_what_is_trained_is_enough(caplog):
    """Frozen representatives are left out: said in the log and in repr, and they are not pruned."""
    model = small_cnn()
    for parameter in (*model[0].parameters(), *model[1].parameters()):
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with caplog.at_level(logging.INFO, logger="torch_worm_optim"):
        opt = WormOptimizer(BASES["SGD"](trained), model, **SEARCH)
    before = model[1].weight.detach().clone()

    train(model, opt, range(6))
    opt.prune()

    assert "1 representatives are frozen" in caplog.text
    assert "1 more are frozen" in repr(opt)
    assert list(opt.final_mask) == ["4.weight", "4.bias"]
    assert torch.equal(model[1].weight, before)
    assert int((model[4].weight == 0).sum()) == 6


def test_nothing_trained_is_an_error():
    """A head alone has nothing to search."""
    model = small_cnn()
    for name in SCALES:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires a gradient, '1.weight' for one, .* unfrozen"):
        WormOptimizer(BASES["SGD"](model.parameters()), model)


def test_what_requires_a_gradient_must_be_trained():
    """A scale that the optimizer was not given stays an error."""
    model = small_cnn()
    with pytest.raises(ValueError, match=r"does not own '1.weight'"):
        WormOptimizer(BASES["SGD"](model[3:].parameters()), model)


# ---- pruned in weights, gradients and state


@pytest.mark.parametrize("base", BASES)
def test_the_optimizers_state_forgets_what_is_pruned(base):
    """All that it keeps in the parameter's shape is zero at removed entries, ever after."""
    model, opt = at_ticket(base)
    opt.prune()
    train(model, opt, range(6, 10))

    checked = 0
    for name, mask in opt.final_mask.items():
        parameter = model.get_parameter(name)
        for key, value in opt.state.get(parameter, {}).items():
            if value.shape == parameter.shape:
                assert not value[~mask].any(), (name, key)
                assert value[mask].any(), (name, key)
                checked += 1
    assert checked or base == "SGD"


class SecondCopy(torch.optim.SGD):
    """An optimizer that trains a copy of the weights, and shows their mean."""

    @torch.no_grad()
    def step(self, closure=None):
        """Step on the copy."""
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                if p.grad is not None:
                    z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, 0.5)


class Around(torch.optim.Optimizer):
    """Writes slow weights into the model every few steps, around another optimizer."""

    def __init__(self, inner):
        self.inner, self.n = inner, 0
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        self.__setstate__({})

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Step, and now and then go back half of the way."""
        self.inner.step()
        self.n += 1
        if self.n % 5 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(fast, self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def test_a_second_copy_of_the_weights_holds_the_ticket():
    """As schedule-free optimizers and Lookahead keep one in their state."""
    model = small_cnn()
    opt = WormOptimizer(SecondCopy(model.parameters(), lr=0.1), model, **SEARCH)
    train(model, opt, range(6))
    opt.prune()
    train(model, opt, range(6, 10))

    for name, mask in opt.final_mask.items():
        assert not opt.state[model.get_parameter(name)]["z"][~mask].any()


def test_weights_written_after_a_step_are_told_once():
    """What cannot be held is said, with the way out, which works."""
    model, opt = at_ticket()
    around = Around(opt)
    opt.prune()
    with pytest.warns(UserWarning, match=r"apply_ticket_\(model, opt.final_mask\)") as caught:
        train(model, around, range(6, 20))
    assert len(caught) == 1

    train(model, around, range(20, 21))
    apply_ticket_(model, opt.final_mask)
    assert n_alive(model, opt.final_mask) == 0


# ---- a ticket that is given


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW", "RMSprop"])
def test_a_given_ticket_is_held_as_a_found_one(base):
    """From the same weights and a fresh optimizer, bit for bit."""
    model, opt = at_ticket(base)
    ticket = opt.final_mask
    twin = copy.deepcopy(model)
    opt.prune()
    opt.base_optim.state.clear()

    given = WormOptimizer(BASES[base](twin.parameters()), twin, ticket=ticket)
    assert given.phase is Phase.PRUNED
    assert given.converged
    assert n_alive(twin, ticket) == 0
    for each, optimizer in ((model, opt), (twin, given)):
        train(each, optimizer, range(6, 12))

    assert same(weights_of(model), weights_of(twin))
    for masks in (given.final_mask, given.candidate_mask):
        assert masks.keys() == ticket.keys()
        assert same(list(masks.values()), list(ticket.values()))
    assert "pruned" in repr(given)
    with pytest.raises(RuntimeError, match="holds the `ticket` that it was given"):
        given.sample()
    given.prune()


def test_a_given_ticket_is_saved_and_shrunk():
    """Resumes bit for bit, in an optimizer that was built with it or without, and shrinks."""
    _, opt = at_ticket()
    twin = small_cnn()
    given = WormOptimizer(BASES["SGD momentum"](twin.parameters()), twin, ticket=opt.final_mask)
    train(twin, given, range(3))
    saved, weights = copy.deepcopy((given.state_dict(), twin.state_dict()))
    train(twin, given, range(3, 6))
    for options in ({"ticket": opt.final_mask}, {}):
        other = small_cnn()
        other.load_state_dict(weights)
        resumed = WormOptimizer(BASES["SGD momentum"](other.parameters()), other, **options)
        resumed.load_state_dict(copy.deepcopy(saved))
        train(other, resumed, range(3, 6))
        assert same(weights_of(twin), weights_of(other))
        assert resumed.phase is Phase.PRUNED

    images = torch.ones(1, 1, 6, 6)
    expected = twin.eval()(images)
    given.shrink(images)
    assert twin[0].out_channels == int(opt.final_mask["1.weight"].sum())
    torch.testing.assert_close(twin(images), expected)
    assert same(list(given.final_mask.values()), list(opt.final_mask.values()))


@pytest.mark.parametrize(
    ("ticket", "error", "message"),
    [
        ({"9.weight": torch.ones(3, dtype=torch.bool)}, ValueError, "no parameter of that name"),
        ({"1.weight": torch.ones(9, dtype=torch.bool)}, ValueError, r"shape \(9,\)"),
        ({"1.weight": torch.ones(8)}, TypeError, "must be a bool tensor"),
    ],
)
def test_a_ticket_of_another_model_is_refused(ticket, error, message):
    """And the model is left as it was."""
    model = small_cnn()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        WormOptimizer(BASES["SGD"](model.parameters()), model, ticket=ticket)
    assert same(before, weights_of(model))


# ---- narrow layers


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([0.05, 0.1, 0.34, 0.5, 0.99]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from(["global", "layer"]),
)
def test_a_share_of_each_representative_always_survives(layers, share, ratio, scope):
    """At least round(share * n), and one; nothing else changes."""
    scores = [torch.tensor(each, dtype=torch.float32) for each in layers]
    packed = compute_mask(
        [Scores("", len(each), each.dtype, lambda each=each: each) for each in scores],
        ratio,
        scope=scope,
        min_keep=share,
    ).kept
    kept = [unpack(bits, len(each)) for bits, each in zip(packed, layers, strict=True)]
    quotas = [max(1, round(share * len(each))) for each in layers]
    assert all(int(mask.sum()) >= quota for mask, quota in zip(kept, quotas, strict=True))
    if len(set(quotas)) == 1:
        expected = reference_mask(layers, ratio, scope, quotas[0])
        assert torch.cat(kept).tolist() == expected


def left_little(**options):
    """What is said at each of two times two masks that remove most of the second layer."""
    model, opt = searched(sample_every=None, prune_ratio=0.55, **options)
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1, 9))
        model[4].weight.copy_(torch.arange(1, 13) / 100)
    said = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_twice(opt)
        said.append([str(each.message) for each in caught if "bottleneck" in str(each.message)])
    return said


def test_narrow_layers_are_named_when_truncation_starts():
    """Once in all: by then the mask can still change. Else at the ticket."""
    before, after = left_little(window=4)
    assert (len(before), len(after)) == (1, 0)
    assert before[0].startswith("The newest mask leaves little of '4.weight' (1 of 12)")

    (said,), after = left_little(window=2, trigger="distance")
    assert not after
    assert said.startswith("The ticket leaves little of '4.weight' (1 of 12)")


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({"scope": "global", "min_keep": 0}, ('`scope="layer"`', "`min_keep=0.2`")),
        ({"scope": "selector", "min_keep": 0}, ('`scope="layer"`', "`min_keep=0.2`")),
        ({"scope": "layer", "min_keep": 0}, ("`min_keep=0.2`", "`prune_ratio`")),
    ],
)
def test_narrow_layers_have_ways_out_that_are_not_taken_yet(options, ways):
    """Ranking each layer by itself is no way out of that."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(20))
    model[0].weight.data[:] = torch.arange(1, 3) / 100
    model[1].weight.data[:] = torch.arange(1, 21)
    opt = of_sgd(model, sample_every=None, prune_ratio=0.76, trigger="always", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.sample()
    said = [str(each.message) for each in caught if "bottleneck" in str(each.message)]
    assert len(said) == 1
    assert all(way in said[0] for way in ways)
    assert ('`scope="layer"`' in said[0]) == (options["scope"] != "layer")


def test_a_ticket_that_empties_a_layer_says_so():
    """With the layer's name, how many are left, and two ways out; shares that are fine do not."""
    for options, warned in (({}, True), ({"min_keep": 0.25}, False), ({"scope": "layer"}, False)):
        model, opt = searched(sample_every=None, window=2, prune_ratio=0.55, **options)
        with torch.no_grad():
            model[1].weight.copy_(torch.arange(1, 9))
            model[4].weight.copy_(torch.arange(1, 13) / 100)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_twice(opt)
        texts = [str(each.message) for each in caught if "bottleneck" in str(each.message)]
        assert len(texts) == warned
        if warned:
            assert "'4.weight' (1 of 12)" in texts[0]
            assert '`scope="layer"`' in texts[0]
            assert "`min_keep=0.2`" in texts[0]


@pytest.mark.parametrize("min_keep", [1.5, -1, 1.0, "a", True])
def test_what_is_kept_is_a_count_or_a_share(min_keep):
    """Anything else is refused."""
    with pytest.raises((TypeError, ValueError), match="`min_keep`"):
        searched(min_keep=min_keep)


# ---- optimizers that cannot be held


class Nested(torch.optim.SGD):
    """Saves itself in a form of its own."""

    def state_dict(self):
        """Whatever."""
        return {"base_optimizer": super().state_dict()}


class TwoStep(torch.optim.SGD):
    """Sharpness-aware in its usual form."""

    def first_step(self, zero_grad=False):
        """Up."""

    def second_step(self, zero_grad=False):
        """Down."""


def test_an_optimizer_that_saves_in_another_form_is_refused_at_once():
    """Not at the first checkpoint."""
    model = small_cnn()
    with pytest.raises(ValueError, match=r"Nested has no .* Wrap the optimizer inside of it"):
        WormOptimizer(Nested(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("name", ["first_step", "second_step"])
def test_two_steps_do_not_go_past_the_search(name):
    """The methods raise and say what to call, which works."""
    model = small_cnn()
    opt = WormOptimizer(TwoStep(model.parameters(), lr=0.1), model, **SEARCH)
    with pytest.raises(RuntimeError, match=rf"{name}\(\) of TwoStep .* step\(closure\)"):
        getattr(opt, name)(zero_grad=True)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    assert len(opt.history) == 1


def test_shifts_and_selected_parts_are_in_the_ticket():
    """All that prune() sets to zero, and nothing else."""
    model, opt = at_ticket(
        selector=BatchNormSelector() | ParameterSelector("8.weight", granularity="row")
    )
    assert set(opt.final_mask) == {*SCALES, *SHIFTS, "8.weight", "8.bias"}
    opt.prune()
    for name, parameter in model.named_parameters():
        if name in opt.final_mask:
            assert torch.equal(parameter != 0, opt.final_mask[name])


# ---- found in review


def test_a_ticket_outlives_a_checkpoint_of_the_plain_optimizer():
    """Rewinding loads an early state of the optimizer; what is held stays held, in it as well."""
    model, opt = at_ticket()
    plain = BASES["SGD momentum"](model.parameters())
    train(model, plain, range(3))
    given = WormOptimizer(BASES["SGD momentum"](model.parameters()), model, ticket=opt.final_mask)
    given.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert given.phase is Phase.PRUNED
    train(model, given, range(3, 6))

    assert n_alive(model, given.final_mask) == 0
    for name, mask in given.final_mask.items():
        assert not given.state[model.get_parameter(name)]["momentum_buffer"][~mask].any()


class Shampoo(torch.optim.SGD):
    """Keeps a matrix for the rows of a parameter, and a code of integers."""

    @torch.no_grad()
    def step(self, closure=None):
        """Make them, and step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 2:
                    self.state[p].setdefault("precond_0", torch.ones(len(p), len(p)))
                self.state[p].setdefault("code", torch.ones(p.shape, dtype=torch.uint8))
        super().step()


def test_state_that_is_not_of_entries_is_left_alone():
    """A square preconditioner has its parameter's shape, and 0 is not the zero of every code."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    opt = WormOptimizer(
        Shampoo(model.parameters(), lr=0.1),
        model,
        ParameterSelector("weight"),
        sample_every=1,
        window=2,
        stopping_point=1.0,
    )
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        opt.step()
    opt.prune()

    assert int((model.weight == 0).sum()) == 18
    assert all(bool((value == 1).all()) for value in opt.state[model.weight].values())


def test_frozen_weights_of_any_type_are_left_out():
    """Quantised weights under an adapter cannot be ranked, and need not be."""
    model = nn.Linear(3, 3)
    model.register_parameter("base", nn.Parameter(torch.ones(3, dtype=torch.uint8), False))
    opt = WormOptimizer(
        torch.optim.SGD([model.weight, model.bias], lr=0.1), model, ParameterSelector("*")
    )
    assert "1 more are frozen" in repr(opt)


def test_a_fingerprint_knows_in_which_tensor_an_entry_is():
    """Entries that change places between chunks of two tensors are noticed."""
    x = [torch.randn((1 << 16) + 10), torch.randn(10)]
    y = [tensor.clone() for tensor in x]
    y[0][(1 << 16) + 3], y[1][3] = x[1][3], x[0][(1 << 16) + 3]
    assert fingerprint(x) != fingerprint(y)


def test_an_empty_ticket_is_refused():
    """It would hold nothing."""
    model = small_cnn()
    with pytest.raises(ValueError, match=r"`ticket` has no mask"):
        WormOptimizer(BASES["SGD"](model.parameters()), model, ticket={})
