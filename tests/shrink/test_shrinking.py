"""Channels cut out: what the network computes, and what training makes of it, stays the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_worm_optim.shrink import cut_tensor, load_shrunk_, shrink_


def zero_channels(model: nn.Module, share: float = 0.5, seed: int = 0) -> None:
    """Set a share of the BatchNorm channels to zero, one of each layer kept; some statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if not isinstance(norm, _BatchNorm) or norm.weight is None:
                continue
            scale = torch.rand(len(norm.weight), generator=generator)
            kept = scale >= scale.sort().values[min(round(share * len(scale)), len(scale) - 1)]
            norm.weight.copy_((scale + 0.5) * kept)
            norm.bias.copy_(torch.randn(len(scale), generator=generator) * kept)
            norm.running_mean.copy_(torch.randn(len(scale), generator=generator) * 0.2)
            norm.running_var.copy_(torch.rand(len(scale), generator=generator) + 0.5)


class Sequence(nn.Sequential):
    """Convolutions one after another, and a head behind a flatten."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.PReLU(12),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(12 * 16, 10),
            nn.BatchNorm1d(10),
            nn.Hardswish(),
            nn.Linear(10, 3),
        )


class Residual(nn.Module):
    """Two blocks that write into one stream, with squeeze-and-excitation in them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "expand": nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)),
                    "depthwise": nn.Sequential(
                        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
                    ),
                    "gate": nn.Sequential(nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 1)),
                    "project": nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Classify, and return the features too."""
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            y = nn.functional.silu(block["expand"](x))
            y = torch.relu(block["depthwise"](y))
            y = y * torch.sigmoid(block["gate"](y.mean((2, 3), keepdim=True)))
            x = x + block["project"](y)
        features = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return {"logits": self.head(features), "features": features}


class Concatenated(nn.Module):
    """A small U-Net: two resolutions, a transposed convolution and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 6, 2, 2), nn.BatchNorm2d(6), nn.GELU())
        self.out = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Segment."""
        wide = self.down(x)
        deep = self.middle(nn.functional.avg_pool2d(wide, 2))
        return self.out(
            torch.cat([nn.functional.interpolate(self.up(deep), wide.shape[2:]), wide], 1)
        )


class Grouped(nn.Module):
    """Grouped convolutions, a split into equal parts, and two filters for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.Sequential(
            nn.Conv2d(12, 24, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.twofold = nn.Sequential(nn.Conv2d(12, 24, 3, groups=12), nn.BatchNorm2d(24), nn.ReLU())
        self.out = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Two outputs, one of them scaled."""
        a, b = self.grouped(self.first(x)).chunk(2, 1)
        y = self.out(self.twofold(a * b))
        return y, y.mean() * scale


class OtherDims(nn.Module):
    """Convolutions of one and of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ELU(), nn.AvgPool1d(2))
        self.more = nn.Sequential(nn.ConvTranspose1d(8, 6, 3), nn.BatchNorm1d(6), nn.Tanh())
        self.space = nn.Sequential(nn.Conv3d(3, 5, 2), nn.BatchNorm3d(5), nn.ReLU())
        self.line_out, self.space_out = nn.Conv1d(6, 2, 1), nn.Conv3d(5, 2, 1)

    def forward(self, line: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
        """Each by itself."""
        return self.line_out(self.more(self.line(line))), self.space_out(self.space(space))


class Shared(nn.Module):
    """One convolution and one BatchNorm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same layer twice."""
        return self.out(self.shared(self.shared(torch.relu(self.stem(x)))))


# A BatchNorm of only two vectors makes signs of them, and of its gradients mostly rounding.
IMAGES = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
NETWORKS = {
    "sequence": (Sequence, IMAGES),
    "residual": (Residual, IMAGES),
    "concatenated": (Concatenated, IMAGES),
    "grouped": (Grouped, IMAGES),
    "other dims": (OtherDims, (torch.randn(2, 4, 12), torch.randn(2, 3, 4, 4, 4))),
    "shared": (Shared, IMAGES),
}
networks = pytest.mark.parametrize("which", NETWORKS)


def build(which: str, share: float = 0.5, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in double precision, a share of its channels zero, and a batch for it."""
    torch.manual_seed(seed)
    kind, batch = NETWORKS[which]
    model = kind().double()
    zero_channels(model, share, seed)
    return model, tuple(each.double() for each in batch)


def tensors_of(output: object) -> list[Tensor]:
    """The tensors in an output."""
    return torch.utils._pytree.tree_leaves(output)


def outputs(model: nn.Module, batch: tuple[Tensor, ...], training: bool) -> list[Tensor]:
    """What a copy of the model returns in one of its modes, without dropout."""
    twin = copy.deepcopy(model).train(training)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        return tensors_of(twin(*batch))


def loss_of(model: nn.Module, batch: tuple[Tensor, ...], step: int) -> Tensor:
    """A loss that depends on the step, on a batch that does."""
    generator = torch.Generator().manual_seed(step)
    moved = [x + torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in batch]
    results = tensors_of(model(*moved))
    return sum(
        (x - 0.1 * step).square().mean() + (x * (i + 1)).sin().mean() for i, x in enumerate(results)
    )


@networks
@settings(max_examples=12)
@given(
    share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), seed=st.integers(0, 99), scatter=st.booleans()
)
@example(share=0.5, seed=0, scatter=False)
@example(share=0.5, seed=0, scatter=True)
def test_a_smaller_network_computes_the_same(which, share, seed, scatter):
    """In both modes, with whatever channels zero; parameters are the same objects, and smaller."""
    model, batch = build(which, share, seed)
    before = {training: outputs(model, batch, training) for training in (False, True)}
    parameters = dict(model.named_parameters())
    n_before = sum(p.numel() for p in parameters.values())
    modes = [module.training for module in model.modules()]
    statistics = [buffer.sum() for buffer in model.buffers()]

    report = shrink_(model, batch, scatter=scatter)

    for training, expected in before.items():
        torch.testing.assert_close(outputs(model, batch, training), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    n_after = sum(p.numel() for p in parameters.values())
    assert report.parameters == (n_before, n_after)
    assert (n_after < n_before) == bool(report.kept) == (report.macs[1] < report.macs[0])
    assert [module.training for module in model.modules()][: len(modes)] == modes
    if share == 0.0:
        assert report.kept == {}
        assert [buffer.sum() for buffer in model.buffers()] == statistics
    if share == 0.5 and (scatter or which not in ("residual", "grouped")):
        zero, stayed = report.channels
        assert zero > 0
        # What one stream or group needs stays; where nothing is shared all zeros go.
        assert stayed == 0 or which in ("grouped", "shared")


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


@networks
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_afterwards_is_training_of_the_pruned_network(which, scatter, optimizer):
    """State is cut as parameters are: twenty steps of both networks end in the same place."""
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
    for number in range(4, 24):
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


@networks
@pytest.mark.parametrize("scatter", [False, True])
def test_a_shrunk_network_is_loaded_into_a_fresh_one(which, scatter):
    """Shapes come from the checkpoint: outputs, and a step of the optimizer on, are bit for bit."""
    model, batch = build(which)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    loss_of(model, batch, 0).backward()
    opt.step()
    zero_channels(model)
    shrink_(model, batch, optimizer=opt, scatter=scatter)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = NETWORKS[which][0]().double()
    load_shrunk_(fresh, saved["model"])
    fresh_opt = torch.optim.AdamW(fresh.parameters(), 1e-2)
    fresh_opt.load_state_dict(saved["opt"])

    assert repr(fresh) == repr(model)
    for training in (False, True):
        for a, b in zip(
            outputs(fresh, batch, training), outputs(model, batch, training), strict=True
        ):
            assert torch.equal(a, b)
    for each, optimizer in ((model, opt), (fresh, fresh_opt)):
        optimizer.zero_grad()
        each.eval()
        loss_of(each, batch, 1).backward()
        optimizer.step()
    for a, b in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["missing", "unknown", "larger", "other layer"])
def test_a_checkpoint_of_another_network_is_refused(what):
    """By the name of a parameter, with the model as it was."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = {"missing": "1.weight", "unknown": "9.weight", "larger": "0.weight"}
    name = names.get(what, "2.weight")
    if what == "missing":
        del state[name]
    elif what == "unknown":
        state[name] = torch.ones(3)
    else:
        state[name] = torch.ones(5, 3, 1, 1) if what == "larger" else torch.ones(3)
    state["0.bias"] += 1
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=f"of another network than Sequential.*'{name}'"):
        load_shrunk_(model, state)

    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


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


class Split(nn.Module):
    """Splits channels by a width that it keeps, as Res2Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.width = 4
        self.more, self.more_bn = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Three parts, added."""
        a, b, c = torch.relu(self.bn(self.conv(x))).split(self.width, 1)
        return self.out(torch.relu(self.more_bn(self.more(a + b + c))))


def test_a_width_that_a_forward_keeps_costs_its_channels_only():
    """Cut at first, put back, and cut again without the channels that are split."""
    torch.manual_seed(0)
    model = Split().double()
    zero_channels(model)
    with torch.no_grad():  # the first two of each part
        for parameter in (model.bn.weight, model.bn.bias):
            parameter.fill_(1.0).view(3, 4)[:, :2] = 0
    batch = (torch.randn(2, 3, 4, 4, dtype=torch.double),)
    expected = outputs(model, batch, False)

    report = shrink_(model, batch)

    torch.testing.assert_close(outputs(model, batch, False), expected)
    assert model.conv.out_channels == 12
    assert model.more.out_channels == 3
    assert report.left.keys() == {"bn.weight"}
    assert "split: 6" in report.left["bn.weight"]


def test_unknown_operators_keep_what_they_touch():
    """Channels that a softmax mixes stay, and those behind the next convolution go."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.a_bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.b, self.b_bn, self.out = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.a_bn(self.a(x)).softmax(1)
            return self.out(torch.relu(self.b_bn(self.b(x))))

    model = Mixed()
    zero_channels(model)

    report = shrink_(model, torch.randn(2, 3, 4, 4))

    assert (model.a.out_channels, model.b.out_channels) == (8, 4)
    assert list(report.left) == ["a_bn.weight"]
    assert "softmax" in report.left["a_bn.weight"]


@pytest.mark.parametrize("activation", ["sigmoid", "hardsigmoid", "exp", "cos", "softplus"])
def test_a_function_that_makes_something_of_zero_keeps_its_channels(activation):
    """A zero channel behind it is a constant that the next layer reads."""
    function = getattr(torch, activation, None) or getattr(nn.functional, activation)

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.out = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.out(function(self.bn(self.a(x))))

    model = Constant()
    zero_channels(model)

    assert shrink_(model, torch.randn(2, 3, 4, 4)).kept == {}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_memory_format_and_autocast_do_not_matter(memory_format, autocast):
    """Weights stay in their format; half precision is compared as such."""
    torch.manual_seed(0)
    model = Sequence().to(memory_format=memory_format)
    zero_channels(model)
    images = IMAGES[0].to(memory_format=memory_format)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shrink_(model, images)

    assert model[4].weight.shape == (6, 4, 3, 3)
    assert model[4].weight.is_contiguous(memory_format=memory_format)
    model.train()(images).sum().backward()


def test_frozen_and_unused_parameters_stay_what_they_are():
    """A parameter that the pass does not reach keeps its shape; frozen ones stay frozen."""
    model = Sequence()
    model.unused = nn.Conv2d(8, 4, 1)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    zero_channels(model)
    model[0].weight.requires_grad_(False)

    shrink_(model, IMAGES)

    assert model.unused.weight.shape == (4, 8, 1, 1)
    assert not model[0].weight.requires_grad
    assert model[0].out_channels == 4


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
    assert "residual stream" in text
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


def test_channels_last_loses_as_much():
    """Pooling to one pixel sets strides there by an operator of its own."""
    sizes = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).append(nn.Linear(8, 2))
        zero_channels(model)
        model.to(memory_format=memory_format)
        shrink_(model, IMAGES[0].to(memory_format=memory_format))
        sizes.append(model[0].out_channels)
    assert sizes == [4, 4]


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("make", [Sequence, Residual, Concatenated, Grouped, Split])
def test_sizes_that_change_are_multiples(make, scatter):
    """Exactly, and with as few zero channels kept as that takes."""
    model = make()
    zero_channels(model, 0.7)
    least, aligned = copy.deepcopy(model), copy.deepcopy(model)
    shrink_(least, IMAGES, scatter=scatter)

    report = shrink_(aligned, IMAGES, scatter=scatter, multiple_of=4)

    expected = outputs(model, IMAGES, True)
    torch.testing.assert_close(outputs(aligned, IMAGES, True), expected, rtol=1e-3, atol=1e-4)
    smallest = dict(least.named_parameters())
    for name, parameter in aligned.named_parameters():
        dense = model.get_parameter(name).shape
        for n, n_least, n_dense in zip(parameter.shape, smallest[name].shape, dense, strict=True):
            assert n == n_dense or n % 4 == 0
            assert n_least <= n <= n_dense
            if make is Sequence:
                assert n in (n_dense, -(-n_least // 4) * 4)
    assert any("multiple of 4" in why for why in report.left.values())


def test_a_multiple_is_a_whole_number():
    """Anything else is refused."""
    with pytest.raises(ValueError, match=r"multiple_of.*at least 1"):
        shrink_(Sequence(), IMAGES, multiple_of=0)


def test_a_compiled_network_is_recompiled_and_agrees():
    """torch.compile notices the smaller parameters, also where only a part of it is compiled."""
    torch.manual_seed(0)
    model = Sequence().eval()
    zero_channels(model)
    widths = []

    def backend(graph, inputs):
        widths.append(model[0].out_channels)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    expected = compiled(IMAGES[0])

    report = shrink_(compiled, IMAGES)
    if torch.__version__ < "2.5":  # it looks at shapes of parameters once, docs/deploy.md says
        torch.compiler.reset()

    assert "0.weight" in report.kept
    compiled(IMAGES[0])
    assert widths == [8, len(report.kept["0.weight"][0])]
    torch.testing.assert_close(compiled(IMAGES[0]), expected)


# ---- what the batch that is watched does not tell


class Blind(nn.Module):
    """Two layers, half of the first one's rows zero, with something in between."""

    def __init__(self, between: Callable[[Blind, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first, self.gate, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        table = torch.stack([torch.arange(9.0) * n for n in range(8)], 1).sin()
        self.register_buffer("table", table)
        with torch.no_grad():
            self.first.weight[:4] = 0
            self.first.bias[:4] = 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Classify each position."""
        return self.last(self.between(self, x, mask))


def filled_through(view: Callable[[Tensor], Tensor]) -> Callable[[Blind, Tensor, Tensor], Tensor]:
    """Writes into what it computed, through a view of it, where a mask says so."""

    def between(self: Blind, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(x)
        view(hidden).masked_fill_(view(mask)[..., None], -1.0)
        return hidden

    return between


def of_a_table(self: Blind, x: Tensor, mask: Tensor) -> Tensor:
    """A table whose first row is zero."""
    return self.first(x) + self.table[: x.shape[1]]


def of_a_copy(self: Blind, x: Tensor, mask: Tensor) -> Tensor:
    """A parameter's copy, which is then multiplied by what depends on the mask."""
    scale = self.gate.bias.clone()
    scale.mul_(mask.any().to(x.dtype))
    return self.first(x) + scale


@pytest.mark.parametrize(
    "between",
    [
        filled_through(lambda hidden: hidden[:, :]),
        filled_through(lambda hidden: hidden[0]),
        filled_through(lambda hidden: hidden.transpose(0, 1)),
        filled_through(lambda hidden: hidden.detach()),
        of_a_table,
        of_a_copy,
    ],
    ids=["slice", "select", "transpose", "detach", "table", "copy"],
)
def test_values_of_the_watched_batch_decide_nothing(between):
    """Watched with one position and an empty mask, run with five and a mask."""
    model = Blind(between)
    x, mask = torch.randn(2, 5, 4), torch.rand(2, 5) > 0.5
    expected = model(x, mask)
    shrink_(model, (x[:, :1], torch.zeros(2, 1, dtype=torch.bool)))
    torch.testing.assert_close(model(x, mask), expected)


class HeadsByNumber(nn.Module):
    """Splits into heads by a number whose name nobody knows."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        with torch.no_grad():
            for layer in (self.q, self.k) if n_heads == 1 else (self.q, self.k, self.v):
                layer.weight[4:16] = 0
                layer.bias[4:16] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (
            layer(x).view(*x.shape[:2], self.h, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("n_heads", [1, 6])
@pytest.mark.parametrize("watched", [torch.ones(1, 5, 24), torch.randn(2, 1, 24)])
def test_heads_are_heads_though_scores_do_not_matter(n_heads, watched):
    """With one position, or equal ones, attention is the same whatever heads are."""
    model = HeadsByNumber(n_heads)
    x = torch.randn(2, 5, 24)
    expected = model(x)
    shrink_(model, watched)
    torch.testing.assert_close(model(x), expected)


def test_an_operator_in_an_odd_form_costs_its_channels_only():
    """One that changes a shape in place, one that reads numbers as others."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            with torch.no_grad():
                for layer in (self.a, self.c):
                    layer.weight[:4] = 0
                    layer.bias[:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            hidden.unsqueeze_(1)
            x = self.b(hidden.view(torch.int32).view(torch.float32).squeeze(1))
            return self.d(self.c(x).relu())

    model, x = Odd(), torch.randn(3, 8)
    expected = model(x)
    report = shrink_(model, x)
    torch.testing.assert_close(model(x), expected)
    assert (model.a.out_features, model.c.out_features) == (8, 4)
    assert report.channels == (8, 4)


def test_a_layer_that_states_its_size_keeps_what_it_reads():
    """And what others read goes; the result can be loaded."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.gru = nn.Linear(8, 8), nn.GRU(8, 4, batch_first=True)
            self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(2, 1, kdim=8, vdim=8, batch_first=True)
            with torch.no_grad():
                for layer in (self.a, self.b):
                    layer.weight[:4] = 0
                    layer.bias[:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            memory = self.a(x)
            y = self.c(self.b(self.gru(memory)[0]).relu())
            return self.attention(y, memory, memory, need_weights=False)[0]

    model, x = Mixed(), torch.randn(2, 3, 8)
    expected = model(x)
    shrink_(model, x)
    torch.testing.assert_close(model(x), expected)
    assert (model.a.out_features, model.b.out_features) == (8, 4)
    fresh = Mixed()
    load_shrunk_(fresh, model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_masked_scores_of_minus_infinity_are_equal_to_themselves():
    """They are outputs like others."""

    class Masked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, True]), -torch.inf)

    model = Masked(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 0
    assert shrink_(model, torch.randn(2, 3)).channels == (1, 0)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"2.weight": torch.ones(4, 3)}), "has shape"),
        (lambda state: state.update({"0.weight": torch.ones(3, 4, device="meta")}), "without data"),
        (lambda state: state.update({"0.weight": [1.0]}), "got list"),
    ],
)
def test_a_state_dict_that_does_not_fit_leaves_the_model_as_it_was(change, message):
    """Among it one whose tied weights differ in shape."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    before = model[0].weight.clone()
    state = {name: torch.ones(3, 4) for name in ("0.weight", "2.weight")}
    change(state)
    with pytest.raises(ValueError, match=message):
        load_shrunk_(model, state)
    assert torch.equal(model[0].weight, before)
    assert model[0].out_features == 6


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
