"""Small networks with one feature each, for ``every_shrink_elsewhere.py``.

Nearly all are a :class:`Net`: some layers, and a function that runs them. So a network is a line or
two of a table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    """How a network is built, its batch, and its batch in training where that is another."""

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, ...]]
    train_batch: Callable[[], tuple[Any, ...]] | None = None


class Net(nn.Module):
    """Layers, buffers and numbers by name, and a function of the network and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part, persistent=not name.startswith("temporary"))
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        """What the function returns."""
        return self.run(self, *args)


def conv(n_in: int, n_out: int, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    """A convolution that keeps the size of images."""
    return nn.Conv2d(n_in, n_out, k, padding=k // 2, **kwargs)


def block(n_in: int, n_out: int, k: int = 3, **kwargs: Any) -> nn.Sequential:
    """A convolution, BatchNorm and ReLU."""
    layer = conv(n_in, n_out, k, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU())


def dense(n_in: int, n_out: int) -> nn.Sequential:
    """A linear layer, BatchNorm and ReLU."""
    return nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU())


def pointwise(n_in: int, n_out: int) -> nn.Sequential:
    """A convolution of points, BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv1d(n_in, n_out, 1), nn.BatchNorm1d(n_out), nn.ReLU())


def head(n: int) -> nn.Sequential:
    """Pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4))


def images() -> tuple[Tensor]:
    """Images of 16 x 16."""
    return (torch.randn(3, 3, 16, 16),)


def rows() -> tuple[Tensor]:
    """Eight features."""
    return (torch.randn(6, 8),)


def graph() -> tuple[Tensor, Tensor]:
    """Features of six nodes, and the edges of a ring."""
    nodes = torch.arange(6)
    return torch.randn(6, 8), torch.stack(
        [torch.cat([nodes, nodes]), torch.cat([nodes.roll(1), nodes.roll(-1)])]
    )


def points() -> tuple[Tensor]:
    """Clouds of 20 points."""
    return (torch.randn(3, 3, 20),)


def tokens() -> tuple[Tensor]:
    """Sequences of 12 tokens."""
    return (torch.randint(20, (3, 12)),)


def net(
    run: Callable[..., Any], batch: Any = images, train_batch: Any = None, /, **parts: Any
) -> Case:
    """A network of these parts, which is copied each time that it is built."""
    prototype = Net(run, **parts)
    return Case(lambda: copy.deepcopy(prototype), batch, train_batch)


def between(run: Callable[..., Tensor], n: int = 16, batch: Any = images, /, **parts: Any) -> Case:
    """Two blocks, with a function between them that makes n channels of 16."""
    parts = {"first": block(3, 16), "second": block(n, 12), **parts, "out": head(12)}
    return net(lambda m, x: m.out(m.second(run(m, m.first(x)))), batch, **parts)


def flattened(run: Callable[..., Tensor], /, **parts: Any) -> Case:
    """Two blocks, and a linear layer that reads 12 channels of 4 x 4 from a function."""
    parts = {"first": block(3, 16), "second": block(16, 12), **parts, "out": nn.Linear(192, 4)}
    return net(lambda m, x: m.out(run(m, F.avg_pool2d(m.second(m.first(x)), 4))), **parts)


def on_nodes(run: Callable[..., Tensor], batch: Any = graph, /, **parts: Any) -> Case:
    """Two layers of a network on graphs, each a linear layer, messages, BatchNorm and ReLU."""
    layers = {"a": nn.Linear(8, 16), "na": nn.BatchNorm1d(16), "b": nn.Linear(16, 12)}
    layers |= {"nb": nn.BatchNorm1d(12), "out": nn.Linear(12, 4)}

    def forward(m: Any, x: Tensor, *edges: Tensor) -> Tensor:
        x = torch.relu(m.na(run(m, m.a(x), *edges)))
        return m.out(torch.relu(m.nb(run(m, m.b(x), *edges))))

    return net(forward, batch, **layers, **parts)


def let(value: Any, run: Callable[[Any], Any]) -> Any:
    """What a function makes of a value, which so has a name in it."""
    return run(value)


def pairwise(x: Tensor) -> Tensor:
    """Distances between rows."""
    return (x[:, None] - x[None]).square().sum(-1)


# fmt: off
# A network is an entry of a table, of a line or two, and not of one line for each of its parts.


