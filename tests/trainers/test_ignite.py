"""Ignite: a supervised trainer with a handler that prunes, and its checkpoints."""

from __future__ import annotations

import pytest
from loops import assert_same_run, batches, pruned_plainly, wrapped
from torch import nn

from torch_worm_optim import Phase


def ignite_trainer(folder, accumulate):
    """A supervised trainer that prunes at the ticket, its checkpoint, and what that holds."""
    engine = pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")
    net, opt = wrapped()
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
def test_trains_as_the_plain_loop_and_resumes(tmp_path, stop, accumulate):
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
