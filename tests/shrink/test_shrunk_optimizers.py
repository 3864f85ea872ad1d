"""Optimizers of all kinds over a network that is shrunk: what they keep, what is around them."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import deque
from types import SimpleNamespace

import every_shrunk_optimizer
import pytest
import torch
import training
from models import zero_channels
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import same, small_cnn, train, weights_of

from torch_worm_optim import Phase, WormOptimizer
from torch_worm_optim.shrink import cut_tensor, shrink_

# Lion moves all scales from 1 by the same steps, up or down.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*normalises gradients", "ignore:.*tie for the mask"
)


def pruned(make, **options):
    """A search under an optimizer of one's own whose ticket is applied, after eight steps."""
    model = small_cnn(torch.double)
    settings = {"sample_every": 3, "window": 2, "stopping_point": 1.0, **options}
    opt = WormOptimizer(make(model.parameters()), model, **settings)
    train(model, opt, range(6))
    opt.prune()
    train(model, opt, range(6, 8))
    return model, opt


def one_image():
    """What the network is traced with."""
    return torch.ones(1, 1, 6, 6, dtype=torch.double, device=training.DEVICE)


def lion(parameters):
    """Lion of timm, which moves every entry by the sign of its momentum."""
    return pytest.importorskip("timm.optim").Lion(parameters, lr=1e-3, weight_decay=0.1)


def lamb(parameters, weight_decay=0.0):
    """Lamb of timm, which takes the norm of all gradients."""
    return pytest.importorskip("timm.optim").Lamb(parameters, lr=0.01, weight_decay=weight_decay)


def lamb_with_decay(parameters):
    """The same, which now takes norms of each parameter and of its update as well."""
    return lamb(parameters, weight_decay=0.1)


def adafactor(parameters):
    """Adafactor of torch, which keeps factors of other shapes than the parameters'."""
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    return torch.optim.Adafactor(parameters, lr=0.01)


def clear_what_was_cut_(model, opt, kept):
    """Set what another network has lost to zero in a dense one, and in the optimizer's state."""
    for name, dims in kept.items():
        tensor = model.state_dict(keep_vars=True)[name]
        stays = torch.ones_like(tensor)
        for dim, indices in enumerate(dims):
            if indices is not None:
                cut = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
                cut[indices] = False
                stays.index_fill_(dim, cut.nonzero()[:, 0], 0.0)
        state = opt.state[tensor].values() if tensor in opt.state else ()
        for each in (tensor.detach(), *state):
            if isinstance(each, torch.Tensor) and each.shape == tensor.shape:
                each.mul_(stays)


def assert_is_left_of(twin, model, report):
    """Parameters of a shrunk network are those of a pruned one that are left."""
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).detach()
        if name in report.kept:
            expected = cut_tensor(expected, report.kept[name])
        bound = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=bound)


@pytest.mark.parametrize(
    ("make", "cleared"), [(lion, False), (lamb, False), (lamb_with_decay, True)]
)
def test_training_a_shrunk_network_is_training_the_pruned_one(make, cleared):
    """Twenty steps after shrinking, parameters are those of the pruned network that are left.

    A pruned channel's filter is not zero, it only has no effect. Optimizers that take norms of
    whole parameters count it, so for those it has to be cleared.
    """
    model, opt = pruned(make)
    twin, twin_opt = copy.deepcopy((model, opt))

    report = opt.shrink(one_image())
    if cleared:
        clear_what_was_cut_(twin, twin_opt, report.kept)
    train(model, opt, range(8, 28))
    train(twin, twin_opt, range(8, 28))

    assert report.parameters[1] < report.parameters[0]
    assert report.channels == (10, 0)
    assert_is_left_of(twin, model, report)


def test_factors_of_cut_parameters_start_afresh_with_one_warning():
    """Adafactor forgets what it cannot cut, says so once, and trains on."""
    model, opt = pruned(adafactor)
    names = {parameter: name for name, parameter in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"Adafactor keeps .* It starts afresh") as caught:
        report = opt.shrink(one_image())

    assert len(caught) == 1
    assert caught[0].filename == __file__
    forgotten = {name for parameter, name in names.items() if parameter not in opt.state}
    assert forgotten == {"0.weight", "3.weight", "8.weight"}
    assert forgotten < report.kept.keys()
    before = weights_of(model)
    train(model, opt, range(8, 12))
    assert all(parameter in opt.state for parameter in names)
    assert not same(before, weights_of(model))
    assert all(bool(parameter.isfinite().all()) for parameter in names)
    assert opt.phase is Phase.PRUNED


