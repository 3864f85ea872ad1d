"""A shrunk network saved, copied, and loaded into a fresh one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import NETWORKS, build, loss_of, networks, outputs, zero_channels
from torch import nn

from torch_worm_optim.shrink import load_shrunk_, shrink_


@networks
@pytest.mark.parametrize("scatter", [False, True])
def test_a_shrunk_network_is_loaded_into_a_fresh_one(which, scatter):
    """Shapes come from the checkpoint: outputs, and a step of the optimizer on, are bit for bit."""
    model, batch = build(which)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    loss_of(model, batch, 0).backward()
    opt.step()
    zero_channels(model)
    shrink_(model, batch, optimizer=opt, scatter=scatter)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = NETWORKS[which][0]().double()
    load_shrunk_(fresh, saved["model"])
    fresh_opt = torch.optim.AdamW(fresh.parameters(), 1e-2)
    fresh_opt.load_state_dict(saved["opt"])

    assert repr(fresh) == repr(model)
    for training in (False, True):
        for a, b in zip(
            outputs(fresh, batch, training), outputs(model, batch, training), strict=True
        ):
            assert torch.equal(a, b)
    for each, optimizer in ((model, opt), (fresh, fresh_opt)):
        optimizer.zero_grad()
        each.eval()
        loss_of(each, batch, 1).backward()
        optimizer.step()
    for a, b in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["missing", "unknown", "larger", "other layer"])
def test_a_checkpoint_of_another_network_is_refused(what):
    """By the name of a parameter, with the model as it was."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = {"missing": "1.weight", "unknown": "9.weight", "larger": "0.weight"}
    name = names.get(what, "2.weight")
    if what == "missing":
        del state[name]
    elif what == "unknown":
        state[name] = torch.ones(3)
    else:
        state[name] = torch.ones(5, 3, 1, 1) if what == "larger" else torch.ones(3)
    state["0.bias"] += 1
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=f"of another network than Sequential.*'{name}'"):
        load_shrunk_(model, state)

    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"2.weight": torch.ones(4, 3)}), "has shape"),
        (lambda state: state.update({"0.weight": torch.ones(3, 4, device="meta")}), "without data"),
        (lambda state: state.update({"0.weight": [1.0]}), "got list"),
    ],
)
def test_a_state_dict_that_does_not_fit_leaves_the_model_as_it_was(change, message):
    """Among it one whose tied weights differ in shape."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    before = model[0].weight.clone()
    state = {name: torch.ones(3, 4) for name in ("0.weight", "2.weight")}
    change(state)
    with pytest.raises(ValueError, match=message):
        load_shrunk_(model, state)
    assert torch.equal(model[0].weight, before)
    assert model[0].out_features == 6


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_whole_network_is_copied_and_saved(how):
    """With BatchNorms that write by index, which can be shrunk again and loaded from."""
    model, batch = build("residual")
    report = shrink_(model, batch, scatter=True)
    assert report.is_scattered

    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)

    assert repr(other) == repr(model)
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    for training in (False, True):
        for a, b in zip(
            outputs(other, batch, training), outputs(model, batch, training), strict=True
        ):
            assert torch.equal(a, b)
    assert shrink_(other, batch, scatter=True).kept == {}
    fresh = NETWORKS["residual"][0]().double()
    load_shrunk_(fresh, other.state_dict())
    assert repr(fresh) == repr(model)
