"""Optimizers of timm's, and those whose state cannot be cut, over a network that is shrunk."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import training
from training import same, small_cnn, train, weights_of

from torch_worm_optim import Phase, WormOptimizer
from torch_worm_optim.shrink import cut_tensor

# Lion moves all scales from 1 by the same steps, up or down.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:.*tie for the mask"
)


def pruned(make, **options):
    """A search under an optimizer of one's own whose ticket is applied, after eight steps."""
    model = small_cnn(torch.double)
    settings = {"sample_every": 3, "window": 2, "stopping_point": 1.0, **options}
    opt = WormOptimizer(make(model.parameters()), model, **settings)
    train(model, opt, range(6))
    opt.prune()
    train(model, opt, range(6, 8))
    return model, opt


def one_image():
    """What the network is traced with."""
    return torch.ones(1, 1, 6, 6, dtype=torch.double, device=training.DEVICE)


def lion(parameters):
    """Lion of timm, which moves every entry by the sign of its momentum."""
    return pytest.importorskip("timm.optim").Lion(parameters, lr=1e-3, weight_decay=0.1)


def lamb(parameters, weight_decay=0.0):
    """Lamb of timm, which takes the norm of all gradients."""
    return pytest.importorskip("timm.optim").Lamb(parameters, lr=0.01, weight_decay=weight_decay)


def lamb_with_decay(parameters):
    """The same, which now takes norms of each parameter and of its update as well."""
    return lamb(parameters, weight_decay=0.1)


def adafactor(parameters):
    """Adafactor of torch, which keeps factors of other shapes than the parameters'."""
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    return torch.optim.Adafactor(parameters, lr=0.01)


def clear_what_was_cut_(model, opt, kept):
    """Set what another network has lost to zero in a dense one, and in the optimizer's state."""
    for name, dims in kept.items():
        tensor = model.state_dict(keep_vars=True)[name]
        stays = torch.ones_like(tensor)
        for dim, indices in enumerate(dims):
            if indices is not None:
                cut = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
                cut[indices] = False
                stays.index_fill_(dim, cut.nonzero()[:, 0], 0.0)
        state = opt.state[tensor].values() if tensor in opt.state else ()
        for each in (tensor.detach(), *state):
            if isinstance(each, torch.Tensor) and each.shape == tensor.shape:
                each.mul_(stays)


@pytest.mark.parametrize(
    ("make", "cleared"), [(lion, False), (lamb, False), (lamb_with_decay, True)]
)
def test_training_a_shrunk_network_is_training_the_pruned_one(make, cleared):
    """Twenty steps after shrinking, parameters are those of the pruned network that are left.

    A pruned channel's filter is not zero, it only has no effect. Optimizers that take norms of
    whole parameters count it, so for those it has to be cleared.
    """
    model, opt = pruned(make)
    twin, twin_opt = copy.deepcopy((model, opt))

    report = opt.shrink(one_image())
    if cleared:
        clear_what_was_cut_(twin, twin_opt, report.kept)
    train(model, opt, range(8, 28))
    train(twin, twin_opt, range(8, 28))

    assert report.parameters[1] < report.parameters[0]
    assert report.channels == (10, 0)
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).detach()
        if name in report.kept:
            expected = cut_tensor(expected, report.kept[name])
        bound = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=bound)


def test_factors_of_cut_parameters_start_afresh_with_one_warning():
    """Adafactor forgets what it cannot cut, says so once, and trains on."""
    model, opt = pruned(adafactor)
    names = {parameter: name for name, parameter in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"Adafactor keeps .* It starts afresh") as caught:
        report = opt.shrink(one_image())

    assert len(caught) == 1
    assert caught[0].filename == __file__
    forgotten = {name for parameter, name in names.items() if parameter not in opt.state}
    assert forgotten == {"0.weight", "3.weight", "8.weight"}
    assert forgotten < report.kept.keys()
    before = weights_of(model)
    train(model, opt, range(8, 12))
    assert all(parameter in opt.state for parameter in names)
    assert not same(before, weights_of(model))
    assert all(bool(parameter.isfinite().all()) for parameter in names)
    assert opt.phase is Phase.PRUNED


def test_nothing_is_said_where_nothing_was_cut():
    """A ticket that keeps all leaves every factor where it is, silently."""
    model, opt = pruned(adafactor, prune_ratio=0.0)
    before = copy.deepcopy(opt.state_dict()["state"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = opt.shrink(one_image())

    assert report.kept == {}
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[i][key], before[i][key]) for i in before for key in before[i])
    assert len(after) == len(list(model.parameters()))
