"""A shrunk network goes where networks go: exported, traced, quantised."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Concatenated, Residual, Sequence, zero_channels
from torch import nn

from torch_worm_optim.shrink import shrink_

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
