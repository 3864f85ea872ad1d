"""Layers that normalise channels one by one, or weights, and layers that torch.jit compiled."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from models import loss_of, outputs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from torch_worm_optim import ParameterSelector, WormOptimizer
from torch_worm_optim.shrink import cut_tensor, load_shrunk_, shrink_

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated"),
]
WEIGHT_NORMS = [old_weight_norm, parametrizations.weight_norm]
SPECTRAL_NORMS = [old_spectral_norm, parametrizations.spectral_norm]
IMAGES = (torch.randn(3, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1)),)


def zero(*vectors: Tensor | None, n: int = 2) -> None:
    """Set the first entries or rows to zero."""
    with torch.no_grad():
        for vector in vectors:
            if vector is not None:
                vector[:n] = 0


def zero_norms(model: nn.Module) -> int:
    """Set the first half of each norm's scale and shift to zero; how many those are."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.weight is not None]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
        zero(norm.weight, norm.bias, n=norm.num_features // 2)
    return sum(norm.num_features // 2 for norm in norms)


def check_shrinks(model: nn.Module, batch: tuple[Tensor, ...], n_left: int = 0, **options: object):
    """Outputs in both modes, and training on, are the pruned network's; the report."""
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    with torch.no_grad():  # hooks set weights, which else are no leaves
        model(*batch)
    small = copy.deepcopy(model)
    before = [outputs(model, batch, training) for training in (False, True)]

    report = shrink_(small, batch, **options)

    for training, expected in zip((False, True), before, strict=True):
        torch.testing.assert_close(outputs(small, batch, training), expected)
    assert report.channels[1] == n_left
    kept = report.kept
    for each in (model, small):
        each.train()
        opt = torch.optim.SGD(each.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
        for step in range(3):
            opt.zero_grad()
            loss_of(each, batch, step).backward()
            opt.step()
            with torch.no_grad():
                for name, parameter in each.named_parameters():
                    mask = zeros[name]
                    mask = cut_tensor(mask, kept[name]) if name in kept and each is small else mask
                    parameter[mask] = 0
    for name, parameter in small.named_parameters():
        dense = model.get_parameter(name).detach()
        expected = cut_tensor(dense, kept[name]) if name in kept else dense
        torch.testing.assert_close(parameter.detach(), expected)
    return small, report


def evaluate(model: nn.Module, *batch: Tensor) -> Tensor:
    """What it returns in evaluation; weights that hooks compute are leaves afterwards."""
    with torch.no_grad():
        return model.eval()(*batch)


class EncoderDecoder(nn.Module):
    """As nnU-Net: a way down, a way up, a concatenation, in any number of dimensions."""

    def __init__(self, n_dims: int, **options: bool) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{n_dims}d")
        norm = getattr(nn, f"InstanceNorm{n_dims}d")
        up = getattr(nn, f"ConvTranspose{n_dims}d")

        def block(n_in: int, n_out: int, stride: int) -> nn.Sequential:
            layers = conv(n_in, n_out, 3, stride, 1), norm(n_out, affine=True, **options)
            return nn.Sequential(*layers, nn.LeakyReLU())

        self.down, self.deep = block(3, 6, 1), block(6, 8, 2)
        self.up = nn.Sequential(up(8, 6, 2, 2), norm(6, affine=True, **options))
        self.both, self.out = block(12, 6, 1), conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Segment."""
        wide = self.down(x)
        return self.out(self.both(torch.cat([self.up(self.deep(wide)), wide], 1)))


class Translator(nn.Module):
    """As CycleGAN: padding by reflection, and blocks that write into one stream."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=affine)
        )
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(8, 6, 3),
            nn.InstanceNorm2d(6, affine=affine),
            nn.ReLU(),
            nn.Conv2d(6, 8, 1),
            nn.InstanceNorm2d(8, affine=affine),
        )
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Another image."""
        x = torch.relu(self.stem(x))
        return torch.tanh(self.out(x + self.block(x)))


class HalfAndHalf(nn.Module):
    """As IBN: one half of the channels has an InstanceNorm, the other a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3)
        self.one, self.other = nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Both halves side by side."""
        a, b = self.conv(self.first(x)).chunk(2, 1)
        return self.out(torch.relu(torch.cat([self.one(a.contiguous()), self.other(b)], 1)))


@pytest.mark.parametrize("n_dims", [1, 2, 3])
@pytest.mark.parametrize("track_running_stats", [False, True])
def test_an_affine_instance_norm_is_cut_as_a_batch_norm_is(n_dims, track_running_stats):
    """In all dimensions, with a channel's own statistics and with running ones."""
    torch.manual_seed(0)
    options = {"track_running_stats": track_running_stats}
    model = EncoderDecoder(n_dims, **options).double()
    n_zero = zero_norms(model)
    batch = (torch.randn(2, 3, *[4] * n_dims, dtype=torch.double),)

    small, report = check_shrinks(model, batch)

    assert report.channels == (n_zero, 0)
    assert small.down[1].num_features == 3
    fresh = EncoderDecoder(n_dims, **options).double()
    load_shrunk_(fresh, small.state_dict())
    assert repr(fresh) == repr(small)
    assert torch.equal(outputs(fresh, batch, False)[0], outputs(small, batch, False)[0])


