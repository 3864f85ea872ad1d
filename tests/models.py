"""Networks with channels to cut, used by several test files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
