"""Masks drawn into the window in one pass: the same as in the ordinary way."""

from __future__ import annotations

import pytest
import torch
from drawing import check_equal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import layers, prune_ratios
from torch import nn
from training import BASES, same, weights_of

from torch_worm_optim import ParameterSelector, WormOptimizer, mask_pass, threshold
from torch_worm_optim.masks import new_window


@pytest.fixture
def few(monkeypatch):
    """Few entries are drawn as many are: in chunks."""
    monkeypatch.setattr(mask_pass, "FEW", 0)
    monkeypatch.setattr(threshold, "FEW", 1)
    monkeypatch.setattr(mask_pass, "_CHUNK", 16)
    monkeypatch.setattr(mask_pass, "_LEAST_CHUNK", 16)
    monkeypatch.setattr(mask_pass, "GLANCE", 2)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers(),
    prune_ratios,
    st.integers(2, 8),
    st.sampled_from([0, 0, 1]),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
@example({"one": torch.tensor([-0.0, 0.0, 1e-45])}, 0.5, 2, 0, 0, 0, torch.bfloat16)
def test_masks_ties_and_distances_are_those_of_the_ordinary_way(
    few, monkeypatch, entries, ratio, window, min_keep, below, above, coarse
):
    """For whatever weights and bracket; it may give up for a quota, or what rounds to infinity."""

    def around(scores, count):
        key = int(scores.all_keys(coarse).sort().values[count - 1])
        low, high = max(0, key - below), min(key + above, threshold.COARSE_INF[coarse])
        return threshold.Bracket(low, high, coarse)

    # Of so few a sample says so little that every bracket would be too wide.
    monkeypatch.setattr(mask_pass, "_bracket", around)
    if round(ratio * sum(tensor.numel() for tensor in entries.values())) > 0:
        may = min_keep > 0 or any(
            tensor.abs().to(coarse).isinf().any() for tensor in entries.values()
        )
        check_equal(mask_pass, entries, ratio, window, min_keep, may_give_up=may)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [2, 5, 8])
def test_so_are_those_of_many_entries(monkeypatch, dtype, window):
    """Ties of every kind, whole lanes and what is left over, tensors that no chunk ends with."""
    monkeypatch.setattr(mask_pass, "_CHUNK", 20 * 1920)
    monkeypatch.setattr(mask_pass, "_LEAST_CHUNK", 20 * 1920)
    generator = torch.Generator().manual_seed(0)
    sizes = [70_000, 0, 16, 51_113]
    normal = {
        str(i): torch.randn(n, generator=generator).to(dtype) for i, n in enumerate(sizes)
    } | {"strided": torch.randn(300, 200, generator=generator).to(dtype).T}
    gave_up = check_equal(mask_pass, normal, 0.5, window, 0, may_give_up=False)
    if dtype != torch.float16:
        for scale in (1e-7, 1e7):  # for which float16 has no normal numbers
            scaled = {name: tensor * scale for name, tensor in normal.items()}
            check_equal(mask_pass, scaled, 0.5, window, 0, may_give_up=False)
    for entries, ratio in (
        ({name: (tensor * 1024).round() for name, tensor in normal.items()}, 0.3),
        ({name: tensor * torch.finfo(dtype).tiny for name, tensor in normal.items()}, 0.03),
        ({name: tensor * (tensor > 0) for name, tensor in normal.items()}, 0.7),
        ({name: tensor * (tensor > 0) for name, tensor in normal.items()}, 0.5),
        ({name: torch.ones_like(tensor) for name, tensor in normal.items()}, 0.5),
    ):
        gave_up += check_equal(mask_pass, entries, ratio, window, 0, may_give_up=True)
    assert gave_up < 4 * (window + 1)