@pytest.mark.parametrize("kind", [Translator, HalfAndHalf])
@pytest.mark.parametrize("scatter", [False, True])
def test_networks_with_instance_norms_lose_their_zero_channels(kind, scatter):
    """Streams that blocks share, and norms of both kinds side by side."""
    torch.manual_seed(0)
    model = kind().double()
    zero_norms(model)

    check_shrinks(model, IMAGES, scatter=scatter)


@pytest.mark.parametrize("scatter", [False, True])
def test_an_instance_norm_that_writes_into_a_stream_is_not_scattered(scatter):
    """It loses the channels that all that write into the stream lose."""
    torch.manual_seed(0)
    model = Translator().double()
    zero_norms(model)
    zero(model.stem[2].weight, model.stem[2].bias, n=6)

    small, _ = check_shrinks(model, IMAGES, n_left=2, scatter=scatter)

    assert small.stem[2].num_features == small.block[-1].num_features == 4
    assert small.block[2].num_features == 3


def test_instance_norms_with_one_image_of_no_batch():
    """One image, and an image without a dimension for the batch."""
    torch.manual_seed(0)
    for shape in ((1, 3, 6, 6), (3, 6, 6)):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ).double()
        zero(model[1].weight, model[1].bias)
        small, _ = check_shrinks(model, (torch.randn(shape, dtype=torch.double),))
        assert small[3].in_channels == 4


@pytest.mark.parametrize(("momentum", "n_channels"), [(None, 4), (0.1, 6)])
def test_a_dead_filter_stays_dead_where_a_norm_has_statistics_of_its_input_alone(
    momentum, n_channels
):
    """Zeros have a mean of zero; running statistics may have another."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(6, track_running_stats=momentum is not None)
    if momentum is not None:
        nn.init.normal_(norm.running_mean)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    zero(model[0].weight, model[0].bias)

    small, _ = check_shrinks(model, IMAGES, n_left=n_channels - 4)

    assert small[0].out_channels == small[1].num_features == n_channels
    fresh = nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.ReLU(), nn.Conv2d(6, 2, 1))
    load_shrunk_(fresh.double(), small.state_dict())
    assert not small[1]._forward_pre_hooks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "input's size at dim=1 does not match num_features")
        assert torch.equal(evaluate(fresh, *IMAGES), evaluate(small, *IMAGES))


def rows_pruned(model: nn.Module, pattern: str) -> WormOptimizer:
    """The optimizer that has pruned half of the rows of each layer."""
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        ParameterSelector(pattern, granularity="row"),
        scope="layer",
        sample_every=None,
    )
    opt.sample()
    opt.prune(force=True)
    return opt


def convolutions(*widths: int) -> list[nn.Module]:
    """Convolutions, each with a ReLU behind."""
    pairs = itertools.pairwise(widths)
    return [m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]


class Fire(nn.Module):
    """As SqueezeNet: two convolutions side by side."""

    def __init__(self, n_in: int, n_squeezed: int, n_out: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(n_in, n_squeezed, 1)
        self.one, self.three = (nn.Conv2d(n_squeezed, n_out, k, padding=k // 2) for k in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze and expand."""
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.one(x)), torch.relu(self.three(x))], 1)


PLAIN = {
    "alexnet": lambda: nn.Sequential(
        *convolutions(3, 16, 32),
        *(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.0)),
        *(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
    ),
    "vgg": lambda: nn.Sequential(
        *convolutions(3, 8, 16, 16),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.Linear(16, 4),
    ),
    "squeezenet": lambda: nn.Sequential(
        *convolutions(3, 16), Fire(16, 8, 16), nn.MaxPool2d(2), Fire(32, 8, 16), nn.Conv2d(32, 4, 1)
    ),
}


