"""The soak in short: stopped and resumed at random, in one process."""

from __future__ import annotations

import io
import random

import pytest
import soak
import torch
from training import record_of


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_stopped_at_random_ends_where_an_undisturbed_one_ends(seed):
    """Checkpoints, skipped steps and masks at random steps leave the same bits everywhere."""
    whole, broken = soak.Training(seed), soak.Training(seed)
    stops = random.Random(seed)
    n_stops = 0
    for _ in range(400):
        whole.train_step()
        broken.train_step()
        if stops.random() < 0.05:
            saved = io.BytesIO()
            torch.save(broken.state(), saved)
            saved.seek(0)
            broken = soak.Training(seed)
            broken.load(torch.load(saved, weights_only=True))
            n_stops += 1

    assert soak.difference(whole.state(), broken.state()) == ""
    assert n_stops > 10
    phases = {sample.phase.value for sample in whole.opt.history}
    assert "truncating" in phases
    assert record_of(whole.opt.state_dict())["step"] < 400  # some were skipped


def test_the_comparison_finds_a_single_bit():
    """Equal states have no difference; one number changed is found where it is."""
    a, b = soak.Training(0).state(), soak.Training(0).state()
    assert soak.difference(a, b) == ""

    b["model"]["1.weight"][3] += 1e-6
    assert soak.difference(a, b) == "state['model']['1.weight']"
    assert soak.difference([1, (2, 3)], [1, (2, 4)]) == "state[1][1]"
