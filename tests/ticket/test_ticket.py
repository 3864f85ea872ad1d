"""Tickets without a search: models that they fit, followers that they lack, and their use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import BASES, SCALES, SHIFTS, at_phase, same, small_cnn, weights_of

from torch_worm_optim import (
    BatchNormSelector,
    Part,
    Phase,
    Representative,
    WormOptimizer,
    apply_ticket_,
)


@pytest.fixture(scope="module")
def found():
    """A small network and its optimizer, with the ticket found; not to be changed."""
    torch.manual_seed(0)
    return at_phase(Phase.CONVERGED)


def given(model, ticket, selector=None):
    """An optimizer that holds this ticket in a model."""
    return WormOptimizer(BASES["SGD"](model.parameters()), model, selector, ticket=ticket)


def test_the_final_mask_is_taken_as_it_is(found):
    """By an optimizer of another network, which hands it out again, and by apply_ticket_()."""
    model, opt = found
    ticket = opt.final_mask
    assert list(ticket) == [*SCALES[:1], *SHIFTS[:1], *SCALES[1:], *SHIFTS[1:]]
    twins = copy.deepcopy(model), copy.deepcopy(model)
    before = weights_of(model)

    held = given(twins[0], ticket)
    apply_ticket_(twins[1], ticket)

    assert same(weights_of(twins[0]), weights_of(twins[1]))
    assert same(before, weights_of(model))
    for name, parameter in twins[0].named_parameters():
        original = model.get_parameter(name)
        assert torch.equal(parameter, original * ticket[name] if name in ticket else original)
    assert list(held.final_mask) == list(ticket)
    assert same(list(held.final_mask.values()), list(ticket.values()))
    assert [each.kept for each in held.kept_counts()] == [int(m.sum()) for m in ticket.values()]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("selector", [None, BatchNormSelector()])
def test_a_ticket_of_scales_gets_their_shifts(found, selector, prefix):
    """From the selector; a shift that it has stays as it is; what was passed is not written to."""
    ticket = {prefix + name: mask for name, mask in found[1].final_mask.items()}
    scales = {name: mask for name, mask in ticket.items() if "weight" in name}
    own = dict(scales)
    own[prefix + "1.bias"] = torch.ones(8, dtype=torch.bool)
    before = copy.deepcopy(own)

    held = given(small_cnn(), scales, selector).final_mask
    assert held.keys() == {*SCALES, *SHIFTS}
    for name, mask in held.items():
        assert torch.equal(mask, ticket[prefix + name])

    held = given(small_cnn(), own, selector).final_mask
    assert held["1.bias"].all()
    assert torch.equal(held["4.bias"], held["4.weight"])
    assert same(list(before.values()), list(own.values()))


def test_a_follower_goes_where_a_whole_unit_goes():
    """A row that is kept in part keeps its bias; only one that goes whole takes it along."""
    model = nn.Sequential(nn.Linear(2, 3))
    rows = Representative(Part("0.weight", units=(3,)), followers=("0.bias",))
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    held = given(model, {"0.weight": mask}, lambda _: [rows])

    assert torch.equal(held.final_mask["0.weight"], mask)
    assert held.final_mask["0.bias"].tolist() == [True, True, False]


def test_without_a_selector_that_fits_a_ticket_is_taken_as_it_is():
    """A network without BatchNorm and attention can hold one, too."""
    model = nn.Sequential(nn.Linear(2, 2))
    held = given(model, {"0.bias": torch.tensor([True, False])})

    assert held.final_mask["0.bias"].tolist() == [True, False]
    assert held.final_mask.keys() == {"0.bias"}
    with pytest.raises(ValueError, match="no BatchNorm"):
        given(model, {"0.bias": torch.tensor([True, False])}, BatchNormSelector())


def test_a_ticket_for_another_model_leaves_it_alone():
    """Unknown names, other shapes and masks that are not bool are refused before any change."""
    model = torch.nn.BatchNorm1d(3)
    good = torch.tensor([False, True, True])

    with pytest.raises(ValueError, match=r"for another model: it has a mask for 'bn\.weight'"):
        apply_ticket_(model, {"weight": good, "bn.weight": good})
    with pytest.raises(ValueError, match=r"mask for 'bias' has shape \(2,\)"):
        apply_ticket_(model, {"weight": good, "bias": good[:2]})
    with pytest.raises(
        TypeError, match=r"'bias' must be a bool tensor.*got a tensor of torch\.int64"
    ):
        apply_ticket_(model, {"weight": good, "bias": good.long()})
    with pytest.raises(TypeError, match="got list"):
        apply_ticket_(model, {"weight": [False, True, True]})

    assert torch.equal(model.weight, torch.ones(3))
    apply_ticket_(model, {"weight": good})
    assert model.weight.tolist() == [0, 1, 1]


def test_a_ticket_may_use_any_name_of_a_tied_parameter():
    """Tied weights have two names, and a ticket may use either."""
    model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight

    apply_ticket_(model, {"1.weight": torch.tensor([False, True, True])})

    assert model[0].weight.tolist() == [0, 1, 1]


def test_a_ticket_fits_a_model_that_is_wrapped_otherwise():
    """The prefixes of wrappers do not make another model."""
    model = torch.nn.BatchNorm1d(3)

    apply_ticket_(model, {"module._orig_mod.weight": torch.tensor([False, True, True])})

    assert model.weight.tolist() == [0, 1, 1]
