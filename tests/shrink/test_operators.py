"""Operators that channels pass through: zeros go where they are exact, and else they stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import outputs, zero_channels
from torch import Tensor, nn
from torch.nn import functional as F

from torch_worm_optim.shrink import shrink_


class Images(nn.Module):
    """A convolution and its BatchNorm, something, and a convolution that reads it."""

    def __init__(self, between: Callable[[Tensor], Tensor], n_read: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.between, self.out = between, nn.Conv2d(n_read, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Two channels."""
        return self.out(self.between(self.bn(self.conv(x)).relu()))


def images(seed: int, size: int = 8) -> tuple[Tensor, ...]:
    """A batch in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2 + seed, 3, size, size, generator=generator, dtype=torch.double),)


def count_left(
    model: nn.Module, batches: list[tuple[Tensor, ...]], zero: list[int] | None = None
) -> int:
    """How many zero channels stay; what is computed must not change for any batch in any mode."""
    zero_channels(model)
    if zero is not None:
        with torch.no_grad():
            for parameter in (model.bn.weight, model.bn.bias):
                parameter.fill_(0.7)[zero] = 0
    model.double()
    expected = [outputs(model, batch, mode) for batch in batches for mode in (False, True)]
    report = shrink_(model, batches[0])
    found = [outputs(model, batch, mode) for batch in batches for mode in (False, True)]
    torch.testing.assert_close(found, expected)
    assert report.channels[0] == 4
    return report.channels[1]


# ---- on images: something between a BatchNorm and a convolution that reads it


def dropped(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Dropout that always is on, and drops nothing."""
    return lambda x: function(x, 1e-15, True)


def drop_path(x: Tensor) -> Tensor:
    """What timm does to whole samples, which drops none here."""
    return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(1.0).div_(1.0)


def filled(x: Tensor) -> Tensor:
    """Multiplied by what was filled in place, and added to what was set to zero."""
    return x * torch.empty_like(x).fill_(2.0) + torch.empty_like(x).zero_()


def unpooled(x: Tensor) -> Tensor:
    """SegNet's way down and up."""
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


def unpooled_adaptively(x: Tensor) -> Tensor:
    """The same of another pooling, whose indices go through a view."""
    y, indices = F.adaptive_max_pool2d(x, 4, return_indices=True)
    return F.max_unpool2d(y, indices.flatten(2).view_as(y), 2, output_size=x.shape)


def sorted_rows(x: Tensor) -> Tensor:
    """Rows in order, and put back where they were."""
    values, indices = x.sort(2)
    return x + torch.zeros_like(x).scatter_(2, indices, values.cumsum(2))


def largest(x: Tensor) -> Tensor:
    """The largest of each row, by three operators."""
    return x.topk(2, 3)[0] + x.gather(3, x.topk(2, 3)[1]) + x.cummax(3)[0][..., :2]


def along(x: Tensor) -> Tensor:
    """Picked by an index that is the same for each channel."""
    return x.gather(2, torch.tensor([3, 1, 0]).view(1, 1, 3, 1).expand(*x.shape[:2], -1, 8))


def diagonal(x: Tensor) -> Tensor:
    """Two indices at once."""
    i = torch.arange(4)
    return x[:, :, i, i + 1].unsqueeze(2)


def apart(x: Tensor) -> Tensor:
    """Two indices with the channels between them."""
    y = x[torch.tensor([0, 1]), :, torch.tensor([2, 3])]
    return y.unsqueeze(2)


def masked(x: Tensor) -> Tensor:
    """The pixels that a mask picks."""
    mask = (x.sum((1, 2, 3)) > -1e9)[:, None, None] & (torch.arange(8) % 3 != 1)
    return x.permute(0, 2, 3, 1)[mask.expand(-1, 8, 8)].T[None, :, None]


def put(x: Tensor) -> Tensor:
    """Written into a fresh tensor, by an index and by a mask."""
    y, z = x.new_zeros(x.shape), torch.zeros_like(x)
    y[:, :, torch.tensor([5, 0, 1])] = x[:, :, :3]
    rows = torch.arange(8) > 3
    z[:, :, rows] = x[:, :, rows] * 2
    return y + z


def normalised(x: Tensor) -> Tensor:
    """By the norm over channels."""
    return F.normalize(x) * F.normalize(x.flatten(1), p=1).view_as(x)


def gated(x: Tensor) -> Tensor:
    """Spatial attention by sums and norms over channels."""
    return x * torch.cat([x.sum(1, True), x.norm(dim=1, keepdim=True)], 1).mean(1, True).sigmoid()


def similar(x: Tensor) -> Tensor:
    """Multiplied by its likeness to the mean over the image."""
    return x * F.cosine_similarity(x, x.mean((2, 3), True).expand_as(x)).unsqueeze(1)


def spread(x: Tensor) -> Tensor:
    """Statistics over the image."""
    return x.std((2, 3), keepdim=True) + torch.var_mean(x, (2, 3), keepdim=True)[0]


