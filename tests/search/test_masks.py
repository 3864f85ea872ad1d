"""Scores to masks, masks to distances, against the slow twin."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import exact_count, reference_mask, reference_ties
from strategies import layers, prune_ratios, scopes
from torch import Tensor

from torch_worm_optim import Part
from torch_worm_optim.search import Scores, compute_mask, unit_magnitudes, unpack

min_keeps = st.integers(0, 3)


def draw(weights: dict[str, Tensor], ratio: float, **options: object) -> tuple[Tensor, int]:
    """The mask of these weights as one tensor, and how many entries tie for it."""
    scores = [
        Scores(name, tensor.numel(), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in weights.items()
    ]
    mask = compute_mask(scores, ratio, **options)
    parts = [unpack(bits, each.numel) for bits, each in zip(mask.kept, scores, strict=True)]
    return torch.cat(parts), mask.n_tied


def draw_mask(weights: dict[str, Tensor], ratio: float, **options: object) -> list[bool]:
    """The mask of these weights, as a list."""
    return draw(weights, ratio, **options)[0].tolist()


def as_lists(weights: dict[str, Tensor]) -> list[list[float]]:
    """The scores of these weights, exactly, as the slow twin takes them."""
    return [tensor.double().abs().flatten().tolist() for tensor in weights.values()]


@given(layers(), prune_ratios, scopes, min_keeps)
@example({"bn": torch.ones(8)}, 0.5, "global", 1)
@example({"a": torch.ones(2), "b": torch.zeros(6)}, 0.5, "global", 1)
@example({"a": torch.tensor([5e-324, 0.0], dtype=torch.float64)}, 0.5, "layer", 0)
@example({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.ones(4)}, 0.99, "global", 1)
# What was tied once depended on whether anything had to be set aside.
@example({"a": torch.zeros(2), "b": torch.zeros(1)}, 0.9, "layer", 1)
def test_mask_equals_the_slow_twin(weights, ratio, scope, min_keep):
    """The fast mask is the one that sorting by (score, position) gives, bit for bit."""
    kept, n_tied = draw(weights, ratio, scope=scope, min_keep=min_keep)

    assert reference_mask(as_lists(weights), ratio, scope, min_keep) == kept.tolist()
    assert reference_ties(as_lists(weights), ratio, scope, min_keep) == n_tied


@given(layers(), prune_ratios, min_keeps, st.data())
def test_what_each_selector_found_is_ranked_by_itself(weights, ratio, min_keep, data):
    """As if the others were not there; groups may be interleaved."""
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(weights), max_size=len(weights)))
    kept, tied = draw(weights, ratio, scope="selector", min_keep=min_keep, groups=groups)
    parts = kept.split([each.numel() for each in weights.values()])
    n_tied = 0
    for group in set(groups):
        members = [w for w, each in zip(as_lists(weights), groups, strict=True) if each == group]
        of_group = [p for p, each in zip(parts, groups, strict=True) if each == group]
        expected = reference_mask(members, ratio, "global", min_keep)
        assert torch.cat(of_group).tolist() == expected
        n_tied += reference_ties(members, ratio, "global", min_keep)
    assert tied == n_tied


@given(layers(), prune_ratios, scopes)
@example({"bn": torch.ones(64)}, 0.5, "global")
def test_exactly_the_promised_count_goes(weights, ratio, scope):
    """round(p * n) entries are removed, however many scores are equal."""
    sizes = [tensor.numel() for tensor in weights.values()]

    kept = draw_mask(weights, ratio, scope=scope, min_keep=0)

    assert exact_count(ratio, sizes, scope) == kept.count(False)


@given(layers(), prune_ratios, scopes, min_keeps)
def test_no_representative_loses_all(weights, ratio, scope, min_keep):
    """At least min_keep entries of each representative survive, or all that it has."""
    kept = torch.tensor(draw_mask(weights, ratio, scope=scope, min_keep=min_keep))

    sizes = [tensor.numel() for tensor in weights.values()]
    for part, size in zip(kept.split(sizes), sizes, strict=True):
        assert int(part.sum()) >= min(min_keep, size)


@given(layers(), prune_ratios, prune_ratios, scopes, min_keeps)
def test_a_higher_ratio_removes_a_superset(weights, a, b, scope, min_keep):
    """What goes at a low ratio also goes at a higher one."""
    low, high = sorted((a, b))

    few = draw_mask(weights, low, scope=scope, min_keep=min_keep)
    many = draw_mask(weights, high, scope=scope, min_keep=min_keep)

    assert all(stays or not still for stays, still in zip(few, many, strict=True))


@given(layers(), prune_ratios, scopes, min_keeps, st.integers(-3, 3))
def test_scaling_all_scores_changes_nothing(weights, ratio, scope, min_keep, exponent):
    """Only the order of scores counts; a power of two scales them without rounding."""
    scaled = {name: tensor * 2.0**exponent for name, tensor in weights.items()}
    assume(all((scaled[name] / 2.0**exponent).equal(weights[name]) for name in weights))

    assert draw_mask(weights, ratio, scope=scope, min_keep=min_keep) == draw_mask(
        scaled, ratio, scope=scope, min_keep=min_keep
    )


@given(layers(), prune_ratios, scopes, st.data())
def test_signs_do_not_matter(weights, ratio, scope, data):
    """A weight and its negative have one score."""
    flipped = {
        name: tensor * data.draw(st.sampled_from([1, -1])) for name, tensor in weights.items()
    }

    assert draw_mask(weights, ratio, scope=scope) == draw_mask(flipped, ratio, scope=scope)


@given(st.permutations(range(12)), prune_ratios, min_keeps, st.integers(1, 11))
def test_the_order_of_representatives_matters_for_ties_only(ranks, ratio, min_keep, cut):
    """With all scores different, the same entries go whichever representative comes first."""
    scores = torch.tensor(ranks, dtype=torch.float32)
    front, back = scores[:cut], scores[cut:]

    kept = draw_mask({"front": front, "back": back}, ratio, min_keep=min_keep)
    swapped = draw_mask({"back": back, "front": front}, ratio, min_keep=min_keep)

    assert kept == swapped[12 - cut :] + swapped[: 12 - cut]


@given(layers(max_layers=1), prune_ratios, min_keeps)
def test_one_representative_has_one_scope(weights, ratio, min_keep):
    """With a single representative, global and layer masks are the same."""
    assert draw_mask(weights, ratio, scope="global", min_keep=min_keep) == draw_mask(
        weights, ratio, scope="layer", min_keep=min_keep
    )


@given(layers(), prune_ratios, scopes, min_keeps, st.data())
def test_empty_representatives_change_nothing(weights, ratio, scope, min_keep, data):
    """Wherever they are, the first and the last included."""
    some = list(weights.items())
    for i in range(data.draw(st.integers(1, 3))):
        some.insert(data.draw(st.integers(0, len(some))), (f"empty{i}", torch.empty(0, 2)))

    assert draw_mask(dict(some), ratio, scope=scope, min_keep=min_keep) == draw_mask(
        weights, ratio, scope=scope, min_keep=min_keep
    )


def test_an_empty_representative_does_not_take_the_place_of_another():
    """What has to keep one entry is the second here, and the third must not be asked instead."""
    weights = {"none": torch.empty(0), "low": torch.tensor([0.1, 0.2]), "high": torch.ones(2)}

    assert draw_mask(weights, 0.5, min_keep=1) == [False, True, False, True]


@given(layers(), layers(), prune_ratios)
def test_mixed_dtypes_rank_by_value(first, second, ratio):
    """Half precision beside double: entries are ranked by what they are worth, unrounded."""
    mixed = {**first, **{f"{name}'": tensor for name, tensor in second.items()}}

    kept = draw_mask(mixed, ratio, min_keep=0)

    assert reference_mask(as_lists(mixed), ratio, "global", 0) == kept


@given(layers(), st.data())
def test_bad_weights_are_named(weights, data):
    """One NaN or infinity anywhere raises, and the message names the parameter that has it."""
    name = data.draw(st.sampled_from(sorted(weights)))
    position = data.draw(st.integers(0, weights[name].numel() - 1))
    weights[name].view(-1)[position] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))

    with pytest.raises(ValueError, match=f"{name}.*NaN or infinite"):
        draw(weights, data.draw(prune_ratios), scope=data.draw(scopes))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_beyond_the_usual_can_be_ranked(dtype):
    """8-bit floats and complex numbers are ranked by their magnitude."""
    weights = torch.tensor([1.0, -3.0, 0.5, 2.0]).to(dtype)

    assert draw_mask({"w": weights}, 0.5) == [False, True, False, True]


def test_the_first_of_several_bad_weights_is_named():
    """Whoever mends one after the other goes through the network from its start."""
    weights = {"good": torch.ones(3), "first": torch.ones(3), "last": torch.ones(3)}
    weights["first"][2] = weights["last"][0] = math.nan

    for scope in ("global", "layer"):
        with pytest.raises(ValueError, match="Cannot rank 'first'"):
            draw(weights, 0.5, scope=scope)


def test_numbers_of_eight_bits_that_are_bad_are_named():
    """What torch cannot ask about eight-bit numbers is asked about wider ones."""
    weights = torch.randn(100)
    weights[3] = math.nan

    with pytest.raises(ValueError, match="'w': it has NaN or infinite"):
        draw({"w": weights.to(torch.float8_e5m2)}, 0.5)


def test_nothing_to_rank_raises():
    """No entries, no mask."""
    with pytest.raises(ValueError, match="no entries to rank"):
        draw({"empty": torch.empty(0)}, 0.5)


def test_numbers_near_nothing_rank_in_every_mode_of_the_processor():
    """Where what is below the smallest normal number is flushed to zero, double ones still rank."""
    scores = torch.randn(200_000, dtype=torch.float64)
    tiny = torch.randperm(200_000)[:8000]
    scores[tiny] = torch.pow(10.0, torch.empty(8000, dtype=torch.float64).uniform_(-60, -38))
    order = torch.sort(scores.abs(), stable=True).indices

    flushes = torch.set_flush_denormal(True)
    try:
        kept = draw({"w": scores}, 0.02, min_keep=0)[0]
    finally:
        torch.set_flush_denormal(False)

    assert flushes
    assert not kept[order[:4000]].any()
    assert kept[order[4000:]].all()


def test_numbers_that_round_to_infinity_are_finite():
    """The largest single precision number is no infinity, though bfloat16 takes it for one."""
    scores = torch.randn(100_000)
    scores[7] = torch.finfo(torch.float32).max

    assert draw({"w": scores}, 0.5)[0][7]
    scores[8] = -math.inf
    equal = torch.full((100_000,), 0.5)  # so many that no bracket holds few
    equal[9] = math.nan
    for ratio, bad in itertools.product((0.0, 0.5), (scores, equal)):
        with pytest.raises(ValueError, match="'w': it has NaN or infinite"):
            draw({"w": bad}, ratio)


@pytest.mark.parametrize("kind", ["half equal", "all equal", "denormal", "bf16", "fp16", "columns"])
def test_large_masks_of_awkward_scores_equal_a_sort(kind):
    """Ties by the hundred thousand, numbers near nothing, coarse types, and strided views."""
    torch.manual_seed(0)
    scores = torch.randn(400_000)
    if kind == "half equal":
        scores[torch.rand(400_000) < 0.5] = 0.7
    elif kind == "all equal":
        scores.fill_(0.3)
    elif kind == "denormal":
        scores *= 1e-40
    elif kind in ("bf16", "fp16"):
        scores = scores.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    else:
        scores = scores.view(1000, 400)[:, 100:300].mT

    for ratio in (0.01, 0.5, 0.9):
        kept = draw({"w": scores}, ratio, min_keep=0)[0]
        order = torch.sort(scores.abs().flatten(), stable=True).indices
        expected = torch.ones(scores.numel(), dtype=torch.bool)
        expected[order[: round(ratio * scores.numel())]] = False
        assert torch.equal(expected, kept)


@pytest.mark.parametrize("n", [100_000, 1_000_003, 4_000_003])
def test_large_masks_equal_a_sort(n):
    """At sizes of real networks the mask is still the one that a stable sort gives."""
    scores = torch.randn(n).abs().round(decimals=3)

    kept = draw({"w": scores}, 0.5)[0]

    order = torch.sort(scores, stable=True).indices
    expected = torch.ones(n, dtype=torch.bool)
    expected[order[: round(0.5 * n)]] = False
    assert torch.equal(expected, kept)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_the_same_on_every_device(dtype, kind, scope):
    """CPU and CUDA draw one mask, ties included."""
    weights = {name: torch.randn(4000) for name in "abc"}
    if kind == "ties":
        weights = {name: tensor.mul(2).round() for name, tensor in weights.items()}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    on_gpu = {name: tensor.cuda() for name, tensor in weights.items()}

    masks = [draw(w, 0.5, scope=scope) for w in (weights, on_gpu)]

    assert torch.equal(masks[0][0], masks[1][0])
    assert masks[0][1] == masks[1][1]


def test_scores_are_read_one_at_a_time():
    """Nothing but the representative that is looked at is held, since it may have been gathered."""
    held = []

    def read(tensor):
        held.append(weakref.ref(copy := tensor.clone()))
        assert sum(each() is not None for each in held) <= 2  # the last, until the next is bound
        return copy

    weights = {str(i): torch.randn(1 << 16) for i in range(5)}
    scores = [
        Scores(name, tensor.numel(), tensor.dtype, lambda tensor=tensor: read(tensor))
        for name, tensor in weights.items()
    ]
    compute_mask(scores, 0.5)
    assert len(held) > 5


@st.composite
def units_of_entries(draw):
    """A shape and how many units there are along each of its first dimensions."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    n_cut = draw(st.integers(1, len(sizes)))
    units = [draw(st.sampled_from([n for n in range(1, s + 1) if s % n == 0])) for s in sizes]
    return tuple(sizes), tuple(units[:n_cut])


