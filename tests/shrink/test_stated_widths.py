"""Forwards that state a width: what that operator touches stays, and the rest goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import outputs, zero_channels
from torch import Tensor, nn
from torch.nn import functional as F

from torch_worm_optim.shrink import shrink_


def block(n_in: int, n_out: int) -> nn.Sequential:
    """A convolution that keeps the size."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU())


class Stated(nn.Module):
    """Three convolutions of 16 channels, with something between the last two, and a head."""

    def __init__(self, between: Callable[[Stated, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = block(3, 16), block(16, 16), block(16, 16)
        self.between, self.n, self.weights = between, 16, torch.rand(16)
        self.hidden, self.last = nn.Linear(16 * 4, 10), nn.Linear(10, 3)
        zero_channels(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = self.first(x)
        x = self.second(x)
        x = self.between(self, x)
        x = self.third(x)
        x = F.adaptive_avg_pool2d(x, 2)
        return self.last(F.relu(self.hidden(x.flatten(1))))


def checked(self: Stated, x: Tensor) -> Tensor:
    """An assertion on the width."""
    assert x.shape[1] == self.n
    return x


def split_unevenly(self: Stated, x: Tensor) -> Tensor:
    """Parts that change places."""
    a, b = x.split((10, 6), 1)
    return torch.cat([b, a], 1)


def split_by_attribute(self: Stated, x: Tensor) -> Tensor:
    """Equal parts, of a width that is known beforehand."""
    a, b = x.split((self.n // 2, self.n // 2), 1)
    return torch.cat([a, b], 1)


STATED: dict[str, Callable[[Stated, Tensor], Tensor]] = {
    "view": lambda self, x: x.view(-1, 16, 64).view(-1, 16, 8, 8),
    "reshape by an attribute": lambda self, x: x.reshape(-1, self.n, 8, 8),
    "reshape and back": lambda self, x: x.reshape(-1, 16, 8, 8).reshape(len(x), -1, 8, 8),
    "expand": lambda self, x: x * torch.ones(16, 1, 1).expand(16, 8, 8),
    "assertion": checked,
    "uneven split": split_unevenly,
    "equal split": split_by_attribute,
    "root of the width": lambda self, x: x / x.shape[1] ** 0.5,
    "width in a tensor": lambda self, x: x / torch.tensor(float(x.shape[1])),
    "sum over the width that only some images show": lambda self, x: (
        x * (1 + (x.sum(1, True) / x.shape[1] - 40).relu())
    ),
    "samples of each channel": lambda self, x: F.fractional_max_pool2d(
        x, 2, output_size=4, _random_samples=torch.full((*x.shape[:2], 2), 0.5, dtype=x.dtype)
    ),
    "tensor of its own": lambda self, x: x * self.weights[:, None, None],
    "slice of it": lambda self, x: x * self.weights[: x.shape[1], None, None],
}


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("n_images", [1, 4])
@pytest.mark.parametrize("stated", STATED)
def test_what_an_operator_touches_that_states_a_width_stays(stated, n_images, scatter):
    """Layers around it lose their channels; with `scatter` those before it do as well."""
    model = Stated(STATED[stated]).double()
    images = torch.randn(n_images, 3, 8, 8, dtype=torch.double)
    batch = (torch.randn(4, 3, 8, 8, dtype=torch.double),)
    model.weights = model.weights.double()
    expected = [outputs(model, batch, training) for training in (False, True)]

    report = shrink_(model, images, scatter=scatter)

    found = [outputs(model, batch, training) for training in (False, True)]
    torch.testing.assert_close(found, expected)
    assert (model.first[0].out_channels, model.third[0].out_channels) == (8, 8)
    assert model.second[0].out_channels == (8 if scatter else 16)
    assert report.left.keys() == (set() if scatter else {"second.1.weight"})


class LeNet(nn.Module):
    """The network of many tutorials, with BatchNorm: it flattens by a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = x.view(-1, 16 * 4 * 4)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class PointNet(nn.Module):
    """Points one by one, then the largest of each channel, in a row of a known width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn3, self.fc2 = nn.Linear(32, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a cloud of points."""
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 32)
        return self.fc2(F.relu(self.bn3(self.fc1(x))))


class Generator(nn.Module):
    """A row that becomes an image of a known width, and norms that one line calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.row = nn.Linear(20, 8 * 4 * 4)
        last = nn.Conv2d(6, 3, 1)
        self.norms = nn.Sequential(nn.BatchNorm2d(8), *block(8, 8), *block(8, 6), last)

    def forward(self, x: Tensor) -> Tensor:
        """Make an image."""
        return self.norms(self.row(x.flatten(1)).view(x.shape[0], 8, 4, 4))


def test_norms_that_one_line_calls_are_not_what_states_a_width():
    """What a BatchNorm allocates for itself is no width that the forward states."""
    model = Generator().double()
    zero_channels(model)
    batch = (torch.randn(4, 20, dtype=torch.double),)
    expected = [outputs(model, batch, training) for training in (False, True)]

    report = shrink_(model, batch[0])

    found = [outputs(model, batch, training) for training in (False, True)]
    torch.testing.assert_close(found, expected)
    assert report.left.keys() == {"norms.0.weight"}
    assert {"norms.2.weight", "norms.5.weight"} <= report.kept.keys()


class Norm(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, as many libraries have: all are called in one line."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and rectify."""
        return F.relu(super().forward(x))


class Mixes(nn.Module):
    """Gives as many channels as it is given, of which it makes others; it says so in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(8, 8, 1), Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels, place by place."""
        b, c, h, w = x.shape
        mixed = self.mix(x).flatten(2)
        return self.norm((mixed * mixed.softmax(1)).reshape(b, c, h, w))


def test_a_forward_that_returns_the_width_of_its_input_stays_and_no_more():
    """Its input has to stay, though the operator that states the width does not touch it."""
    torch.manual_seed(0)
    ends = nn.Conv2d(3, 8, 3), Norm(8), Mixes(), nn.Conv2d(8, 8, 3), Norm(8), nn.Conv2d(8, 3, 1)
    model = nn.Sequential(*ends[:2], nn.Conv2d(8, 8, 1), Norm(8), *ends[2:]).double()
    zero_channels(model)
    batch = (torch.randn(4, 3, 8, 8, dtype=torch.double),)
    expected = [outputs(model, batch, training) for training in (False, True)]

    report = shrink_(model, *batch)

    found = [outputs(model, batch, training) for training in (False, True)]
    torch.testing.assert_close(found, expected)
    assert {"1.weight", "6.weight"} <= report.kept.keys()
    assert "states a width" in report.left["3.weight"]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("kind", "shape", "left"),
    [(LeNet, (1, 28, 28), "bn2.weight"), (PointNet, (3, 20), "bn2.weight")],
)
def test_networks_of_tutorials_lose_what_does_not_feed_the_flatten(kind, shape, left, n):
    """One layer of several states a width."""
    model = kind().double()
    zero_channels(model)
    batch = (torch.randn(4, *shape, dtype=torch.double),)
    expected = [outputs(model, batch, training) for training in (False, True)]

    report = shrink_(model, batch[0][:n])

    found = [outputs(model, batch, training) for training in (False, True)]
    torch.testing.assert_close(found, expected)
    assert report.left.keys() == {left}
    assert "states a width, `view`" in report.left[left]
    assert "bn1.weight" in report.kept


class Many(nn.Module):
    """Twelve layers of one class, each of which splits by a width that it keeps."""

    class Layer(nn.Module):
        """Two parts that change places."""

        def __init__(self) -> None:
            super().__init__()
            self.convolve, self.width = block(12, 12), 6

        def forward(self, x: Tensor) -> Tensor:
            """The second part first."""
            a, b = self.convolve(x).split(self.width, 1)
            return torch.cat([b, a], 1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = block(3, 12), nn.Linear(12, 2)
        self.layers = nn.ModuleList(Many.Layer() for _ in range(12))
        self.calls = 0
        zero_channels(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        self.calls += 1
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def test_one_line_that_fails_in_each_of_many_layers_fails_once():
    """It is told by where it stands, so a network of many such layers takes no longer."""
    model = Many()
    report = shrink_(model, torch.randn(2, 3, 4, 4))
    assert model.stem[0].out_channels == 6
    assert len(report.left) == 12
    assert model.calls <= 12


class Mlp(nn.Module):
    """Two linear layers, one place in the code for all of its kind."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n_in, n_hidden), nn.Linear(n_hidden, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Of each position alone."""
        return self.fc2(F.relu(self.fc1(x)))


class OfATable(nn.Module):
    """Weights of positions that one Mlp makes, in rows of a known width, and another Mlp."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.table = Mlp(8, 16, 8), Mlp(2, 6, 3)
        self.head, self.out = nn.Linear(8, 3), nn.Linear(3, 2)
        self.register_buffer("places", torch.randn(1, 5, 2))
        with torch.no_grad():
            for layer, n in ((self.mlp.fc1, 8), (self.head, 1)):
                layer.weight[:n] = layer.bias[:n] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Of five positions."""
        x = x + self.mlp(x)
        weights = self.table(self.places).view(-1, 3)
        return self.out(self.head(x) * weights)


def test_the_line_that_raises_is_the_one_that_states_a_width():
    """And not a layer that ran before it, whose class does most of the work elsewhere."""
    model, x = OfATable().double(), torch.randn(2, 5, 8, dtype=torch.double)
    expected = model(x)
    report = shrink_(model, x)
    torch.testing.assert_close(model(x), expected)
    assert (model.mlp.fc1.out_features, model.head.out_features) == (8, 3)
    assert report.left.keys() == {"head.weight"}
