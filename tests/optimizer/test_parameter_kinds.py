"""Parameters of every kind: complex, sparse, tied, frozen, reparametrised and swapped ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from training import BASES, PAPER, same, small_cnn, through_a_file, train, weights_of

from torch_worm_optim import BatchNormSelector, ParameterSelector, Phase, WormOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises gradients")

# The first mask starts truncation, and the third, with which the window is full, ends the search.
SEARCH = {
    "sample_every": 2,
    "window": 3,
    "stopping_point": 1.0,
    "trigger": "always",
    "truncation": 0.0,
    **PAPER,
}


def tied():
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    return model, torch.randn(8, 4)


def complex_numbers():
    """A layer of complex weights."""
    return nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat)), torch.randn(8, 4).cfloat()


def sparse_gradients():
    """A table of which some rows are looked up."""
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    return model, torch.tensor([1, 2, 2, 5, 6])


def parametrised():
    """A weight computed from another by a function."""
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    return model, torch.randn(8, 4)


def weight_normed():
    """A weight computed from its length and its direction."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))), torch.ones(8, 4)


def pruned():
    """A weight that torch.nn.utils.prune has masked already."""
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.25)
    return model, torch.randn(8, 4)


KINDS = {
    tied: "0.weight",
    complex_numbers: "0.weight",
    sparse_gradients: "0.weight",
    parametrised: "0.parametrizations.weight.original",
    weight_normed: "0.parametrizations.weight.original0",
    pruned: "0.weight_orig",
}


@pytest.mark.parametrize("truncate", ["gradient", "update"])
@pytest.mark.parametrize("make", KINDS)
def test_a_parameter_of_any_kind_is_truncated_and_pruned(make, truncate):
    """Removed entries stand still while truncating, and are held at zero once pruned."""
    name = KINDS[make]
    torch.manual_seed(1)
    model, inputs = make()
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        model,
        ParameterSelector(name),
        truncate=truncate,
        **SEARCH,
    )
    seen = []
    for step in range(10):
        if step == 8:
            opt.prune()
        seen.append(opt.phase)
        mask = opt.candidate_mask
        before = model.get_parameter(name).detach().clone()
        opt.zero_grad()
        (model(inputs).abs() - 1).square().sum().backward()
        opt.step()
        after = model.get_parameter(name).detach()
        if opt.phase is Phase.PRUNED:
            assert torch.equal(after != 0, mask[name])
        elif seen[-1] is Phase.TRUNCATING:
            assert torch.equal(after[~mask[name]], before[~mask[name]])
            assert not torch.equal(after, before)
    assert list(dict.fromkeys(seen)) == list(Phase)
    assert list(opt.final_mask) == [name]

    opt.load_state_dict(through_a_file(opt.state_dict()))
    assert opt.phase is Phase.PRUNED


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_a_reparametrised_scale_is_not_passed_over(how, key):
    """A search that left a whole layer out in silence would find another ticket."""
    model = small_cnn()
    if how == "prune":
        prune.l1_unstructured(model[1], key, 0.25)
    else:
        parametrize.register_parametrization(model[1], key, nn.Softplus(), unsafe=True)

    with pytest.raises(ValueError, match=f"The `{key}` of a .*BatchNorm2d is computed from"):
        WormOptimizer(BASES["SGD"](model.parameters()), model)
    if key == "bias":
        assert len(BatchNormSelector(bias=False)(model)) == 2
    with pytest.raises(ValueError, match="is computed from"):
        WormOptimizer(BASES["SGD"](model[1].parameters()), nn.Sequential(model[1]))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_a_parameter_reparametrised_under_the_search_is_an_error(how, phase):
    """What is written into a computed weight is gone at once: no truncation, no ticket held."""
    model = small_cnn()
    opt = WormOptimizer(BASES["SGD"](model.parameters()), model, **SEARCH)
    n_steps = {Phase.SEARCHING: 1, Phase.TRUNCATING: 3}.get(phase, 7)
    train(model, opt, range(n_steps))
    if phase is Phase.PRUNED:
        opt.prune()
    assert opt.phase is phase
    if how == "prune":
        prune.l1_unstructured(model[4], "weight", 0.25)
    else:
        parametrize.register_parametrization(model[4], "weight", nn.Softplus(), unsafe=True)

    if phase is Phase.CONVERGED:  # nothing is left to do but what the base optimizer does
        train(model, opt, range(7, 8))
        with pytest.raises(RuntimeError, match=r"'4\.weight' is no parameter any more"):
            opt.prune()
        assert opt.phase is Phase.CONVERGED
    else:
        with pytest.raises(RuntimeError, match=r"'4\.weight' is no parameter any more"):
            train(model, opt, range(n_steps, n_steps + 1))


@pytest.mark.parametrize("swapping", [False, True])
@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_the_model_may_be_converted_in_every_phase(truncate, swapping):
    """To double and back, with parameters swapped or their data set: the masks go with them."""
    was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        model = small_cnn()
        opt = WormOptimizer(BASES["SGD"](model.parameters()), model, truncate=truncate, **SEARCH)
        for step in range(12):
            if step == 8:
                opt.prune()
            opt.zero_grad()
            model.to(torch.double if step % 2 else torch.float)
            mask, phase = opt.candidate_mask, opt.phase
            before = copy.deepcopy(model)
            train(model, opt, range(step, step + 1))
            for name in mask if phase is Phase.TRUNCATING else ():
                still = model.get_parameter(name) == before.get_parameter(name)
                assert torch.equal(still, ~mask[name])
            for name in mask if phase is Phase.PRUNED else ():
                assert torch.equal(model.get_parameter(name) != 0, mask[name])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(was)

    assert opt.phase is Phase.PRUNED


@pytest.mark.parametrize("truncate", ["gradient", "update"])
def test_swapped_tensors_go_on_as_they_would_have(truncate):
    """torch.utils.swap_tensors puts other tensors in the place of parameters, at any time."""
    runs = []
    for swap in (True, False):
        model = small_cnn()
        opt = WormOptimizer(BASES["SGD"](model.parameters()), model, truncate=truncate, **SEARCH)
        for step in range(12):
            if step == 8:
                opt.prune()
            opt.zero_grad()
            for parameter in list(model.parameters()) if swap else ():
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))
            train(model, opt, range(step, step + 1))
        runs.append((weights_of(model), opt.history))

    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
