"""Accelerate, Lightning, transformers, timm, skorch and Ignite, the real ones.

What each of them does is written out once more as a plain loop, and has to agree bit for bit.
"""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from training import BASES, same, sample_twice, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer, load_shrunk_
from torch_worm_optim.integrations import reports
from torch_worm_optim.ticket import apply_ticket_

# Truncating from step 2 on; the ticket is the sixth mask, of step 12, wherever it lies.
SEARCH = {"sample_every": 2, "window": 6, "stopping_point": 1.0, "trigger": "always"}
MOMENTUM, ADAMW = BASES["SGD momentum"], BASES["AdamW"]


def batches(first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of some steps; the same on every call."""
    made = []
    for step in range(first, last):
        images = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        made.append((images, (images.mean((1, 2, 3)) * 8).round().clamp(-1, 1).long() + 1))
    return made


def loader(first: int, last: int) -> torch.utils.data.DataLoader:
    """The same batches from a DataLoader, in order."""
    images, labels = (torch.cat(tensors) for tensors in zip(*batches(first, last), strict=True))
    dataset = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(dataset, batch_size=16)


def build(make=MOMENTUM, **options):
    """A small network and its wrapped optimizer."""
    net = small_cnn()
    return net, WormOptimizer(make(net.parameters()), net, **{**SEARCH, **options})


def train_plainly(net, opt, data, *, accumulate=1, bf16=False, clip=None, scaler=None):
    """The loop that a trainer takes over."""
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for index, (images, labels) in enumerate(data):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(net(images), labels)
        scaler.scale(loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()


def callback_for(package):
    """The callback for one of the packages, which skips the test where that is missing."""
    pytest.importorskip(package)
    return importlib.import_module(f"torch_worm_optim.integrations.{package}").WormCallback


def assert_same_run(net, opt, other_net, other):
    """Weights, buffers, base state, masks and history are equal, and the search did something."""
    assert opt.history == other.history
    assert [sample.phase for sample in opt.history] == [*[Phase.TRUNCATING] * 5, Phase.CONVERGED]
    assert same(weights_of(net), weights_of(other_net))
    for ours, theirs in zip(opt.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    masks, other_masks = opt.final_mask, other.final_mask
    assert masks.keys() == other_masks.keys()
    assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())


def assert_pruned(weights, opt, prefix=""):
    """What the ticket removes is zero in a state dict, shifts included; what it keeps is not."""
    assert any(name.endswith("bias") for name in opt.ticket)
    for name, mask in opt.final_mask.items():
        assert torch.equal(weights[prefix + name] != 0, mask)
    assert all((weights[prefix + name][~mask] == 0).all() for name, mask in opt.ticket.items())
    assert opt.phase is Phase.PRUNED


# ---- Accelerate


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
    ("make", "options", "mixed_precision"),
    [(MOMENTUM, {}, "no"), (MOMENTUM, {}, "bf16"), (ADAMW, {"truncate": "update"}, "no")],
)
def test_accelerate_trains_as_the_plain_loop(
    accelerator, accumulate, make, options, mixed_precision
):
    """Prepared, accumulating and in mixed precision, a run is the plain loop's bit for bit."""
    accelerator = accelerator(
        mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate
    )
    net, opt = build(make, **options)
    prepared = accelerator.prepare(net, opt, loader(0, 16 * accumulate))
    train_accelerated(accelerator, *prepared, clip=1.0)

    plain_net, plain = build(make, **options)
    data = batches(0, 16 * accumulate)
    bf16 = mixed_precision == "bf16"
    train_plainly(plain_net, plain, data, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_run(net, opt, plain_net, plain)
    assert prepared[1].optimizer is opt


def spoil(net, index_of_call):
    """Make the network's outputs infinite in one forward pass while training."""
    calls = itertools.count()
    net.register_forward_hook(
        lambda _net, _inputs, output: output * math.inf if next(calls) == index_of_call else None
    )


def test_accelerate_skips_what_the_scaler_skips(accelerator):
    """A step that Accelerate's GradScaler skips for its gradients is not counted by the search."""
    accelerator = accelerator()
    # Accelerate makes one for float16 only, and that only on GPUs.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    net, opt = build()
    spoil(net, 5)
    prepared = accelerator.prepare(net, opt, loader(0, 17))
    skipped = train_accelerated(accelerator, *prepared)

    plain_net, plain = build()
    spoil(plain_net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_plainly(plain_net, plain, batches(0, 17), scaler=scaler)
    assert skipped == [5]
    assert_same_run(net, opt, plain_net, plain)
    assert opt.history[-1].step == opt.sample().step == 12


@pytest.mark.parametrize("stop", [5, 14])
def test_accelerate_resumes(accelerator, tmp_path, stop):
    """save_state() and load_state(), while truncating or after the ticket, change no bit."""

    def run(first, last, *, load=False, save=False):
        fresh = accelerator(gradient_accumulation_steps=2)
        net, opt = build(ADAMW, truncate="update")
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


# ---- Lightning


def lightning_module(make=MOMENTUM, manual=False, **options):
    """The small network as a LightningModule, automatically or manually optimised."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.net = small_cnn()

        def configure_optimizers(self):
            base = make(self.parameters())
            self.worm = WormOptimizer(base, self, **{**SEARCH, **options})
            return self.worm

        def forward(self, images):
            return self.net(images)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            loss = nn.functional.cross_entropy(self(images), labels)
            if not manual:
                return loss
            opt = self.optimizers()
            assert opt is not self.worm
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            if opt.converged:
                opt.prune()
            return None

    return Module()


def lightning_trainer(**options):
    """A Trainer that writes nothing, unless told to."""
    lightning = pytest.importorskip("lightning.pytorch")
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**quiet, **options})


def assert_same_lightning_run(module, net, opt):
    """As `assert_same_run`; the network has another name within the module."""
    assert module.worm.history == opt.history
    assert same(weights_of(module.net), weights_of(net))
    masks = opt.final_mask
    ours = module.worm.final_mask
    assert ours.keys() == {f"net.{name}" for name in masks}
    assert all(torch.equal(ours[f"net.{name}"], mask) for name, mask in masks.items())
    assert module.worm.phase is opt.phase


# What Lightning says of small data, and what torch 2.14 says of Lightning 2.6.
lightning_warns = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
)


@lightning_warns
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("make", "options", "precision"),
    [
        (MOMENTUM, {}, "32-true"),
        (MOMENTUM, {}, "bf16-mixed"),
        (ADAMW, {"truncate": "update"}, "32-true"),
    ],
)
def test_lightning_trains_as_the_plain_loop(accumulate, make, options, precision):
    """Automatic optimisation passes closures, and is the plain loop bit for bit all the same."""
    module = lightning_module(make, **options)
    lightning_trainer(
        accumulate_grad_batches=accumulate, precision=precision, gradient_clip_val=1.0
    ).fit(module, loader(0, 16 * accumulate))

    net, opt = build(make, **options)
    bf16 = precision == "bf16-mixed"
    data = batches(0, 16 * accumulate)
    train_plainly(net, opt, data, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_lightning_run(module, net, opt)


@lightning_warns
def test_lightning_manual_optimisation_can_prune():
    """What self.optimizers() returns is a proxy: pruning through it holds in the optimizer."""
    module = lightning_module(manual=True)
    lightning_trainer().fit(module, loader(0, 16))

    net, opt = build()
    train_plainly(net, opt, batches(0, 12))
    opt.prune()
    train_plainly(net, opt, batches(12, 16))
    assert_same_lightning_run(module, net, opt)
    assert opt.phase is Phase.PRUNED
    assert int(net[1].weight.count_nonzero() + net[4].weight.count_nonzero()) == 10


@lightning_warns
def test_lightning_skips_what_the_scaler_skips():
    """A step that Lightning's GradScaler skips is not counted by the search."""
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    module = lightning_module()
    spoil(module.net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = scaler  # Lightning makes one for float16 only, which CPUs are slow at.
    lightning_trainer(plugins=[precision]).fit(module, loader(0, 17))

    net, opt = build()
    spoil(net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_plainly(net, opt, batches(0, 17), scaler=scaler, bf16=True)
    assert_same_lightning_run(module, net, opt)
    assert opt.sample().step == 12


@lightning_warns
@pytest.mark.parametrize("epochs", [1, 3])
def test_lightning_resumes(tmp_path, epochs):
    """fit(ckpt_path=...) of a run stopped while truncating or after the ticket changes no bit."""
    whole = lightning_module(ADAMW, truncate="update")
    lightning_trainer(max_epochs=4).fit(whole, loader(0, 5))
    first = lightning_module(ADAMW, truncate="update")
    trainer = lightning_trainer(max_epochs=epochs)
    trainer.fit(first, loader(0, 5))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = lightning_module(ADAMW, truncate="update")
    lightning_trainer(max_epochs=4).fit(resumed, loader(0, 5), ckpt_path=tmp_path / "run.ckpt")

    assert_same_run(whole, whole.worm, resumed, resumed.worm)
    assert first.worm.converged == (epochs == 3)


def logged_by_lightning():
    """A logger of Lightning's that remembers what it was given."""
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import Logger

    class Remembering(Logger):
        name, version = "remembering", 0

        def __init__(self):
            super().__init__()
            self.rows, self.shrunk = [], []

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.rows += [(step, metrics)] if "worm/phase" in metrics else []
            self.shrunk += [(step, metrics)] if "worm/parameters_after" in metrics else []

    return Remembering()


def assert_reports(rows, opt, last_phase):
    """Each mask was reported once, at its step, and the ticket with the last."""
    assert (
        [step for step, _ in rows]
        == [sample.step for sample in opt.history]
        == [2, 4, 6, 8, 10, 12]
    )
    assert [row["worm/phase"] for _, row in rows] == [1, 1, 1, 1, 1, last_phase]
    assert all("worm/max_distance" not in row for _, row in rows[:-1])
    _, row = rows[-1]
    assert row["worm/max_distance"] == opt.history[-1].max_distance
    assert row["worm/mean_distance"] == opt.history[-1].mean_distance
    assert row["worm/ticket_step"] == 12
    kept = {
        f"worm/kept/{name}": float(mask.float().mean()) for name, mask in opt.final_mask.items()
    }
    assert {name: row[name] for name in kept} == pytest.approx(kept)
    assert sum(name.startswith("worm/kept/") for name in row) == len(kept) > 0


@lightning_warns
@pytest.mark.parametrize("at_ticket", ["continue", "stop", "prune"])
def test_lightning_callback_logs_and_acts(at_ticket):
    """Each mask is logged once, however rarely Lightning logs; at the ticket it stops or prunes."""
    logger, module = logged_by_lightning(), lightning_module()
    callback = callback_for("lightning")
    trainer = lightning_trainer(
        logger=logger, log_every_n_steps=50, callbacks=[callback(at_ticket)]
    )
    trainer.fit(module, loader(0, 16))

    assert_reports(logger.rows, module.worm, 4 if at_ticket == "prune" else 2)
    assert trainer.global_step == (12 if at_ticket == "stop" else 16)
    assert module.worm.phase is (Phase.PRUNED if at_ticket == "prune" else Phase.CONVERGED)
    zeros = 20 - int(sum(module.net[i].weight.count_nonzero() for i in (1, 4)))
    assert zeros == (10 if at_ticket == "prune" else 0)


@lightning_warns
@pytest.mark.parametrize("over", [3, 7])
def test_lightning_callback_prunes_over_some_steps(over):
    """The fade begins at the ticket, is not begun anew at each batch, and ends with training."""
    logger, module = logged_by_lightning(), lightning_module()
    callback = callback_for("lightning")("prune", over=over)
    lightning_trainer(logger=logger, callbacks=[callback]).fit(module, loader(0, 16))

    net, opt = build()
    train_plainly(net, opt, batches(0, 12))
    opt.prune(over)
    train_plainly(net, opt, batches(12, 16))
    assert opt.phase is (Phase.PRUNED if over == 3 else Phase.FADING)
    opt.prune()
    assert_same_lightning_run(module, net, opt)
    assert_reports(logger.rows, module.worm, 3)


@lightning_warns
def test_lightning_callback_goes_on_after_a_resume(tmp_path):
    """Masks from before a checkpoint are not logged again; a search that has stopped stays so."""
    callback = callback_for("lightning")
    first, second, third = (logged_by_lightning() for _ in range(3))
    path = tmp_path / "run.ckpt"
    trainer = lightning_trainer(logger=first, callbacks=[callback("stop")])
    trainer.fit(lightning_module(), loader(0, 5))
    trainer.save_checkpoint(path)
    trainer = lightning_trainer(logger=second, callbacks=[callback("stop")], max_epochs=4)
    module = lightning_module()
    trainer.fit(module, loader(0, 5), ckpt_path=path)
    assert trainer.global_step == 12
    assert_reports(first.rows + second.rows, module.worm, 2)

    trainer.save_checkpoint(path)
    trainer = lightning_trainer(logger=third, callbacks=[callback("stop")], max_epochs=4)
    trainer.fit(lightning_module(), loader(0, 5), ckpt_path=path)
    assert trainer.global_step <= 13
    assert third.rows == []


def train_and_shrink(data, over, *, accumulate=1, rate=None, **options):
    """The plain loop that prunes at the ticket and shrinks once pruned; and what that reported.

    ``rate`` makes a schedule over optimizer steps.
    """
    net, opt = build()
    schedule, report = rate and rate(opt), None
    for first in range(0, len(data), accumulate):
        train_plainly(net, opt, data[first : first + accumulate], accumulate=accumulate, **options)
        if schedule is not None:
            schedule.step()
        if opt.converged:
            opt.prune(over)
        if opt.phase is Phase.PRUNED and report is None:
            report = opt.shrink(data[0][0][:1])
    return net, opt, report


def assert_shrunk_once(net, logged, report, step):
    """The network has lost half of its channels, and the report was logged once, at that step."""
    assert net[0].out_channels + net[3].out_channels == 10
    assert [at for at, _ in logged] == [step]
    row = {name: value for name, value in logged[0][1].items() if name.startswith("worm/")}
    assert row.pop("worm/max_difference") < 1e-5
    assert row["worm/parameters_after"] < row["worm/parameters_before"] == 1015
    expected = report.as_dict()
    del expected["max_difference"]  # That depends on the example.
    assert row == {f"worm/{name}": value for name, value in expected.items()}


def linear_rate(opt):
    """A schedule that the steps after shrinking depend on."""
    return torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=16)


@lightning_warns
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("over", [0, 3])
def test_lightning_callback_shrinks_once(over, accumulate):
    """Accumulation, scaler, clipping and schedule go on in the smaller network, bit for bit."""
    callback = callback_for("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    logger, module = logged_by_lightning(), lightning_module()
    make = module.configure_optimizers

    def with_schedule():
        opt = make()
        return [opt], [{"scheduler": linear_rate(opt), "interval": "step"}]

    module.configure_optimizers = with_schedule
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    lightning_trainer(
        logger=logger,
        callbacks=[callback("shrink", over=over)],
        plugins=[precision],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    ).fit(module, loader(0, 16 * accumulate))

    net, opt, report = train_and_shrink(
        batches(0, 16 * accumulate),
        over,
        accumulate=accumulate,
        rate=linear_rate,
        bf16=True,
        clip=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    assert_same_lightning_run(module, net, opt)
    assert_shrunk_once(module.net, logger.shrunk, report, 12 + over)
    assert_reports(logger.rows, module.worm, 3 if over else 4)


@lightning_warns
@pytest.mark.parametrize("epochs", [2, 3])
def test_lightning_resumes_a_run_that_shrinks(tmp_path, epochs):
    """Stopped before shrinking or after it, a run goes on bit for bit, and shrinks once in all."""
    path = tmp_path / "run.ckpt"

    def run(last, checkpoint=None):
        logger, module = logged_by_lightning(), lightning_module()
        if checkpoint is not None and epochs == 3:
            load_shrunk_(module, torch.load(checkpoint, weights_only=True)["state_dict"])
        callback = callback_for("lightning")("shrink")
        trainer = lightning_trainer(max_epochs=last, logger=logger, callbacks=[callback])
        trainer.fit(module, loader(0, 5), ckpt_path=checkpoint)
        trainer.save_checkpoint(path)
        return module, logger.shrunk

    whole, row = run(4)
    _, first = run(epochs)
    resumed, second = run(4, path)
    assert_same_run(whole, whole.worm, resumed, resumed.worm)
    assert resumed.net[0].out_channels + resumed.net[3].out_channels == 10
    assert [step for step, _ in row] == [step for step, _ in first + second] == [12]


@lightning_warns
@pytest.mark.parametrize("source", ["tensor", "tuple", "dict", "example_input_array", "batch"])
def test_lightning_callback_finds_inputs(source):
    """What is passed comes first, then the module's example, then one example of a batch."""
    module, seen = lightning_module(), []
    images = torch.zeros(3, 1, 6, 6)
    inputs = {"tensor": images, "tuple": (images,), "dict": {"images": images}}.get(source)
    if source != "batch":
        module.example_input_array = images if inputs is None else torch.zeros(2, 5)
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (
            None if module.training else seen.append((*args, *kwargs.values())[0])
        ),
        with_kwargs=True,
    )
    callback = callback_for("lightning")("shrink", inputs=inputs)
    lightning_trainer(callbacks=[callback]).fit(module, loader(0, 13))

    assert module.net[0].out_channels + module.net[3].out_channels == 10
    expected = batches(0, 1)[0][0][:1] if source == "batch" else images
    assert torch.equal(seen[0], expected)


@lightning_warns
def test_lightning_callback_shrinks_at_the_end_of_training():
    """A ticket of after the last batch is acted upon too."""
    module = lightning_module(sample_every=None, window=2)
    module.on_train_epoch_end = lambda: module.worm.sample()
    callback = callback_for("lightning")("shrink")
    lightning_trainer(max_epochs=2, callbacks=[callback]).fit(module, loader(0, 2))

    assert module.worm.phase is Phase.PRUNED
    assert module.net[0].out_channels + module.net[3].out_channels == 10


def weight_averaging():
    """Lightning's callback that checkpoints an average, and puts it into the model at the end."""
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return module.WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))


@lightning_warns
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("over", [0, 7])
@pytest.mark.parametrize("at_ticket", ["prune", "shrink"])
def test_lightning_callback_prunes_and_shrinks_averages(tmp_path, at_ticket, over, part, order):
    """An average is pruned and cut with the model, of which it may be more than the optimizer's."""
    module = lightning_module()
    if part:
        module.worm = WormOptimizer(MOMENTUM(module.parameters()), module.net, **SEARCH)
        module.configure_optimizers = lambda: module.worm
    callbacks = [callback_for("lightning")(at_ticket, over=over), weight_averaging()][::order]
    trainer = lightning_trainer(callbacks=callbacks)
    trainer.fit(module, loader(0, 16))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert same(saved["state_dict"].values(), weights_of(module))
    if at_ticket == "prune":
        assert_pruned(module.state_dict(), module.worm, "net." if part else "")
    else:
        assert module.net[0].out_channels + module.net[3].out_channels == 10
        assert all(module.net[i].weight.all() for i in (1, 4))


@lightning_warns
def test_lightning_resumes_a_run_that_shrinks_averages(tmp_path):
    """The average of a resumed run has the smaller shapes already, and is left alone."""
    path, callback = tmp_path / "run.ckpt", callback_for("lightning")
    modules = []
    for last, ends, checkpoint in ((4, 4, None), (4, 3, None), (4, 4, path)):
        module = lightning_module()
        if checkpoint is not None:
            load_shrunk_(module, torch.load(path, weights_only=True)["state_dict"])
        trainer = lightning_trainer(
            max_epochs=last, callbacks=[callback("shrink"), weight_averaging()]
        )
        if ends < last:
            module.on_train_epoch_end = lambda trainer=trainer: (
                trainer.save_checkpoint(path) if trainer.current_epoch == 2 else None
            )
        trainer.fit(module, loader(0, 5), ckpt_path=checkpoint)
        modules.append(module)
    assert same(weights_of(modules[0]), weights_of(modules[2]))


@lightning_warns
@pytest.mark.parametrize("order", [1, -1])
def test_lightning_callback_prunes_what_fit_leaves(order):
    """Weights that another callback puts into the model when training ends are pruned."""
    callback = callback_for("lightning")
    from lightning.pytorch import Callback

    class LoadsOthers(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(lightning_module().state_dict())

    module = lightning_module()
    callbacks = [callback("prune"), LoadsOthers()][::order]
    lightning_trainer(callbacks=callbacks).fit(module, loader(0, 16))
    assert_pruned(module.state_dict(), module.worm)


@lightning_warns
@pytest.mark.parametrize("pruned_only", [False, True])
def test_lightning_checkpoint_of_before_the_ticket_is_pruned(tmp_path, pruned_only):
    """ModelCheckpoint's best is pruned once loaded; a metric that starts late passes it over."""
    callback = callback_for("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = lightning_module()

    def log_loss():
        pruned = module.worm.phase is Phase.PRUNED
        module.log("loss", float(module.current_epoch) if pruned or not pruned_only else math.inf)

    module.on_train_epoch_end = log_loss
    best = ModelCheckpoint(tmp_path, monitor="loss")
    trainer = lightning_trainer(
        max_epochs=4, callbacks=[callback("prune"), best], enable_checkpointing=True
    )
    trainer.fit(module, loader(0, 5))

    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == (2 if pruned_only else 0)
    copy = lightning_module()
    copy.load_state_dict(saved["state_dict"])
    if not pruned_only:
        assert all(copy.net[i].weight.all() for i in (1, 4))
        apply_ticket_(copy, module.worm.ticket)
    assert_pruned(copy.state_dict(), module.worm)


@lightning_warns
def test_lightning_callback_says_why_it_does_not_shrink(monkeypatch):
    """Shrinking that fails ends training, after the ticket is logged, or when that begins."""
    callback = callback_for("lightning")
    logger, module = logged_by_lightning(), lightning_module()
    noise = torch.nn.Parameter(torch.zeros(1))
    module.forward = lambda images: module.net(images) + noise.data.add_(1)
    trainer = lightning_trainer(logger=logger, callbacks=[callback("shrink")])
    with pytest.raises(RuntimeError, match="returns other outputs when it is called again"):
        trainer.fit(module, loader(0, 16))
    assert_reports(logger.rows, module.worm, 4)
    assert logger.shrunk == []

    words = torch.utils.data.DataLoader(["a", "b"])
    trainer = lightning_trainer(callbacks=[callback("shrink")])
    module = lightning_module()
    module.training_step = lambda batch, batch_idx: module.net(batches(0, 1)[0][0]).sum()
    with pytest.raises(ValueError, match=r"batch of type list .* Pass `inputs=`"):
        trainer.fit(module, words)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    worm = build()[1]
    with pytest.raises(RuntimeError, match=r'is for one process, and there are 2\. Pass "prune"'):
        reports.Reporter(worm, "shrink")
    reports.Reporter(worm, "prune")


@lightning_warns
def test_lightning_callback_reports_samples_of_ones_own_and_several_optimizers():
    """Masks drawn at the end of an epoch are logged, of two optimizers under two names."""
    lightning = pytest.importorskip("lightning.pytorch")
    callback = callback_for("lightning")

    class Two(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([small_cnn(), small_cnn()])

        def configure_optimizers(self):
            options = {**SEARCH, "sample_every": None}
            return [WormOptimizer(MOMENTUM(n.parameters()), n, **options) for n in self.nets]

        def training_step(self, batch, batch_idx):
            for net, opt in zip(self.nets, self.optimizers(), strict=True):
                opt.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
                opt.step()

        def on_train_epoch_end(self):
            for opt in self.optimizers():
                opt.sample()

    rows = []
    logger = logged_by_lightning()
    logger.log_metrics = lambda metrics, step=None: rows.append(metrics)
    lightning_trainer(logger=logger, max_epochs=2, callbacks=[callback()]).fit(Two(), loader(0, 3))

    assert [next(iter(row)) for row in rows if "epoch" not in row] == [
        "worm0/phase",
        "worm1/phase",
    ] * 2


@lightning_warns
def test_lightning_callback_needs_a_search_to_watch():
    """Without a WormOptimizer, or with an unknown action, the message says what to do."""
    callback = callback_for("lightning")
    module = lightning_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got \['SGD'\]\. Return one from configure_optim"):
        lightning_trainer(callbacks=[callback()]).fit(module, loader(0, 2))
    with pytest.raises(ValueError, match=r"`at_ticket` must be one of .* got 'halt'"):
        callback("halt")
    with pytest.raises(ValueError, match=r"`over` must be at least 0, got -1"):
        callback("prune", over=-1)


# ---- transformers


class Classifier(nn.Module):
    """The small network as the Trainer wants it, with the loss among its outputs."""

    def __init__(self):
        super().__init__()
        self.net = small_cnn()

    def forward(self, images, labels):
        """Loss and logits."""
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def worm_for_classifier(classifier, make=MOMENTUM, **options):
    """The optimizer that `build` makes, for the network inside."""
    return WormOptimizer(make(classifier.parameters()), classifier.net, **{**SEARCH, **options})


def hf_trainer(directory, n_batches, classifier, optimizer=None, *, callbacks=None, **options):
    """A Trainer over the batches, which it shuffles; and the batches, in the order of training."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    given = options.pop("optimizer_cls_and_kwargs", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": 16,
            "num_train_epochs": 1,
            "learning_rate": 0.05,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        },
    )
    seen = []

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        seen.append((batch["images"], batch["labels"]))
        return batch

    rows = [
        {"images": image, "labels": label}
        for images, labels in batches(0, n_batches)
        for image, label in zip(images, labels, strict=True)
    ]
    trainer = transformers.Trainer(
        classifier,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=given,
        callbacks=callbacks,
    )
    return trainer, seen


# torch says so of pinned memory where there is no accelerator to pin it for.
trainer_warns = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@trainer_warns
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trains_as_the_plain_loop(tmp_path, accumulate, bf16):
    """Accumulating, clipping, in mixed precision and on a schedule, the Trainer changes no bit."""
    classifier = Classifier()
    opt = worm_for_classifier(classifier)
    trainer, seen = hf_trainer(
        tmp_path,
        16 * accumulate,
        classifier,
        opt,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
    )
    trainer.train()

    net, plain = build()
    train_plainly(net, plain, seen, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_run(classifier.net, opt, net, plain)
    assert trainer.optimizer.optimizer is opt


@trainer_warns
def test_transformers_makes_the_optimizer_itself(tmp_path):
    """optimizer_cls_and_kwargs= takes a factory of a function of the model."""
    classifier = Classifier()
    trainer, seen = hf_trainer(
        tmp_path,
        16,
        classifier,
        optimizer_cls_and_kwargs=(lambda: worm_for_classifier, {"window": 6}),
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
    )
    trainer.train()

    net, plain = build()
    train_plainly(net, plain, seen, clip=1.0)
    assert_same_run(classifier.net, trainer.optimizer.optimizer, net, plain)


@trainer_warns
@pytest.mark.parametrize("stop", [5, 14])
def test_transformers_resumes_a_bert(tmp_path, stop):
    """train(resume_from_checkpoint=...), while truncating or after the ticket, changes no bit."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    rows = [{"input_ids": torch.randint(20, (8,)), "labels": i % 2} for i in range(32)]

    def run(max_steps, checkpoint=None):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        opt = WormOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01), model, truncate="update", **SEARCH
        )
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=16,
                lr_scheduler_type="linear",
                save_strategy="steps",
                save_steps=stop,
                logging_strategy="no",
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            optimizers=(opt, None),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, opt

    whole = run(16)
    assert_same_run(*whole, *run(16, checkpoint=str(tmp_path / f"checkpoint-{stop}")))


def worm_rows(trainer):
    """What the callback logged of each mask, by the Trainer's step."""
    logged = trainer.state.log_history
    return [(row["step"], row) for row in logged if "worm/phase" in row]


@trainer_warns
@pytest.mark.parametrize("at_ticket", ["continue", "stop", "prune"])
def test_transformers_callback_logs_and_acts(tmp_path, at_ticket):
    """Each mask is logged once and no loss is lost to it; at the ticket it stops or prunes."""
    classifier = Classifier()
    opt = worm_for_classifier(classifier)
    trainer, _ = hf_trainer(
        tmp_path, 16, classifier, opt, logging_strategy="steps", logging_steps=4
    )
    callback = callback_for("transformers")
    trainer.add_callback(callback(trainer, at_ticket))
    trainer.train()

    assert_reports(worm_rows(trainer), opt, 4 if at_ticket == "prune" else 2)
    last = 12 if at_ticket == "stop" else 16
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == list(range(4, last + 1, 4))
    assert trainer.state.global_step == last
    assert opt.phase is (Phase.PRUNED if at_ticket == "prune" else Phase.CONVERGED)
    zeros = 20 - int(sum(classifier.net[i].weight.count_nonzero() for i in (1, 4)))
    assert zeros == (10 if at_ticket == "prune" else 0)


@trainer_warns
@pytest.mark.parametrize("over", [3, 7])
def test_transformers_callback_prunes_over_some_steps(tmp_path, over):
    """The fade begins at the ticket, goes on after a resume, and ends with training."""
    callback = callback_for("transformers")
    runs = []
    for checkpoint in (None, "checkpoint-14"):
        classifier = Classifier()
        opt = worm_for_classifier(classifier)
        trainer, seen = hf_trainer(
            tmp_path,
            16,
            classifier,
            opt,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
        )
        trainer.add_callback(callback(trainer, "prune", over=over))
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        runs.append((classifier.net, opt, seen))
        assert_reports(worm_rows(trainer), opt, 3)

    net, plain = build()
    train_plainly(net, plain, runs[0][2][:12], clip=1.0)
    plain.prune(over)
    train_plainly(net, plain, runs[0][2][12:], clip=1.0)
    assert plain.phase is (Phase.PRUNED if over == 3 else Phase.FADING)
    plain.prune()
    for its_net, opt, _ in runs:
        assert_same_run(its_net, opt, net, plain)
        assert opt.phase is Phase.PRUNED


@trainer_warns
@pytest.mark.parametrize(
    ("at_ticket", "over", "best"), [("prune", 0, 12), ("prune", 7, 4), ("shrink", 0, 12)]
)
def test_transformers_callback_prunes_the_best_model(tmp_path, at_ticket, over, best):
    """The best of the pruned is loaded, also if it is shrunk, and where there is none one pruned.

    The first model that is evaluated counts as the best, and so does the first once that is reset.
    """
    classifier = Classifier()
    opt = worm_for_classifier(classifier)
    trainer, _ = hf_trainer(
        tmp_path,
        16,
        classifier,
        opt,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    inputs = batches(0, 1)[0][0][:1]
    trainer.add_callback(callback_for("transformers")(trainer, at_ticket, over=over, inputs=inputs))
    trainer.train()

    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert torch.equal(saved["net.8.weight"], classifier.net[8].weight)
    if at_ticket == "prune":
        assert_pruned(classifier.net.state_dict(), opt)
        assert bool(saved["net.1.weight"].all()) == (over == 7)
    else:
        assert classifier.net[0].out_channels + classifier.net[3].out_channels == 10


@trainer_warns
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("over", [0, 3])
def test_transformers_callback_shrinks_once(tmp_path, over, whole):
    """Accelerate's wrapper and the schedule go on in the smaller network, also from a checkpoint.

    The optimizer is built with the whole model, which is called with a dict, or with a part of it.
    """
    callback = callback_for("transformers")
    runs = []
    for checkpoint in (None, tmp_path / "checkpoint-15"):
        classifier = Classifier()
        if checkpoint is not None:
            safetensors = pytest.importorskip("safetensors.torch")
            load_shrunk_(classifier, safetensors.load_file(checkpoint / "model.safetensors"))
        opt = worm_for_classifier(classifier)
        if whole:
            opt = WormOptimizer(MOMENTUM(classifier.parameters()), classifier, **SEARCH)
        trainer, seen = hf_trainer(
            tmp_path,
            16,
            classifier,
            opt,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=5,
        )
        images, labels = batches(0, 1)[0]
        inputs = {"images": images[:1], "labels": labels[:1]} if whole else images[:1]
        trainer.add_callback(callback(trainer, "shrink", over=over, inputs=inputs))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        shrunk = [
            (row["step"], row)
            for row in trainer.state.log_history
            if "worm/parameters_after" in row
        ]
        runs.append((classifier.net, opt, shrunk, seen))

    def rate(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0, (16 - step) / 16))

    net, plain, report = train_and_shrink(runs[0][3], over, rate=rate, clip=1.0)
    for its_net, opt, shrunk, _ in runs:
        assert same(weights_of(its_net), weights_of(net))
        assert opt.history == plain.history
        assert opt.phase is Phase.PRUNED
        assert_shrunk_once(its_net, shrunk, report, 12 + over)
    assert trainer.optimizer.optimizer is opt


@trainer_warns
def test_transformers_callback_goes_on_after_a_resume(tmp_path):
    """Masks from before a checkpoint are not logged again; a search that has stopped stays so."""
    callback = callback_for("transformers")
    rows = []
    for checkpoint, at_ticket, last in (
        (None, "continue", 16),
        ("checkpoint-4", "continue", 16),
        ("checkpoint-12", "stop", 13),
    ):
        classifier = Classifier()
        opt = worm_for_classifier(classifier)
        trainer, _ = hf_trainer(tmp_path, 16, classifier, opt, save_strategy="steps", save_steps=4)
        trainer.add_callback(callback(trainer, at_ticket))
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        rows.append(worm_rows(trainer))
        assert trainer.state.global_step == last

    assert rows[0] == rows[1] == rows[2]
    assert_reports(rows[0], opt, 2)


@trainer_warns
def test_transformers_callback_needs_a_search_to_watch(tmp_path):
    """Without a WormOptimizer, or with an unknown action, the message says what to do."""
    trainer, _ = hf_trainer(tmp_path, 1, Classifier())
    callback = callback_for("transformers")
    trainer.add_callback(callback(trainer))
    with pytest.raises(ValueError, match=r"to be a WormOptimizer, got AdamW\. Pass one"):
        trainer.train()
    with pytest.raises(ValueError, match=r"`at_ticket` must be one of .* got 'halt'"):
        callback(trainer, "halt")
    with pytest.raises(TypeError, match=r"`over` must be a whole number, got 'all' of type str"):
        callback(trainer, "prune", over="all")
    with pytest.raises(ValueError, match='"shrink"` needs `inputs`, since the Trainer shows'):
        callback(trainer, "shrink")


# ---- timm


def timm_optimizer(net, name, **options):
    """An optimizer as timm's train.py makes it, wrapped."""
    optim = pytest.importorskip("timm.optim")
    base = optim.create_optimizer_v2(net, opt=name, lr=0.05, weight_decay=0.05, momentum=0.9)
    return WormOptimizer(base, net, **{**SEARCH, **options})


def timm_scheduler(opt, epochs=4, updates=4):
    """A cosine schedule over updates with a warm-up, as timm's train.py makes it."""
    scheduler = pytest.importorskip("timm.scheduler")
    return scheduler.CosineLRScheduler(
        opt, t_initial=epochs * updates, warmup_t=4, warmup_lr_init=1e-3, t_in_epochs=False
    )


def train_as_timm(net, opt, scheduler, loss_scaler, first, last):
    """Four batches an epoch, in the order of timm's train.py."""
    for epoch in range(first, last):
        for index, (images, labels) in enumerate(batches(4 * epoch, 4 * epoch + 4)):
            loss = nn.functional.cross_entropy(net(images), labels)
            loss_scaler(loss, opt, clip_grad=1.0, clip_mode="norm", parameters=net.parameters())
            opt.zero_grad()
            scheduler.step_update(num_updates=4 * epoch + index + 1)
        if hasattr(opt, "sync_lookahead"):
            opt.sync_lookahead()
        scheduler.step(epoch + 1)


def timm_loss_scaler():
    """The loss scaler that train.py makes."""
    return pytest.importorskip("timm.utils").NativeScaler(device="cpu")


@pytest.mark.parametrize("name", ["momentum", "lamb", "lookahead_sgd"])
def test_timm_trains_the_base_alone_where_nothing_is_truncated(name):
    """Scaler, clipping, schedule and Lookahead's hook reach the base through the wrapper."""
    net, base_net = small_cnn(), small_cnn()
    opt = timm_optimizer(net, name, truncation=1)
    base = timm_optimizer(base_net, name, truncation=1).base_optim
    for each, optimizer in ((net, opt), (base_net, base)):
        spoil(each, 5)
        train_as_timm(each, optimizer, timm_scheduler(optimizer), timm_loss_scaler(), 0, 4)

    assert same(weights_of(net), weights_of(base_net))
    assert [group["lr"] for group in opt.param_groups] == [
        group["lr"] for group in base.param_groups
    ]
    assert len({group["weight_decay"] for group in opt.param_groups}) == 2
    assert opt.phase is Phase.CONVERGED
    assert opt.history[-1].step == 12


@pytest.mark.parametrize("name", ["momentum", "lookahead_sgd"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_timm_resumes(tmp_path, epochs, name):
    """CheckpointSaver and resume_checkpoint(), as train.py uses them, change no bit."""
    utils = pytest.importorskip("timm.utils")
    models = pytest.importorskip("timm.models")

    def start():
        net = small_cnn()
        opt = timm_optimizer(net, name)
        return net, opt, timm_scheduler(opt), timm_loss_scaler()

    whole = start()
    train_as_timm(*whole, 0, 4)
    net, opt, scheduler, loss_scaler = start()
    saver = utils.CheckpointSaver(net, opt, amp_scaler=loss_scaler, checkpoint_dir=str(tmp_path))
    for epoch in range(epochs):
        train_as_timm(net, opt, scheduler, loss_scaler, epoch, epoch + 1)
        saver.save_checkpoint(epoch, metric=epoch)
    net, opt, scheduler, loss_scaler = start()
    epoch = models.resume_checkpoint(net, str(tmp_path / "last.pth.tar"), opt, loss_scaler)
    scheduler.step_update(4 * epoch)
    train_as_timm(net, opt, scheduler, loss_scaler, epoch, 4)

    assert epoch == epochs
    assert_same_run(*whole[:2], net, opt)


# ---- skorch and Ignite


def pruned_plainly(n_epochs, accumulate=1):
    """The loop that they take over: the same batches in every epoch, and pruned at the ticket."""
    net, opt = build()
    for data in n_epochs * [
        batches(first, first + accumulate) for first in range(0, 4 * accumulate, accumulate)
    ]:
        train_plainly(net, opt, data, accumulate=accumulate)
        if opt.phase is Phase.CONVERGED:
            opt.prune()
    return net, opt


@pytest.fixture
def skorch_net():
    """Makes the net of the documentation."""
    skorch = pytest.importorskip("skorch")

    class WormNet(skorch.NeuralNet):
        def initialize_optimizer(self):
            super().initialize_optimizer()
            self.optimizer_ = WormOptimizer(self.optimizer_, self.module_, **SEARCH)
            return self

    class Prune(skorch.callbacks.Callback):
        def on_batch_end(self, net, training=None, **kwargs):
            if training and net.optimizer_.phase is Phase.CONVERGED:
                net.optimizer_.prune()

    def make(callbacks=(), **options):
        return WormNet(
            small_cnn,
            nn.CrossEntropyLoss,
            batch_size=16,
            train_split=None,
            callbacks=[Prune, *callbacks],
            verbose=0,
            lr=0.05,
            optimizer__momentum=0.9,
            optimizer__nesterov=True,
            optimizer__weight_decay=1e-2,
            **options,
        )

    return make


@pytest.mark.parametrize("stop", [1, 3])
def test_skorch_trains_as_the_plain_loop_and_resumes(skorch_net, tmp_path, stop):
    """Stopped and resumed from its checkpoint, a run is the plain loop's bit for bit."""
    checkpoints = pytest.importorskip("skorch.callbacks").Checkpoint
    data = [torch.cat(tensors) for tensors in zip(*batches(0, 4), strict=True)]

    skorch_net([checkpoints(monitor=None, dirname=tmp_path)], max_epochs=stop).fit(*data)
    checkpoint = checkpoints(monitor=None, dirname=tmp_path)
    net = skorch_net([checkpoint]).initialize()
    net.load_params(checkpoint=checkpoint)
    assert net.optimizer_.phase is (Phase.TRUNCATING if stop == 1 else Phase.PRUNED)
    net.partial_fit(*data, epochs=4 - stop)

    assert net.optimizer_.phase is Phase.PRUNED
    assert_same_run(net.module_, net.optimizer_, *pruned_plainly(4))
    assert net.fit(*data, epochs=1).optimizer_.phase is Phase.TRUNCATING  # fit() begins anew


def ignite_trainer(folder, accumulate):
    """A supervised trainer that prunes at the ticket, its checkpoint, and what that holds."""
    engine = pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")
    net, opt = build()
    trainer = engine.create_supervised_trainer(
        net, opt, nn.functional.cross_entropy, gradient_accumulation_steps=accumulate
    )

    @trainer.on(engine.Events.ITERATION_COMPLETED)
    def prune():
        if opt.phase is Phase.CONVERGED:
            opt.prune()

    state = {"model": net, "optimizer": opt, "trainer": trainer}
    checkpoint = handlers.Checkpoint(state, handlers.DiskSaver(folder, require_empty=False))
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, checkpoint)
    return trainer, checkpoint, state


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 3])
def test_ignite_trains_as_the_plain_loop_and_resumes(tmp_path, stop, accumulate):
    """Stopped and resumed from its checkpoint, a run is the plain loop's bit for bit."""
    events = pytest.importorskip("ignite.engine").Events
    data = batches(0, 4 * accumulate)

    trainer, checkpoint, _ = ignite_trainer(tmp_path, accumulate)
    trainer.add_event_handler(events.EPOCH_COMPLETED(once=stop), trainer.terminate)
    trainer.run(data, max_epochs=4)
    saved = checkpoint.last_checkpoint
    trainer, checkpoint, state = ignite_trainer(tmp_path, accumulate)
    checkpoint.load_objects(state, saved)
    assert state["optimizer"].phase is (Phase.TRUNCATING if stop == 1 else Phase.PRUNED)
    trainer.run(data)

    assert trainer.state.epoch == 4
    assert state["optimizer"].phase is Phase.PRUNED
    assert_same_run(state["model"], state["optimizer"], *pruned_plainly(4, accumulate))


def test_callbacks_name_the_extra_that_they_need():
    """Without the packages the core can be imported, and a callback says what to install."""
    code = """
import sys
sys.modules.update({"lightning": None, "transformers": None})  # Not to be imported from here on.
import torch_worm_optim
assert not any(name.startswith("torch_worm_optim.integrations") for name in sys.modules)
for module in ("lightning", "transformers"):
    try:
        __import__(f"torch_worm_optim.integrations.{module}")
    except ImportError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    advice = [line.split("Install it: ")[1] for line in ran.stdout.splitlines()]
    assert advice == [
        'pip install "torch-worm-optim[lightning]"',
        'pip install "torch-worm-optim[transformers]"',
    ]


def test_callbacks_hand_on_how_to_shrink():
    """Sizes are multiples of what was asked for."""
    model = small_cnn()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = WormOptimizer(sgd, model, sample_every=None, window=2)
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1, 9))
        model[4].weight.copy_(torch.arange(1, 13))
    sample_twice(opt)
    reporter = reports.Reporter(opt, "shrink", scatter=True, multiple_of=4)
    told = list(reporter.news(torch.ones(1, 1, 6, 6)))
    kept = [int(mask.sum()) for mask in opt.final_mask.values()]

    assert "worm/parameters_after" in told[-1]
    assert [model[0].out_channels, model[3].out_channels] == [-(-n // 4) * 4 for n in kept]
    assert any(n % 4 for n in kept)