def test_nothing_is_said_where_nothing_was_cut():
    """A ticket that keeps all leaves every factor where it is, silently."""
    model, opt = pruned(adafactor, prune_ratio=0.0)
    before = copy.deepcopy(opt.state_dict()["state"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = opt.shrink(one_image())

    assert report.kept == {}
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[i][key], before[i][key]) for i in before for key in before[i])
    assert len(after) == len(list(model.parameters()))


class Code(Tensor):
    """A quantized state, of which no indices can be picked."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """All but that."""
        if func is Tensor.index_select:
            raise NotImplementedError("index_select of a code")
        return super().__torch_function__(func, types, args, kwargs or {})


class Holder(Optimizer):
    """SGD with momentum, which keeps the momentum in something."""

    def __init__(self, parameters, wrap, unwrap):
        super().__init__(parameters, {"lr": 0.05})
        self.wrap, self.unwrap = wrap, unwrap

    @torch.no_grad()
    def step(self):
        """Like SGD's."""
        for parameter in self.param_groups[0]["params"]:
            held = self.held_of(parameter)
            if "momentum" not in held:
                held["momentum"] = self.wrap(torch.zeros_like(parameter))
            momentum = self.unwrap(held["momentum"]).mul_(0.9).add_(parameter.grad)
            parameter.sub_(momentum, alpha=0.05)

    def held_of(self, parameter):
        """Where it is kept."""
        return self.state[parameter]


class AllHolder(Holder):
    """The same, in one entry for all parameters."""

    def held_of(self, parameter):
        """Where it is kept."""
        return self.state["all"].setdefault(parameter, {})


class AtParameter(Holder):
    """The same, as an attribute of the parameter."""

    def held_of(self, parameter):
        """Where it is kept."""
        return vars(parameter)


class TinyShampoo(Holder):
    """It keeps a matrix for a matrix's rows, which has its shape if it is square."""


HELD = {
    "list": (lambda m: [m], lambda held: held[0]),
    "tuple of a list": (lambda m: ([m], 1), lambda held: held[0][0]),
    "dict": (lambda m: {0.9: m}, lambda held: held[0.9]),
    "deque": (lambda m: deque([m]), lambda held: held[0]),
    "object": (lambda m: SimpleNamespace(m=m), lambda held: held.m),
    "code": (lambda m: m.as_subclass(Code), lambda held: held.as_subclass(Tensor)),
    "row": (lambda m: m.flatten(), lambda held: held.view(-1)),
}


@pytest.mark.parametrize("kind", [Holder, AllHolder])
@pytest.mark.parametrize("held", HELD)
def test_state_that_cannot_be_cut_starts_afresh(held, kind):
    """One warning says for how many parameters, and names one; training goes on."""
    wrap, unwrap = HELD[held]
    if held == "row":  # of another shape than a matrix

        def unwrap(held):
            return held.view(shapes[held.numel()])

    model, _ = pruned(lambda parameters: SGD(parameters, lr=0.1))
    shapes = {p.numel(): p.shape for p in model.parameters()}
    model, opt = pruned(lambda parameters: kind(parameters, wrap, unwrap))
    with pytest.warns(UserWarning, match=rf"{kind.__name__} keeps something .*afresh") as caught:
        report = opt.shrink(one_image())
    shapes = {p.numel(): p.shape for p in model.parameters()}

    assert len(caught) == 1
    assert caught[0].filename == __file__
    cut = [name for name in report.kept if name in dict(model.named_parameters())]
    n_cut = sum(model.get_parameter(n).dim() > 1 for n in cut) if held == "row" else len(cut)
    if kind is Holder:
        assert f"for {n_cut} parameters, {cut[0]!r} among them" in str(caught[0].message)
    before = weights_of(model)
    train(model, opt, range(8, 28))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not same(before, weights_of(model))


