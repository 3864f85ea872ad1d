"""A shrunk network saved, copied, and loaded into a fresh one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import IMAGES, NETWORKS, Sequence, build, loss_of, networks, outputs, zero_channels
from torch import Tensor, nn

from torch_worm_optim.shrink import load_shrunk_, shrink_


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


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_whole_network_is_copied_and_saved(how):
    """With BatchNorms that write by index, which can be shrunk again and loaded from."""
    model, batch = build("residual")
    report = shrink_(model, batch, scatter=True)
    assert report.is_scattered

    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)

    assert repr(other) == repr(model)
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    for training in (False, True):
        for a, b in zip(
            outputs(other, batch, training), outputs(model, batch, training), strict=True
        ):
            assert torch.equal(a, b)
    assert shrink_(other, batch, scatter=True).kept == {}
    fresh = NETWORKS["residual"][0]().double()
    load_shrunk_(fresh, other.state_dict())
    assert repr(fresh) == repr(model)


class BackToFront(nn.Module):
    """Layers built before those that they read, some of them several side by side."""

    def __init__(self, n_classes: int = 2, n_channels: int = 3) -> None:
        super().__init__()
        self.out = nn.Conv2d(14, n_classes, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 6, 2, 2), nn.BatchNorm2d(6), nn.GELU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(n_channels, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Segment."""
        wide = self.down(x)
        deep = self.up(self.middle(nn.functional.avg_pool2d(wide, 2)))
        return self.out(torch.cat([deep, wide], 1))