def plain() -> dict[str, Case]:
    """What every network is made of; and what depends on channels without BatchNorm."""
    return {
        "plain": between(lambda m, x: x),
        "mlp": net(lambda m, x: m.out(m.b(m.a(x))), rows, a=dense(8, 16), b=dense(16, 12),
            out=nn.Linear(12, 4)),
        "mlp_rows": net(
            lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
            rows, a=nn.Linear(8, 16), b=nn.Linear(16, 12), c=nn.Linear(12, 4),
        ),
        "alexnet_rows": net(
            lambda m, x: m.d(torch.relu(m.c(F.max_pool2d(torch.relu(m.b(torch.relu(m.a(x)))),
                4).flatten(1)))),
            a=conv(3, 16), b=conv(16, 12), c=nn.Linear(192, 20), d=nn.Linear(20, 4),
        ),
        "fire_rows": net(
            lambda m, x: let(torch.relu(m.a(x)),
                lambda y: m.out(torch.cat([torch.relu(m.b(y)), torch.relu(m.c(y))], 1))),
            a=conv(3, 8, 1), b=conv(8, 8, 1), c=conv(8, 8), out=head(16),
        ),
        "residual": between(lambda m, x: x + m.b(m.a(x)), a=block(16, 16), b=block(16, 16)),
        "projected": between(lambda m, x: m.s(x) + m.b(m.a(x)), 20, a=block(16, 16),
            b=block(16, 20), s=block(16, 20, 1)),
        "inverted_residual": between(lambda m, x: x + m.c(m.b(m.a(x))), a=block(16, 32, 1),
            b=block(32, 32, groups=32), c=block(32, 16, 1)),
        "squeeze_excite": between(lambda m, x: x *
            torch.sigmoid(m.b(torch.relu(m.a(x.mean((2, 3), True))))), a=conv(16, 4, 1),
            b=conv(4, 16, 1)),
        "dense_cat": between(lambda m, x: torch.cat([x, m.a(x)], 1), 24, a=block(16, 8)),
        "grouped": between(lambda m, x: m.a(x), a=block(16, 16, groups=4)),
        "multiplier": between(lambda m, x: m.a(x), 32, a=block(16, 32, groups=16)),
        "unet": between(lambda m, x: torch.cat([x, m.up(m.a(F.max_pool2d(x, 2)))], 1), 24,
            a=block(16, 20), up=nn.ConvTranspose2d(20, 8, 2, 2)),
        "depthwise_transposed": between(lambda m, x: m.up(x),
            up=nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16, bias=False)),
        "grouped_transposed": between(lambda m, x: m.up(x),
            up=nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=4)),
        "prelu": between(lambda m, x: m.p(m.b(x)), p=nn.PReLU(16), b=nn.BatchNorm2d(16)),
        "preactivation": between(lambda m, x: x + m.c(torch.relu(m.n(x))), n=nn.BatchNorm2d(16),
            c=conv(16, 16)),
        "ghost": between(lambda m, x: torch.cat([x, m.a(x)], 1), 32, a=block(16, 16, groups=16)),
        "tcn1d": net(
            lambda m, x: m.c(F.pad(m.b(F.pad(m.a(x), (2, 0))), (0, 0)).mean(2)),
            points, a=pointwise(3, 16), b=nn.Sequential(nn.Conv1d(16, 12, 3, dilation=1),
                nn.BatchNorm1d(12)), c=nn.Linear(12, 4),
        ),
        "conv3d": net(
            lambda m, x: m.c(torch.relu(m.nb(m.b(torch.relu(m.na(m.a(x)))))).mean((2, 3, 4))),
            lambda: (torch.randn(2, 1, 6, 6, 6),),
            a=nn.Conv3d(1, 8, 3), na=nn.BatchNorm3d(8), b=nn.Conv3d(8, 6,
                3), nb=nn.BatchNorm3d(6), c=nn.Linear(6, 3),
        ),
        "aspp": between(
            lambda m, x: torch.cat([m.a(x), m.b(x),
                m.c(x.mean((2, 3), True)).expand(-1, -1, *x.shape[2:])], 1),
            24, a=block(16, 8, 1), b=block(16, 8, 3), c=conv(16, 8, 1),
        ),
        "shared_conv": net(lambda m, x: m.out(m.b(m.a(x)) - m.b(m.a(x.flip(3)))), a=block(3, 16),
            b=block(16, 12), out=head(12)),
        "dropout2d": between(lambda m, x: m.d(x), d=nn.Dropout2d(0.5)),
        "checkpointed": between(lambda m, x: checkpoint(m.a, x, use_reentrant=False),
            a=block(16, 16)),
        "functional_conv": between(lambda m, x: F.conv2d(x, m.w, padding=1),
            w=nn.Parameter(torch.randn(16, 16, 3, 3) * 0.1)),
        "functional_batch_norm": net(
            lambda m, x: m.out(m.b(torch.relu(F.batch_norm(m.a(x), m.mean, m.var, m.w, m.s,
                m.training)))),
            a=conv(3, 16), mean=torch.zeros(16), var=torch.ones(16), w=nn.Parameter(torch.ones(16)),
            s=nn.Parameter(torch.zeros(16)), b=block(16, 12), out=head(12),
        ),
        "no_running_stats": between(lambda m, x: m.n(x),
            n=nn.BatchNorm2d(16, track_running_stats=False)),
        "no_affine": between(lambda m, x: m.n(m.c(x)), n=nn.BatchNorm2d(16, affine=False),
            c=conv(16, 16)),
        "channels_last": between(lambda m, x:
            F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 2)),
        "position_map": between(lambda m, x: x + m.p, p=nn.Parameter(torch.zeros(1, 16, 16, 16))),
        "layer_scale": between(lambda m, x: x + m.g * m.c(x), g=nn.Parameter(torch.ones(16, 1, 1)),
            c=conv(16, 16)),
        "lstm": net(lambda m, x: m.out(m.r(m.b(m.a(x)).transpose(1, 2))[0][:, -1]), points,
            a=pointwise(3, 16), b=pointwise(16, 12), r=nn.LSTM(12, 8, batch_first=True),
            out=nn.Linear(8, 4)),
        "gru_cell": net(lambda m, x: m.out(m.r(m.b(m.a(x)))), rows, a=dense(8, 16), b=dense(16, 12),
            r=nn.GRUCell(12, 8), out=nn.Linear(8, 4)),
        "attention_on_top": net(lambda m, x:
            let(m.b(m.a(x)).transpose(1, 2), lambda y: m.out(m.t(y, y, y)[0].mean(1))), points,
            a=pointwise(3, 16), b=pointwise(16, 12),
            t=nn.MultiheadAttention(12, 2, batch_first=True), out=nn.Linear(12, 4)),
        "encoder_layer": net(lambda m, x: m.out(m.t(m.a(x).transpose(1, 2)).mean(1)), points,
            a=pointwise(3, 16), t=nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True),
            out=nn.Linear(16, 4)),
        "mixer": net(lambda m, x: let(m.e(x) +
            m.b(F.gelu(m.a(m.e(x).transpose(1, 2)))).transpose(1, 2),
            lambda y: m.out((y + m.d(F.gelu(m.c(y)))).mean(1))), lambda: (torch.randn(3, 10, 6),),
            e=nn.Linear(6, 16), a=nn.Linear(10, 12), b=nn.Linear(12, 10), c=nn.Linear(16, 24),
            d=nn.Linear(24, 16), out=nn.Linear(16, 4)),
        "convnext": between(lambda m, x: x +
            m.c(F.gelu(m.b(m.n(m.a(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
            a=conv(16, 16, 7, groups=16), n=nn.LayerNorm(16), b=nn.Linear(16, 32),
            c=nn.Linear(32, 16)),
        "embedding_bag": net(lambda m, x: m.out(m.a(m.e(x))), tokens, e=nn.EmbeddingBag(20, 12),
            a=dense(12, 16), out=nn.Linear(16, 4)),
        "crossed_features": net(lambda m, x: m.out(m.a(m.e(x).flatten(1))), tokens,
            e=nn.Embedding(20, 6), a=dense(72, 16), out=nn.Linear(16, 4)),
    }


def indices_and_sizes() -> dict[str, Case]:
    """Indices kept in buffers, and forwards that state how many channels there are."""
    return {
        "positions_full_length": net(
            lambda m, x: m.out(m.b(F.gelu(m.a(m.e(x) +
                m.p(m.position_ids[:, : x.shape[1]])))).mean(1)),
            tokens, e=nn.Embedding(20, 16), p=nn.Embedding(12,
                16), position_ids=torch.arange(12)[None],
            a=nn.Linear(16, 32), b=nn.Linear(32, 16), out=nn.Linear(16, 4),
        ),
        "positions_shorter": net(
            lambda m, x: m.out(m.b(F.gelu(m.a(m.e(x) +
                m.p(m.position_ids[:, : x.shape[1]])))).mean(1)),
            tokens, e=nn.Embedding(20, 16), p=nn.Embedding(14,
                16), position_ids=torch.arange(14)[None],
            a=nn.Linear(16, 32), b=nn.Linear(32, 16), out=nn.Linear(16, 4),
        ),
        "condensenet": between(lambda m, x: x.index_select(1, m.index.detach()),
            index=torch.randperm(16)),
        "shuffled_by_buffer": between(lambda m, x: x[:, m.index], index=torch.randperm(16)),
        "indices_viewed": between(lambda m, x: x.index_select(1, m.index.view(-1).to(torch.int64)),
            index=torch.randperm(16).view(4, 4).int()),
        "gathered": between(lambda m, x: x.gather(1, m.index.view(1, -1, 1, 1).expand_as(x)),
            index=torch.randperm(16)),
        "boolean_index": between(lambda m, x: x[:, m.keep], 8, keep=torch.arange(16) % 2 == 0),
        "two_indices": net(lambda m, x: m.out(m.b(m.a(x))[torch.arange(3)[:, None],
            torch.arange(12)[None]].mean((2, 3))), a=block(3, 16), b=block(16, 12),
            out=nn.Linear(12, 4)),
        "flatten": flattened(lambda m, x: x.flatten(1)),
        "flatten_counted": flattened(lambda m, x: x.view(-1, math.prod(x.shape[1:]))),
        "view_stated": flattened(lambda m, x: x.view(-1, 12 * 4 * 4)),
        "view_stated_batch": flattened(lambda m, x: x.view(x.size(0), 192)),
        "reshape_attribute": flattened(lambda m, x: x.reshape(-1, m.n), n=192),
        "permuted_stated": flattened(lambda m, x: x.permute(0, 2, 3, 1).reshape(-1, 4 * 4 * 12)),
        "pooled_stated": net(lambda m, x: m.out(F.adaptive_avg_pool2d(m.b(m.a(x)), 1).view(-1, 12)),
            a=block(3, 16), b=block(16, 12), out=nn.Linear(12, 4)),
        "asserted": between(lambda m, x: x if x.shape[1] == m.n else 1 / 0, n=16),
        "asserted_out": net(lambda m, x: m.out(m.b(y)) if (y := m.a(x)).shape[1] == 16 else 1 / 0,
            a=block(3, 16), b=block(16, 12), out=head(12)),
        "scaled_by_size": between(lambda m, x: x / x.shape[1] ** 0.5),
        "view_4d_stated": between(lambda m, x:
            x.view(x.shape[0], 16, -1).view(x.shape[0], 16, 16, 16)),
        "unflatten_stated": between(lambda m, x: x.unflatten(1, (4, 4)).flatten(1, 2)),
        "expand_stated": between(lambda m, x: x + m.a(x.mean((2, 3), True)).expand(-1, 16, 16, 16),
            a=conv(16, 16, 1)),
        "state_stated": between(lambda m, x:
            m.g(torch.cat([x, x.new_zeros(x.shape[0], 16, 16, 16)], 1)) + x, g=conv(32, 16)),
        "ones_stated": between(lambda m, x: x * torch.ones(1, 16, 1, 1, dtype=x.dtype)),
        "split_stated": between(lambda m, x:
            let(x.split([10, 6], 1), lambda y: torch.cat([torch.relu(y[0]), y[1]], 1))),
        "lenet": net(
            lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(F.max_pool2d(m.q(F.max_pool2d(m.p(x),
                2)), 2).view(-1, 16 * 4 * 4)))))),
            p=block(3, 6), q=block(6, 16), a=nn.Linear(256, 20), b=dense(20, 12), c=nn.Linear(12,
                4),
        ),
        "stn": net(
            lambda m, x: m.out(m.b(F.dropout2d(m.a(F.grid_sample(x,
                F.affine_grid(m.t(m.fc(m.l2(F.max_pool2d(m.l1(x), 2)).view(-1,
                10 * 8 * 8))).view(-1, 2, 3), x.size(), align_corners=False),
                align_corners=False)))).view(-1, 10 * 16 * 16)),
            l1=block(3, 8), l2=block(8, 10), fc=nn.Sequential(nn.Linear(640, 32),
                nn.ReLU()), t=nn.Linear(32, 6),
            a=block(3, 12), b=block(12, 10), out=nn.Linear(2560, 4),
        ),
        "alphazero": net(
            lambda m, x: let(torch.relu(m.s(x) + m.r2(m.r1(m.s(x)))),
                lambda y: (F.log_softmax(m.p2(m.p1(y).view(-1, 2 * 16 * 16)), 1),
                torch.tanh(m.v2(m.v1(y).view(-1, 16 * 16))))),
            s=block(3, 16), r1=block(16, 16), r2=block(16, 16), p1=block(16, 2,
                1), p2=nn.Linear(512, 5), v1=block(16, 1, 1), v2=nn.Linear(256, 1),
        ),
        "pointnet": Case(PointNet, points),
        "pointnet_stated": Case(lambda: PointNet(stated=True), points),
        "heads_stated": net(lambda m, x: m.out((m.b(m.a(x)).view(-1, 3, 4) * m.w).flatten(1)), rows,
            a=dense(8, 16), b=dense(16, 12), w=nn.Parameter(torch.randn(3, 4)),
            out=nn.Linear(12, 4)),
        "capsules": net(lambda m, x: let(m.b(m.a(x)).view(x.shape[0], 3, 4, -1).permute(0, 1, 3,
            2).reshape(x.shape[0], -1, 4),
            lambda y: (y.square().sum(-1, True) / (1 + y.square().sum(-1, True)) * y).sum(1)),
            a=block(3, 16), b=block(16, 12)),
        "dcgan": net(lambda m, x: m.out(m.c(m.b(m.n(m.a(x).view(-1, 16, 4, 4))))), rows,
            a=nn.Linear(8, 256), n=nn.BatchNorm2d(16),
            b=nn.Sequential(nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.BatchNorm2d(12), nn.ReLU()),
            c=block(12, 8), out=conv(8, 3)),
        "dcgan_noise": net(lambda m, x: m.out(m.c(m.b(x[:, :, None, None]))), rows,
            b=nn.Sequential(nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU()),
            c=nn.Sequential(nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.BatchNorm2d(12), nn.ReLU()),
            out=conv(12, 3)),
        "vae": net(lambda m, x: m.out(m.d(torch.relu(m.l(m.mu(m.b(m.a(x)).flatten(1)))).unflatten(1,
            (12, 16, 16)))), a=block(3, 8), b=block(8, 4), mu=nn.Linear(1024, 6),
            l=nn.Linear(6, 3072), d=block(12, 8), out=conv(8, 3)),
    }


