"""What a report tells, and copies that are cut by one."""

from __future__ import annotations

import copy

import pytest
import torch
from models import IMAGES, Sequence, build, outputs
from torch import Tensor, nn

from torch_worm_optim.shrink import shrink_


def test_a_report_tells_what_a_person_asks():
    """Parameters, multiplications, channels gone, why some stay, and where most has gone."""
    model, batch = build("residual")
    n_before = {name: p.numel() for name, p in model.named_parameters()}

    report = shrink_(model, batch)

    text = str(report)
    assert f"parameters {report.parameters[0]:,} -> {report.parameters[1]:,}" in text
    zero, stayed = report.channels
    assert stayed > 0
    assert f"zero channels: {zero - stayed} of {zero} gone" in text
    assert "a later BatchNorm makes something else of zero" in text
    assert report.as_dict()["zero_channels_left"] == stayed
    assert sum(n for each in report.reasons.values() for n in each.values()) == stayed
    assert report.parameters == tuple(map(sum, zip(*report.layers.values(), strict=True)))
    for name in ("blocks.0.expand.0", "head"):
        layer = model.get_submodule(name)
        before = sum(n_before[f"{name}.{key}"] for key, _ in layer.named_parameters())
        assert report.layers[name] == (before, sum(p.numel() for p in layer.parameters()))
    lines = text.split("layers that changed most:\n")[1].splitlines()
    gone = sorted((a - b for a, b in report.layers.values()), reverse=True)
    assert len(lines) == 5
    for line, n in zip(lines, gone, strict=False):
        name, sizes = line.strip().split(": ")
        assert sizes == " -> ".join(f"{size:,}" for size in report.layers[name])
        assert report.layers[name][0] - report.layers[name][1] == n


def test_a_report_of_nothing_names_no_layer():
    """A network without zeros loses nothing, and a parameter of its own is a layer by its name."""
    model = Sequence()
    model.scale = nn.Parameter(torch.ones(2))

    report = shrink_(model, IMAGES)

    assert "layers" not in str(report)
    assert report.layers["scale"] == (2, 2)


def test_an_average_of_the_weights_is_cut_alike():
    """What was cut out of the network is cut out of its copy, whose own weights it keeps."""
    model, batch = build("grouped")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module.out.weight.data += 1
    expected = outputs(average.module, batch, False)

    report = shrink_(model, batch)
    report.apply_(average.module)

    torch.testing.assert_close(outputs(average.module, batch, False), expected)
    assert average.module.out.weight.shape == model.out.weight.shape
    with pytest.raises(ValueError, match="has none of that name"):
        report.apply_(nn.Linear(1, 1))


def test_a_copy_is_cut_whole_or_not_at_all():
    """Not twice, not one of another size, and not one whose network writes by index."""
    model, batch = build("residual")
    copies = [copy.deepcopy(model) for _ in range(3)]
    report = shrink_(model, batch)
    report.apply_(copies[0])
    shapes = [p.shape for p in copies[0].parameters()]
    with pytest.raises(ValueError, match="had shape"):
        report.apply_(copies[0])
    assert [p.shape for p in copies[0].parameters()] == shapes
    average = torch.optim.swa_utils.AveragedModel(copies[1])
    report.apply_(average)
    assert [p.shape for p in average.module.parameters()] == shapes
    scattered = shrink_(copies[2], batch, scatter=True)
    with pytest.raises(ValueError, match="shrink it with `scatter` by itself"):
        scattered.apply_(copies[1])


class Stream(nn.Module):
    """Two layers that write to one stream, and something behind them."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.first_norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.behind, self.head = behind, nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.first_norm.weight[:6] = 0
            self.second_norm.weight[2:] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Segment."""
        x = torch.relu(self.first_norm(self.first(x)))
        return self.head(self.behind(x + self.second_norm(self.second(x))))


def test_a_reason_names_the_operator_and_what_helps():
    """A stream only where there is one, and `scatter` as its way out."""
    names = ["first_norm.weight", "second_norm.weight"]
    stream = "other layers write to the same channel (residual stream; pass `scatter=True`)"
    report = shrink_(Stream(nn.ReLU()), IMAGES)
    assert report.reasons == {name: {stream: 2} for name in names}
    assert shrink_(Stream(nn.ReLU()), IMAGES, scatter=True).reasons == {}

    sigmoid = shrink_(Stream(nn.Sigmoid()), IMAGES).reasons
    assert {why for each in sigmoid.values() for why in each} == {
        stream,
        "`sigmoid` makes something else of zero",
    }
