"""What shrinking touches for a while is put back, and so is all where it fails."""

from __future__ import annotations

import copy
import random
import weakref

import numpy as np
import pytest
import torch
from models import Sequence, zero_channels
from torch import Tensor, nn

from torch_worm_optim.shrink import shrink_


class Refused(nn.Module):
    """A network with something in its forward that shrinking cannot work with."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 2, 1)
        zero_channels(self)

    def forward(self, x: Tensor) -> object:
        """Depends on the kind."""
        x = torch.relu(self.bn(self.conv(x)))
        if self.kind == "attribute":
            x = x.view(len(x), 8, -1).unflatten(2, (8, 8)).clone()
            x = x * torch.ones(8, 1, 1)[: self.bn.num_features]
        if self.kind == "random":
            x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed()))
        y = self.out(x)
        if self.kind == "nan":
            y = y * float("nan")
        return Refused if self.kind == "no tensors" else y

    def seed(self) -> int:
        """Another one at every call."""
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("random", RuntimeError, "returns other outputs when it is called again"),
        ("nan", RuntimeError, "Refused returns NaN for this batch"),
        ("no tensors", TypeError, "Refused returns no tensor"),
        (
            "batch",
            RuntimeError,
            r"cannot be run with this batch .*expected input.* Pass the",
        ),
        ("ddp", RuntimeError, r"Shrink its `\.module` on every rank"),
    ],
)
def test_what_cannot_be_shrunk_is_left_as_it_was(kind, error, message):
    """The error says why, and weights, modes and statistics have their bits."""
    model = Refused(kind)
    batch = torch.randn(2, 5 if kind == "batch" else 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapped)
        wrapped.module = model

    with pytest.raises(error, match=message):
        shrink_(wrapped if kind == "ddp" else model, batch)

    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_break_leaves_everything_as_it_was():
    """Parameters, attributes, and what torch was told for the whole process."""

    class Breaks(Sequence):
        breaks = False

        def forward(self, x: Tensor) -> Tensor:
            if self.breaks and self[0].out_channels < 8:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Breaks()
    zero_channels(model)
    model.breaks = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        shrink_(model, torch.randn(2, 3, 8, 8), scatter=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model[0].out_channels == 8
    assert torch.is_autocast_cache_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_without_shapes_is_refused_and_settings_stay():
    """A lazy layer has not seen any input."""
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet.*Run the model once"):
        shrink_(nn.Sequential(nn.LazyLinear(3)), torch.ones(1, 2))
    assert torch.is_autocast_cache_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class LowRank(nn.Linear):
    """Merges its low-rank update in evaluation and takes it out in training, as loralib does."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.down = nn.Parameter(torch.randn(2, n_in))
        self.up = nn.Parameter(torch.randn(n_out, 2))
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        """Merge, or take apart."""
        super().train(mode)
        if self.merged is mode:
            with torch.no_grad():
                self.weight.add_(self.up @ self.down, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """With the update once."""
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Cached(nn.Module):
    """Keeps in evaluation what it makes of its parameter, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.cache = nn.Parameter(torch.ones(4)), {}

    def train(self, mode: bool = True) -> Cached:
        """Forget it."""
        super().train(mode)
        if mode:
            self.cache.clear()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        if self.training:
            return x * self.scale
        return x * self.cache.setdefault("scale", self.scale.detach().clone())


def with_own_modes(last: nn.Module) -> nn.Sequential:
    """A network in training, a BatchNorm of it in evaluation, before a layer with own modes."""
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), last)
    zero_channels(model)
    model.train()
    model[1].eval()
    return model


def test_a_layer_that_merges_in_evaluation_trains_on():
    """It hears that it is in training again, and a frozen BatchNorm stays frozen."""
    model, x = with_own_modes(LowRank(4, 2)), torch.randn(5, 3)
    expected = model(x)

    assert shrink_(model, x).kept

    assert model.training
    assert not model[1].training
    assert not model[4].merged
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model[4].down.grad is not None


def test_what_a_layer_keeps_in_evaluation_is_forgotten():
    """After shrinking and a step, evaluation goes by the parameter as it is."""
    model, x = with_own_modes(Cached()), torch.randn(5, 3)
    shrink_(model, x)
    with torch.no_grad():
        model[4].scale.mul_(10)
    expected = model(x)
    torch.testing.assert_close(model.eval()(x), expected)


def test_no_more_activations_live_than_in_a_forward():
    """Only the input and the output of the layer that runs are alive in a long chain of layers."""
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())))
    seen: list[weakref.ref[Tensor]] = []
    n_alive = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(weakref.ref(output))
        n_alive.append(sum(each() is not None for each in seen))

    for layer in model:
        layer.register_forward_hook(count)
    with torch.no_grad():
        model[0].weight[:4] = model[0].bias[:4] = 0
        model(torch.randn(2, 8))
    n_in_forward = max(n_alive)

    report = shrink_(model, torch.randn(2, 8))

    assert report.kept
    assert max(n_alive) <= n_in_forward + 3  # with the outputs of other passes


class Remembering(nn.Sequential):
    """Writes to all that a module can hold, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.way, self.n_calls = way, 0
        self.teacher = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("level", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Classify, and remember."""
        y = super().forward(x)
        if self.way == "buffer assigned":
            self.level = self.level * 0.9 + y.mean()
        elif self.way == "parameter in place":
            self.teacher.mul_(0.9)
        elif self.way == "parameter assigned" and self.training:
            self.teacher.data = self.teacher.data * 0.9
        elif self.way == "number" and self.training:
            self.n_calls += 1
        elif self.way == "generators":
            random.random(), np.random.rand(), torch.rand(1)
        return y + self.teacher * (1 + self.n_calls)


WAYS = ("buffer assigned", "parameter in place", "parameter assigned", "number", "generators")


@pytest.mark.parametrize("way", WAYS)
def test_what_passes_write_is_put_back(way):
    """As if the network had not been called."""
    model, x = Remembering(way), torch.randn(1, 3)
    zero_channels(model)
    held, before = (model.teacher, model.level), copy.deepcopy((model.teacher, model.level))
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    assert shrink_(model, x).channels == (4, 0)

    assert held == (model.teacher, model.level)
    assert all(torch.equal(*each) for each in zip(held, before, strict=True))
    assert model.n_calls == 0
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
