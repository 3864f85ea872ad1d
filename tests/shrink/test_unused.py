"""Parts of a network that a batch does not use, or only in training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from models import outputs, zero_channels
from torch import Tensor, nn
from torch.nn import functional as F

from torch_worm_optim import WormOptimizer, shrink_


def trunk() -> nn.Sequential:
    """Two convolutions with BatchNorm, and their mean."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
    )


class Auxiliary(nn.Module):
    """A second head that runs in training alone, with dropout, as those of GoogLeNet do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = trunk(), nn.Linear(12, 3)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.aux_head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify, in training twice."""
        x = self.trunk[:3](x)
        aux = None
        if self.training:
            aux = self.aux(F.dropout2d(x, 0.2, self.training)).mean((2, 3))
            aux = self.aux_head(F.dropout(aux, 0.2, self.training))
        y = self.head(self.trunk[3:](x).mean((2, 3)))
        return y if aux is None else (y, aux)


class DeepSupervision(nn.Module):
    """Every stage is classified in training, in one BatchNorm and with one image if need be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = trunk()
        self.side = nn.ModuleList(nn.Conv2d(n, 3, 1) for n in (8, 12))
        self.fuse = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Classify."""
        a = self.trunk[:3](x)
        b = self.trunk[3:](a)
        found = [self.head(b.mean((2, 3)))]
        if self.training:
            sides = [side(y).mean((2, 3)) for side, y in zip(self.side, (a, b), strict=True)]
            found.append(self.fuse(torch.cat(sides, 1)))
        return found


@pytest.mark.parametrize("n_images", [1, 4])
@pytest.mark.parametrize("kind", [Auxiliary, DeepSupervision])
def test_what_runs_in_training_alone_is_seen(kind, n_images):
    """It loses what it reads of channels that go, and channels of its own."""
    model = kind().double()
    zero_channels(model)
    twin = copy.deepcopy(model)
    batch = (torch.randn(4, 1, 6, 6, dtype=torch.double),)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = shrink_(model, batch[0][:n_images])

    assert report.unused == []
    assert report.channels[1] == 0
    assert model.trunk[0].out_channels == 4
    torch.testing.assert_close(outputs(model, batch, False), outputs(twin, batch, False))
    model.train()
    sum(each.sum() for each in torch.utils._pytree.tree_leaves(model(*batch))).backward()


def test_training_outputs_stay_what_they_were():
    """Without dropout, in both heads."""
    model = DeepSupervision().double()
    zero_channels(model)
    batch = (torch.randn(4, 1, 6, 6, dtype=torch.double),)
    expected = outputs(model, batch, True)
    shrink_(model, batch)
    torch.testing.assert_close(outputs(model, batch, True), expected)


class Domains(nn.Module):
    """One BatchNorm for each domain, one head for each task, chosen by arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(16, n) for n in (3, 5))
        with torch.no_grad():
            for norm, kept in zip(self.norms, (slice(0, 10), slice(6, 16)), strict=True):
                keeps = torch.zeros(16)
                keeps[kept] = 1
                norm.weight.mul_(keeps)

    def forward(self, x: Tensor, domain: int = 0, task: int = 0) -> Tensor:
        """Classify."""
        x = torch.relu(self.norms[domain](self.conv(x)))
        return self.heads[task](x.mean((2, 3)))


def test_several_batches_show_all_of_a_network():
    """A channel goes where it is zero in each of them."""
    model = Domains().double()
    with torch.no_grad():  # channels that both leave at zero
        for norm in model.norms:
            norm.weight[8] = 0
    x = torch.randn(3, 1, 6, 6, dtype=torch.double)
    calls = [(domain, task) for domain in (0, 1) for task in (0, 1)]
    modes = (False, True)
    expected = [outputs(model, (x, *call), mode) for call in calls for mode in modes]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = [(x, 1), {"x": x, "task": 1}, x]
        report = shrink_(model, x, batches=batches)

    assert report.unused == []
    found = [outputs(model, (x, *call), mode) for call in calls for mode in modes]
    torch.testing.assert_close(found, expected)
    assert model.conv.out_channels == 15
    assert model.heads[1].in_features == 15


def test_the_method_takes_several_batches_too():
    """In a search whose ticket is applied."""
    model = Domains()
    masks = {f"norms.{n}.{k}": torch.arange(16) < 12 for n in (0, 1) for k in ("weight", "bias")}
    opt = WormOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ticket=masks)
    x = torch.randn(3, 1, 6, 6)
    opt.shrink(x, batches=[(x, 1, 1)])
    assert model.conv.out_channels == 12
    for call in ((0, 0), (0, 1), (1, 0), (1, 1)):
        model(x, *call).sum().backward()


def test_what_no_batch_used_stays_with_what_its_twin_reads():
    """A warning and the report name it, and other calls of the model go on."""
    model = Domains().double()
    model.more = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 1, 1))
    zero_channels(model.more)
    model.double().register_forward_pre_hook(lambda self, args: (self.more(args[0]), *args[1:]))
    x = torch.randn(3, 1, 6, 6, dtype=torch.double)
    calls = [(domain, task) for domain in (0, 1) for task in (0, 1)]
    expected = [outputs(model, (x, *call), mode) for call in calls for mode in (False, True)]

    with pytest.warns(UserWarning, match=r"4 trainable parameters of Domains.*batches=") as caught:
        report = shrink_(model, x)

    assert len(caught) == 1
    names = ["norms.1.weight", "norms.1.bias", "heads.1.weight", "heads.1.bias"]
    assert report.unused == names
    assert "not used by this batch: 4 parameters, norms.1.weight" in str(report)
    assert "may read it" in report.left["norms.0.weight"]
    assert (model.conv.out_channels, model.more[0].out_channels) == (16, 3)
    found = [outputs(model, (x, *call), mode) for call in calls for mode in (False, True)]
    torch.testing.assert_close(found, expected)


class Experts(nn.Module):
    """Three blocks of one kind, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
            for _ in range(3)
        )
        zero_channels(self)

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        """By one of them."""
        return x + self.experts[expert](x)


