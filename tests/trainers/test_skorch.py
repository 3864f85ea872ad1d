"""skorch: the net of the documentation, trained, pruned and resumed."""

from __future__ import annotations

import pytest
import torch
from loops import SEARCH, assert_same_run, batches, pruned_plainly
from torch import nn
from training import small_cnn

from torch_worm_optim import Phase, WormOptimizer


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
def test_trains_as_the_plain_loop_and_resumes(skorch_net, tmp_path, stop):
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