@pytest.mark.parametrize("which", PLAIN)
def test_networks_without_norms_lose_rows_with_their_biases(which):
    """Half of the rows of all layers but the last: about three quarters of all parameters."""
    torch.manual_seed(0)
    model = PLAIN[which]().double()
    last = f"{len(model) - 1}.weight"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
            assert name.endswith("bias")
    opt = rows_pruned(model, lambda name, p: p.ndim > 1 and name != last)
    expected = outputs(model, IMAGES, True)

    report = opt.shrink(*IMAGES)

    torch.testing.assert_close(outputs(model, IMAGES, True), expected)
    before, after = report.parameters
    assert after < 0.4 * before
    assert not any(p.eq(0).flatten(1).all(1).any() for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("norm", WEIGHT_NORMS)
def test_rows_with_weight_norm_go_and_columns_stay(norm):
    """A row has a norm of its own, over all of its columns."""
    torch.manual_seed(0)

    def build() -> nn.Sequential:
        return nn.Sequential(
            *(norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(norm(nn.Conv2d(8, 4, 3, bias=False)), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Flatten(), norm(nn.Linear(16, 5)), nn.BatchNorm1d(5), nn.Linear(5, 2)),
        ).double()

    model = build()
    n_zero = zero_norms(model)

    small, report = check_shrinks(model, IMAGES, n_left=4 + 2)

    assert report.channels == (n_zero, 6)
    assert report.left == {
        "4.weight": "weight norm sums over them: 4",
        "7.weight": "weight norm sums over them: 2",
    }
    assert small[0].out_channels == small[3].in_channels == 3
    assert (small[6].in_channels, small[6].out_channels) == (8, 4)
    assert (small[10].in_features, small[10].out_features) == (16, 3)
    fresh = build()
    load_shrunk_(fresh, small.state_dict())
    expected = evaluate(small, *IMAGES)
    assert repr(fresh) == repr(small)
    assert torch.equal(evaluate(fresh, *IMAGES), expected)
    for layer in (fresh[0], fresh[6], fresh[10]):
        if norm is old_weight_norm:
            remove_weight_norm(layer)
        else:
            remove_parametrizations(layer, "weight")
    torch.testing.assert_close(evaluate(fresh, *IMAGES), expected)
    assert fresh[0].weight.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("norm", [*WEIGHT_NORMS, *SPECTRAL_NORMS])
def test_zero_rows_of_normed_layers_count_as_zero(norm):
    """The last layer is normed over its columns, so the report says that rows before it stay."""
    torch.manual_seed(0)
    first, last = norm(nn.Conv2d(3, 6, 3)), norm(nn.Conv2d(6, 2, 3))
    model = nn.Sequential(first, nn.ReLU(), last).double()
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if not name.endswith(("weight_v", "original1")):
                parameter[:2] = 0
    with pytest.warns(UserWarning, match="2 zero channels stay: (weight|spectral) norm"):
        report = shrink_(model, *IMAGES)
    assert report.channels == (2, 2)


@pytest.mark.parametrize("norm", WEIGHT_NORMS)
def test_rows_of_weight_norm_are_selected_by_their_lengths(norm):
    """A length of zero is a row of zeros, and the bias follows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(72, 2)
    ).double()
    lengths = "0.weight_g" if norm is old_weight_norm else "0.parametrizations.weight.original0"
    opt = rows_pruned(model, lengths)
    expected = evaluate(model, *IMAGES)

    opt.shrink(*IMAGES)

    torch.testing.assert_close(evaluate(model, *IMAGES), expected)
    assert model[0].out_channels == model[2].in_channels == len(model[0].bias) == 3


@pytest.mark.parametrize("norm", WEIGHT_NORMS)
@pytest.mark.parametrize("kind", ["transposed", "over the whole", "depthwise", "shared"])
def test_other_ways_to_norm_weights_are_exact(norm, kind):
    """What a norm sums over stays; around it channels go."""
    torch.manual_seed(0)
    middle = {
        "transposed": lambda: norm(nn.ConvTranspose2d(6, 8, 3)),
        "over the whole": lambda: norm(nn.Conv2d(6, 8, 3), dim=None),
        "depthwise": lambda: nn.Sequential(norm(nn.Conv2d(6, 6, 3, groups=6)), nn.Conv2d(6, 8, 1)),
        "shared": lambda: nn.Sequential(*[norm(nn.Conv2d(6, 6, 1))] * 2, nn.Conv2d(6, 8, 1)),
    }[kind]()
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(middle, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    ).double()
    zero_norms(model)

    # The rows of a transposed convolution are those of its input, which have norms of their own.
    n_left = {"transposed": 4, "over the whole": 3 + 4, "depthwise": 3, "shared": 3}[kind]
    small, _ = check_shrinks(model, IMAGES, n_left)

    assert small[0].out_channels == 2


@pytest.mark.parametrize("norm", SPECTRAL_NORMS)
def test_what_spectral_norm_is_over_stays(norm):
    """All of the matrix has a say in it, but for what is zero; around it channels go."""
    torch.manual_seed(0)

    def build() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(norm(nn.Conv2d(8, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        ).double()

    model = build()
    zero_norms(model)

    small, report = check_shrinks(model, IMAGES, n_left=4 + 2)

    assert report.left == {
        "4.weight": "spectral norm is over the whole matrix: 4",
        "7.weight": "spectral norm is over the whole matrix: 2",
    }
    assert small[0].out_channels == small[3].in_channels == 3
    assert small[6].out_channels == 4


SURROUNDINGS = {
    "convolution": (nn.Conv2d, lambda: nn.Conv2d(8, 4, 3), 0),
    "transposed": (nn.Conv2d, lambda: nn.ConvTranspose2d(8, 4, 3), 1),
    "linear": (lambda n_in, n_out, _: nn.Linear(n_in, n_out), lambda: nn.Linear(8, 4), 0),
}


@pytest.mark.parametrize("norm", SPECTRAL_NORMS)
@pytest.mark.parametrize("which", SURROUNDINGS)
def test_zeros_of_a_matrix_with_spectral_norm_go(norm, which):
    """Rows and columns of zeros have no say in its norm; vectors are cut alike."""
    torch.manual_seed(0)
    around, middle, out_dim = SURROUNDINGS[which]

    def build() -> nn.Sequential:
        batch_norm = nn.BatchNorm1d if which == "linear" else nn.BatchNorm2d
        return nn.Sequential(
            *(around(3, 8, 1), batch_norm(8), nn.ReLU(), norm(middle())),
            *(batch_norm(4), nn.ReLU(), around(4, 2, 1)),
        ).double()

    model = build()
    zero_norms(model)
    key = "weight_orig" if norm is old_spectral_norm else "parametrizations.weight.original"
    weight = model[3].get_parameter(key)
    zero(weight.movedim(out_dim, 0), n=2)
    zero(weight.movedim(1 - out_dim, 0), n=4)
    batch = torch.randn(8, 3, dtype=torch.double) if which == "linear" else IMAGES[0]

    small, _ = check_shrinks(model, (batch,))

    assert len(small[0].weight) == 4
    assert len(small[3].bias) == small[4].num_features == 2
    n_filter = weight[0, 0].numel()
    assert [len(b) for _, b in sorted(small[3].named_buffers())] == [2, 4 * n_filter]
    fresh = build()
    load_shrunk_(fresh, small.state_dict())
    expected = evaluate(small, batch)
    assert torch.equal(evaluate(fresh, batch), expected)
    if norm is old_spectral_norm:
        remove_spectral_norm(fresh[3])
    else:
        remove_parametrizations(fresh[3], "weight")
    torch.testing.assert_close(evaluate(fresh, batch), expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_filters_that_a_mask_prunes_go(kind):
    """The mask is cut with what it is multiplied by, and can be taken off afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    prune.ln_structured(model[1], "weight", 2, n=2, dim=int(kind is nn.ConvTranspose2d))
    alive = model[1].weight_mask.flatten(2).any(2).any(int(kind is nn.Conv2d))
    with torch.no_grad():
        model[1].bias[~alive] = 0
    expected = evaluate(model, *IMAGES)

    shrink_(model, IMAGES)

    torch.testing.assert_close(evaluate(model, *IMAGES), expected)
    assert model[1].out_channels == model[3].in_channels == 4
    prune.remove(model[1], "weight")
    torch.testing.assert_close(evaluate(model, *IMAGES), expected)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: each filter has a mean of 0 and a variance of 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with a weight that a BatchNorm made."""
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_filters_that_are_standardised_keep_their_columns(kernel_size):
    """A column has a say in the mean of a row, whatever it reads."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(Standardised(6, 8, kernel_size), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    ).double()
    zero_norms(model)

    small, report = check_shrinks(model, IMAGES, n_left=3)

    assert report.left == {"1.weight": "normalised over, in `native_batch_norm`: 3"}
    assert (small[3].in_channels, small[3].out_channels) == (6, 4)


class Interrupted(nn.Module):
    """Is interrupted as soon as there are fewer channels."""

    def forward(self, x: Tensor) -> Tensor:
        """What it was given."""
        if x.shape[1] != 6:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize(
    "norm",
    [
        *(lambda conv, f=f: f(conv) for f in (*WEIGHT_NORMS, *SPECTRAL_NORMS)),
        lambda conv: nn.Sequential(conv, nn.InstanceNorm2d(4, affine=True)),
        lambda conv: nn.Sequential(conv, nn.InstanceNorm2d(4)),
    ],
)
def test_all_is_put_back_after_a_break(norm):
    """Parameters, vectors and what layers say of their sizes, bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 6, 1)),
        *(nn.BatchNorm2d(6), Interrupted(), nn.Conv2d(6, 2, 1)),
    ).double()
    zero_norms(model)
    expected = evaluate(model, *IMAGES)
    state, text = copy.deepcopy(model.state_dict()), repr(model)

    with pytest.raises(KeyboardInterrupt):
        shrink_(model, IMAGES)

    assert repr(model) == text
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(evaluate(model, *IMAGES), expected)


class Doubled(nn.Module):
    """A parametrization that nobody knows."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice the weight."""
        return 2 * weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda conv: register_parametrization(conv, "weight", Doubled()),
        lambda conv: parametrizations.orthogonal(conv),
    ],
)
def test_a_weight_that_is_computed_otherwise_stays(wrap):
    """Nobody knows what it does in training; around it channels go."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)),
        *(nn.BatchNorm2d(6), nn.ReLU(), wrap(nn.Conv2d(6, 4, 1)), nn.BatchNorm2d(4)),
    ).double()
    zero_norms(model)
    expected = outputs(model, IMAGES, False)

    report = shrink_(model, IMAGES)

    torch.testing.assert_close(outputs(model, IMAGES, False), expected)
    assert model[0].out_channels == 3
    assert model[6].out_channels == 4
    assert report.left.keys() == {"4.weight", "7.weight"}


class Around(nn.Module):
    """Layers before and behind one that torch.jit compiled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.inner = inner
        self.behind = nn.Sequential(
            nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One after another."""
        return self.behind(self.inner(self.before(x)))


def block() -> nn.Sequential:
    """What is compiled."""
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).double()


COMPILED = {
    "scripted": lambda: torch.jit.script(block()),
    "traced": lambda: torch.jit.trace(block().eval(), torch.randn(1, 8, 8, 8).double()),
    "without parameters": lambda: torch.jit.script(nn.SiLU()),
}


@pytest.mark.parametrize("which", COMPILED)
def test_a_compiled_part_stays_and_the_rest_goes(which):
    """The default selector takes the scales around it, and it goes on as it was."""
    torch.manual_seed(0)
    model = Around(COMPILED[which]()).double()
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, sample_every=None, scope="layer"
    )
    for scale in (model.before[1].weight, model.before[4].weight, model.behind[1].weight):
        nn.init.uniform_(scale)
    opt.sample()
    opt.prune(force=True)
    assert len(opt.final_mask) == 6
    compiled = {name: p.clone() for name, p in model.inner.named_parameters()}
    expected = outputs(model, IMAGES, False)

    report = opt.shrink(*IMAGES)

    torch.testing.assert_close(outputs(model, IMAGES, False), expected)
    [reason] = report.left.values()
    assert reason.endswith("Module states its size: 4")
    assert (model.before[0].out_channels, model.before[3].out_channels) == (3, 8)
    assert model.behind[0].out_channels == 3
    assert all(torch.equal(p, compiled[name]) for name, p in model.inner.named_parameters())
    fresh = Around(model.inner).double()
    load_shrunk_(fresh, model.state_dict())
    torch.testing.assert_close(outputs(fresh, IMAGES, False), expected)
    loss_of(model, IMAGES, 0).backward()
    opt.step()


@pytest.mark.parametrize("which", ["scripted", "traced"])
def test_a_model_that_is_compiled_whole_is_refused(which):
    """With what to do instead."""
    model = COMPILED[which]()
    batch = torch.randn(1, 8, 8, 8).double()

    with pytest.raises(TypeError, match="Shrink the Python module"):
        shrink_(model, batch)
    with pytest.raises(TypeError, match="Shrink the Python module"):
        load_shrunk_(model, model.state_dict())
    for selector in (None, ParameterSelector("*weight")):
        with pytest.raises(TypeError, match="Build WormOptimizer with the Python module"):
            WormOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, selector)
