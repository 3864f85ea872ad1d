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


def where_any_is(x: Tensor) -> Tensor:
    """Weighted by how many channels are not zero, if any is."""
    return x * ((x != 0).any(1, True) * x.count_nonzero(1).unsqueeze(1))


def similar(x: Tensor) -> Tensor:
    """Multiplied by its likeness to the mean over the image."""
    return x * F.cosine_similarity(x, x.mean((2, 3), True).expand_as(x)).unsqueeze(1)


def spread(x: Tensor) -> Tensor:
    """Statistics over the image."""
    variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return x.std((2, 3), keepdim=True) + variance + mean * x


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
    "true": lambda x: x[torch.tensor(True)][0],
    "index put": put,
    "flip": lambda x: x.flip(3).rot90(1, (2, 3)),
    "normalize": normalised,
    "sums over channels": gated,
    "cosine": similar,
    "any": where_any_is,
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
        lambda x: x + x.new_ones(8, 1, 1).clone().fill_(float(x.min())),
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


class Compared(Images):
    """Says where channels are equal to others, which have zeros for some images alone."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.Identity())
        self.other, self.compare = nn.Conv2d(3, 8, 1), compare
        nn.init.constant_(self.other.bias, 50.0)

    def forward(self, x: Tensor) -> Tensor:
        """Two channels."""
        y = self.bn(self.conv(x)).relu()
        return self.out(y + self.compare(y, self.other(x).relu()))


@pytest.mark.filterwarnings("ignore:Nothing was cut")
@pytest.mark.parametrize(
    "compare",
    [torch.eq, lambda a, b: (a == b) & (a < 1), lambda a, b: torch.isclose(a, b)],
)
def test_what_is_zero_beside_most_values_and_not_beside_zero_stays(compare):
    """Zero is equal to zero, whatever the batch that is watched has."""
    batches = [images(0), tuple(1e3 * x for x in images(1))]
    assert count_left(Compared(compare), batches) == 4


def test_zero_over_something_is_zero():
    """Over zero it is not a number, before as well."""
    assert count_left(Compared(lambda a, b: a / (b + 1) + a * b), [images(0), images(1)]) == 0


class OfItsBatch(nn.BatchNorm2d):
    """A BatchNorm that always is in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the batch, and keep statistics."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=True)


def test_statistics_of_the_batch_that_is_watched_are_no_matter():
    """They are put back, and zero scales and shifts make zeros in training mode too."""
    torch.manual_seed(0)
    model = Images(nn.Dropout(0.0))
    model.bn = OfItsBatch(8)
    zero_channels(model)
    before = model.bn.running_mean[model.bn.weight != 0].double()
    assert count_left(model, [images(0), images(1)]) == 0
    assert torch.equal(model.bn.running_mean, before)


# ---- on graphs: nodes that read what their neighbours have


class Nodes(nn.Module):
    """A layer and its BatchNorm on each node, a sum over neighbours, and a layer that reads it."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Of each node."""
        return self.last(self.between(self.bn(self.first(x)).relu(), edges))


