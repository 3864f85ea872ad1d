"""Global step hooks, which torch keeps in one registry for the whole process."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import small_cnn

from torch_worm_optim import WormOptimizer


class Waiting(torch.optim.Optimizer):
    """Says when it steps, and waits in the middle of a step until it may go on."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.steps, self.may_go_on = threading.Event(), threading.Event()

    def step(self, closure=None):
        """Wait, and move nothing."""
        self.steps.set()
        assert self.may_go_on.wait(20)


@pytest.mark.parametrize("first_out", [0, 1])
def test_steps_that_interleave_lose_no_global_hook(first_out):
    """Two threads step at once; afterwards the hook still fires for all, and once per step."""
    seen = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(id(optimizer)))
    try:
        bases = [Waiting(small_cnn().parameters()) for _ in range(2)]
        models = [small_cnn() for _ in range(2)]
        for base, model in zip(bases, models, strict=True):
            base.param_groups[0]["params"] = list(model.parameters())
        opts = [WormOptimizer(b, m) for b, m in zip(bases, models, strict=True)]
        threads = [threading.Thread(target=opt.step) for opt in opts]
        for base, thread in zip(bases, threads, strict=True):
            thread.start()
            assert base.steps.wait(20)
        for index in (first_out, 1 - first_out):
            bases[index].may_go_on.set()
            threads[index].join(20)
        assert sorted(seen) == sorted(map(id, opts))

        seen.clear()
        for each in (*opts, *bases):
            each.step()
        assert seen == list(map(id, (*opts, *bases)))
    finally:
        handle.remove()

    opts[0].step()
    assert len(seen) == 4
