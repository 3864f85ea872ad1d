"""Outputs in objects, sparse buffers, and results whose size depends on values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import zero_channels
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from torch_worm_optim.shrink import shrink_


@dataclasses.dataclass
class Found:
    """What a model of one's own returns."""

    logits: Tensor
    features: list[Tensor]
    name: str = "found"


class Plain:
    """An object without anything that tells what is in it."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.extra = logits, {"logits": logits * 2}


class Returning(nn.Module):
    """A network that returns what it is told to return of its logits and features."""

    def __init__(self, returns: Callable[[Tensor, Tensor], object], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.a_bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.b_bn = nn.Conv2d(8, width, 3), nn.BatchNorm2d(width)
        self.head, self.returns = nn.Linear(width, 4), returns
        zero_channels(self)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features."""
        x = torch.relu(self.a_bn(self.a(x)))
        features = torch.relu(self.b_bn(self.b(x))).mean((2, 3))
        return self.head(features), features

    def forward(self, x: Tensor) -> object:
        """In the form that is asked for."""
        return self.returns(*self.logits(x))


@pytest.mark.parametrize(
    ("returns", "n_left"),
    [
        (lambda logits, features: Found(logits, [features]), 4),
        (lambda logits, features: Plain(logits), 0),
        (lambda logits, features: Normal(logits[:, :2], logits[:, 2:].exp()), 0),
        (lambda logits, features: Categorical(logits=logits), 0),
        (lambda logits, features: Independent(Normal(logits, logits.exp()), 1), 0),
        (lambda logits, features: [Normal(features, 1.0), {"logits": logits}], 4),
        (lambda logits, features: logits.numpy(), 0),
        (lambda logits, features: (logits, np.zeros(3)), 0),
    ],
    ids=["dataclass", "object", "normal", "categorical", "nested", "list", "array", "mixed"],
)
def test_tensors_are_found_in_whatever_a_model_returns(returns, n_left):
    """And keep their width."""
    model, x = Returning(returns), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval().logits(x)
        report = shrink_(model, x)
        found = model.logits(x)
    torch.testing.assert_close(found[0], expected[0])
    assert report.channels == (8, n_left)
    assert found[1].shape[1] == 4 + n_left


class Graph(nn.Module):
    """Two layers over the nodes of a graph, whose edges are a buffer."""

    def __init__(self, layout: torch.layout, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        edges = torch.eye(6) + torch.eye(6).roll(1, 0)
        if layout != torch.strided:
            edges = edges.to_sparse(layout=layout)
        self.register_buffer("edges", edges)
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.multiply = multiply
        zero_channels(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the nodes."""
        x = torch.relu(self.norm(self.multiply(self.edges, self.first(x))))
        return self.last(self.multiply(self.edges, x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("multiply", [torch.mm, torch.matmul], ids=["mm", "matmul"])
def test_nodes_are_summed_over_and_channels_go(layout, multiply):
    """Edges may be dense or sparse."""
    model, x = Graph(layout, multiply), torch.randn(6, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        report = shrink_(model, x)
        torch.testing.assert_close(model(x), expected)
    assert report.channels == (8, 0)
    assert model.edges.layout == layout
    assert (model.first.out_features, model.last.in_features) == (8, 8)


def largest_only(self: Picking, logits: Tensor) -> Tensor:
    """As many rows as there are large ones."""
    return logits[(logits.sum(1) > logits.sum(1).median()).nonzero()[:, 0]]


def masked(self: Picking, logits: Tensor) -> Tensor:
    """As many entries as there are positive ones."""
    return torch.masked_select(logits, logits > 0).cumsum(0)


def one_by_one(self: Picking, logits: Tensor) -> Tensor:
    """As many operators as there are rows that are found."""
    found = [row.exp() for row in logits[logits.argmax(1) != 0]]
    return torch.stack([*found, logits[0]])


def suppressed(self: Picking, logits: Tensor) -> Tensor:
    """Boxes that overlap with no better one."""
    nms = pytest.importorskip("torchvision").ops.nms
    corners = logits[:, :2]
    boxes = torch.cat([corners, corners + 0.5], 1)
    at_least_single = torch.promote_types(boxes.dtype, torch.float32)
    return boxes[nms(boxes.to(at_least_single), logits[:, 2].to(at_least_single), 0.3)]


class Picking(Returning):
    """Returns as many results as values tell."""

    def __init__(self, pick: Callable[[Picking, Tensor], Tensor], width: int = 8) -> None:
        super().__init__(lambda logits, _: pick(self, logits), width)


@pytest.mark.parametrize("pick", [largest_only, masked, one_by_one, suppressed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_results_there_are_may_depend_on_rounding(pick, dtype):
    """They are compared in double precision, in which rounding changes no count."""
    model = Picking(pick).to(dtype)
    x = torch.randn(64, 3, 8, 8, dtype=dtype)
    twin_in_double = Picking(pick).double()
    twin_in_double.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = twin_in_double.eval().logits(x.double())[0]
        report = shrink_(model.eval(), x)
        found = model.double().logits(x.double())[0]
    assert report.channels == (8, 0)
    torch.testing.assert_close(found, expected)


def residue(logits: Tensor) -> Tensor:
    """Rounding of single precision, of which double precision has next to none."""
    first = logits[:, 0]
    return (first * 3 - first - first - first).abs() > 1e-11


def rounded(self: Picking, logits: Tensor) -> Tensor:
    """As many rows as rounding tells."""
    return logits[~residue(logits)]


def ranked(self: Picking, logits: Tensor) -> Tensor:
    """The first rows, or those of which rounding leaves something."""
    order = (
        residue(logits).to(logits.dtype) - torch.arange(len(logits), device=logits.device) / 1000
    )
    return logits[order.topk(8).indices]


@pytest.mark.parametrize("pick", [rounded, ranked])
def test_what_rounding_tells_is_compared_in_double_precision(pick):
    """Other sums of the same numbers pick other rows in single precision."""
    model = Picking(pick, width=300)
    report = shrink_(model, torch.randn(256, 3, 8, 8))
    assert report.channels == (154, 0)
    assert report.max_difference < 1e-12
