"""Which zeros go: those that the ticket holds, and not those that training will move."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import outputs
from torch import Tensor, nn
from training import SEARCH, small_cnn, train

from torch_worm_optim import BatchNormSelector, ParameterSelector, WormOptimizer, shrink_


class ZeroResidual(nn.Module):
    """Branches whose last scale starts at zero, as in torchvision's and timm's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)
        for branch in self.branches:
            nn.init.zeros_(branch[4].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = torch.relu(self.stem_bn(self.stem(x)))
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


class ZeroHead(nn.Module):
    """Heads whose last layers start at zero, as those of detectors for boxes do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.boxes, self.classes = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(8, 3)
        nn.init.zeros_(self.boxes.weight)
        nn.init.zeros_(self.boxes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classes and boxes in one row."""
        x = torch.relu(self.bn(self.trunk(x))).mean((2, 3))
        return torch.cat([self.classes(x), self.boxes(torch.relu(self.hidden(x)))], 1)


class ZeroControl(nn.Module):
    """A trainable copy whose output passes a convolution of zeros, as in ControlNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.trunk, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.control, self.zero = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = self.stem(x)
        y = torch.relu(self.bn(self.trunk(x))) + self.zero(torch.relu(self.control(x)))
        return self.head(y).mean((2, 3))


class LowRank(nn.Module):
    """A linear layer with an update of low rank, whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.fc, self.out = nn.BatchNorm1d(8), nn.Linear(36, 8), nn.Linear(8, 3)
        self.down = nn.Parameter(torch.randn(2, 36))
        self.up = nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = x.flatten(1)
        return self.out(torch.relu(self.bn(self.fc(x) + x @ self.down.T @ self.up.T)))


KINDS = [ZeroResidual, ZeroHead, ZeroControl, LowRank]


def with_ticket(kind: type[nn.Module], **options: object) -> tuple[nn.Module, WormOptimizer]:
    """A network that is pruned at its initial values, as after a rewind."""
    model = kind().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    ticket = {}
    for representative in BatchNormSelector()(model):
        n = model.get_parameter(representative.name).numel()
        keeps = torch.randperm(n, generator=generator) < n // 2
        ticket |= dict.fromkeys((part.name for part in representative.members), keeps)
    return model, WormOptimizer(sgd, model, ticket=ticket, **options)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_that_training_will_move_is_no_reason_to_cut(kind, scatter):
    """Losses and weights after twenty steps are those of the pruned network."""
    model, opt = with_ticket(kind)
    twin, twin_opt = copy.deepcopy((model, opt))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = opt.shrink(torch.ones(1, 1, 6, 6, dtype=torch.double), scatter=scatter)

    assert report.zero == []
    assert report.parameters[1] < report.parameters[0]
    train(model, opt, range(20))
    train(twin, twin_opt, range(20))
    batch = (torch.randn(4, 1, 6, 6, dtype=torch.double),)
    expected = outputs(twin, batch, False)
    torch.testing.assert_close(outputs(model, batch, False), expected, rtol=1e-9, atol=1e-9)


def test_a_rewound_network_is_as_small_as_the_trained_one():
    """Each scale that the ticket keeps stays, though it is zero."""
    _, opt = with_ticket(ZeroResidual)
    ticket = opt.final_mask
    trained = ZeroResidual().double()
    nn.init.ones_(trained.branches[0][4].weight)
    nn.init.ones_(trained.branches[1][4].weight)
    opt_of_trained = WormOptimizer(
        torch.optim.SGD(trained.parameters(), lr=0.1), trained, ticket=ticket
    )
    images = torch.ones(1, 1, 6, 6, dtype=torch.double)
    reports = [each.shrink(images, scatter=True) for each in (opt, opt_of_trained)]
    assert reports[0].parameters == reports[1].parameters
    for name, mask in ticket.items():
        kept = reports[0].kept[name][0].tolist() if name in reports[0].kept else range(len(mask))
        assert set(mask.nonzero()[:, 0].tolist()) <= set(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_takes_a_ticket_too(kind):
    """And cuts what the method cuts."""
    images = torch.ones(1, 1, 6, 6, dtype=torch.double)
    model, opt = with_ticket(kind)
    by_hand = copy.deepcopy(model)
    report = shrink_(by_hand, images, ticket=opt.final_mask)
    assert report.parameters == opt.shrink(images).parameters
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in by_hand.named_parameters()
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (ZeroResidual, ["branches.0.4.weight", "branches.1.4.weight"]),
        (ZeroHead, ["boxes.weight"]),
        (ZeroControl, ["zero.weight"]),
        (LowRank, ["up"]),
    ],
)
def test_without_a_ticket_zeros_as_a_whole_are_cut_and_named(kind, names):
    """In the report, and in one warning."""
    model = kind()
    with pytest.warns(UserWarning, match="were zero as a whole") as caught:
        report = shrink_(model, torch.ones(1, 1, 6, 6), scatter=True)
    assert set(report.zero) == set(names)
    assert len(caught) == 1


