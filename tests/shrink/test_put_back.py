"""What shrinking touches for a while is put back, and so is all where it fails."""

from __future__ import annotations

import copy

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
        return Refused if self.kind == "no tensors" else y

    def seed(self) -> int:
        """Another one at every call."""
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("random", RuntimeError, "returns other outputs when it is called again"),
        ("no tensors", TypeError, "returns type, in which shrinking cannot find the tensors"),
        ("batch", RuntimeError, "expected input"),
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_break_leaves_everything_as_it_was(error):
    """Parameters, attributes, and what torch was told for the whole process."""

    class Breaks(Sequence):
        breaks = False

        def forward(self, x: Tensor) -> Tensor:
            if self.breaks and self[0].out_channels < 8:
                raise error
            return super().forward(x)

    model = Breaks()
    zero_channels(model)
    model.breaks = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(error):
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
