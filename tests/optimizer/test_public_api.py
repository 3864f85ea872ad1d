"""What users import, and what arguments they may pass."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from torch import nn
from training import BASES, DEVICE, SCALES, at_phase, small_cnn

import torch_worm_optim
from torch_worm_optim import Phase, WormOptimizer


def wrap(**options):
    """A WormOptimizer over a small network with these arguments."""
    model = small_cnn()
    return WormOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def test_all_names_are_there_and_no_others():
    """`__all__` is what a star import of the package gives, submodules aside."""
    public = {
        name
        for name, value in vars(torch_worm_optim).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }

    assert public == set(torch_worm_optim.__all__)
    assert public == {
        "BatchNormSelector",
        "FeedForwardSelector",
        "MaskSample",
        "ParameterSelector",
        "Part",
        "Phase",
        "QueryKeySelector",
        "Representative",
        "Selector",
        "ShrinkReport",
        "WormOptimizer",
        "apply_ticket_",
        "load_shrunk_",
        "plot_kept",
        "plot_trajectory",
        "shrink_",
    }
    assert torch_worm_optim.__version__.count(".") == 2


def test_every_public_thing_has_a_docstring_with_an_example():
    """Whoever asks for help gets an example that runs as a doctest."""
    for name in torch_worm_optim.__all__:
        if name in ("MaskSample", "Phase", "Selector"):
            continue
        assert ">>>" in inspect.getdoc(getattr(torch_worm_optim, name))


@pytest.mark.parametrize(
    ("name", "value", "error", "rule"),
    [
        ("prune_ratio", 1.0, ValueError, r"in \[0, 1\), got 1\.0"),
        ("prune_ratio", -0.1, ValueError, r"in \[0, 1\), got -0\.1"),
        ("prune_ratio", 50, ValueError, r"got 50\. It is a share, not a percentage"),
        ("prune_ratio", math.nan, ValueError, "got nan"),
        ("prune_ratio", "half", TypeError, "a number in .*got 'half' of type str"),
        ("prune_ratio", True, TypeError, "got True of type bool"),
        ("stopping_point", 1.5, ValueError, r"in \[0, 1\], got 1\.5"),
        ("margin", -1e-9, ValueError, r"in \[0, 1\], got -1e-09"),
        ("truncation", 2, ValueError, r"in \[0, 1\], got 2"),
        ("window", 1, ValueError, "at least 2, got 1"),
        ("window", 5.5, ValueError, r"whole number, got 5\.5"),
        ("sample_every", 0, ValueError, "at least 1, got 0"),
        ("sample_every", 2.5, ValueError, r"whole number, got 2\.5"),
        ("window", "5", TypeError, "whole number, got '5' of type str"),
        ("min_keep", -1, ValueError, "at least 0, got -1"),
        ("scope", "net", ValueError, "one of 'global', 'selector', 'layer', got 'net'"),
        ("truncate", "grad", ValueError, "one of 'gradient', 'update', got 'grad'"),
        ("trigger", "never", ValueError, "one of 'distance', 'always', got 'never'"),
    ],
)
def test_arguments_out_of_range_are_refused(name, value, error, rule):
    """The message gives the argument, the rule and the value."""
    with pytest.raises(error, match=f"`{name}` must be .*{rule}"):
        wrap(**{name: value})


@pytest.mark.parametrize("name", ["stopping_point", "margin", "truncation"])
@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
def test_the_ends_of_ranges_are_allowed(name, value):
    """0 and 1 are shares, whole numbers or not."""
    wrap(**{name: value})


def test_what_is_not_an_optimizer_or_a_model_is_refused():
    """Mixed-up arguments and doubly wrapped optimizers are told apart from real ones."""
    model, opt = small_cnn(), wrap()
    sgd = torch.optim.SGD(model.parameters())

    with pytest.raises(TypeError, match=r"`base_optim` must be a torch\.optim\.Optimizer, got Seq"):
        WormOptimizer(model, sgd)
    with pytest.raises(TypeError, match=r"is a WormOptimizer already.*opt\.base_optim"):
        WormOptimizer(opt, model)
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got generator"):
        WormOptimizer(sgd, model.parameters())
    with pytest.raises(TypeError, match="positional"):
        WormOptimizer(sgd, model, None, 0.5)


def test_arguments_can_be_read_and_not_changed():
    """`settings` has them under their names, those that were left out included."""
    given = {"prune_ratio": 0.3, "window": 4, "sample_every": None, "min_keep": 0.2}
    given |= {"truncate": "update", "trigger": "always", "scope": "layer", "truncation": 0}
    settings = wrap(**given).settings

    assert {name: getattr(settings, name) for name in given} == given
    parameters = inspect.signature(WormOptimizer).parameters
    assert {field.name for field in dataclasses.fields(settings)} <= parameters.keys()
    for name, value in dataclasses.asdict(wrap().settings).items():
        default = parameters[name].default
        assert value == ("gradient" if default is None else default)  # which `truncate` is for SGD
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.window = 5
    with pytest.raises(AttributeError):
        wrap().settings = settings


@pytest.mark.parametrize(("base", "truncate"), [("SGD", "gradient"), ("AdamW", "update")])
def test_the_defaults_suit_the_base_optimizer_and_ruin_no_layer(base, truncate):
    """Each layer loses half, what goes fades to a tenth, and nobody is warned for taking them."""
    model = small_cnn()
    opt = WormOptimizer(BASES[base](model.parameters()), model)
    assert dataclasses.asdict(opt.settings) == {
        "prune_ratio": 0.5,
        "stopping_point": 0.1,
        "margin": 0.05,
        "window": 5,
        "truncation": 3e-3,
        "sample_every": 200,
        "scope": "layer",
        "min_keep": 1,
        "truncate": truncate,
        "trigger": "distance",
        "fade": 0.1,
    }
    for name in SCALES:
        nn.init.uniform_(model.get_parameter(name))
    model[4].weight.data.mul_(1e-3)
    opt.sample()
    assert [each.kept for each in opt.kept_counts()] == [4, 6]
    with pytest.raises(ValueError, match="`truncate` must be one of 'gradient', 'update', got ''"):
        WormOptimizer(opt.base_optim, model, truncate="")


def test_the_model_the_counts_and_the_size_can_be_read():
    """Counts are those of the newest mask, then of the ticket, also when the network is smaller."""
    opt = wrap()
    assert [(each.name, each.numel, each.kept) for each in opt.kept_counts()] == [
        ("1.weight", 8, None),
        ("4.weight", 12, None),
    ]
    for phase in (Phase.TRUNCATING, Phase.PRUNED):
        model, opt = at_phase(phase)
        kept = [int(opt.candidate_mask[name].sum()) for name in SCALES]
        assert [each.kept for each in opt.kept_counts()] == kept
        assert opt.model is model
        assert not opt.is_shrunk
    opt.shrink(torch.ones(1, 1, 6, 6, device=DEVICE))
    assert opt.is_shrunk
    assert opt.model is model
    assert [each.kept for each in opt.kept_counts()] == kept
    assert opt.final_mask["1.weight"].shape == (8,)