def test_what_an_optimizer_keeps_at_the_parameter_is_cut():
    """An attribute of the parameter's shape is cut as its state would be."""
    (model, opt), (twin, twin_opt) = (
        pruned(lambda parameters: AtParameter(parameters, *(lambda m: m,) * 2)) for _ in range(2)
    )
    report = opt.shrink(one_image())
    train(model, opt, range(8, 28))
    train(twin, twin_opt, range(8, 28))
    assert report.kept
    assert_is_left_of(twin, model, report)


def test_matrices_for_rows_of_a_square_parameter_are_not_cut():
    """They have the parameter's shape, and their columns are no columns of it."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    zero_channels(model)
    opt = TinyShampoo(model.parameters(), *(lambda m: m,) * 2)
    model(torch.randn(8, 6)).sum().backward()
    opt.step()
    with pytest.warns(UserWarning, match="TinyShampoo keeps something"):
        report = shrink_(model, torch.randn(8, 6), optimizer=opt)
    assert {name for name, p in model.named_parameters() if p not in opt.state} == {
        name for name in report.kept if "running" not in name
    }


@pytest.mark.parametrize("first", ["cut", "whole"])
def test_lbfgs_starts_afresh(first):
    """Its history is flat, under the first parameter, whether or not that one gets smaller."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)]
    head = [] if first == "cut" else [nn.Linear(6, 6), nn.Tanh()]
    torch.manual_seed(0)
    model, x = nn.Sequential(*head, *layers), torch.randn(16, 6)
    zero_channels(model)
    opt = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    with pytest.warns(UserWarning, match="LBFGS keeps something for"):
        shrink_(model, x, optimizer=opt)
    losses = [float(opt.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]


class Slow(Optimizer):
    """Lookahead: goes back half of the way to weights of its own."""

    def __init__(self, inner, hold=lambda inner: inner, *, share=False):
        super().__init__(inner.param_groups, {})
        self.param_groups, self.inner = inner.param_groups, hold(inner)
        self.take_step = inner.step
        if share:
            self.state = inner.state

    @torch.no_grad()
    def step(self, closure=None):
        """The inner one's, and half of it back."""
        before = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.take_step()
        for parameter, start in before.items():
            slow = self.state[parameter].setdefault("slow", start)
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


def momentum(parameters):
    """SGD with momentum."""
    return SGD(parameters, lr=0.05, momentum=0.9)


class SlowList(Slow):
    """The same with its own weights made when it is built, in lists, one for each group."""

    def __init__(self, inner):
        super().__init__(inner)
        self.weights = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        """The inner one's, and half of it back."""
        self.take_step()
        for group, weights in zip(self.param_groups, self.weights, strict=True):
            for parameter, slow in zip(group["params"], weights, strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))


class SlowDict(SlowList):
    """The same with its own weights by parameter."""

    def __init__(self, inner):
        super().__init__(inner)
        [group], [weights] = self.param_groups, self.weights
        self.weights = dict(zip(group["params"], weights, strict=True))

    def step(self, closure=None):
        """The inner one's, and half of it back."""
        with torch.no_grad():
            self.take_step()
            for parameter, slow in self.weights.items():
                parameter.copy_(slow.lerp_(parameter, 0.5))


class Flat(SlowList):
    """One that keeps all parameters in one row, which nobody can take apart."""

    def __init__(self, inner):
        super().__init__(inner)
        self.weights = torch.cat([slow.flatten() for slow in self.weights[0]])

    def step(self, closure=None):
        """The inner one's alone."""
        self.take_step()


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SlowList(momentum(parameters)),
        lambda parameters: SlowDict(momentum(parameters)),
        lambda parameters: Slow(momentum(parameters)),
        lambda parameters: Slow(momentum(parameters), share=True),
        lambda parameters: Slow(momentum(parameters), lambda inner: [inner]),
        lambda parameters: Slow(Slow(momentum(parameters)), lambda inner: {"of": {"all": inner}}),
    ],
    ids=["slow list", "slow dict", "attribute", "one state", "list", "two deep"],
)
def test_optimizers_inside_of_others_are_cut_along(make):
    """Whatever holds them."""
    (model, opt), (twin, twin_opt) = pruned(make), pruned(make)
    report = opt.shrink(one_image())
    train(model, opt, range(8, 28))
    train(twin, twin_opt, range(8, 28))
    assert report.parameters[1] < report.parameters[0]
    assert_is_left_of(twin, model, report)


