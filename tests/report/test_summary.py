"""`opt.summary()`: its numbers are those of the masks, in every phase."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import SCALES, same, sample_twice, small_cnn, train, weights_of, wrapped

from torch_worm_optim import (
    BatchNormSelector,
    ParameterSelector,
    Part,
    Phase,
    QueryKeySelector,
    Representative,
)
from torch_worm_optim.report import KeptCount, kept_counts, summary_text


def untied(**options):
    """A small network of which no scales are equal, and its wrapped optimizer."""
    model = small_cnn()
    for index in (1, 4):
        nn.init.uniform_(model[index].weight, 0.5, 1.5)
    return wrapped(model=model, **options)


def numbers(text: str) -> dict[str, tuple[int, int]]:
    """Entries or units, and how many are kept, by name."""
    rows = re.findall(r"^(\S.*?) +([\d,]+) +([\d,]+) +[\d.]+ %$", text, flags=re.MULTILINE)
    return {name: tuple(int(n.replace(",", "")) for n in row) for name, *row in rows}


def of_masks(masks) -> dict[str, tuple[int, int]]:
    """The same of masks that rank whole parameters."""
    rows = {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()}
    return {**rows, "total": tuple(map(sum, zip(*rows.values(), strict=True)))}


def test_numbers_are_those_of_the_masks_in_every_phase():
    """Of the newest mask, then of the ticket, and reading them changes nothing."""
    (model, opt), (twin_model, twin) = wrapped(), wrapped()
    assert "1.weight        8     -      -" in opt.summary()
    assert opt.summary().endswith("phase: searching, no mask drawn yet")

    met = set()
    for step in range(300):
        for each, optimizer in ((model, opt), (twin_model, twin)):
            train(each, optimizer, range(step, step + 1))
            if optimizer.phase is Phase.CONVERGED and step % 3 == 0:
                optimizer.prune()
        if opt.history:
            met.add(opt.phase)
            text, n = opt.summary(), len(opt.history)
            assert numbers(text) == of_masks({name: opt.candidate_mask[name] for name in SCALES})
            which = "the ticket" if opt.converged else "the newest"
            s = "s" * (n > 1)
            last = f"phase: {opt.phase.value}, {n} mask{s} drawn, {which} counted"
            assert text.splitlines()[-1] == last
        if opt.phase is Phase.PRUNED:
            break

    assert met == {Phase.SEARCHING, Phase.TRUNCATING, Phase.CONVERGED, Phase.PRUNED}
    assert opt.history == twin.history
    assert same(weights_of(model), weights_of(twin_model))


def test_a_summary_outlives_shrinking_and_resuming():
    """The numbers stay those of the search, units included, though parameters are smaller."""
    followers = tuple(Part(name, units=(8,)) for name in ("1.weight", "1.bias"))
    filters = Representative(Part("0.weight", units=(8,)), followers)
    options = {"selector": lambda model: [filters], "sample_every": None, "window": 2}
    model, opt = untied(**options)
    sample_twice(opt)
    opt.prune()
    before = opt.summary()
    assert "units" in before.splitlines()[0]
    assert numbers(before)["0.weight"] == (8, 4)

    opt.shrink(torch.ones(1, 1, 6, 6))
    assert model[0].out_channels == 4
    assert opt.summary() == before

    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    smaller = copy.deepcopy(model)
    _, resumed = wrapped(model=smaller, **{**options, "selector": BatchNormSelector()})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.summary() == before


def test_a_given_ticket_is_counted_by_parameter():
    """Followers included, before and after shrinking."""
    _, opt = untied(sample_every=None, window=2)
    sample_twice(opt)
    ticket = opt.final_mask

    _, given_one = untied(ticket=ticket)
    text = given_one.summary()
    assert numbers(text) == of_masks(ticket)
    assert text.endswith("phase: pruned, no mask drawn, the given ticket counted")
    given_one.shrink(torch.ones(1, 1, 6, 6))
    assert given_one.summary() == text


def test_units_are_counted_where_there_are_some():
    """Heads count as heads; beside scales the header has both and rows say which."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.norm = nn.BatchNorm1d(6)

    heads = QueryKeySelector(granularity="head")
    for selector, header, rows in (
        (heads, "units", {"attention.in_proj_weight": 2}),
        (
            heads | BatchNormSelector(),
            "entries or units",
            {"attention.in_proj_weight (units)": 2, "norm.weight": 6},
        ),
    ):
        model = Net()
        nn.init.uniform_(model.norm.weight)
        _, opt = wrapped(model=model, selector=selector, sample_every=None, scope="layer")
        opt.sample()
        text = opt.summary()

        assert re.split("  +", text.splitlines()[0]) == ["name", header, "kept", "share"]
        assert numbers(text) == {
            **{name: (n, n // 2) for name, n in rows.items()},
            "total": (sum(rows.values()), sum(n // 2 for n in rows.values())),
        }


def test_parts_of_one_parameter_have_names_of_their_own():
    """Two parts of one weight are two rows."""
    parts = [Representative(Part("0.weight", index=(slice(i, i + 4),))) for i in (0, 4)]
    _, opt = untied(selector=lambda model: parts, sample_every=None, scope="layer")
    opt.sample()

    rows = numbers(opt.summary())
    assert list(rows) == [
        "0.weight (representative 0)",
        "0.weight (representative 1)",
        "total",
    ]
    assert set(rows.values()) == {(36, 18), (72, 36)}


def test_names_are_those_of_the_bare_model():
    """What wrappers add to names is not shown."""
    _, bare = wrapped()
    wrapper = nn.ModuleDict({"module": small_cnn()})
    _, opt = wrapped(model=wrapper, selector=ParameterSelector("*1.weight"))

    assert "module" not in opt.summary()
    assert bare.summary().splitlines()[1] == opt.summary().splitlines()[1]


@given(
    st.lists(
        st.tuples(st.text("abc.", min_size=1), st.integers(0, 10**9), st.floats(0, 1)),
        max_size=60,
    ),
    st.booleans(),
)
def test_all_rows_are_there_and_as_long_as_the_header(rows, drawn):
    """Any names and numbers, none at all and empty representatives too, make aligned columns."""
    counts = kept_counts(
        [Representative(name) for name, _, _ in rows],
        [n for _, n, _ in rows],
        [int(share * n) if drawn else None for _, n, share in rows],
    )
    *lines, last = summary_text(counts, Phase.SEARCHING, int(drawn)).splitlines()

    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert last.startswith("phase: searching, ")


def test_a_summary_is_of_the_mask_that_was_drawn():
    """What happens to the model afterwards changes no number."""
    model, opt = untied(sample_every=None)
    opt.sample()
    before = opt.summary()
    model[1] = nn.BatchNorm2d(5)

    assert opt.summary() == before
    with pytest.raises(RuntimeError, match=r"'1\.weight' has shape \(5,\)"):
        opt.sample()


def test_a_share_of_nothing_is_no_number():
    """An empty representative has no share."""
    assert "q" in summary_text([KeptCount("q", 0, 0, False)], Phase.SEARCHING, 1)