def graph(n: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    """Nodes, and edges as pairs of their numbers."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return x, torch.randint(n, (2, 3 * n), generator=generator)


def matrix(edges: Tensor, n: int) -> Tensor:
    """How many edges there are from each node to each."""
    found = torch.zeros(n, n, dtype=torch.double)
    return found.index_put_((edges[1], edges[0]), torch.ones(len(edges[0])).double(), True)


def attended(x: Tensor, edges: Tensor) -> Tensor:
    """Weighted by a softmax over each node's edges, as graph attention is."""
    source, target = edges
    scores = x[source].sum(1).tanh().exp()
    sums = scores.new_zeros(len(x)).scatter_add_(0, target, scores)
    weights = (scores / sums[target]).unsqueeze(1)
    return torch.zeros_like(x).index_add_(0, target, weights * x[source])


def reduced(how: str) -> Callable[[Tensor, Tensor], Tensor]:
    """By one operator, with an index that is expanded over channels."""

    def between(x: Tensor, edges: Tensor) -> Tensor:
        index = edges[1].unsqueeze(1).expand(-1, x.shape[1])
        zeros = x.new_zeros(len(x), x.shape[1])
        return zeros.scatter_reduce(0, index, x.index_select(0, edges[0]), how, include_self=False)

    return between


def added(x: Tensor, edges: Tensor) -> Tensor:
    """With an index that is made for each entry."""
    index = edges[1].unsqueeze(1).expand_as(x[edges[0]])
    return x.scatter_add(0, index, x[edges[0]])


ON_NODES = {
    "dense": lambda x, edges: matrix(edges, len(x)) @ x,
    "dense twice": lambda x, edges: torch.addmm(x, matrix(edges, len(x)), x),
    "einsum": lambda x, edges: torch.einsum("nm,mc->nc", matrix(edges, len(x)), x),
    "batched": lambda x, edges: (matrix(edges, len(x)) @ x.view(1, *x.shape)).squeeze(0),
    "coo": lambda x, edges: torch.sparse.mm(matrix(edges, len(x)).to_sparse(), x),
    "coo @": lambda x, edges: matrix(edges, len(x)).to_sparse() @ x,
    "csr": lambda x, edges: torch.sparse.mm(matrix(edges, len(x)).to_sparse_csr(), x),
    "csr @": lambda x, edges: matrix(edges, len(x)).to_sparse_csr() @ x,
    "attention": attended,
    "scatter_add": added,
    "scatter sum": reduced("sum"),
    "scatter mean": reduced("mean"),
    "scatter amax": reduced("amax"),
    "index_add": lambda x, edges: x.index_add(0, edges[1], x[edges[0]], alpha=2),
    "index_copy": lambda x, edges: x.index_copy(0, edges[1].unique(), x[edges[0].unique()]
                                                [:1].expand(len(edges[1].unique()), -1)),
}  # fmt: skip


@pytest.mark.parametrize("between", ON_NODES.values(), ids=ON_NODES)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_zero_channels_go_through_graphs(between):
    """All of them, and the network computes what it did, of another graph too."""
    torch.manual_seed(0)
    assert count_left(Nodes(between), [graph(6), graph(9)]) == 0


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_zero_channels_go_through_an_adjacency_that_is_given(layout):
    """As an argument, or as an attribute of the module."""

    class Convolutional(Nodes):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            y = torch.sparse.mm(self.adjacency, super().forward(x, adjacency))
            return torch.addmm(y, adjacency, y)

    model = Convolutional(lambda x, adjacency: torch.mm(adjacency, x))
    x, edges = graph(6)
    dense = matrix(edges, 6)
    adjacency = {
        torch.strided: dense, torch.sparse_coo: dense.to_sparse(),
        torch.sparse_csr: dense.to_sparse_csr(),
    }[layout]  # fmt: skip
    model.adjacency = dense.to_sparse()
    assert count_left(model, [(x, adjacency), (x * 2, adjacency)]) == 0


@pytest.mark.filterwarnings("ignore:Nothing was cut")
@pytest.mark.parametrize(
    "between",
    [
        lambda x, edges: torch.ones_like(x).index_add(0, edges[1], x[edges[0]]),
        lambda x, edges: x.index_add(0, edges[1], x[edges[0]].exp()),
        lambda x, edges: (x @ x.T) @ x,
        lambda x, edges: torch.mm(matrix(edges, len(x)), x) + 1,
        lambda x, edges: torch.addmm(torch.ones_like(x), matrix(edges, len(x)), x),
        lambda x, edges: x.scatter_reduce(
            0, edges[1].unsqueeze(1).expand(-1, 8), x[edges[0]].cos(), "amax"
        ),
    ],
)
def test_what_is_not_exact_on_graphs_stays(between):
    """What is added to something, and products whose scale may be made of how many there are."""
    torch.manual_seed(0)
    assert count_left(Nodes(between), [graph(6), graph(9)]) == 4


# ---- convolutions that are none of torch's own layers


class Blurred(nn.Module):
    """A filter for each channel, which is a buffer."""

    def __init__(self, is_expanded: bool, persistent: bool = True) -> None:
        super().__init__()
        blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        blur = blur.repeat(1 if is_expanded else 8, 1, 1, 1)
        self.register_buffer("blur", blur, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Half as large."""
        n = x.shape[1]
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.blur.expand(n, -1, -1, -1), stride=2, groups=n)


class Deformed(nn.Module):
    """A convolution whose places another one says."""

    def __init__(self, mask: bool, bias: bool) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.mask, self.offset = mask, nn.Conv2d(8, 27, 3, padding=1)
        self.moved = ops.DeformConv2d(8, 8, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """With weights of places, or without."""
        places = self.offset(x)
        return self.moved(x, places[:, :18], places[:, 18:].sigmoid() if self.mask else None)


def transposed(n: int, bias: bool) -> nn.Module:
    """Upsampling with so many filters for each channel."""
    return nn.ConvTranspose2d(8, 8 * n, 2, 2, groups=8, bias=bias)


@pytest.mark.parametrize(
    ("between", "n_read"),
    [
        (Blurred(True), 8),
        (Blurred(True, persistent=False), 8),
        (Blurred(False), 8),
        (Deformed(True, True), 8),
        (Deformed(False, False), 8),
        (transposed(1, False), 8),
        (transposed(2, False), 16),
        (nn.Sequential(transposed(1, False), nn.ReLU(), nn.Conv2d(8, 8, 1)), 8),
    ],
)
def test_zero_channels_go_through_other_convolutions(between, n_read):
    """All of them, and of a buffer or a weight what belongs to them."""
    torch.manual_seed(0)
    model = Images(between, n_read)
    assert count_left(model, [images(0), images(1)]) == 0
    assert model.conv.out_channels == 4
    found = [len(t) for n, t in between.state_dict().items() if n in ("weight", "blur", "0.weight")]
    assert found in ([4], [1], [])


@pytest.mark.filterwarnings("ignore:Nothing was cut")
@pytest.mark.parametrize("between", [transposed(1, True), Blurred(False, persistent=False)])
def test_convolutions_that_keep_their_channels(between):
    """A bias makes something of zero, and of filters that are not saved none can be left out."""
    assert count_left(Images(between), [images(0), images(1)]) == 4


# ---- a layer whose features become an image


class Decoder(nn.Module):
    """From a code to an image, as generators begin."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8 * 16), nn.BatchNorm1d(8 * 16, affine=False)
        self.view, self.bn, self.conv = view, nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Two channels."""
        return self.conv(self.bn(self.view(self.norm(self.first(x)))).relu())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(len(x), -1, 4, 4),
        lambda x: x.unflatten(1, (-1, 4, 4)),
        lambda x: x.view(len(x), -1, 16).unflatten(2, (4, 4)),
    ],
)
def test_features_that_become_an_image_go_with_its_channels(view):
    """Sixteen rows for each channel that the BatchNorm behind removes."""
    torch.manual_seed(0)
    model, x = Decoder(view), torch.randn(9, 6, dtype=torch.double)
    assert count_left(model, [(x,), (x[2:] * 3,)], [0, 2, 3, 7]) == 0
    assert (model.first.out_features, model.conv.in_channels) == (64, 4)


class SplitAttention(nn.Module):
    """Two halves weighted by a softmax over them, as in ResNeSt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.second = nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Half as many channels."""
        halves = x.view(len(x), 2, -1, *x.shape[2:])
        weights = self.second(self.first(halves.sum(1).mean((2, 3)))).view(len(x), 1, 2, -1)
        weights = weights.transpose(1, 2).softmax(1).reshape(len(x), -1)
        return (halves * weights.reshape(len(x), 2, -1, 1, 1)).sum(1)


def test_channels_go_with_what_weights_them():
    """The rows that make weights of both halves go too."""
    torch.manual_seed(0)
    between = SplitAttention()
    model = Images(between)
    model.conv, model.bn = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
    zero_channels(model)
    with torch.no_grad():
        for parameter in (model.bn.weight, model.bn.bias):
            parameter.copy_(torch.arange(8).repeat(2) % 3)
    model.double()
    expected = model.eval()(*images(1))
    report = shrink_(model, images(0))
    torch.testing.assert_close(model(*images(1)), expected)
    assert report.channels == (6, 0)
    assert (between.first[0].in_features, between.second.out_features) == (5, 10)


# ---- buffers of indices, reached through some operator and used to pick


class Picking(nn.Module):
    """A buffer of as many indices as there are nodes, and a feed-forward block."""

    def __init__(self, reach: Callable[[Tensor], Tensor], pick: Callable[..., Tensor]) -> None:
        super().__init__()
        self.reach, self.pick = reach, pick
        self.register_buffer("picks", torch.tensor([[3, 1, 0, 2, 5, 4]]))
        self.places, self.up = nn.Embedding(6, 5), nn.Linear(5, 8)
        self.bn, self.down = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Of each node."""
        x = self.pick(x, self.reach(self.picks), self.places)
        return self.down(self.bn(self.up(x)).relu())


REACHES = [
    lambda picks: picks[:, :6][0],
    lambda picks: picks.view(6),
    lambda picks: picks.detach().flatten(),
    lambda picks: picks.to(torch.int32).to(torch.long)[0],
    lambda picks: torch.ops.aten.alias(picks)[0],
    lambda picks: picks.repeat(2, 1)[1],
    lambda picks: torch.cat([picks[:, :3], picks[:, 3:]], 1)[0],
    lambda picks: (picks + 1 - 1).squeeze(0),
    lambda picks: torch.where(picks > 2, picks, picks.clamp(max=2))[0],
    lambda picks: torch.stack(picks[0].chunk(2)).flatten(),
]
PICKS = {
    "embedding": lambda x, i, places: x + places(i),
    "index_select": lambda x, i, places: x.index_select(0, i),
    "index": lambda x, i, places: x[i],
    "two indices": lambda x, i, places: x + x[i, i % 5][:, None],
    "gather": lambda x, i, places: x.gather(0, i[:, None].expand(-1, 5)),
    "gather in order": lambda x, i, places: x.gather(0, i.repeat_interleave(5).view(6, 5)),
    "index_put": lambda x, i, places: put_at(x, (i,), x),
    "index_put twice": lambda x, i, places: put_at(x, (i, i % 5), x[:, 0]),
    "scatter": lambda x, i, places: x.scatter(0, i[:, None].expand(-1, 5), x),
    "scatter a number": lambda x, i, places: x.scatter(1, i[:, None] % 5, 1.0),
    "index_add": lambda x, i, places: x.index_add(0, i, x),
    "index_fill": lambda x, i, places: x.index_fill(0, i[:3], 0),
    "take_along_dim": lambda x, i, places: x.take_along_dim(i[:, None], 0),
    "take": lambda x, i, places: x + x.take(i)[:, None],
    "one_hot": lambda x, i, places: F.one_hot(i, 6).to(x.dtype) @ x,
    "bucketize": lambda x, i, places: x + torch.bucketize(x, i.sort()[0].to(x.dtype)),
    "searchsorted": lambda x, i, places: x + torch.searchsorted(i.sort()[0].to(x.dtype), x),
    "mask": lambda x, i, places: torch.cat([x[i > 2], x[i <= 2]]),
    "bytes": lambda x, i, places: x.masked_fill((i > 2)[:, None], 0.5),
    "where": lambda x, i, places: torch.where((i > 2)[:, None], x, -x),
    "triangle": lambda x, i, places: (i[:, None] >= i).to(x.dtype).tril() @ x,
    "list": lambda x, i, places: x[i.tolist()],
    "array": lambda x, i, places: x[torch.as_tensor(i.numpy().copy())],
    "length": lambda x, i, places: x * len(i),
    "numbers": lambda x, i, places: torch.stack([x[n] for n in i]),
    "embedding_bag": lambda x, i, places: x + F.embedding_bag(i[:, None], places.weight),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:This batch does not use 1 trainable")
@pytest.mark.parametrize("pick", PICKS)
def test_a_buffer_of_indices_stays_as_it_is(pick):
    """Whatever it is reached through and used for, and what it does not touch goes."""
    number = list(PICKS).index(pick)
    for reach in (REACHES[0], REACHES[1 + number % (len(REACHES) - 1)]):
        torch.manual_seed(0)
        model, x = Picking(reach, PICKS[pick]), torch.randn(6, 5, dtype=torch.double)
        assert count_left(model, [(x,), (-2 * x,)]) == 0
        assert model.picks.tolist() == [[3, 1, 0, 2, 5, 4]]
        assert model.up.out_features == 4