class Stream(nn.Module):
    """A residual stream that only its BatchNorms are narrower than, with `scatter`."""

    def __init__(self, n_classes: int = 3, n_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(n_channels, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.block = nn.Sequential(
            nn.Conv2d(8, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = torch.relu(self.stem(x))
        return self.head((x + self.block(x)).relu().mean((2, 3)))


class Perceptron(nn.Sequential):
    """Convolutions, a flatten and linear layers."""

    def __init__(self, n_classes: int = 3, n_channels: int = 3) -> None:
        super().__init__(
            *(nn.Conv2d(n_channels, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(12 * 9, 20), nn.BatchNorm1d(20), nn.GELU()),
            nn.Linear(20, n_classes),
        )


FIRST_AND_LAST = {Stream: ("stem.0", "head"), Perceptron: ("0", "8")}


@pytest.mark.parametrize("kind", [Stream, Perceptron, BackToFront])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_layers_of_any_order_are_loaded(kind, scatter, multiple_of):
    """What is read by a layer that was built before, or with others, is not taken for an end."""
    model = kind()
    zero_channels(model)
    shrink_(model, IMAGES, scatter=scatter, multiple_of=multiple_of)
    fresh = kind()
    load_shrunk_(fresh, model.state_dict())
    assert torch.equal(fresh.eval()(*IMAGES), model.eval()(*IMAGES))


@pytest.mark.parametrize("kind", FIRST_AND_LAST)
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("sizes", [{"n_classes": 11}, {"n_classes": 2}, {"n_channels": 7}])
def test_what_a_network_takes_and_returns_keeps_its_width(kind, scatter, sizes):
    """Another number of classes is refused; the way out that the message names works."""
    model = kind()
    zero_channels(model)
    shrink_(model, IMAGES, scatter=scatter)
    fresh = kind(**sizes)
    before = copy.deepcopy(fresh.state_dict())
    first, last = FIRST_AND_LAST[kind]
    name = last if "n_classes" in sizes else first
    with pytest.raises(ValueError, match=f"'{name}.weight' has shape .* never cut.* replace its"):
        load_shrunk_(fresh, model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())

    fresh = kind()
    load_shrunk_(fresh, model.state_dict())
    n_features = fresh.get_submodule(last).in_features
    fresh.set_submodule(last, nn.Linear(n_features, 11))
    assert fresh(*IMAGES).shape == (8, 11)


class Versioned(nn.BatchNorm2d):
    """As MNASNet, it does not load what says no version."""

    _version = 7

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata["version"] == 7
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("plain", [False, True])
def test_versions_are_passed_on(plain):
    """Those of the state_dict, or of the fresh network where a file format dropped them."""
    make = lambda: nn.Sequential(nn.Conv2d(3, 6, 1), Versioned(6), nn.Conv2d(6, 2, 1))  # noqa: E731
    model, fresh = make(), make()
    zero_channels(model)
    shrink_(model, IMAGES)
    state = model.state_dict()
    load_shrunk_(fresh, dict(state) if plain else state)
    assert fresh[1].num_features == model[1].num_features < 6


class Scale(nn.Module):
    """A factor for each channel that is not saved."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", values.reshape(-1, 1, 1), persistent=False)
        self.register_buffer("eps", torch.tensor(1e-3), persistent=False)
        self.register_buffer("numbers", torch.arange(len(values)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.factor * self.eps


class ScaledNorm(Scale):
    """The same with the BatchNorm before it."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.norm = nn.BatchNorm2d(len(values))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and scale."""
        return super().forward(self.norm(x))


def scaled(where: str, values: Tensor) -> nn.Module:
    """A network with a buffer in a module of its own, beside a BatchNorm, or in a block."""
    n, conv = len(values), lambda a, b: nn.Conv2d(a, b, 1)
    if where == "own":
        return nn.Sequential(conv(3, n), nn.BatchNorm2d(n), Scale(values), conv(n, 2))
    if where == "norm":
        return nn.Sequential(conv(3, n), ScaledNorm(values), conv(n, n), conv(n, 2))
    block = nn.Sequential(conv(3, n), nn.BatchNorm2d(n), Scale(values))
    return nn.Sequential(block, conv(n, n), nn.ReLU(), conv(n, 2))


@pytest.mark.parametrize("where", ["own", "norm", "block"])
def test_buffers_that_are_not_saved_follow(where):
    """A constant takes the width around it; which of several values stay is not known."""
    model, fresh = (scaled(where, torch.full((6,), 0.5)) for _ in range(2))
    zero_channels(model)
    shrink_(model, IMAGES)
    load_shrunk_(fresh, model.state_dict())
    buffers = dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        if not name.endswith("numbers"):
            assert torch.equal(buffer, buffers[name])
    assert torch.equal(fresh.eval()(*IMAGES), model.eval()(*IMAGES))

    different = scaled(where, torch.arange(6.0))
    before = copy.deepcopy(different.state_dict())
    with pytest.raises(ValueError, match=r"factor' is not in the state_dict.*`persistent=True`"):
        load_shrunk_(different, model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in different.state_dict().items())


def test_buffers_of_what_was_not_cut_stay():
    """Such as a filter, a table of as many rows as there are channels, or frequencies."""
    model, fresh = (Sequence() for _ in range(2))
    for each in (model, fresh):
        each[9].register_buffer("table", torch.arange(24.0).reshape(8, 3), persistent=False)
        each[8].register_buffer("filter", torch.ones(3, 3), persistent=False)
        each[7].register_buffer("inv_freq", torch.arange(3.0), persistent=False)
    zero_channels(model)
    shrink_(model, IMAGES)
    load_shrunk_(fresh, model.state_dict())
    assert torch.equal(fresh[9].table, torch.arange(24.0).reshape(8, 3))
    assert fresh[8].filter.shape == (3, 3)
    assert fresh[7].inv_freq.shape == (3,)


@pytest.mark.parametrize(
    ("around", "error", "message"),
    [
        (lambda _: "net.pt", TypeError, r"got str\. Read a file first"),
        (lambda model: model, TypeError, "got Linear"),
        (
            lambda model: {"epoch": 3, "model": model.state_dict(), "optimizer": {"state": {}}},
            ValueError,
            r"with \['epoch', 'model', 'optimizer'\] in it.*checkpoint\['model'\]",
        ),
    ],
)
def test_it_says_what_it_wants(around, error, message):
    """A path, a model or a whole checkpoint is none."""
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        load_shrunk_(model, around(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_that_a_wrapper_made_are_told(prefix):
    """With what takes them off."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    wrapped = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"a wrapper adds, such as '{prefix}0.weight'.*consume"):
        load_shrunk_(model, wrapped)


class HeadFirst(nn.Module):
    """Its head is built before what it reads, without a norm in between."""

    def __init__(self, n_pixels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(n_pixels)
        self.head, self.conv = nn.Linear(8 * n_pixels**2, 3), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.pool(self.conv(x)).flatten(1))


@pytest.mark.parametrize("n_pixels", [1, 2])
def test_a_head_that_is_built_first_is_loaded(n_pixels):
    """The width of what it reads is its own, or so many times that behind a flatten."""
    model, x = HeadFirst(n_pixels), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model.conv.weight[:3] = model.conv.bias[:3] = 0
    assert shrink_(model, x).channels == (3, 0)
    fresh = HeadFirst(n_pixels)
    load_shrunk_(fresh, model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))
