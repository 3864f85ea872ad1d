"""Lightning: what its Trainer does to an optimizer, and the callback for it."""

from __future__ import annotations

import math

import pytest
import torch
from loops import (
    SEARCH,
    assert_pruned,
    assert_reports,
    assert_same_run,
    assert_shrunk_once,
    batches,
    callback_for,
    loader,
    spoil,
    train_and_shrink,
    train_plainly,
    wrapped,
)
from torch import nn
from training import BASES, same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer, apply_ticket_, load_shrunk_

# What Lightning says of small data, and what torch 2.14 says of Lightning 2.6.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
)


def module_of(base="SGD momentum", manual=False, **options):
    """The small network as a LightningModule, automatically or manually optimised."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.net = small_cnn()

        def configure_optimizers(self):
            _, self.worm = wrapped(base, self, **options)
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


def trainer_of(**options):
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


def assert_same_as_plain(module, net, opt):
    """As `assert_same_run`; the network has another name within the module."""
    assert module.worm.history == opt.history
    assert same(weights_of(module.net), weights_of(net))
    masks = opt.final_mask
    ours = module.worm.final_mask
    assert ours.keys() == {f"net.{name}" for name in masks}
    assert all(torch.equal(ours[f"net.{name}"], mask) for name, mask in masks.items())
    assert module.worm.phase is opt.phase


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("base", "options", "precision"),
    [
        ("SGD momentum", {}, "32-true"),
        ("SGD momentum", {}, "bf16-mixed"),
        ("AdamW", {"truncate": "update"}, "32-true"),
    ],
)
def test_trains_as_the_plain_loop(accumulate, base, options, precision):
    """Automatic optimisation passes closures, and is the plain loop bit for bit all the same."""
    module = module_of(base, **options)
    trainer_of(accumulate_grad_batches=accumulate, precision=precision, gradient_clip_val=1.0).fit(
        module, loader(0, 16 * accumulate)
    )

    net, opt = wrapped(base, **options)
    bf16 = precision == "bf16-mixed"
    data = batches(0, 16 * accumulate)
    train_plainly(net, opt, data, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_as_plain(module, net, opt)


def test_manual_optimisation_can_prune():
    """What self.optimizers() returns is a proxy: pruning through it holds in the optimizer."""
    module = module_of(manual=True)
    trainer_of().fit(module, loader(0, 16))

    net, opt = wrapped()
    train_plainly(net, opt, batches(0, 12))
    opt.prune()
    train_plainly(net, opt, batches(12, 16))
    assert_same_as_plain(module, net, opt)
    assert opt.phase is Phase.PRUNED
    assert int(net[1].weight.count_nonzero() + net[4].weight.count_nonzero()) == 10


def test_skips_what_the_scaler_skips():
    """A step that Lightning's GradScaler skips is not counted by the search."""
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    module = module_of()
    spoil(module.net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = scaler  # Lightning makes one for float16 only, which CPUs are slow at.
    trainer_of(plugins=[precision]).fit(module, loader(0, 17))

    net, opt = wrapped()
    spoil(net, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_plainly(net, opt, batches(0, 17), scaler=scaler, bf16=True)
    assert_same_as_plain(module, net, opt)
    assert opt.sample().step == 12


@pytest.mark.parametrize("epochs", [1, 3])
def test_resumes(tmp_path, epochs):
    """fit(ckpt_path=...) of a run stopped while truncating or after the ticket changes no bit."""
    whole = module_of("AdamW", truncate="update")
    trainer_of(max_epochs=4).fit(whole, loader(0, 5))
    first = module_of("AdamW", truncate="update")
    trainer = trainer_of(max_epochs=epochs)
    trainer.fit(first, loader(0, 5))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = module_of("AdamW", truncate="update")
    trainer_of(max_epochs=4).fit(resumed, loader(0, 5), ckpt_path=tmp_path / "run.ckpt")

    assert_same_run(whole, whole.worm, resumed, resumed.worm)
    assert first.worm.converged == (epochs == 3)


def remembering_logger():
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


@pytest.mark.parametrize("at_ticket", ["continue", "stop", "prune"])
def test_callback_logs_and_acts(at_ticket):
    """Each mask is logged once, however rarely Lightning logs; at the ticket it stops or prunes."""
    logger, module = remembering_logger(), module_of()
    callback = callback_for("lightning")
    trainer = trainer_of(logger=logger, log_every_n_steps=50, callbacks=[callback(at_ticket)])
    trainer.fit(module, loader(0, 16))

    assert_reports(logger.rows, module.worm, 3 if at_ticket == "prune" else 2)
    assert trainer.global_step == (12 if at_ticket == "stop" else 16)
    assert module.worm.phase is (Phase.PRUNED if at_ticket == "prune" else Phase.CONVERGED)
    zeros = 20 - int(sum(module.net[i].weight.count_nonzero() for i in (1, 4)))
    assert zeros == (10 if at_ticket == "prune" else 0)


def test_callback_prunes_at_the_ticket():
    """Training goes on as the plain loop that prunes there does, bit for bit."""
    module = module_of()
    trainer_of(callbacks=[callback_for("lightning")("prune")]).fit(module, loader(0, 16))

    net, opt = wrapped()
    train_plainly(net, opt, batches(0, 12))
    opt.prune()
    train_plainly(net, opt, batches(12, 16))
    assert_same_as_plain(module, net, opt)
    assert opt.phase is Phase.PRUNED


def test_callback_goes_on_after_a_resume(tmp_path):
    """Masks from before a checkpoint are not logged again; a search that has stopped stays so."""
    callback = callback_for("lightning")
    first, second, third = (remembering_logger() for _ in range(3))
    path = tmp_path / "run.ckpt"
    trainer = trainer_of(logger=first, callbacks=[callback("stop")])
    trainer.fit(module_of(), loader(0, 5))
    trainer.save_checkpoint(path)
    trainer = trainer_of(logger=second, callbacks=[callback("stop")], max_epochs=4)
    module = module_of()
    trainer.fit(module, loader(0, 5), ckpt_path=path)
    assert trainer.global_step == 12
    assert_reports(first.rows + second.rows, module.worm, 2)

    trainer.save_checkpoint(path)
    trainer = trainer_of(logger=third, callbacks=[callback("stop")], max_epochs=4)
    trainer.fit(module_of(), loader(0, 5), ckpt_path=path)
    assert trainer.global_step <= 13
    assert third.rows == []


def linear_rate(opt):
    """A schedule that the steps after shrinking depend on."""
    return torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=16)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_callback_shrinks_once(accumulate):
    """Accumulation, scaler, clipping and schedule go on in the smaller network, bit for bit."""
    callback = callback_for("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    logger, module = remembering_logger(), module_of()
    make = module.configure_optimizers

    def with_schedule():
        opt = make()
        return [opt], [{"scheduler": linear_rate(opt), "interval": "step"}]

    module.configure_optimizers = with_schedule
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer_of(
        logger=logger,
        callbacks=[callback("shrink")],
        plugins=[precision],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    ).fit(module, loader(0, 16 * accumulate))

    net, opt, report = train_and_shrink(
        batches(0, 16 * accumulate),
        accumulate=accumulate,
        rate=linear_rate,
        bf16=True,
        clip=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    assert_same_as_plain(module, net, opt)
    assert_shrunk_once(module.net, logger.shrunk, report, 12)
    assert_reports(logger.rows, module.worm, 3)


@pytest.mark.parametrize("epochs", [2, 3])
def test_resumes_a_run_that_shrinks(tmp_path, epochs):
    """Stopped before shrinking or after it, a run goes on bit for bit, and shrinks once in all."""
    path = tmp_path / "run.ckpt"

    def run(last, checkpoint=None):
        logger, module = remembering_logger(), module_of()
        if checkpoint is not None and epochs == 3:
            load_shrunk_(module, torch.load(checkpoint, weights_only=True)["state_dict"])
        callback = callback_for("lightning")("shrink")
        trainer = trainer_of(max_epochs=last, logger=logger, callbacks=[callback])
        trainer.fit(module, loader(0, 5), ckpt_path=checkpoint)
        trainer.save_checkpoint(path)
        return module, logger.shrunk

    whole, row = run(4)
    _, first = run(epochs)
    resumed, second = run(4, path)
    assert_same_run(whole, whole.worm, resumed, resumed.worm)
    assert resumed.net[0].out_channels + resumed.net[3].out_channels == 10
    assert [step for step, _ in row] == [step for step, _ in first + second] == [12]


@pytest.mark.parametrize("source", ["tensor", "tuple", "dict", "example_input_array", "batch"])
def test_callback_finds_inputs(source):
    """What is passed comes first, then the module's example, then one example of a batch."""
    module, seen = module_of(), []
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
    trainer_of(callbacks=[callback]).fit(module, loader(0, 13))

    assert module.net[0].out_channels + module.net[3].out_channels == 10
    expected = batches(0, 1)[0][0][:1] if source == "batch" else images
    assert torch.equal(seen[0], expected)


def test_callback_shrinks_at_the_end_of_training():
    """A ticket of after the last batch is acted upon too."""
    module = module_of(sample_every=None, window=2)
    module.on_train_epoch_end = lambda: module.worm.sample()
    callback = callback_for("lightning")("shrink")
    trainer_of(max_epochs=2, callbacks=[callback]).fit(module, loader(0, 2))

    assert module.worm.phase is Phase.PRUNED
    assert module.net[0].out_channels + module.net[3].out_channels == 10


def weight_averaging():
    """Lightning's callback that checkpoints an average, and puts it into the model at the end."""
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return module.WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at_ticket", ["prune", "shrink"])
def test_callback_prunes_and_shrinks_averages(tmp_path, at_ticket, late, part, order):
    """An average is pruned and cut with the model, of which it may be more than the optimizer's.

    The ticket may come after the last batch.
    """
    options = {"sample_every": 2 if not late else None, "window": 6 if not late else 2}
    module = module_of(**options)
    if part:
        module.worm = WormOptimizer(
            BASES["SGD momentum"](module.parameters()), module.net, **{**SEARCH, **options}
        )
        module.configure_optimizers = lambda: module.worm
    if late:
        module.on_train_epoch_end = lambda: module.worm.sample()
    callbacks = [callback_for("lightning")(at_ticket), weight_averaging()][::order]
    trainer = trainer_of(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, loader(0, 8))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert same(saved["state_dict"].values(), weights_of(module))
    if at_ticket == "prune":
        assert_pruned(module.state_dict(), module.worm, "net." if part else "")
    else:
        assert module.net[0].out_channels + module.net[3].out_channels == 10
        assert all(module.net[i].weight.all() for i in (1, 4))


def test_resumes_a_run_that_shrinks_averages(tmp_path):
    """The average of a resumed run has the smaller shapes already, and is left alone."""
    path, callback = tmp_path / "run.ckpt", callback_for("lightning")
    modules = []
    for last, ends, checkpoint in ((4, 4, None), (4, 3, None), (4, 4, path)):
        module = module_of()
        if checkpoint is not None:
            load_shrunk_(module, torch.load(path, weights_only=True)["state_dict"])
        trainer = trainer_of(max_epochs=last, callbacks=[callback("shrink"), weight_averaging()])
        if ends < last:
            module.on_train_epoch_end = lambda trainer=trainer: (
                trainer.save_checkpoint(path) if trainer.current_epoch == 2 else None
            )
        trainer.fit(module, loader(0, 5), ckpt_path=checkpoint)
        modules.append(module)
    assert same(weights_of(modules[0]), weights_of(modules[2]))


@pytest.mark.parametrize("order", [1, -1])
def test_callback_prunes_what_fit_leaves(order):
    """Weights that another callback puts into the model when training ends are pruned."""
    callback = callback_for("lightning")
    from lightning.pytorch import Callback

    class LoadsOthers(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(module_of().state_dict())

    module = module_of()
    callbacks = [callback("prune"), LoadsOthers()][::order]
    trainer_of(callbacks=callbacks).fit(module, loader(0, 16))
    assert_pruned(module.state_dict(), module.worm)


@pytest.mark.parametrize("pruned_only", [False, True])
def test_checkpoint_of_before_the_ticket_is_pruned(tmp_path, pruned_only):
    """ModelCheckpoint's best is pruned once loaded; a metric that starts late passes it over."""
    callback = callback_for("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = module_of()

    def log_loss():
        pruned = module.worm.phase is Phase.PRUNED
        module.log("loss", float(module.current_epoch) if pruned or not pruned_only else math.inf)

    module.on_train_epoch_end = log_loss
    best = ModelCheckpoint(tmp_path, monitor="loss")
    trainer = trainer_of(
        max_epochs=4, callbacks=[callback("prune"), best], enable_checkpointing=True
    )
    trainer.fit(module, loader(0, 5))

    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == (2 if pruned_only else 0)
    copy = module_of()
    copy.load_state_dict(saved["state_dict"])
    if not pruned_only:
        assert all(copy.net[i].weight.all() for i in (1, 4))
        apply_ticket_(copy, module.worm.final_mask)
    assert_pruned(copy.state_dict(), module.worm)


def test_callback_says_why_it_does_not_shrink():
    """Shrinking that fails ends training, after the ticket is logged, or at its first batch."""
    callback = callback_for("lightning")
    logger, module = remembering_logger(), module_of()
    noise = torch.nn.Parameter(torch.zeros(1))
    module.forward = lambda images: module.net(images) + noise.data.add_(1)
    trainer = trainer_of(logger=logger, callbacks=[callback("shrink")])
    with pytest.raises(RuntimeError, match="returns other outputs when it is called again"):
        trainer.fit(module, loader(0, 16))
    assert_reports(logger.rows, module.worm, 3)
    assert logger.shrunk == []

    words = torch.utils.data.DataLoader(["a", "b"])
    trainer = trainer_of(callbacks=[callback("shrink")])
    module = module_of()
    module.training_step = lambda batch, batch_idx: module.net(batches(0, 1)[0][0]).sum()
    with pytest.raises(ValueError, match=r"batch of type list .* Pass `inputs=`"):
        trainer.fit(module, words)


def test_callback_reports_samples_of_ones_own_and_several_optimizers():
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
            return [
                WormOptimizer(BASES["SGD momentum"](n.parameters()), n, **options)
                for n in self.nets
            ]

        def training_step(self, batch, batch_idx):
            for net, opt in zip(self.nets, self.optimizers(), strict=True):
                opt.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
                opt.step()

        def on_train_epoch_end(self):
            for opt in self.optimizers():
                opt.sample()

    rows = []
    logger = remembering_logger()
    logger.log_metrics = lambda metrics, step=None: rows.append(metrics)
    trainer_of(logger=logger, max_epochs=2, callbacks=[callback()]).fit(Two(), loader(0, 3))

    assert [next(iter(row)) for row in rows if "epoch" not in row] == [
        "worm0/phase",
        "worm1/phase",
    ] * 2


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_callback_finds_the_inputs_of_each_of_several_networks(given, late):
    """Of a GAN each network is shrunk with what it is called with, if it is called late too."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(8, 36)

        def forward(self, noise, scale, *, gain):
            return (self.head(self.body(noise)) * scale * gain).view(-1, 1, 6, 6)

    class Gan(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.generator, self.judge, self.n_batches = Decoder(), small_cnn(), 0
            if given:
                self.example_input_array = torch.zeros(1, 99)  # of the module, not of its parts

        def configure_optimizers(self):
            parts = self.generator, self.judge
            self.worms = [
                wrapped(model=each, sample_every=sample_every)[1]
                for each, sample_every in zip(parts, (3 if late else 2, 2), strict=True)
            ]
            return self.worms

        def training_step(self, batch, batch_idx):
            self.n_batches += 1
            first, second = self.optimizers()
            fake = self.generator(torch.randn(16, 5), torch.ones(36), gain=torch.tensor(2.0))
            self.judge.requires_grad_(False)
            is_called = not late or self.n_batches > 2
            loss = self.judge(fake)[:, 0].mean() if is_called else fake.square().mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            self.judge.requires_grad_(True)
            if is_called:
                second.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.judge(batch[0]), batch[1]))
                second.step()

    module = Gan()
    callback = callback_for("lightning")("shrink")
    trainer_of(callbacks=[callback]).fit(module, loader(0, 24))

    assert [each.is_shrunk for each in module.worms] == [True, True]
    assert module.generator.head.in_features == 4
    assert module.judge[0].out_channels + module.judge[3].out_channels == 10


@pytest.mark.parametrize("scaled", [False, True])
def test_fabric_sets_up_a_search(scaled):
    """A search that is set up counts what the scaler lets through; what is set up is refused."""
    fabric_of = pytest.importorskip("lightning.fabric").Fabric
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = scaler
    fabric = fabric_of(accelerator="cpu", devices=1, plugins=[precision])
    net, opt = wrapped()
    if scaled:
        spoil(net, 5)
    model, proxy = fabric.setup(net, opt)
    for images, labels in batches(0, 17):
        proxy.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(images), labels))
        proxy.step()
    assert [sample.step for sample in opt.history] == [2, 4, 6, 8, 10, 12]

    other = small_cnn()
    model, proxy = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"FabricSGD.*first.*fabric\.setup"):
        WormOptimizer(proxy, other)


def test_callback_needs_a_search_to_watch():
    """Without a WormOptimizer, or with an unknown action, the message says what to do."""
    callback = callback_for("lightning")
    module = module_of()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got \['SGD'\]\. Return one from configure_optim"):
        trainer_of(callbacks=[callback()]).fit(module, loader(0, 2))
    with pytest.raises(ValueError, match=r"`at_ticket` must be one of .* got 'halt'"):
        callback("halt")