def test_what_is_around_a_worm_optimizer_is_cut_along():
    """Nobody has to name it."""

    def make():
        model, opt = pruned(momentum)
        around = Slow(opt)
        train(model, around, range(8, 10))
        return model, opt, around

    (model, opt, around), (twin, _, twin_around) = make(), make()
    report = opt.shrink(one_image())
    clear_what_was_cut_(twin, twin_around, report.kept)
    train(model, around, range(10, 30))
    train(twin, twin_around, range(10, 30))
    assert report.kept
    assert_is_left_of(twin, model, report)


class Both(Optimizer):
    """Two optimizers as one, for `train`."""

    def __init__(self, *parts):
        self.parts = parts

    def zero_grad(self):
        """Of both."""
        for each in self.parts:
            each.zero_grad()

    def step(self):
        """Of both."""
        for each in self.parts:
            each.step()


def with_two(other=momentum):
    """A pruned network whose matrices are trained by another optimizer than the rest."""
    model = small_cnn(torch.double)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = AdamW([p for p in model.parameters() if p.dim() == 1], lr=0.01)
    opt = WormOptimizer(
        rest, model, sample_every=3, window=2, stopping_point=1.0, truncate="update"
    )
    others = other(matrices)
    train(model, Both(opt, others), range(6))
    opt.prune()
    train(model, Both(opt, others), range(6, 8))
    return model, opt, others


def everything(model, *optimizers):
    """All numbers of a network and its optimizers, in an order."""
    gradients = [parameter.grad for parameter in model.parameters()]
    sizes = [value for m in model.modules() for value in vars(m).values() if type(value) is int]
    return numbers([model.state_dict(), gradients, sizes, [each.state for each in optimizers]])


def numbers(value):
    """Copies of all that nested things hold, in a list."""
    if isinstance(value, Tensor):
        return [value.detach().as_subclass(Tensor).clone()]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [torch.tensor(float("nan") if value is None else value)]
    return [number for each in value for number in numbers(each)]


def assert_equal(a, b):
    """Whether two lists of tensors are equal bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_second_optimizer_has_to_be_named():
    """It trains what would be cut: the error names both, and nothing has changed."""
    model, opt, other = with_two()
    before = everything(model, opt, other)
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*SGD.*optimizers=\[\.\.\.\]"):
        opt.shrink(one_image())
    assert_equal(everything(model, opt, other), before)
    assert not opt.is_shrunk
    train(model, Both(opt, other), range(8, 10))


@pytest.mark.parametrize(
    "other",
    [momentum, lambda parameters: Slow(momentum(parameters)), lion],
    ids=["SGD", "with one inside", "Lion"],
)
def test_further_optimizers_are_cut_along(other):
    """Training is that of the pruned network with the same two."""
    (model, opt, others), (twin, twin_opt, twin_others) = with_two(other), with_two(other)
    report = opt.shrink(one_image(), optimizers=[others])
    train(model, Both(opt, others), range(8, 28))
    train(twin, Both(twin_opt, twin_others), range(8, 28))
    assert report.kept
    assert_is_left_of(twin, model, report)


def test_the_same_optimizer_may_be_named_twice():
    """A WormOptimizer, its base, and both as further ones, are all cut once."""
    (model, opt), (twin, twin_opt) = pruned(momentum), pruned(momentum)
    report = opt.shrink(one_image(), optimizers=(each for each in (opt, opt.base_optim)))
    train(model, opt, range(8, 28))
    train(twin, twin_opt, range(8, 28))
    assert_is_left_of(twin, model, report)


def test_optimizers_that_nobody_uses_are_in_nobodys_way():
    """One that has the same parameters, and one that only the garbage collector knows."""
    model = small_cnn(torch.double)
    zero_channels(model)
    earlier = SGD(model.parameters(), lr=0.1)
    earlier.itself = earlier
    opt = SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1)
    gc.disable()
    try:
        del earlier
        assert shrink_(model, one_image(), optimizer=opt).kept
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [[1], [None], ["SGD"]])
def test_what_is_no_optimizer_is_refused(wrong):
    """In words, before anything is done."""
    model = small_cnn(torch.double)
    with pytest.raises(TypeError, match=r"must be torch\.optim\.Optimizers, got"):
        shrink_(model, one_image(), optimizers=wrong)


class SaRA(Holder):
    """By its name one that makes its state when it is built, and never again."""


def test_an_optimizer_that_cannot_start_afresh_is_refused():
    """By name, with nothing changed."""
    model, opt = pruned(lambda parameters: SaRA(parameters, *(lambda m: m,) * 2))
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="SaRA can neither be cut nor start afresh"):
        opt.shrink(one_image())
    assert_equal(everything(model, opt), before)
    assert shrink_(model, one_image()).kept


def test_an_optimizer_that_keeps_all_in_one_row_is_refused():
    """It would crash at the next step; nothing is changed."""
    model, opt = pruned(lambda parameters: Flat(momentum(parameters)))
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="Flat keeps tensors of its parameters' sizes"):
        opt.shrink(one_image())
    assert_equal(everything(model, opt), before)
    assert shrink_(model, one_image()).kept


class BreaksWhenCut(Tensor):
    """A gradient of which no indices can be picked."""

    error: type[BaseException] = RuntimeError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """All but that."""
        if func is Tensor.index_select:
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs or {})


class Interrupted(BreaksWhenCut):
    """The same, by the user's hand."""

    error = KeyboardInterrupt