class PointNet(nn.Module):
    """The well-known network on clouds of points, with a transform of its inputs."""

    def __init__(self, stated: bool = False) -> None:
        super().__init__()
        self.stated = stated
        self.t1, self.t2, self.t3 = pointwise(3, 16), pointwise(16, 32), dense(32, 16)
        self.transform = nn.Linear(16, 9)
        self.a, self.b, self.c = pointwise(3, 16), pointwise(16, 24), pointwise(24, 32)
        self.d, self.out = dense(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classes of clouds."""
        y = torch.max(self.t2(self.t1(x)), 2, keepdim=True)[0]
        y = y.view(-1, 32) if self.stated else y.flatten(1)
        turned = self.transform(self.t3(y)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        x = torch.bmm(x.transpose(2, 1), turned).transpose(2, 1)
        y = torch.max(self.c(self.b(self.a(x))), 2, keepdim=True)[0]
        return self.out(self.d(y.view(-1, 32) if self.stated else y.flatten(1)))


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all of its parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def zero_to_begin_with() -> dict[str, Case]:
    """What begins at zero and is trained."""
    ends = nn.BatchNorm2d(16)
    nn.init.zeros_(ends.weight)
    return {
        "zero_init_residual": between(lambda m, x: torch.relu(x + m.n(m.b(m.a(x)))),
            a=block(16, 16), b=conv(16, 16), n=ends),
        "zero_init_linear": between(lambda m, x: x + m.n(m.b(m.a(x))), a=block(16, 16),
            b=conv(16, 16), n=zeroed(nn.BatchNorm2d(16))),
        "controlnet": between(lambda m, x: x + m.z(m.b(m.a(x))), a=block(16, 20), b=block(20, 20),
            z=zeroed(conv(20, 16, 1))),
        "fixup_rows": net(lambda m, x: let(torch.relu(m.a(x)),
            lambda y: m.out(torch.relu(y + m.c(torch.relu(m.b(y)))))), a=conv(3, 16),
            b=conv(16, 20), c=zeroed(conv(20, 16)), out=head(16)),
        "detr_boxes": net(lambda m, x: let(m.b(m.a(x)).mean((2, 3)),
            lambda y: (m.cls(y), m.box2(torch.relu(m.box1(y))).sigmoid())), a=block(3, 16),
            b=block(16, 12), cls=nn.Linear(12, 4), box1=nn.Linear(12, 16),
            box2=zeroed(nn.Linear(16, 4))),
        "rezero": between(lambda m, x: x + m.g * m.b(m.a(x)), g=nn.Parameter(torch.zeros(1)),
            a=block(16, 20), b=block(20, 16)),
        "layer_scale_zero": between(lambda m, x: x + m.g * m.b(m.a(x)),
            g=nn.Parameter(torch.zeros(16, 1, 1)), a=block(16, 20), b=block(20, 16)),
        "lora": between(lambda m, x: x + m.up(m.down(x)), down=conv(16, 4, 1, bias=False),
            up=zeroed(conv(4, 16, 1, bias=False))),
        "gate_zero": between(lambda m, x: x * (1 + m.g2(torch.relu(m.g1(x.mean((2, 3), True))))),
            g1=conv(16, 8, 1), g2=zeroed(conv(8, 16, 1))),
        "stn_zero": net(lambda m, x: m.out(m.b(m.a(F.grid_sample(x,
            F.affine_grid(m.t(torch.relu(m.l(F.avg_pool2d(x, 4).flatten(1)))).view(-1, 2, 3) +
            torch.eye(2, 3, dtype=x.dtype), x.size(), align_corners=False), align_corners=False)))),
            l=nn.Linear(48, 16), t=zeroed(nn.Linear(16, 6)), a=block(3, 16), b=block(16, 12),
            out=head(12)),
    }


def branches() -> dict[str, Case]:
    """What one call in evaluation mode does not run, or what depends on values."""
    domains = {"c": conv(3, 16), "n": nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))}
    return {
        "auxiliary_in_training": net(lambda m, x:
            let(m.a(x), lambda y: (m.out(m.b(y)), m.aux(y)) if m.training else m.out(m.b(y))),
            a=block(3, 16), b=block(16, 12), out=head(12), aux=head(16)),
        "auxiliary_conv_in_training": net(lambda m, x:
            let(m.a(x), lambda y: (m.out(m.b(y)), m.o2(m.aux(y))) if m.training else m.out(m.b(y))),
            a=block(3, 16), b=block(16, 12), out=head(12), aux=block(16, 8), o2=head(8)),
        "deep_supervision": net(lambda m, x:
            let([y0 := m.a(x), m.b(y0)], lambda ys: [h(y) for h, y in zip(m.heads, ys, strict=True)]
            if m.training else m.heads[1](ys[1])), a=block(3, 16), b=block(16, 12),
            heads=nn.ModuleList([head(16), head(12)])),
        "projection_in_training": net(lambda m, x:
            let(m.b(m.a(x)).mean((2, 3)),
            lambda y: (m.out(y), F.normalize(m.p2(m.p1(y)), dim=1)) if m.training else m.out(y)),
            a=block(3, 16), b=block(16, 12), p1=dense(12, 16), p2=nn.Linear(16, 8),
            out=nn.Linear(12, 4)),
        "early_exit": net(lambda m, x: let(m.a(x),
            lambda y: m.exit(y) if not m.training and m.exit(y).softmax(1).max() > 0.2 else
            (m.exit(y), m.out(m.b(y)))), a=block(3, 16), b=block(16, 12), exit=head(16),
            out=head(12)),
        "exit_by_argument": net(lambda m, x, k=1:
            let(m.a(x), lambda y: m.heads[k](m.b(y) if k else y)), images, lambda: (*images(), 0),
            a=block(3, 16), b=block(16, 12), heads=nn.ModuleList([head(16), head(12)])),
        "tasks": net(lambda m, x, k=0: m.heads[k](m.b(m.a(x))), images, lambda: (*images(), 1),
            a=block(3, 16), b=block(16, 12), heads=nn.ModuleList([head(12), head(12)])),
        "domain_batch_norm": net(lambda m, x, k=0: m.out(m.b(torch.relu(m.n[k](m.c(x))))), images,
            lambda: (*images(), 1), **domains, b=block(16, 12), out=head(12)),
        "stochastic_depth": between(lambda m, x: x + m.a(x) if not m.training or torch.rand(()) <
            0.5 else x, a=block(16, 16)),
        "noise_in_training": between(lambda m, x: x + torch.randn_like(x) if m.training else x),
        "experts": net(lambda m, x: let(m.a(x),
            lambda y: m.out(torch.stack([m.e[int(k)](row[None])[0] for row,
            k in zip(y, m.g(y).argmax(1), strict=True)]))), rows, a=dense(8, 16),
            g=nn.Linear(16, 2), e=nn.ModuleList(nn.Sequential(nn.Linear(16, 12), nn.ReLU())
            for _ in range(2)), out=nn.Linear(12, 4)),
        "experts_by_mask": net(lambda m, x:
            let(m.a(x), lambda y: m.out(sum((m.g(y).argmax(1) == k)[:, None] * m.e[k](y) for k
            in range(2)))), rows, a=dense(8, 16), g=nn.Linear(16, 2),
            e=nn.ModuleList(nn.Linear(16, 12) for _ in range(2)), out=nn.Linear(12, 4)),
        "momentum_encoder": net(lambda m, x: (m.q2(m.q1(x)), m.k2(m.k1(x)).detach()),
            q1=block(3, 16), q2=head(16), k1=block(3, 16), k2=head(16)),
        "reused_block": between(lambda m, x: m.a(m.a(x)), a=block(16, 16)),
        "tied_norms": between(lambda m, x: m.n(m.b(torch.relu(m.n(m.a(x))))), a=conv(16, 16),
            b=conv(16, 16), n=nn.BatchNorm2d(16)),
        "unused": between(lambda m, x: x, spare=block(16, 20)),
    }


def without_batch_norm() -> dict[str, Case]:
    """Other norms, and weights that are computed."""
    return {
        "instance_norm_affine": net(lambda m, x:
            m.out(torch.relu(m.nb(m.b(torch.relu(m.na(m.a(x))))))), a=conv(3, 16),
            na=nn.InstanceNorm2d(16, affine=True), b=conv(16, 12),
            nb=nn.InstanceNorm2d(12, affine=True), out=conv(12, 4)),
        "instance_norm_tracked": net(lambda m, x:
            m.out(torch.relu(m.nb(m.b(torch.relu(m.na(m.a(x))))))), a=conv(3, 16),
            na=nn.InstanceNorm2d(16, affine=True, track_running_stats=True), b=conv(16, 12),
            nb=nn.InstanceNorm2d(12, affine=True, track_running_stats=True), out=conv(12, 4)),
        "instance_norm_3d": net(lambda m, x: m.out(F.leaky_relu(m.na(m.a(x)))),
            lambda: (torch.randn(2, 1, 6, 6, 6),), a=nn.Conv3d(1, 8, 3),
            na=nn.InstanceNorm3d(8, affine=True), out=nn.Conv3d(8, 3, 1)),
        "instance_norm_plain": between(lambda m, x: torch.relu(m.n(m.a(x))),
            n=nn.InstanceNorm2d(16), a=conv(16, 16)),
        "instance_norm_functional": between(lambda m, x: F.instance_norm(m.a(x)), a=conv(16, 16)),
        "ibn": between(lambda m, x: torch.cat([m.i(x[:, :8]), m.n(x[:, 8:])], 1),
            i=nn.InstanceNorm2d(8, affine=True), n=nn.BatchNorm2d(8)),
        "adain": between(lambda m, x: F.instance_norm(x) * m.s(x.mean((2, 3)))[:, :, None, None],
            s=nn.Linear(16, 16)),
        "group_norm": between(lambda m, x: m.n(m.a(x)), n=nn.GroupNorm(4, 16), a=conv(16, 16)),
        "group_norm_rows": net(lambda m, x: m.c(torch.relu(m.b(torch.relu(m.n(m.a(x)))))),
            a=conv(3, 16), n=nn.GroupNorm(4, 16), b=conv(16, 12), c=head(12)),
        "group_norm_single": between(lambda m, x: m.n(x), n=nn.GroupNorm(16, 16)),
        "layer_norm": between(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            n=nn.LayerNorm(16)),
        "rms_norm": net(lambda m, x: m.out(m.n(m.b(m.a(x)))), rows, a=dense(8, 16), b=dense(16, 12),
            n=nn.RMSNorm(12), out=nn.Linear(12, 4)),
        "local_response_norm": between(lambda m, x: m.n(x), n=nn.LocalResponseNorm(3)),
        "frn": between(lambda m, x: torch.maximum(m.w * x *
            torch.rsqrt(x.square().mean((2, 3), True) + 1e-6) + m.b, m.t),
            w=nn.Parameter(torch.ones(1, 16, 1, 1)), b=nn.Parameter(torch.zeros(1, 16, 1, 1)),
            t=nn.Parameter(torch.zeros(1, 16, 1, 1))),
        "weight_norm_old": Case(lambda: Net(lambda m, x: m.out(m.b(torch.relu(m.w(m.a(x))))),
            a=block(3, 16), w=weight_norm(conv(16, 16)), b=block(16, 12), out=head(12)), images),
        "weight_norm": between(lambda m, x: torch.relu(m.w(x)),
            w=parametrizations.weight_norm(conv(16, 16))),
        "weight_norm_linear": net(lambda m, x: m.out(m.b(m.a(x))), rows, a=dense(8, 16),
            b=dense(16, 12), out=parametrizations.weight_norm(nn.Linear(12, 4))),
        "weight_norm_rows": net(lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
            a=parametrizations.weight_norm(conv(3, 16)), b=conv(16, 12), c=head(12)),
        "spectral_norm_old": Case(lambda:
            Net(lambda m, x: m.out(m.b(torch.relu(m.w(m.a(x))))), a=block(3, 16),
            w=spectral_norm(conv(16, 16)), b=block(16, 12), out=head(12)), images),
        "spectral_norm": between(lambda m, x: torch.relu(m.w(x)),
            w=parametrizations.spectral_norm(conv(16, 16))),
        "discriminator": net(lambda m, x: m.c(F.leaky_relu(m.nb(m.b(F.leaky_relu(m.a(x)))))),
            a=parametrizations.spectral_norm(conv(3, 16)),
            b=parametrizations.spectral_norm(conv(16, 12)), nb=nn.BatchNorm2d(12), c=head(12)),
        "weight_standardised": between(lambda m, x:
            F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) /
            (m.w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1),
            w=nn.Parameter(torch.randn(16, 16, 3, 3))),
        "equalised": between(lambda m, x: F.conv2d(x, m.w * (2 / m.w[0].numel()) ** 0.5, padding=1),
            w=nn.Parameter(torch.randn(16, 16, 3, 3))),
        "masked_conv": between(lambda m, x: F.conv2d(x, m.w * m.mask, padding=1),
            w=nn.Parameter(torch.randn(16, 16, 3, 3) / 12), mask=torch.ones(16, 16, 3, 3).tril()),
        "modulated_conv": between(lambda m, x:
            F.conv2d(x.reshape(1, -1, *x.shape[2:]),
            (m.w[None] * m.s(x.mean((2, 3)))[:, None, :, None, None]).flatten(0, 1), padding=1,
            groups=x.shape[0]).view(x.shape[0], -1, *x.shape[2:]),
            w=nn.Parameter(torch.randn(16, 16, 3, 3) / 12), s=nn.Linear(16, 16)),
        "dynamic_conv": between(lambda m, x:
            torch.cat([F.conv2d(row[None], (k[:, None, None, None, None] * m.w).sum(0), padding=1)
            for row, k in zip(x, m.k(x.mean((2, 3))).softmax(1), strict=True)]),
            w=nn.Parameter(torch.randn(3, 16, 16, 3, 3) / 12), k=nn.Linear(16, 3)),
    }


def graphs() -> dict[str, Case]:
    """Messages on graphs, in the ways in which they are passed."""
    ring = (torch.eye(6) + torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0)) / 3

    def dense_batch() -> tuple[Tensor, Tensor]:
        return torch.randn(6, 8), ring

    def sparse_batch() -> tuple[Tensor, Tensor]:
        return torch.randn(6, 8), ring.to_sparse()

    def index_add(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])

    def scatter_add(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        where = edges[1][:, None].expand(-1, x.shape[1])
        return torch.zeros_like(x).scatter_add_(0, where, x[edges[0]])

    def reduce(kind: str) -> Callable[..., Tensor]:
        def run(m: Any, x: Tensor, edges: Tensor) -> Tensor:
            where = edges[1][:, None].expand(-1, x.shape[1])
            return torch.zeros_like(x).scatter_reduce(0, where, x[edges[0]], kind,
                include_self=False)

        return run

    def attention(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        score = F.leaky_relu(m.q[: x.shape[1]] @ x.t())
        shares = torch.exp(score[edges[0]])
        total = torch.zeros_like(score).index_add(0, edges[1], shares)
        sums = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * shares[:, None])
        return sums / total[:, None]

    def pna(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        ways = [reduce(kind)(m, x, edges) for kind in ("mean", "amax", "amin")]
        return sum(ways) * math.log(3)

    def edge_conv(m: Any, x: Tensor) -> Tensor:
        near = pairwise(x).topk(3, largest=False).indices
        return (x[near] - x[:, None]).amax(1) + x

    return {
        "adjacency_dense": on_nodes(lambda m, x, adjacency: adjacency @ x, dense_batch),
        "adjacency_buffer": on_nodes(lambda m, x: m.adjacency @ x, rows, adjacency=ring),
        "adjacency_batched": net(lambda m, x:
            m.out(torch.relu(m.n((m.adjacency @ m.a(x)).transpose(1, 2))).mean(2)),
            lambda: (torch.randn(3, 6, 8),), adjacency=ring, a=nn.Linear(8, 16),
            n=nn.BatchNorm1d(16), out=nn.Linear(16, 4)),
        "adjacency_sparse": on_nodes(lambda m, x, adjacency: torch.sparse.mm(adjacency, x),
            sparse_batch),
        "adjacency_sparse_buffer": on_nodes(lambda m, x: torch.sparse.mm(m.adjacency, x), rows,
            adjacency=ring.to_sparse()),
        "adjacency_csr_buffer": Case(lambda:
            Net(lambda m, x: m.out(torch.relu(m.n(m.adjacency @ m.a(x)))),
            adjacency=ring.to_sparse_csr(), a=nn.Linear(8, 16), n=nn.BatchNorm1d(16),
            out=nn.Linear(16, 4)), rows),
        "adjacency_normalised": on_nodes(lambda m, x, a: (a / a.sum(1, keepdim=True)) @ x,
            dense_batch),
        "adjacency_learned": on_nodes(lambda m, x: torch.softmax(m.e @ m.e.t(), 1) @ x, rows,
            e=nn.Parameter(torch.randn(6, 4))),
        "index_add": on_nodes(index_add),
        "scatter_add": on_nodes(scatter_add),
        "scatter_mean": on_nodes(reduce("mean")),
        "scatter_max": on_nodes(reduce("amax")),
        "gather_only": on_nodes(lambda m, x, edges: x + x[edges[0]].view(2, 6, -1).sum(0)),
        "index_put": on_nodes(lambda m, x, edges:
            torch.zeros_like(x).index_put((edges[1],), x[edges[0]], accumulate=True)),
        "graph_attention": on_nodes(attention, q=nn.Parameter(torch.randn(16))),
        "principal_neighbourhood": on_nodes(pna),
        "edge_conv": on_nodes(edge_conv, rows),
        "chebyshev": on_nodes(lambda m, x: m.l @ x + (2 * m.l @ m.l - m.i) @ x, rows, l=ring,
            i=torch.eye(6)),
        "einsum_nodes": net(lambda m, x: m.out(torch.relu(m.n(torch.einsum("nctv,vw->nctw", m.a(x),
            m.adjacency))).mean((2, 3))), lambda: (torch.randn(3, 3, 5, 6),), adjacency=ring,
            a=conv(3, 16, 1), n=nn.BatchNorm2d(16), out=nn.Linear(16, 4)),
    }


def over_channels() -> dict[str, Case]:
    """Sums, norms and orders of channels."""
    def gram(x: Tensor) -> Tensor:
        x = x.flatten(2)
        return (x @ x.transpose(1, 2)).flatten(1)

    return {
        "normalised": net(lambda m, x: m.out(F.normalize(m.b(m.a(x)).mean((2, 3)), dim=1)),
            a=block(3, 16), b=block(16, 12), out=nn.Linear(12, 4)),
        "normalised_output": net(lambda m, x: F.normalize(m.b(m.a(x)).mean((2, 3)), dim=1),
            a=block(3, 16), b=block(16, 12)),
        "arcface": net(lambda m, x: F.linear(F.normalize(m.b(m.a(x))), F.normalize(m.w)), rows,
            a=dense(8, 16), b=dense(16, 12), w=nn.Parameter(torch.randn(4, 12))),
        "cosine": net(lambda m, x: F.cosine_similarity(m.b(m.a(x))[:, None], m.w[None], dim=-1),
            rows, a=dense(8, 16), b=dense(16, 12), w=nn.Parameter(torch.randn(4, 12))),
        "prototypes": net(lambda m, x: (m.b(m.a(x))[:, None] - m.w[None]).square().sum(-1), rows,
            a=dense(8, 16), b=dense(16, 12), w=nn.Parameter(torch.randn(4, 12))),
        "cdist": net(lambda m, x: torch.cdist(m.b(m.a(x)), m.w), rows, a=dense(8, 16),
            b=dense(16, 12), w=nn.Parameter(torch.randn(4, 12))),
        "siamese_distance": net(lambda m, x: (m.b(m.a(x)) - m.b(m.a(x.flip(0)))).norm(dim=1), rows,
            a=dense(8, 16), b=dense(16, 12)),
        "vector_quantised": net(lambda m, x:
            m.out(m.code[torch.cdist(m.b(m.a(x)), m.code).argmin(1)]), rows, a=dense(8, 16),
            b=dense(16, 12), code=nn.Parameter(torch.randn(5, 12)), out=nn.Linear(12, 4)),
        "cbam": between(lambda m, x: x * torch.sigmoid(m.s(torch.cat([x.mean(1, True),
            x.amax(1, True)], 1))), s=conv(2, 1, 7)),
        "sum_of_channels": between(lambda m, x: x + x.sum(1, keepdim=True)),
        "mean_of_channels": between(lambda m, x: x - x.mean(1, keepdim=True)),
        "max_of_channels": between(lambda m, x: x * x.max(1, keepdim=True)[0]),
        "norm_of_channels": between(lambda m, x: x * x.norm(dim=1, keepdim=True)),
        "softmax_of_channels": between(lambda m, x: x.softmax(1)),
        "logsumexp": between(lambda m, x: x * x.logsumexp(1, keepdim=True)),
        "gram": net(lambda m, x: gram(m.b(m.a(x))), a=block(3, 16), b=block(16, 12)),
        "bilinear_pooling": net(lambda m, x: m.out(gram(m.b(m.a(x)))), a=block(3, 16),
            b=block(16, 12), out=nn.Linear(144, 4)),
        "two_bilinear": net(lambda m, x: m.out(m.n(m.a(x), m.b(x))), rows, a=dense(8, 16),
            b=dense(8, 12), n=nn.Bilinear(16, 12, 6), out=nn.Linear(6, 4)),
        "einsum_product": net(lambda m, x: torch.einsum("bc,kc->bk", m.b(m.a(x)), m.w), rows,
            a=dense(8, 16), b=dense(16, 12), w=nn.Parameter(torch.randn(4, 12))),
        "dot_product": net(lambda m, x: (m.a(x[:, :4]) * m.b(x[:, 4:])).sum(1), rows,
            a=dense(4, 16), b=dense(4, 16)),
        "netvlad": net(lambda m, x: let(F.normalize(m.b(m.a(x)), dim=1),
            lambda y: m.out(F.normalize((m.s(y).flatten(2).softmax(1)[:, :, None] *
            (y.flatten(2)[:, None] - m.c[None, :, :, None])).sum(3).flatten(1)))), a=block(3, 16),
            b=block(16, 12), s=conv(12, 3, 1), c=nn.Parameter(torch.randn(3, 12)),
            out=nn.Linear(36, 4)),
        "eca": between(lambda m, x: x * torch.sigmoid(m.c(x.mean((2, 3))[:, None])[:, 0])[:, :,
            None, None], c=nn.Conv1d(1, 1, 3, padding=1)),
        "non_local": between(lambda m, x: x +
            m.o((m.g(x).flatten(2) @ (m.t(x).flatten(2).transpose(1, 2) @
            m.p(x).flatten(2)).softmax(2).transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])),
            t=conv(16, 8, 1), p=conv(16, 8, 1), g=conv(16, 8, 1), o=conv(8, 16, 1)),
        "correlation": net(lambda m, x: let(m.b(m.a(F.avg_pool2d(x, 4))),
            lambda y: m.out(torch.einsum("bchw,bcuv->bhwuv", y,
            y.flip(3)).flatten(3).mean((1, 2)))), a=block(3, 16), b=block(16, 12),
            out=nn.Linear(16, 4)),
        "knn": net(lambda m, x: let(m.a(x),
            lambda y: m.out(m.b(y)[torch.cdist(y, y).topk(3, largest=False).indices].mean(1))),
            rows, a=dense(8, 16), b=dense(16, 12), out=nn.Linear(12, 4)),
        "sorted_channels": between(lambda m, x: x.sort(1)[0]),
        "cumulative": between(lambda m, x: x.cumsum(1)),
        "maxout": between(lambda m, x: x.view(x.shape[0], 8, 2, *x.shape[2:]).amax(2), 8),
        "top_channels": between(lambda m, x: x.topk(8, 1)[0], 8),
        "gem": net(lambda m, x: m.out(F.avg_pool2d(m.b(m.a(x)).clamp(min=1e-6).pow(m.p),
            16).pow(1 / m.p).flatten(1)), a=block(3, 16), b=block(16, 12),
            p=nn.Parameter(torch.tensor(3.0)), out=nn.Linear(12, 4)),
        "sigmoid_read": between(lambda m, x: torch.sigmoid(x)),
        "softplus_read": between(lambda m, x: F.softplus(x)),
        "bias_added": between(lambda m, x: x + m.b, b=nn.Parameter(torch.randn(16, 1, 1))),
        "noise_buffer": between(lambda m, x: x + m.noise, noise=torch.randn(1, 1, 16, 16)),
        "film": net(lambda m, x: let(m.f(x.mean((2, 3)))[:, :, None, None].chunk(2, 1),
            lambda y: m.out(m.b(m.a(x) * (1 + y[0]) + y[1]))), a=block(3, 16), f=nn.Linear(3, 32),
            b=block(16, 12), out=head(12)),
    }


def rearranged() -> dict[str, Case]:
    """Channels that are moved, split, padded or made of pixels."""
    grid = F.affine_grid(torch.eye(2, 3).expand(3, 2, 3), [3, 16, 16, 16], align_corners=False)
    blur = torch.ones(16, 1, 3, 3) / 9
    haar = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(16, 1, 1, 1) / 2

    def shuffle(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)

    def unequal(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).split((m.n, 24 - m.n), 1)
        return torch.cat([m.b(a), b], 1)

    def scales(m: Any, x: Tensor) -> Tensor:
        parts = list(x.chunk(4, 1))
        for i in range(1, 4):
            parts[i] = m.s[i - 1](parts[i] + parts[i - 1])
        return torch.cat(parts, 1)

    def radix(m: Any, x: Tensor) -> Tensor:
        parts = m.a(x).view(x.shape[0], 2, 16, *x.shape[2:])
        shares = m.f(parts.sum(1).mean((2, 3))).view(-1, 2, 16).softmax(1)
        return (parts * shares[..., None, None]).sum(1)

    def selective(m: Any, x: Tensor) -> Tensor:
        parts = torch.stack([m.a(x), m.b(x)], 1)
        shares = m.f(parts.sum(1).mean((2, 3))).view(-1, 2, 16).softmax(1)
        return (parts * shares[..., None, None]).sum(1)

    def dual_path(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.cat([x[:, :12] + y[:, :12], x[:, 12:], y[:, 12:]], 1)

    def filled(m: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x).fill_(0.5)
        return x + y

    def written(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 24, *x.shape[2:], dtype=x.dtype)
        y[:, :16] = x
        return y

    def coordinates(m: Any, x: Tensor) -> Tensor:
        row = torch.linspace(-1, 1, 16, dtype=x.dtype).expand(x.shape[0], 1, 16, 16)
        return torch.cat([x, row, row.transpose(2, 3)], 1)

    def involution(m: Any, x: Tensor) -> Tensor:
        kernels = m.k(x)[:, None].view(x.shape[0], 1, 9, 16, 16)
        return (F.unfold(x, 3, padding=1).view(x.shape[0], -1, 9, 16, 16) * kernels).sum(2)

    def coupling(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, b + m.f(a)], 1).flip(1)

    return {
        "pixel_shuffle": between(lambda m, x: F.pixel_shuffle(x, 2), 4),
        "super_resolution": net(lambda m, x: F.pixel_shuffle(m.c(m.b(m.a(x))), 2), a=block(3, 16),
            b=block(16, 12), c=conv(12, 12)),
        "pixel_unshuffle": between(lambda m, x: F.pixel_unshuffle(x, 2), 64),
        "space_to_depth": between(lambda m, x:
            torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1), 64),
        "channel_shuffle": between(lambda m, x: F.channel_shuffle(x, 4)),
        "channel_shuffle_view": between(shuffle),
        "shufflenet": between(lambda m, x:
            F.channel_shuffle(torch.cat([x[:, :8], m.a(x[:, 8:])], 1), 2), a=block(8, 8)),
        "unfold": net(lambda m, x: m.out(F.unfold(m.b(m.a(x)), 4, stride=4).transpose(1,
            2)).mean(1), a=block(3, 16), b=block(16, 12), out=nn.Linear(192, 4)),
        "fold": between(lambda m, x: F.fold(F.unfold(x, 2, stride=2), (16, 16), 2, stride=2)),
        "tensor_unfold": between(lambda m, x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))),
        "involution": between(involution, k=conv(16, 9, 1)),
        "statistics_pooling": net(lambda m, x:
            let(m.b(m.a(x)), lambda y: m.out(torch.cat([y.mean(2), y.std(2)], 1))), points,
            a=pointwise(3, 16), b=pointwise(16, 12), out=nn.Linear(24, 4)),
        "variance_pooling": net(lambda m, x: m.out(m.b(m.a(x)).var(2)), points, a=pointwise(3, 16),
            b=pointwise(16, 12), out=nn.Linear(12, 4)),
        "grid_sample": between(lambda m, x: F.grid_sample(x, m.grid, align_corners=False),
            grid=grid),
        "blur_functional": between(lambda m, x: F.conv2d(x, m.blur, padding=1, groups=x.shape[1]),
            blur=blur),
        "blur_expanded": between(lambda m, x:
            F.conv2d(x, m.blur.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1]),
            blur=blur[:1].clone()),
        "haar": between(lambda m, x: F.conv2d(x, m.haar, stride=2, groups=16), 16, haar=haar),
        "option_a": between(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) +
            m.b(F.avg_pool2d(x, 2)), 24, b=block(16, 24)),
        "padded_cat": between(lambda m, x: torch.cat([x, torch.zeros_like(x[:, :8])], 1), 24),
        "written_in_place": between(written, 24),
        "flip_images": between(lambda m, x: x.flip(3)),
        "flip_channels": between(lambda m, x: x.flip(1)),
        "roll_images": between(lambda m, x: x.roll((1, 1), (2, 3))),
        "roll_channels": between(lambda m, x: x.roll(3, 1)),
        "shift_parts": between(lambda m, x:
            torch.cat([x[:, :4].roll(1, 2), x[:, 4:8].roll(-1, 2), x[:, 8:]], 1)),
        "rrelu": between(lambda m, x: m.r(x), r=nn.RReLU()),
        "crelu": between(lambda m, x: torch.cat([x, -x], 1).relu(), 32),
        "gated": between(lambda m, x: let(m.g(x).chunk(2, 1),
            lambda y: torch.tanh(y[0]) * torch.sigmoid(y[1])), g=conv(16, 32)),
        "glu": between(lambda m, x: F.glu(m.g(x), 1), g=block(16, 32)),
        "deformable": between(lambda m, x: torchvision.ops.deform_conv2d(x, m.o(x), m.w, padding=1),
            o=conv(16, 18), w=nn.Parameter(torch.randn(16, 16, 3, 3) / 12)),
        "bicubic_antialiased": between(lambda m, x:
            F.interpolate(x, (8, 8), mode="bicubic", antialias=True)),
        "bicubic": between(lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic")),
        "split_attention": between(radix, a=block(16, 32, groups=2),
            f=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 32))),
        "selective_kernel": between(selective, a=block(16, 16), b=block(16, 16, 5),
            f=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 32))),
        "dual_path": between(dual_path, 20, a=block(16, 16)),
        "equal_split": between(lambda m, x: torch.cat([y := m.a(x), m.b(y.chunk(2, 1)[1])], 1), 36,
            a=block(16, 24), b=block(12, 12)),
        "unequal_split": between(unequal, 24, a=block(16, 24), b=block(8, 8), n=8),
        "unequal_beside_equal": between(lambda m, x:
            unequal(m, torch.cat([m.c(h) for h in x.chunk(2, 1)], 1)), 24, a=block(16, 24),
            b=block(8, 8), c=block(8, 8), n=8),
        "scales_of_parts": between(scales, s=nn.ModuleList(block(4, 4) for _ in range(3))),
        "mixed_kernels": between(lambda m, x:
            torch.cat([c(part) for c, part in zip(m.c, x.split([6, 10], 1), strict=True)], 1),
            c=nn.ModuleList([block(6, 6, 3, groups=6), block(10, 10, 5, groups=10)])),
        "partial_conv": between(lambda m, x: torch.cat([m.c(x[:, :4]), x[:, 4:]], 1), c=conv(4, 4)),
        "filled": between(filled),
        "coordinates": between(coordinates, 18),
        "coupling": between(coupling, f=conv(8, 8)),
        "fourier": between(lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * m.f, s=(16, 16)),
            f=nn.Parameter(torch.randn(1, 1, 16, 9))),
        "repeated": between(lambda m, x: x.repeat(1, 2, 1, 1), 32),
        "repeat_interleaved": between(lambda m, x: x.repeat_interleave(2, 1), 32),
        "width_as_channels": net(lambda m, x:
            m.out(m.r(m.b(m.a(x)).permute(0, 3, 1, 2).flatten(2))[0].mean(1)), a=block(3, 16),
            b=block(16, 12), r=nn.GRU(192, 8, batch_first=True), out=nn.Linear(8, 4)),
        "coordinate_attention": between(lambda m, x: x *
            torch.sigmoid(m.c(torch.cat([x.mean(3, True), x.mean(2, True).transpose(2, 3)],
            2)).split(16, 2)[0]), c=conv(16, 16, 1)),
    }


def values_and_indices() -> dict[str, Case]:
    """Sizes that depend on values, and second results of operators."""
    def unpooled(m: Any, x: Tensor) -> Tensor:
        y, where = F.max_pool2d(m.a(x), 2, return_indices=True)
        return m.out(m.c(F.max_unpool2d(m.b(y), where, 2)))

    def boxes(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x)).mean((2, 3))
        corner = m.corner(y)
        found = torch.cat([corner, corner + 1], 1)
        return found[torchvision.ops.nms(found, m.score(y)[:, 0], 0.5)]

    layers = {"a": block(3, 16), "b": block(16, 12)}
    detector = {"first": block(3, 16), "second": block(16, 12), "box": conv(12, 4, 1),
        "cls": conv(12, 3, 1)}
    return {
        "max_unpool": net(unpooled, a=block(3, 16), b=block(16, 16), c=block(16, 12),
            out=conv(12, 4)),
        "segnet": net(lambda m, x: let(F.max_pool2d(m.b(m.a(x)), 2, return_indices=True),
            lambda y: m.out(m.d(F.max_unpool2d(m.c(y[0]), y[1], 2)))), a=block(3, 16),
            b=block(16, 12), c=block(12, 12), d=block(12, 8), out=conv(8, 3)),
        "pool_indices_unused": between(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]),
        "max_values_only": net(lambda m, x: m.out(m.b(m.a(x)).flatten(2).max(2)[0]), **layers,
            out=nn.Linear(12, 4)),
        "nms": net(boxes, **layers, corner=nn.Linear(12, 2), score=nn.Linear(12, 1)),
        "nonzero": net(lambda m, x: m.out(m.b(m.a(x)).mean((2,
            3))[(x.mean((1, 2, 3)) > -1).nonzero()[:, 0]]), **layers, out=nn.Linear(12, 4)),
        "nonzero_of_features": net(lambda m, x:
            (y := m.out(m.b(m.a(x))).flatten())[(y > y.mean()).nonzero()[:, 0]], **layers,
            out=conv(12, 1)),
        "masked_select": net(lambda m, x: (y := m.out(m.b(m.a(x)))).masked_select(y > 0), **layers,
            out=conv(12, 1)),
        "unique": net(lambda m, x: (y := m.out(m.b(m.a(x))).mean((2, 3)), y.round().unique()),
            **layers, out=conv(12, 2)),
        "top_proposals": net(lambda m, x:
            (y := m.out(m.b(m.a(x))).flatten(1)).gather(1, y.topk(5).indices), **layers,
            out=conv(12, 1)),
        "classes_out": net(lambda m, x: m.out(m.b(m.a(x))).argmax(1), **layers, out=head(12)),
        "raw_features_in_evaluation": net(lambda m, x:
            let(m.raw(m.first(x)), lambda y: y if m.training else (y, m.first(x))),
            first=block(3, 16), raw=conv(16, 4, 1)),
        "detector": net(lambda m, x: let(m.second(m.first(x)),
            lambda y: torch.cat([m.box(y), m.cls(y)], 1).flatten(2).transpose(1, 2)), **detector),
        "detector_raw": net(lambda m, x: let(torch.cat([m.box(y := m.second(m.first(x))), m.cls(y)],
            1), lambda raw: raw if m.training else (raw.sigmoid(), {"raw": raw, "features": y})),
            **detector),
        "fractional_pool": between(lambda m, x:
            F.fractional_max_pool2d(x, 2, output_size=8,
            _random_samples=torch.full((x.shape[0], x.shape[1], 2), 0.5, dtype=x.dtype))),
        "adaptive_max_pool": between(lambda m, x: F.adaptive_max_pool2d(x, 4)),
        "lp_pool": between(lambda m, x: F.lp_pool2d(x, 2, 2)),
        "roi_align": net(lambda m, x: m.out(torchvision.ops.roi_align(m.b(m.a(x)),
            [x.new_tensor([[0, 0, 8, 8]])] * 3, 4).flatten(1)), **layers, out=nn.Linear(192, 4)),
        "loss_inside": net(lambda m, x: let(m.out(m.b(m.a(x))),
            lambda y: {"loss": F.cross_entropy(y, torch.arange(3)), "logits": y}), **layers,
            out=head(12)),
        "moving_threshold": between(lambda m, x: torch.where(x > m.t, x, torch.zeros_like(x)),
            t=torch.full((16, 1, 1), 0.1)),
    }


@dataclass
class Answer:
    """An output with two names."""

    logits: Tensor
    features: Tensor


class Pair(NamedTuple):
    """Another."""

    logits: Tensor
    features: Tensor


class Versioned(nn.Module):
    """A module whose ``state_dict`` has a version that it asks for."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(3, 16), block(16, 12), head(12))

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        return self.layers(x)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be 1 or 2, got {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def wholes() -> dict[str, Case]:
    """What surrounds a network: outputs, files, scripts, buffers that are not saved."""
    layers = {"a": block(3, 16), "b": block(16, 12)}
    out = {"out": nn.Linear(12, 4)}

    def ending(make: Callable[[Tensor, Tensor], Any]) -> Case:
        def run(m: Any, x: Tensor) -> Any:
            y = m.b(m.a(x)).mean((2, 3))
            return make(m.out(y), y)

        return net(run, **layers, **out)

    def sequence() -> nn.Module:
        return nn.Sequential(block(3, 16), block(16, 12), head(12))

    def scripted_part() -> nn.Module:
        part = torch.jit.script(nn.Sequential(conv(16, 16), nn.ReLU()))
        return Net(lambda m, x: m.out(m.b(m.s(m.a(x)))), a=block(3, 16), s=part, b=block(16, 12),
            out=head(12))

    def scripted_activation() -> nn.Module:
        return Net(lambda m, x: m.out(m.b(m.s(m.a(x)))), a=block(3, 16),
            s=torch.jit.script(nn.ReLU()), b=block(16, 12), out=head(12))

    @torch.jit.script
    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def hooked() -> nn.Module:
        model = sequence()
        model[0].register_forward_hook(lambda module, args, result: result * 2)
        return model

    return {
        "output_dataclass": ending(Answer),
        "output_named_tuple": ending(Pair),
        "output_dict_of_lists": ending(lambda y, z: {"logits": [y], "more": ({"y": y},)}),
        "output_distribution": ending(lambda y, z: torch.distributions.Categorical(logits=y)),
        "output_normal": ending(lambda y, z: torch.distributions.Normal(y, F.softplus(y) + 0.1)),
        "output_array": ending(lambda y, z: y.detach().numpy()),
        "output_with_none": ending(lambda y, z: (y, None, 3, "name")),
        "output_features_too": ending(lambda y, z: (y, z)),
        "versioned": Case(Versioned, images),
        "temporary_buffer": between(lambda m, x: x * m.temporary_scale,
            temporary_scale=torch.rand(1, 16, 1, 1)),
        "saved_buffer": between(lambda m, x: x * m.scale, scale=torch.rand(1, 16, 1, 1)),
        "plain_tensor": between(lambda m, x: x * m.held[0].to(x.dtype),
            held=[torch.rand(1, 16, 1, 1)]),
        "moving_average": between(lambda m, x: x - m.mean, mean=torch.rand(1, 16, 1, 1)),
        "memory_bank": net(lambda m, x: m.b(m.a(x)) @ m.bank.t(), rows, a=dense(8, 16),
            b=dense(16, 12), bank=torch.randn(7, 12)),
        "scripted_part": Case(scripted_part, images),
        "scripted_activation": Case(scripted_activation, images),
        "scripted_function": between(lambda m, x: swish(x)),
        "scripted_whole": Case(lambda: torch.jit.script(sequence()), images),
        "traced_whole": Case(lambda: torch.jit.trace(sequence().eval(), images()), images),
        "fx_graph": Case(lambda: torch.fx.symbolic_trace(sequence()), images),
        "hooked": Case(hooked, images),
        "feature_extractor": Case(lambda:
            torchvision.models._utils.IntermediateLayerGetter(sequence(), {"1": "features"}),
            images),
        "sync_batch_norm": Case(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(sequence()),
            images),
        "own_autograd": between(lambda m, x: Straight.apply(x)),
        "own_autograd_context": between(lambda m, x: Double.apply(x)),
        "no_grad_inside": net(lambda m, x: m.out(m.b(no_grad(m.a, x))), **layers, out=head(12)),
        "in_double_inside": between(lambda m, x: m.c.double()(x.double()).to(x.dtype),
            c=conv(16, 16)),
        "autocast_inside": between(lambda m, x: autocast(m.c, x).to(x.dtype), c=conv(16, 16)),
        "compiled_names": net(lambda m, x: m.out(m.b(m.a(x))), **layers, out=head(12),
            num_features=16),
    }


def no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer that is not trained."""
    with torch.no_grad():
        return layer(x)


def autocast(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer in half precision."""
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


class Straight(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sign."""
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient."""
        return gradient


class Double(torch.autograd.Function):
    """The square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The square."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Its gradient."""
        return 2 * gradient * ctx.saved_tensors[0]


def by_hand() -> dict[str, Case]:
    """All of them."""
    torch.manual_seed(0)
    groups = {
        "plain": plain(),
        "sizes": indices_and_sizes(),
        "zero": zero_to_begin_with(),
        "branches": branches(),
        "norms": without_batch_norm(),
        "graphs": graphs(),
        "channels": over_channels(),
        "moved": rearranged(),
        "values": values_and_indices(),
        "wholes": wholes(),
    }
    return {f"{group}/{name}": case for group, some in groups.items() for name,
        case in some.items()}