@pytest.mark.filterwarnings("ignore:This batch does not use")
def test_what_a_part_has_for_itself_goes_though_its_twins_are_unused():
    """Nobody else can read the hidden units of an expert."""
    model, x = Experts().double(), torch.randn(3, 4, dtype=torch.double)
    expected = [outputs(model, (x, n), False) for n in range(3)]
    shrink_(model, x, batches=[(x, 2)])
    assert [expert[0].out_features for expert in model.experts] == [4, 8, 4]
    torch.testing.assert_close([outputs(model, (x, n), False) for n in range(3)], expected)


def test_a_norm_of_which_a_part_is_used_stays():
    """Two BatchNorms with one scale have statistics of their own."""
    model = Domains()
    model.norms[1].weight, model.norms[1].bias = model.norms[0].weight, model.norms[0].bias
    x = torch.randn(3, 1, 6, 6)
    expected = [outputs(model, (x, n), False) for n in (0, 1)]
    with pytest.warns(UserWarning, match="no batch uses all of a layer"):
        shrink_(model, x, batches=[(x, 0, 1)])
    torch.testing.assert_close([outputs(model, (x, n), False) for n in (0, 1)], expected)


class Distilled(nn.Module):
    """Adapters for the hints of a teacher, which a loss calls and the forward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.hint = trunk(), nn.Linear(12, 3), nn.Conv2d(12, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.trunk(x).mean((2, 3)))


def test_what_a_loss_calls_is_named_and_a_frozen_part_only_reported():
    """The adapter reads what may have been cut."""
    model = Distilled()
    zero_channels(model)
    with pytest.warns(UserWarning, match="2 trainable parameters of Distilled, 'hint.weight'"):
        shrink_(copy.deepcopy(model), torch.randn(1, 1, 6, 6))
    model.hint.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = shrink_(model, torch.randn(1, 1, 6, 6))
    assert report.unused == ["hint.weight", "hint.bias"]


def test_a_model_that_needs_labels_in_training_is_watched_in_evaluation():
    """As detectors do."""

    class NeedsLabels(Distilled):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            if self.training:
                assert labels is not None
            return super().forward(x)

    model = NeedsLabels()
    zero_channels(model)
    with pytest.warns(UserWarning, match="'hint.weight'"):
        report = shrink_(model, torch.randn(1, 1, 6, 6))
    assert report.channels[1] == 0
    assert all(module.training for module in model.modules())


class InTraining(nn.Module):
    """Does more with its channels in training, with the parameters that it always uses."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk, self.head, self.more = trunk(), nn.Linear(12, 3), more

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Classify."""
        x = self.trunk(x)
        y = self.more(x) if self.training else x
        further = () if y.shape == x.shape else (y,)
        return self.head((x if further else y).mean((2, 3))), *further


@pytest.mark.parametrize(
    "more",
    [
        nn.AlphaDropout(0.2),
        nn.FeatureAlphaDropout(0.2),
        lambda x: F.alpha_dropout(x, 0.2, True),
        lambda x: x + torch.randn_like(x),
        lambda x: x + 1,
        lambda x: x.flatten(2),  # is returned
        lambda x: x.abs().sum(1) / x.shape[1],
    ],
)
def test_what_zeros_become_in_training_is_seen(more):
    """A channel whose zeros count there stays, or what is returned is what it was."""
    model = InTraining(more).double()
    zero_channels(model)
    twin, batch = copy.deepcopy(model), torch.randn(3, 1, 6, 6, dtype=torch.double)
    report = shrink_(model, batch[:1])
    assert (model.trunk[0].out_channels, model.trunk[3].out_channels) == (4, 12)
    assert report.left.keys() == {"trunk.4.weight"}
    for training in (False, True):
        results = []
        for each in (model, twin):
            torch.manual_seed(0)
            results.append(each.train(training)(batch))
        torch.testing.assert_close(*results)


def test_dropout_of_zeros_takes_nothing_from_what_goes():
    """Zeros stay zeros."""
    model = InTraining(lambda x: F.dropout2d(F.dropout(x)))
    zero_channels(model)
    assert shrink_(model, torch.randn(1, 1, 6, 6)).channels[1] == 0
