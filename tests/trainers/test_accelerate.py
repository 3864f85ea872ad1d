"""Accelerate: preparing, accumulating, skipping steps and resuming change no bit."""

from __future__ import annotations

import pytest
import torch
from loops import assert_same_run, batches, loader, spoil, train_plainly, wrapped
from torch import nn

from torch_worm_optim import WormOptimizer


@pytest.fixture
def accelerator():
    """Makes an Accelerator; its settings are global, and so are reset before each and after."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def make(**options):
        reset()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    reset()


def train_accelerated(accelerator, net, opt, data, clip=None):
    """The loop of Accelerate's documentation."""
    skipped = []
    for index, (images, labels) in enumerate(data):
        with accelerator.accumulate(net):
            accelerator.backward(nn.functional.cross_entropy(net(images), labels))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), clip)
            opt.step()
            opt.zero_grad()
        if accelerator.optimizer_step_was_skipped:
            skipped.append(index)
    return skipped


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("base", "options", "mixed_precision"),
    [
        ("SGD momentum", {}, "no"),
        ("SGD momentum", {}, "bf16"),
        ("AdamW", {"truncate": "update"}, "no"),
    ],
)
def test_trains_as_the_plain_loop(accelerator, accumulate, base, options, mixed_precision):
    """Prepared, accumulating and in mixed precision, a run is the plain loop's bit for bit."""
    accelerator = accelerator(
        mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate
    )
    net, opt = wrapped(base, **options)
    prepared = accelerator.prepare(net, opt, loader(0, 16 * accumulate))
    train_accelerated(accelerator, *prepared, clip=1.0)

    plain_net, plain = wrapped(base, **options)
    data = batches(0, 16 * accumulate)
    bf16 = mixed_precision == "bf16"
    train_plainly(plain_net, plain, data, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_run(net, opt, plain_net, plain)
    assert prepared[1].optimizer is opt


def test_skips_what_the_scaler_skips(accelerator):
    """A step that Accelerate's GradScaler skips for its gradients is not counted by the search."""
    accelerator = accelerator()
    # Accelerate makes one for float16 only, and that only on GPUs.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    net, opt = wrapped()
    spoil(net, 5)
    prepared = accelerator.prepare(net, opt, loader(0, 17))
    skipped = train_accelerated(accelerator, *prepared)

    plain_net, plain = wrapped()
    spoil(plain_net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_plainly(plain_net, plain, batches(0, 17), scaler=scaler)
    assert skipped == [5]
    assert_same_run(net, opt, plain_net, plain)
    assert opt.history[-1].step == opt.sample().step == 12


@pytest.mark.parametrize("stop", [5, 14])
def test_resumes(accelerator, tmp_path, stop):
    """save_state() and load_state(), while truncating or after the ticket, change no bit."""

    def run(first, last, *, load=False, save=False):
        fresh = accelerator(gradient_accumulation_steps=2)
        net, opt = wrapped("AdamW", truncate="update")
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 16)
        prepared = fresh.prepare(net, opt, loader(2 * first, 2 * last), rate)
        if load:
            fresh.load_state(tmp_path)
        for data in prepared[2]:
            train_accelerated(fresh, *prepared[:2], [data])
            prepared[3].step()
        if save:
            fresh.save_state(tmp_path)
        return net, opt

    whole = run(0, 16)
    run(0, stop, save=True)
    resumed = run(stop, 16, load=True)
    assert_same_run(*whole, *resumed)
    assert whole[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"] < 0.001


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_prepared_already_is_refused(accelerator, accumulate):
    """It steps once in several calls, and each call would count; the order named counts right."""
    accelerator = accelerator(gradient_accumulation_steps=accumulate)
    net, opt = wrapped()
    _, prepared = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*first.*accelerator\.prepare"):
        WormOptimizer(prepared, net)

    prepared = accelerator.prepare(net, opt, loader(0, 8 * accumulate))
    train_accelerated(accelerator, *prepared)
    assert [sample.step for sample in opt.history] == [2, 4, 6, 8]
