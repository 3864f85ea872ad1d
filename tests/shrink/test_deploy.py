"""A shrunk network goes where networks go: exported, traced, quantised."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from models import Concatenated, Residual, Sequence, zero_channels
from torch import Tensor, nn

from torch_worm_optim.shrink import load_shrunk_, shrink_

NETWORKS = {"sequence": Sequence, "residual": Residual, "concatenated": Concatenated}
networks = pytest.mark.parametrize("which", NETWORKS)
shrunk_networks = pytest.mark.parametrize(
    ("which", "scatter"), [("concatenated", False), ("residual", True)]
)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class FirstOutput(nn.Module):
    """A network that returns one tensor, as exporters like it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first tensor that the network returns."""
        output = self.model(x)
        return output["logits"] if isinstance(output, dict) else output


def shrunk(which: str, scatter: bool) -> nn.Module:
    """A network in evaluation mode, smaller than it was."""
    torch.manual_seed(0)
    model = NETWORKS[which]().eval()
    zero_channels(model)
    assert shrink_(model, IMAGES, scatter=scatter).kept
    return FirstOutput(model).eval()


@shrunk_networks
def test_it_is_exported_by_torch_export(which, scatter):
    """The exported program computes the same, on another batch of the same size."""
    model = shrunk(which, scatter)

    program = torch.export.export(model, (IMAGES,))

    torch.testing.assert_close(program.module()(IMAGES + 1), model(IMAGES + 1))


@pytest.mark.filterwarnings("ignore")  # torch says that tracing is deprecated
@shrunk_networks
def test_it_is_traced_by_torch_jit(which, scatter):
    """The traced module computes the same."""
    model = shrunk(which, scatter)

    traced = torch.jit.trace(model, (IMAGES,))

    torch.testing.assert_close(traced(IMAGES + 1), model(IMAGES + 1))


@pytest.mark.filterwarnings("ignore")
@shrunk_networks
def test_onnxruntime_computes_the_same(tmp_path, which, scatter):
    """Exported to ONNX and run there."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = shrunk(which, scatter), str(tmp_path / "model.onnx")

    torch.onnx.export(model, (IMAGES,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})

    torch.testing.assert_close(
        torch.from_numpy(output), model(IMAGES).detach(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("small", [False, True])
def test_quantisation_aware_training_needs_the_zeros_gone(small):
    """Fused with a scale of zero the network is NaN at once; shrunk, it trains."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not hasattr(quantization, "prepare_qat"):
        pytest.skip("this torch has no prepare_qat")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(8 * 36, 2))
    zero_channels(model)
    if small:
        shrink_(model, IMAGES)
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86", version=0)
    quantization.fuse_modules_qat(model, [["1", "2", "3"]], inplace=True)
    quantization.prepare_qat(model, inplace=True)
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(5):
        sgd.zero_grad()
        try:
            loss = nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1]))
        except AssertionError:  # The observers of some releases of torch refuse NaN.
            losses.append(float("nan"))
            break
        loss.backward()
        sgd.step()
        losses.append(float(loss))

    assert all(torch.tensor(losses).isfinite()) == small
    if small:
        assert losses[-1] < losses[0]


@networks
def test_a_copy_goes_its_own_way(which):
    """A deep copy has scattered BatchNorms of its own."""
    model = shrunk(which, True)

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()

    assert model(IMAGES).abs().sum() > 0
    assert repr(other) == repr(model)


class Branches(nn.Module):
    """A depthwise convolution, a pointwise one and an identity, which become one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_chs, self.groups, self.kernel_size, self.fused = dim, dim, 3, None
        self.wide = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches, or the one convolution."""
        if self.fused is not None:
            return self.fused(x)
        return self.norms[0](self.wide(x)) + self.norms[1](x)

    def reparameterize(self) -> None:
        """Build that from what the block says of its sizes."""
        n, k = self.in_chs, self.kernel_size
        identity = torch.zeros(n, n // self.groups, k, k, dtype=self.wide.weight.dtype)
        identity[:, 0, k // 2, k // 2] = 1
        weight, bias = 0, 0
        for kernel, norm in zip((self.wide.weight, identity), self.norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = weight + kernel * scale[:, None, None, None]
            bias = bias + norm.bias - norm.running_mean * scale
        self.fused = nn.Conv2d(n, n, k, padding=k // 2, groups=self.groups)
        self.fused.weight.data, self.fused.bias.data = weight, bias
        del self.wide, self.norms


def zero_alike(model: nn.Module) -> None:
    """Zero every other channel of all BatchNorms, the same ones in each branch of a block."""
    zero_channels(model, 0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight[1::2], module.bias[1::2] = 0, 0


def branches_of(which: str, dim: int) -> nn.Module:
    """A block of ours, or of timm, which skips the test where that is missing."""
    if which == "ours":
        return Branches(dim)
    package, kind = which.split(".")
    pytest.importorskip("timm")
    block = getattr(importlib.import_module(f"timm.models.{package}"), kind)
    return block(dim, dim, kernel_size=3, group_size=1, num_conv_branches=2)


@pytest.mark.parametrize("which", ["ours", "byobnet.MobileOneBlock", "fastvit.MobileOneBlock"])
@pytest.mark.parametrize("loaded", [False, True])
def test_branches_are_fused_after_shrinking(which, loaded):
    """Blocks say what sizes they have, with which they make one convolution of several."""

    def make():
        stem = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        blocks = branches_of(which, 8), nn.ReLU(), branches_of(which, 8)
        return nn.Sequential(*stem, *blocks, nn.Conv2d(8, 2, 1)).double().eval()

    model = make()
    zero_alike(model)
    assert shrink_(model, IMAGES.double()).channels[1] == 0
    assert model[0].out_channels == 4
    if loaded:
        fresh = make()
        load_shrunk_(fresh, model.state_dict())
        model = fresh
    expected = model(IMAGES.double())
    for block in (model[3], model[5]):
        block.reparameterize()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model[3:].modules())
    torch.testing.assert_close(model.double()(IMAGES.double()), expected)
