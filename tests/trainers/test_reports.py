"""What the callbacks share, without a trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from loops import wrapped
from training import sample_twice

from torch_worm_optim import Phase
from torch_worm_optim.integrations import AtTicket, Reporter


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


@torch.no_grad()
def untied(**options):
    """A small network of which no two scales of a layer are equal, and its wrapped optimizer."""
    model, opt = wrapped("SGD", sample_every=None, **options)
    for norm in (model[1], model[4]):
        norm.weight.copy_(torch.arange(1, len(norm.weight) + 1))
    return model, opt


def test_callbacks_hand_on_how_to_shrink():
    """Sizes are multiples of what was asked for."""
    model, opt = untied(window=2)
    sample_twice(opt)
    reporter = Reporter(opt, AtTicket("shrink", scatter=True, multiple_of=4))
    *_, last = reporter.new_metrics(torch.ones(1, 1, 6, 6))
    kept = [each.kept for each in opt.kept_counts()]

    assert "worm/parameters_after" in last
    assert [model[0].out_channels, model[3].out_channels] == [-(-n // 4) * 4 for n in kept]
    assert any(n % 4 for n in kept)
    assert list(reporter.new_metrics(torch.ones(1, 1, 6, 6))) == []


def test_a_ticket_that_is_taken_by_force_is_logged():
    """The mask was logged when it was drawn; what it keeps follows, once."""
    model, opt = untied()
    reporter = Reporter(opt, AtTicket())
    opt.sample()
    assert list(reporter.new_metrics()) == [{"worm/phase": 1}]

    opt.prune(force=True)
    assert opt.history[-1].phase is Phase.PRUNED
    [row] = reporter.new_metrics()
    assert row["worm/phase"] == 3
    assert row["worm/ticket_step"] == 0
    assert row["worm/kept/1.weight"] == int(model[1].weight.count_nonzero()) / 8
    assert list(reporter.new_metrics()) == []


def test_shrinking_is_for_one_process(monkeypatch):
    """On several it is refused when training begins; pruning is not."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    _, opt = wrapped()
    with pytest.raises(RuntimeError, match=r'is for one process, and there are 2\. Pass "prune"'):
        Reporter(opt, AtTicket("shrink"))
    Reporter(opt, AtTicket("prune"))