@pytest.mark.parametrize("kind", [BreaksWhenCut, Interrupted])
def test_a_gradient_that_cannot_be_cut_leaves_all_as_it_was(kind):
    """It is the last one, and those before it are whole."""
    model, opt = pruned(lambda parameters: Slow(momentum(parameters)))
    *_, last = (p for p in model.parameters() if p.dim() > 1)
    last.grad = last.grad.as_subclass(kind)
    before = everything(model, opt, opt.base_optim.inner)
    with pytest.raises(kind.error):
        opt.shrink(one_image())
    assert_equal(everything(model, opt, opt.base_optim.inner), before)
    assert (model[0].out_channels, model[4].num_features, model[8].in_features) == (8, 12, 12)
    assert not opt.is_shrunk
    train(model, opt, range(8, 10))


@pytest.mark.parametrize("kind", [Holder, AllHolder])
def test_a_warning_that_is_an_error_leaves_all_as_it_was(kind):
    """It comes last, when all has been cut."""
    model, opt = pruned(lambda parameters: kind(parameters, *HELD["list"]))
    before = everything(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="starts afresh"):
            opt.shrink(one_image())
    assert_equal(everything(model, opt), before)
    train(model, opt, range(8, 10))
    assert model[0].out_channels == 8


@pytest.mark.parametrize("scatter", [False, True])
def test_a_model_that_cannot_go_back_to_training_is_whole(scatter):
    """Its modules have their classes, sizes and weights."""

    class Stubborn(nn.Module):
        """Refuses the mode that it was in."""

        def train(self, mode=True):
            """Only down."""
            if mode and stubborn:
                raise RuntimeError("no training")
            return super().train(mode)

        def forward(self, x):
            """Nothing."""
            return x

    stubborn = False
    model, opt = pruned(momentum)
    model.append(Stubborn())
    before, kinds = everything(model, opt), [type(m) for m in model]
    stubborn = True
    with pytest.raises(RuntimeError, match="no training"):
        opt.shrink(one_image(), scatter=scatter)
    assert_equal(everything(model, opt), before)
    assert [type(m) for m in model] == kinds
    assert (model[0].out_channels, model[4].num_features) == (8, 12)


@pytest.mark.parametrize("name", every_shrunk_optimizer.names())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_optimizer_trains_on(name, monkeypatch):
    """As its pruned twin does, or afresh, or by means over parameters that are smaller now."""
    if name.startswith("timm."):
        monkeypatch.setattr("timm.optim.kron.has_dynamo", False)  # or it compiles itself
    outcome, details = every_shrunk_optimizer.judge(name)
    assert outcome not in ("crashed", "nothing was cut"), details
    assert "not finite" not in details
    if name in ("torch.SGD", "torch.AdamW", "torch.SparseAdam", "timm.lookahead_adam"):
        assert outcome == "equal to the twin"