def test_frozen_zeros_count():
    """Nothing moves them."""
    model, opt = with_ticket(ZeroHead)
    for parameter in (*model.boxes.parameters(), *model.hidden.parameters()):
        parameter.requires_grad_(False)
    report = opt.shrink(torch.ones(1, 1, 6, 6, dtype=torch.double))
    assert model.hidden.out_features == 1
    assert report.zero == []


def test_a_ticket_that_is_not_applied_is_refused():
    """Its zeros are not there yet."""
    _, opt = with_ticket(ZeroResidual)
    fresh = ZeroResidual().double()
    with pytest.raises(ValueError, match=r"'stem_bn.weight' has entries .* apply_ticket_"):
        shrink_(fresh, torch.ones(1, 1, 6, 6).double(), ticket=opt.final_mask)
    with pytest.raises(ValueError, match="The ticket is for another model"):
        shrink_(nn.Linear(2, 2), torch.ones(1, 2), ticket=opt.final_mask)


def dense_again() -> tuple[nn.Module, WormOptimizer, dict[str, Tensor], WormOptimizer]:
    """A pruned network that has got its first weights back, those, and an optimizer of before."""
    model = small_cnn(torch.double)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = WormOptimizer(sgd, model, **SEARCH)
    best = copy.deepcopy(model.state_dict())
    while not opt.converged:
        train(model, opt, range(1))
    opt.prune()
    _, pruned = copy.deepcopy((model, opt))
    model.load_state_dict(best)
    return model, opt, best, pruned


def test_dense_weights_that_were_put_back_are_pruned_first():
    """Such as the best of a run that were found before the ticket."""
    model, opt, best, pruned = dense_again()
    images = torch.ones(1, 1, 6, 6, dtype=torch.double)

    report = opt.shrink(images)

    assert report.parameters == pruned.shrink(images).parameters
    kept = report.kept["0.weight"][0]
    assert torch.equal(model[0].weight, best["0.weight"][kept])


def test_dense_weights_are_there_again_after_a_failure():
    """With the optimizer's state."""
    model, opt, best, _ = dense_again()
    before = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(RuntimeError, match="cannot be run with this batch"):
        opt.shrink(torch.ones(1, 2, 6, 6))
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[n][key], before[n][key]) for n in before for key in before[n])


def test_rows_without_their_bias_stay():
    """A bias that is zero at first is none that the ticket holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model[0].bias)
    masks = {"0.weight": (torch.arange(8) < 4)[:, None].expand(8, 4).contiguous()}
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        selector=ParameterSelector("2.weight"),
        ticket=masks,
    )
    with pytest.warns(UserWarning, match="Nothing was cut out of Sequential: no channel is zero"):
        opt.shrink(torch.ones(1, 4))
    assert model[0].out_features == 8
