"""What a trainer takes over, written out as a plain loop that it has to agree with bit for bit."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
import training
from torch import nn
from training import SCALES, same, weights_of

from torch_worm_optim import Phase

# Truncating and fading from step 2 on; the ticket is the sixth mask, of step 12, wherever it lies.
SEARCH = {"sample_every": 2, "window": 6, "stopping_point": 1.0, "trigger": "always"}
SEARCH |= {"scope": "layer", "fade": 0.1}


def wrapped(base="SGD momentum", model=None, **options):
    """A small network and its wrapped optimizer, with its ticket at step 12."""
    return training.wrapped(base, model, **{**SEARCH, **options})


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
    """What the ticket removes is zero in a state dict, shifts too; the scales that stay are not."""
    ticket = opt.final_mask
    assert any(name.endswith("bias") for name in ticket)
    assert all((weights[prefix + name][~mask] == 0).all() for name, mask in ticket.items())
    assert all(weights[prefix + n][ticket[n]].all() for n in ticket if n.endswith(SCALES))
    assert opt.phase is Phase.PRUNED


def spoil(net, index_of_call):
    """Make the network's outputs infinite in one forward pass while training."""
    calls = itertools.count()
    net.register_forward_hook(
        lambda _net, _inputs, output: output * math.inf if next(calls) == index_of_call else None
    )


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
    scales = {name: mask for name, mask in opt.final_mask.items() if name.endswith(SCALES)}
    shares = {f"worm/kept/{name}": float(mask.float().mean()) for name, mask in scales.items()}
    assert len(shares) == 2
    assert {name: row[name] for name in row if "kept" in name} == pytest.approx(shares)


def train_and_shrink(data, *, accumulate=1, rate=None, **options):
    """The plain loop that prunes and shrinks at the ticket; and what that reported.

    ``rate`` makes a schedule over optimizer steps.
    """
    net, opt = wrapped()
    schedule, report = rate and rate(opt), None
    for first in range(0, len(data), accumulate):
        train_plainly(net, opt, data[first : first + accumulate], accumulate=accumulate, **options)
        if schedule is not None:
            schedule.step()
        if opt.converged and report is None:
            opt.prune()
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


def pruned_plainly(n_epochs, accumulate=1):
    """The loop that they take over: the same batches in every epoch, and pruned at the ticket."""
    net, opt = wrapped()
    for data in n_epochs * [
        batches(first, first + accumulate) for first in range(0, 4 * accumulate, accumulate)
    ]:
        train_plainly(net, opt, data, accumulate=accumulate)
        if opt.phase is Phase.CONVERGED:
            opt.prune()
    return net, opt
