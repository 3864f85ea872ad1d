"""A search whose network is shrunk: held on, saved, and trained as the pruned network would be."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import Concatenated, Residual, Sequence, tensors_of
from torch import nn
from training import BASES, same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer, load_shrunk_
from torch_worm_optim.shrink import cut_tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises gradients")

NETWORKS = {
    "small": lambda: small_cnn(torch.double),
    "residual": lambda: Residual().double(),
    "concatenated": lambda: Concatenated().double(),
}
networks = pytest.mark.parametrize("which", NETWORKS)
scatters = pytest.mark.parametrize("scatter", [False, True])


def batch_of(which: str, step: int, n: int = 8) -> torch.Tensor:
    """The images of a step."""
    generator = torch.Generator().manual_seed(step)
    channels = 1 if which == "small" else 3
    return torch.randn(n, channels, 8, 8, generator=generator, dtype=torch.double)


def train(which: str, model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    """Some loss of all outputs, step by step."""
    for step in steps:
        opt.zero_grad()
        outputs = tensors_of(model(batch_of(which, step)))
        sum((x - 0.1).square().mean() + x.sin().mean() for x in outputs).backward()
        opt.step()


def build(which: str, base: str = "SGD momentum", **options):
    """A network and its wrapped optimizer."""
    torch.manual_seed(0)
    model = NETWORKS[which]()
    for module in model.modules():  # BatchNorm takes the gradient of a bias before it away
        if isinstance(module, nn.modules.conv._ConvNd) and module.bias is not None:
            module.bias.requires_grad_(False)
    settings = {"sample_every": 3, "window": 2, "stopping_point": 1.0, **options}
    return model, WormOptimizer(BASES[base](model.parameters()), model, **settings)


def pruned(which: str, base: str = "SGD momentum"):
    """A search whose ticket is applied."""
    model, opt = build(which, base)
    train(which, model, opt, range(6))
    opt.prune()
    train(which, model, opt, range(6, 8))
    return model, opt


@pytest.mark.parametrize(
    ("which", "base", "scatter"),
    [
        *((which, "SGD momentum", scatter) for which in NETWORKS for scatter in (False, True)),
        *(("residual", base, True) for base in ("AdamW", "NAdam")),
    ],
)
def test_training_a_shrunk_network_is_training_the_pruned_one(which, base, scatter):
    """Ten steps after shrinking, parameters are those of the pruned network that are left."""
    model, opt = pruned(which, base)
    twin, twin_opt = copy.deepcopy((model, opt))

    report = opt.shrink(batch_of(which, 0, 1), scatter=scatter)
    train(which, model, opt, range(8, 18))
    train(which, twin, twin_opt, range(8, 18))

    assert report.parameters[1] < report.parameters[0]
    assert opt.phase is Phase.PRUNED
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).detach()
        if name in report.kept:
            expected = cut_tensor(expected, report.kept[name], report.groups.get(name, 1))
        largest = float(expected.abs().max())
        torch.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=1e-12 * largest)


@scatters
@networks
def test_what_stays_zero_is_held_and_masks_keep_their_shapes(which, scatter):
    """The ticket is that of the dense network; zeros that could not go stay zero."""
    model, opt = pruned(which)
    final_mask = opt.final_mask
    shapes = {name: mask.shape for name, mask in final_mask.items()}

    report = opt.shrink(batch_of(which, 0, 1), scatter=scatter)
    train(which, model, opt, range(8, 12))

    assert same(list(final_mask.values()), list(opt.final_mask.values()))
    assert {name: mask.shape for name, mask in opt.final_mask.items()} == shapes
    n_zero = 0
    for name, mask in opt.final_mask.items():
        kept = report.kept.get(name)
        left = mask if kept is None else cut_tensor(mask, kept)
        parameter = model.get_parameter(name)
        assert torch.equal(parameter != 0, left)
        n_zero += int((~left).sum())
    assert (n_zero == 0) == (report.channels[1] == 0)
    assert n_zero > 0 or scatter or which != "residual"
    assert "phase: pruned" in repr(opt)


@scatters
@networks
def test_a_shrunk_run_resumes_bit_for_bit(which, scatter):
    """Saved, built anew, loaded by load_shrunk_, and trained on."""
    model, opt = pruned(which)
    opt.shrink(batch_of(which, 0, 1), scatter=scatter)
    train(which, model, opt, range(8, 10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh, fresh_opt = build(which)
    with pytest.raises(ValueError, match="load the model's state_dict with load_shrunk_"):
        fresh_opt.load_state_dict(saved["opt"])
    load_shrunk_(fresh, saved["model"])
    fresh_opt = WormOptimizer(BASES["SGD momentum"](fresh.parameters()), fresh)
    fresh_opt.load_state_dict(saved["opt"])
    for each, optimizer in ((model, opt), (fresh, fresh_opt)):
        train(which, each, optimizer, range(10, 14))

    assert same(weights_of(model), weights_of(fresh))
    assert fresh_opt.phase is Phase.PRUNED
    assert fresh_opt.history == opt.history
    assert same(list(opt.final_mask.values()), list(fresh_opt.final_mask.values()))
    assert str(fresh_opt.state_dict()) == str(opt.state_dict())
    dense = build(which)[1].state_dict()
    with pytest.raises(ValueError, match="or its network was shrunk"):
        opt.load_state_dict(dense)


# Before 2.6, torch warned of its own way to unpickle a tensor.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_shrunk_search_goes_its_own_way(how):
    """What was cut is remembered in the copy."""
    model, opt = pruned("residual")
    opt.shrink(batch_of("residual", 0, 1))
    other_model, other = (
        copy.deepcopy((model, opt))
        if how == "deepcopy"
        else pickle.loads(pickle.dumps((model, opt)))
    )
    train("residual", other_model, other, range(8, 12))
    train("residual", model, opt, range(8, 12))

    assert same(weights_of(model), weights_of(other_model))


def test_shrinking_twice_is_shrinking_once_as_far():
    """First exactly, then with what scatter allows on top."""
    model, opt = pruned("residual")
    twin, twin_opt = copy.deepcopy((model, opt))

    opt.shrink(batch_of("residual", 0, 1))
    second = opt.shrink(batch_of("residual", 0, 1), scatter=True)
    twin_opt.shrink(batch_of("residual", 0, 1), scatter=True)
    train("residual", model, opt, range(8, 12))
    train("residual", twin, twin_opt, range(8, 12))

    assert second.kept
    assert same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("phase", [Phase.SEARCHING, Phase.CONVERGED])
def test_what_is_not_pruned_is_not_shrunk(phase):
    """The error says what to do first."""
    model, opt = build("small")
    train("small", model, opt, range(0 if phase is Phase.SEARCHING else 6))
    assert opt.phase is phase
    before = weights_of(model)

    with pytest.raises(RuntimeError, match="prune"):
        opt.shrink(batch_of("small", 0, 1))

    assert same(before, weights_of(model))
    assert opt.phase is phase


def test_a_failing_batch_leaves_all_as_it_was():
    """A batch that the model refuses, at a run that goes on as if nothing had been asked."""
    model, opt = pruned("small")
    twin, twin_opt = copy.deepcopy((model, opt))

    with pytest.raises(RuntimeError, match="channels"):
        opt.shrink(batch_of("residual", 0, 1))

    for each, optimizer in ((model, opt), (twin, twin_opt)):
        train("small", each, optimizer, range(8, 12))
    assert same(weights_of(model), weights_of(twin))


def test_schedulers_and_scalers_go_on():
    """They hold the optimizer and its groups, which are the same objects."""
    model, opt = pruned("small")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.shrink(batch_of("small", 0, 1))
    for step in range(8, 12):
        opt.zero_grad()
        scaler.scale(model(batch_of("small", step)).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
        scheduler.step()

    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 * 0.25)
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)


def test_keyword_arguments_reach_the_model():
    """Whatever forward takes."""
    torch.manual_seed(0)

    class Scaled(Sequence):
        def forward(self, *, images, scale):
            return super().forward(images) * scale

    model = Scaled()
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, sample_every=1, window=2, stopping_point=1
    )
    images = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        opt.zero_grad()
        model(images=images, scale=2.0).square().mean().backward()
        opt.step()
    opt.prune()

    report = opt.shrink(images=images[:1], scale=2.0)

    assert report.kept
    assert report.max_difference < 1e-5


def test_a_damaged_record_is_refused_whole():
    """A ticket that was cut short says so, and the search stays where it was."""
    model, opt = pruned("small")
    opt.shrink(batch_of("small", 0, 1))
    saved = opt.state_dict()
    saved["param_groups"][0]["worm"] = saved["param_groups"][0]["worm"][:1000]

    fresh, _ = build("small")
    load_shrunk_(fresh, model.state_dict())
    fresh_opt = WormOptimizer(BASES["SGD momentum"](fresh.parameters()), fresh)
    with pytest.raises(ValueError, match=r"cannot be read .* load an earlier"):
        fresh_opt.load_state_dict(saved)

    assert fresh_opt.phase is Phase.SEARCHING
