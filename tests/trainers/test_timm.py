"""timm's training script: its scaler, schedules, optimizers and checkpoints."""

from __future__ import annotations

import pytest
from loops import SEARCH, assert_same_run, batches, spoil
from torch import nn
from training import same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer


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
def test_trains_the_base_alone_where_nothing_is_truncated(name):
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
def test_resumes(tmp_path, epochs, name):
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