def unit_of(index, shape, units):
    """The unit of an entry, counted in the order of the unit grid: written out from the words."""
    number = 0
    for position, (i, size) in enumerate(zip(index, shape, strict=True)):
        n = units[position] if position < len(units) else 1
        number = number * n + i // (size // n)
    return number


@given(units_of_entries(), st.integers(0, 100))
def test_units_are_blocks_of_entries(case, seed):
    """Means over blocks and masks of blocks are those of a walk over single entries."""
    shape, units = case
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(shape, generator=generator, dtype=torch.float64)
    n_units = math.prod(units)
    members = [[] for _ in range(n_units)]
    for index in itertools.product(*map(range, shape)):
        members[unit_of(index, shape, units)].append(index)

    part = Part("weight", units=units)
    scores = unit_magnitudes([part.blocks(entries)])
    mask = torch.rand(n_units, generator=generator) < 0.5
    spread = torch.empty(shape, dtype=torch.bool)
    part.write_(mask, spread)

    for unit, indices in enumerate(members):
        mean = sum(abs(float(entries[index])) for index in indices) / len(indices)
        assert math.isclose(float(scores[unit]), mean, rel_tol=1e-12)
        assert all(bool(spread[index]) == bool(mask[unit]) for index in indices)
    both = unit_magnitudes([part.blocks(entries), part.blocks(2 * entries)])
    torch.testing.assert_close(both, scores * 1.5)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_units_are_summed_in_single_precision_at_least(dtype):
    """In half precision a long sum would stop growing."""
    entries = torch.ones(2, 4096).to(dtype)

    scores = unit_magnitudes([Part("w", units=(2,)).blocks(entries)])

    assert scores.dtype == torch.float32
    assert scores.equal(torch.ones(2))


def test_a_mask_of_entries_spreads_to_itself():
    """Without units every entry has its own place."""
    mask = torch.tensor([True, False, True, True])

    spread = torch.empty(2, 2, dtype=torch.bool)
    Part("weight").write_(mask, spread)

    assert spread.equal(mask.view(2, 2))
