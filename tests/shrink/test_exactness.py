"""Channels cut out: what the network computes stays the same."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import (
    IMAGES,
    Concatenated,
    Grouped,
    Residual,
    Sequence,
    Split,
    build,
    networks,
    outputs,
    zero_channels,
)
from torch import Tensor, nn

from torch_worm_optim.shrink import load_shrunk_, shrink_


@networks
@settings(max_examples=6)
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
    assert report.left["bn.weight"] == "the forward states a width, `split`: 6"


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

    with pytest.warns(UserWarning, match=r"does not use 2 trainable.*'unused\.weight'"):
        report = shrink_(model, IMAGES)

    assert set(report.unused) == {"unused.weight", "unused.bias"}
    assert model.unused.weight.shape == (4, 8, 1, 1)
    assert not model[0].weight.requires_grad
    assert model[0].out_channels == 4


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


# ---- operators in odd forms


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


def test_grouped_transposed_convolutions_keep_their_channels_only():
    """Those with several filters of each channel state sizes unlike those of other convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.ConvTranspose2d(4, 8, 2, groups=4), nn.Conv2d(8, 2, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].weight[:3] = 0
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    shrink_(model, x)
    torch.testing.assert_close(model(x), expected)
    assert (model[0].out_channels, model[4].in_channels, model[4].out_channels) == (3, 4, 8)


@pytest.fixture
def fragile():
    """An operator that torch is told works entry by entry, and that does not run on everything."""
    library = torch.library.Library("worm_test", "FRAGMENT")
    library.define("fragile(Tensor x) -> Tensor", tags=torch.Tag.pointwise)

    def compute(x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise KeyError("two dimensions")
        return x * 2

    library.impl("fragile", compute, "CPU")
    yield torch.ops.worm_test.fragile
    library._destroy()


def test_a_rule_that_fails_costs_its_channels_only(fragile, caplog):
    """And says so to who asks."""

    class Fragile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[3](self[2](fragile(self[1](self[0](x)))).relu())

    model = Fragile(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Linear(8, 2))
    zero_channels(model)
    with torch.no_grad():
        model[2].weight[:4] = model[2].bias[:4] = 0
    model.eval()
    x = torch.randn(5, 3)
    expected = model(x)

    with caplog.at_level(logging.DEBUG, "torch_worm_optim"):
        report = shrink_(model, x)

    torch.testing.assert_close(model(x), expected)
    assert (model[0].out_features, model[2].out_features) == (6, 4)
    assert "a form that is not known of worm_test.fragile" in report.left["1.weight"]
    for record in caplog.records:
        assert "worm_test.fragile" in record.getMessage()
        assert record.exc_info[0] is KeyError
    assert len(caplog.records) == 1


def test_memory_formats_are_no_matter_to_zeros():
    """A copy in another format is zero where it was."""

    class Formatted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[1](self[0](x)).contiguous(memory_format=torch.channels_last)
            return self[2](y.relu())

    model = Formatted(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    zero_channels(model)
    assert shrink_(model, IMAGES).channels == (4, 0)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose scores are filled with a tensor."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(mask, torch.tensor(-1e9)).softmax(-1) @ v


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that leaves as much of a head as it is wide as it is, as GPT-J's may."""
    q, k = (torch.cat([-each[..., :4], each[..., 4:]], -1) for each in (q, k))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("attend", [masked, turned])
def test_heads_go_through_odd_operators(attend):
    """A value that is a tensor, and a tensor that is empty."""

    class Heads(HeadsByNumber):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            return self.o(attend(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))

    model, x = Heads(6), torch.randn(2, 5, 24)
    expected = model(x)
    assert shrink_(model, x).channels == (36, 0)
    torch.testing.assert_close(model(x), expected)


class WideValues(nn.Module):
    """One matrix for all, with values twice as wide as queries, joined by a width that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.val_attn_dim = 4, 32
        self.qkv, self.proj = nn.Linear(6, 64), nn.Linear(32, 6)
        with torch.no_grad():  # two of the heads, head by head
            self.qkv.weight[16:48] = self.qkv.bias[16:48] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        qkv = self.qkv(x).view(*x.shape[:2], self.num_heads, -1)
        q, k, v = (each.transpose(1, 2) for each in qkv.split([4, 4, 8], -1))
        y = (q @ k.mT).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.val_attn_dim))


def test_a_width_of_heads_is_what_the_last_matrix_reads():
    """Where neither a matrix nor a third of one is as wide."""
    model, x = WideValues(), torch.randn(2, 5, 6)
    expected = model(x)
    assert shrink_(model, x).channels == (32, 0)
    torch.testing.assert_close(model(x), expected)
    assert (model.num_heads, model.val_attn_dim) == (2, 16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_hides_no_difference(dtype, autocast):
    """A forward that counts its channels keeps them, though it would move outputs by 1 %."""

    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x).relu()
            return self[1](y) * (1 + torch.tensor(y.shape[1] / 400))

    torch.manual_seed(0)
    model, x = Counting(nn.Linear(4, 8), nn.Linear(8, 2)).to(dtype), torch.randn(3, 4).to(dtype)
    with torch.no_grad():
        model[0].weight[:4] = model[0].bias[:4] = 0
    expected = model(x)

    with contextlib.suppress(RuntimeError), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shrink_(model, x)

    assert torch.equal(model(x), expected)
    assert model[0].out_features == 8
    assert model[0].weight.dtype == dtype


class Positions(nn.Module):
    """Embeddings of words and places, as BERT adds them, and a feed-forward block."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.register_buffer("position_ids", torch.arange(6).unsqueeze(0))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, words):
        """Of each word."""
        places = self.position_ids[:, : words.shape[1]]
        return self.down(self.up(self.words(words) + self.places(places)).relu())


@pytest.mark.parametrize("length", [5, 6])
def test_a_buffer_of_indices_stays_at_full_length_too(length):
    """Once the slice of all position ids was cut to one entry, and the network refused whole."""
    model = Positions()
    with torch.no_grad():
        model.up.weight[::2] = model.up.bias[::2] = 0
    words = torch.arange(length).unsqueeze(0)
    before = model(words)

    shrink_(model, words)

    assert model.up.out_features == 6
    assert model.position_ids.shape == (1, 6)
    torch.testing.assert_close(model(words), before)