def in_frequencies(x: Tensor) -> Tensor:
    """Multiplied by a filter there."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.linspace(0, 1, 5))


def sampled(x: Tensor) -> Tensor:
    """Between the pixels."""
    places = torch.linspace(-1, 1, len(x) * 18, dtype=x.dtype).view(-1, 3, 3, 2)
    return F.grid_sample(x, places, align_corners=False)


def windows(x: Tensor) -> Tensor:
    """Sums over neighbours, made of a view of all windows."""
    return x.unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2))


def deep_padded(x: Tensor) -> Tensor:
    """Padded in three dimensions."""
    return nn.ReplicationPad3d(1)(x.unsqueeze(2))[:, :, 0]


ON_IMAGES = {
    "dropout": dropped(F.dropout),
    "dropout2d": dropped(F.dropout2d),
    "native dropout": lambda x: torch.native_dropout(x, 1e-15, True)[0],
    "drop path": drop_path,
    "fill": filled,
    "rrelu": lambda x: F.rrelu(x - 2 * x, 0.1, 0.1 + 1e-15, training=True),
    "max unpool": unpooled,
    "adaptive max unpool": unpooled_adaptively,
    "sort and scatter": sorted_rows,
    "topk and gather": largest,
    "gather by one index": along,
    "two indices": diagonal,
    "two indices apart": apart,
    "mask": masked,
    "index put": put,
    "flip": lambda x: x.flip(3).rot90(1, (2, 3)),
    "normalize": normalised,
    "sums over channels": gated,
    "cosine": similar,
    "std": spread,
    "fft": in_frequencies,
    "grid sample": sampled,
    "windows": windows,
    "bicubic": lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True),
    "padding": deep_padded,
}  # fmt: skip


@pytest.mark.parametrize("between", ON_IMAGES.values(), ids=ON_IMAGES)
def test_zero_channels_go_through(between):
    """All of them, and the network computes what it did, of other images too."""
    torch.manual_seed(0)
    assert count_left(Images(between), [images(0), images(1)]) == 0


def repeated(x: Tensor) -> Tensor:
    """Space made channels, four of each."""
    return F.pixel_unshuffle(x, 2)


@pytest.mark.parametrize(
    ("between", "n_read", "zero", "n_left"),
    [
        (repeated, 32, None, 0),
        (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32, None, 0),
        (lambda x: F.pixel_shuffle(x, 2), 2, [4, 5, 6, 7], 0),
        (lambda x: F.pixel_shuffle(x, 2), 2, [0, 5, 6, 7], 4),
        (lambda x: F.fold(x.flatten(2), (9, 8), (2, 1)), 4, [0, 1, 4, 5], 0),
        (lambda x: F.fold(x.flatten(2), (9, 8), (2, 1)), 4, [0, 1, 3, 4], 2),
        (lambda x: F.channel_shuffle(x, 2), 8, [0, 3, 4, 7], 0),
        (lambda x: F.channel_shuffle(x, 2), 8, [0, 3, 5, 7], 2),
        (lambda x: torch.native_channel_shuffle(x, 4), 8, [0, 2, 4, 6], 0),
        (lambda x: F.pad(x, (0, 0, 0, 0, 3, 2)), 13, None, 0),
        (lambda x: F.pad(x, (1, 0, 0, 2, 0, 4)), 12, None, 0),
        (lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), 7, None, 4),
    ],
)
def test_channels_that_become_others(between, n_read, zero, n_left):
    """Those that become one go together."""
    torch.manual_seed(0)
    assert count_left(Images(between, n_read), [images(0), images(1)], zero) == n_left


def put_at(x: Tensor, index: tuple[object, ...], values: Tensor | float) -> Tensor:
    """Written into a copy."""
    y = x.clone()
    y[index] = values
    return y


@pytest.mark.filterwarnings("ignore:Nothing was cut")
@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * x.amax(1, True).sigmoid(),
        lambda x: x * (x - 1).amin(1, True).sigmoid(),
        lambda x: x * x.norm(-torch.inf, dim=1, keepdim=True).sigmoid(),
        lambda x: x * x.mean(1, True),
        lambda x: x * x.sigmoid().sum(1, True),
        lambda x: x * (x + 1).norm(dim=1, keepdim=True),
        lambda x: x * x.argmax(1, True),
        lambda x: x * x.std(1, keepdim=True),
        lambda x: x * x.sort(1)[0][:, :1].exp(),
        lambda x: x.cumsum(1),
        lambda x: F.pad(x, (1, 0), value=2.0),
        lambda x: x + torch.empty_like(x).fill_(1.0),
        lambda x: x + torch.rand_like(x) * 1e-15,
        lambda x: F.alpha_dropout(x, 1e-15, True) + 1e-300,
        lambda x: x.sigmoid().scatter(2, x.argsort(2), x),
        lambda x: x.scatter(2, x.argsort(2)[:, :, :2], 1.0),
        lambda x: torch.zeros_like(x).scatter_add_(1, x.argsort(1), x),
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.index_add(1, torch.arange(8), x),
        lambda x: x.index_fill(2, torch.tensor([0]), 1.0),
        lambda x: x.flip(1),
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2) + 1,
        lambda x: sampled(x).exp(),
        lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2).cos(), 2),
        lambda x: x[x.new_ones(8, dtype=torch.bool).expand(len(x), 8)].view(len(x), 8, 8, 8),
        lambda x: x[:, torch.arange(8) >= 0],
        lambda x: put_at(x, (slice(None), torch.arange(8)[::2]), x[:, 1::2]),
        lambda x: put_at(x, (..., torch.arange(4)), 1.0),
        lambda x: put_at(torch.ones_like(x), (..., torch.arange(4)), x[..., 4:]),
        lambda x: x.tril().triu() + x.new_ones(8, 8).tril(),
        lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real,
    ],
)  # fmt: skip
def test_what_is_not_exact_stays(between):
    """Constants, maxima and means over channels, and channels that change their order."""
    torch.manual_seed(0)
    assert count_left(Images(between), [images(0), images(1)]) == 4