@pytest.mark.parametrize(
    ("weights", "coarse"),
    [
        (torch.linspace(1, 2, 60_000), torch.float16),
        (torch.linspace(1, 2, 60_000, dtype=torch.float64), torch.float16),
        (torch.linspace(1, 2, 60_000).half(), torch.float16),
        (torch.linspace(1, 2, 60_000).bfloat16(), torch.bfloat16),
        (torch.linspace(1e-5, 1e-4, 60_000), torch.bfloat16),  # 6.1e-5 is the lowest normal one
        (torch.linspace(1, 2e5, 60_000), torch.bfloat16),  # 65504 is the highest
        # A gap of 307 float16 numbers, and of 38 bfloat16 ones; then of 1,000 or so and 130
        (torch.linspace(1, 1.7, 60_000) + 0.3 * (torch.arange(60_000) > 29_999), torch.bfloat16),
        (torch.linspace(1, 1.7, 60_000) + 1.5 * (torch.arange(60_000) > 29_999), None),
        (torch.ones(60_000), None),
    ],
)
def test_scores_are_rounded_to_the_finest_that_serves(weights, coarse):
    """A byte must tell all inside the bracket apart, and they must be normal numbers."""
    bracket = mask_pass._bracket(threshold.Scores([weights]), 30_000)
    assert (bracket and bracket.coarse) == coarse
    check_equal(mask_pass, {"one": weights}, 0.5, 5, 0, may_give_up=coarse is None)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)]
)
def test_types_may_be_mixed(dtypes):
    """The finest that any of them can do with is taken for all."""
    weights = [torch.linspace(1, 2, 30_000).to(dtype) for dtype in dtypes]
    assert mask_pass._bracket(threshold.Scores(weights), 30_000).coarse == torch.float16
    check_equal(mask_pass, dict(zip("ab", weights, strict=True)), 0.5, 5, 0, may_give_up=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_near_nothing_rank_in_every_mode_of_the_processor(dtype):
    """Some types keep them where others flush them, so that rounded ones have another order."""
    weights = [torch.randn(60_000) * 2**-127, torch.randn(60_000, dtype=torch.float64) * 2**-127]
    weights[0] = weights[0].to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a mode is one thread's
    flushes = torch.set_flush_denormal(True)
    try:
        check_equal(mask_pass, dict(zip("ab", weights, strict=True)), 0.5, 5, 0, may_give_up=False)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert flushes


def test_one_that_is_infinite_when_rounded_is_ranked_otherwise():
    """A magnitude that float16 has no number for; the masks that are held stay."""
    weights = torch.linspace(0.1, 1, 60_000)
    weights[7] = 7e4
    assert check_equal(mask_pass, {"one": weights}, 0.5, 5, 0, may_give_up=True) == 6


def spoilt(value):
    """Many weights, one of them such."""
    weights = [torch.randn(60_000), torch.full((50,), 1e-6)]
    weights[0][50_001] = value
    return weights


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        (spoilt(0.0), [1, 1]),  # the second would keep nothing
        (spoilt(torch.nan), [0, 0]),
        (spoilt(-torch.inf), [0, 0]),
    ],
)
def test_giving_up_leaves_the_masks_held_as_they_were(weights, quotas):
    """What is no ranking, or keeps too few, is found when the mask is in the window already."""
    window = new_window(60_050, 5).random_(0, 128)
    before = window.clone()
    assert mask_pass.draw_mask_(weights, window, 30_000, quotas, 4) is None
    assert torch.equal(window, before)


def test_a_sample_that_misleads_leaves_the_masks_held_as_they_were(monkeypatch):
    """The threshold is not where it was looked for."""
    monkeypatch.setattr(mask_pass, "_bracket", lambda *_: threshold.Bracket(0, 5))
    window = new_window(60_050, 5).random_(0, 128)
    before = window.clone()
    assert mask_pass.draw_mask_(spoilt(0.0), window, 30_000, [0, 0], 4) is None
    assert torch.equal(window, before)


@pytest.mark.parametrize("where", ["where_set", "keep_highest", "_n_kept"])
def test_an_interruption_leaves_the_masks_held_as_they_were(monkeypatch, where):
    """In the middle of the pass, after it, and when all is done but the answer."""
    monkeypatch.setattr(mask_pass, "_CHUNK", 20 * 1920)
    usual, calls = getattr(mask_pass, where), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2 or where == "keep_highest":
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(mask_pass, where, interrupted)
    monkeypatch.setattr(mask_pass, "_LEAST_CHUNK", 20 * 1920)
    weights = [torch.randn(60_000), torch.randn(50)]
    window = new_window(60_050, 5).random_(0, 128)
    before = window.clone()
    with pytest.raises(KeyboardInterrupt):
        mask_pass.draw_mask_(weights, window, 30_000, [1, 1], 4)
    assert torch.equal(window, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_search_is_that_of_the_ordinary_way(monkeypatch, dtype):
    """Histories, windows and weights have the same bits."""

    def search():
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).to(dtype)
        opt = WormOptimizer(
            BASES["SGD momentum"](model.parameters()),
            model,
            ParameterSelector("*"),
            sample_every=2,
            stopping_point=0.01,
        )
        for _ in range(24):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            opt.step()
        return opt.history, [opt._search.window], weights_of(model)

    drawn = []
    usual = mask_pass.draw_mask_
    monkeypatch.setattr(
        mask_pass, "draw_mask_", lambda *args: drawn.append(usual(*args)) or drawn[-1]
    )
    history, window, weights = search()
    assert sum(each is not None for each in drawn) > 3
    monkeypatch.setattr(mask_pass, "can_draw", lambda *_: False)
    plainly = search()
    assert history == plainly[0]
    assert same(window, plainly[1])
    assert same(weights, plainly[2])


@pytest.mark.parametrize("window", [2, 8, 9])
def test_the_default_device_does_not_matter(window):
    """Weights are ranked where they are, by both ways."""
    model = nn.Linear(300, 300)
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        ParameterSelector("*"),
        sample_every=None,
        stopping_point=0,
        window=window,
    )
    torch.set_default_device("meta")
    try:
        samples = [opt.sample() for _ in range(window + 1)]
    finally:
        torch.set_default_device(None)
    assert samples[-1].distances == (0.0,) * (window - 1)


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_many_that_are_no_numbers_leave_the_masks_held_as_they_were(share):
    """The bracket is upside down then."""
    weights = torch.randn(60_000)
    weights[: round(share * 60_000)] = torch.nan
    window = new_window(60_000, 5).random_(0, 128)
    before = window.clone()
    assert mask_pass.draw_mask_([weights], window, 30_000, [0], 4) is None
    assert torch.equal(window, before)
