"""Training after shrinking is training of the pruned network: state and gradients are cut alike."""

from __future__ import annotations

import copy

import pytest
import torch
from models import IMAGES, NETWORKS, Sequence, build, loss_of, outputs, zero_channels
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_worm_optim.shrink import cut_tensor, shrink_

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "AMSGrad, foreach": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(
        p, 1e-3, momentum=0.5, centered=True, weight_decay=1e-2
    ),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=1e-2),
}


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """Double precision and the largest entry are the measure."""
    # SGD stays below 1e-13. The others divide by roots of second moments: of those as small as
    # 1e-18 they make more of the last bit of a gradient, and came to 2e-13 at most.
    bound = 1e-12 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=bound)


def hold_zeros(model: nn.Module, removed: dict[str, Tensor]) -> None:
    """Set channels that are zero back to zero."""
    with torch.no_grad():
        for name, mask in removed.items():
            model.get_parameter(name)[mask] = 0


# Every network with one optimizer, and one network with every optimizer.
RUNS = [
    *((which, scatter, "SGD") for which in NETWORKS for scatter in (False, True)),
    *(("residual", True, optimizer) for optimizer in OPTIMIZERS if optimizer != "SGD"),
]


@pytest.mark.parametrize(("which", "scatter", "optimizer"), RUNS)
def test_training_afterwards_is_training_of_the_pruned_network(which, scatter, optimizer):
    """State is cut as parameters are: ten steps of both networks end in the same place."""
    pruned, batch = build(which)
    zeros = {
        f"{path}.{key}": getattr(module, key) == 0
        for path, module in pruned.named_modules()
        if isinstance(module, _BatchNorm)
        for key in ("weight", "bias")
    }
    make = OPTIMIZERS[optimizer]
    opt = make(pruned.parameters())
    for module in pruned.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is not None:
            # A BatchNorm takes their gradient away but for rounding, which some optimizers blow up.
            module.bias.requires_grad_(False)

    def step(model, opt, number):
        opt.zero_grad()
        loss_of(model, batch, number).backward()
        opt.step()

    for number in range(4):
        step(pruned, opt, number)
        hold_zeros(pruned, zeros)
    small, small_opt = copy.deepcopy((pruned, opt))
    report = shrink_(small, batch, optimizer=small_opt, scatter=scatter)
    left = {
        name: mask[report.kept[name][0]] if name in report.kept else mask
        for name, mask in zeros.items()
    }
    for number in range(4, 14):
        step(pruned, opt, number)
        hold_zeros(pruned, zeros)
        step(small, small_opt, number)
        hold_zeros(small, left)

    assert bool(report.kept) == (scatter or which != "shared")  # one layer ties all there is
    for name, parameter in small.named_parameters():
        dense = pruned.get_parameter(name)
        expected = (
            cut_tensor(dense, report.kept[name], report.groups.get(name, 1))
            if name in report.kept
            else dense
        )
        assert_equal_but_for_rounding(parameter.detach(), expected.detach())
    for training in (False, True):
        for a, b in zip(
            outputs(small, batch, training), outputs(pruned, batch, training), strict=True
        ):
            assert_equal_but_for_rounding(a, b)


def test_gradients_are_cut_too():
    """Gradients that are there are cut as their parameters are."""
    model = Sequence()
    zero_channels(model)
    model(IMAGES[0]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}

    report = shrink_(model, IMAGES, optimizer=torch.optim.SGD(model.parameters(), 0.1))

    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape
        if name in report.kept:
            assert torch.equal(parameter.grad, cut_tensor(before[name], report.kept[name]))


def test_state_of_another_shape_starts_afresh_with_one_warning():
    """Factored second moments cannot be cut as parameters are."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), nn.Flatten()
    )
    zero_channels(model)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGES[0]).sum().backward()
    opt.step()
    zero_channels(model)
    opt.state[model[0].weight] = {"row": torch.ones(8), "column": torch.ones(3)}

    with pytest.warns(UserWarning, match=r"for 1 parameters, '0\.weight' among them") as caught:
        shrink_(model, IMAGES, optimizer=opt)

    assert len(caught) == 1
    assert model[0].weight not in opt.state
    assert opt.state[model[1].weight]["momentum_buffer"].shape == (4,)
    opt.step()
