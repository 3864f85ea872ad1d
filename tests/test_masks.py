"""Scores to masks, masks to distances, against the slow twin."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from reference import exact_count, reference_distance, reference_mask, reference_ties
from strategies import layers, mask_sequences, masks, prune_ratios, scopes
from torch import Tensor

from torch_worm_optim import counting, threshold
from torch_worm_optim import masks as masks_module
from torch_worm_optim.counting import count_bits, count_flags
from torch_worm_optim.masks import (
    compute_mask,
    mask_distance,
    new_window,
    newest_mask,
    push_mask_,
    spread_mask,
    unit_magnitudes,
    window_distances,
)

min_keeps = st.integers(0, 3)


def draw_mask(weights: dict[str, Tensor], ratio: float, **options: object) -> list[bool]:
    """The mask of these weights, as a list."""
    return compute_mask(weights, ratio, **options).kept.tolist()


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
    mask = compute_mask(weights, ratio, scope=scope, min_keep=min_keep)

    assert reference_mask(as_lists(weights), ratio, scope, min_keep) == mask.kept.tolist()
    assert reference_ties(as_lists(weights), ratio, scope, min_keep) == mask.n_tied


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
        compute_mask(weights, data.draw(prune_ratios), scope=data.draw(scopes))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_beyond_the_usual_can_be_ranked(dtype):
    """8-bit floats and complex numbers are ranked by their magnitude."""
    weights = torch.tensor([1.0, -3.0, 0.5, 2.0]).to(dtype)

    assert draw_mask({"w": weights}, 0.5) == [False, True, False, True]


def test_numbers_of_eight_bits_that_are_bad_are_named():
    """What torch cannot ask about eight-bit numbers is asked about wider ones."""
    weights = torch.randn(100)
    weights[3] = math.nan

    with pytest.raises(ValueError, match="'w': it has NaN or infinite"):
        compute_mask({"w": weights.to(torch.float8_e5m2)}, 0.5)


def test_nothing_to_rank_raises():
    """No entries, no mask."""
    with pytest.raises(ValueError, match="no entries to rank"):
        compute_mask({"empty": torch.empty(0)}, 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_ratios_and_scopes_must_be_in_range(ratio):
    """What is not a share below 1, or not a known scope, is refused."""
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\)"):
        compute_mask({"w": torch.ones(4)}, ratio)
    with pytest.raises(ValueError, match=r"`scope` must be .* got 'Layer'"):
        compute_mask({"w": torch.ones(4)}, 0.5, scope="Layer")


@pytest.fixture
def _small_chunks(monkeypatch):
    """Chunks and samples so small that a few entries go every way that millions go."""
    monkeypatch.setattr(threshold, "_HOST_CHUNK", 8)
    monkeypatch.setattr(threshold, "_LEAST_CHUNK", 8)
    monkeypatch.setattr(threshold, "FEW", 4)
    monkeypatch.setattr(threshold, "_SAMPLE", 6)
    monkeypatch.setattr(masks_module, "_PART", 3)
    monkeypatch.setattr(masks_module, "GLANCE", 2)
    monkeypatch.setattr(masks_module, "_FEW", 2)
    monkeypatch.setattr(threshold, "_DEVIATIONS", 0.7)


@pytest.mark.usefixtures("_small_chunks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers(), layers(), prune_ratios, scopes, min_keeps, st.booleans())
@example({"a": torch.ones(40)}, {}, 0.5, "global", 1, True)
@example({"a": torch.arange(40.0)}, {"b": torch.zeros(30)}, 0.6, "global", 1, True)
def test_masks_in_chunks_equal_the_slow_twin(first, second, ratio, scope, min_keep, strided):
    """Bracket, ends with many equals, and bisection: every way gives the one mask."""
    weights = {**first, **{f"{name}'": tensor for name, tensor in second.items()}}
    if strided:
        weights = {name: torch.stack([w, w], -1)[..., 0] for name, w in weights.items()}

    mask = compute_mask(weights, ratio, scope=scope, min_keep=min_keep)

    assert reference_mask(as_lists(weights), ratio, scope, min_keep) == mask.kept.tolist()
    assert reference_ties(as_lists(weights), ratio, scope, min_keep) == mask.n_tied


@pytest.mark.usefixtures("_small_chunks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(*[st.integers(1, 5)] * 4, st.sampled_from("abcd")), min_size=1, max_size=3),
    prune_ratios,
    st.integers(0, 99),
)
# A contiguous piece of a strided tensor once overran what was left of a chunk.
@example([(4, 3, 2, 5, "b")], 0.5, 0)
def test_masks_of_parts_with_gaps_equal_the_slow_twin(cases, ratio, seed):
    """Parts of tensors in every kind of memory layout are read as they are indexed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, (*shape, kind) in enumerate(cases):
        whole = torch.randn([2 * size for size in shape], generator=generator)
        a, b, c, d = shape
        parts = {
            "a": lambda whole=whole: whole[::2],
            "b": lambda whole=whole, b=b: whole[:, :b],
            "c": lambda whole=whole, c=c: whole[:, :, c:],
            "d": lambda whole=whole, a=a, d=d: whole[:a, ..., :d].transpose(1, 2),
        }
        weights[str(i)] = parts[kind]()

    kept = draw_mask(weights, ratio)

    assert kept == reference_mask(as_lists(weights), ratio, "global", 1)


def test_numbers_near_nothing_rank_in_every_mode_of_the_processor():
    """Where what is below the smallest normal number is flushed to zero, double ones still rank."""
    scores = torch.randn(200_000, dtype=torch.float64)
    tiny = torch.randperm(200_000)[:8000]
    scores[tiny] = torch.pow(10.0, torch.empty(8000, dtype=torch.float64).uniform_(-60, -38))
    order = torch.sort(scores.abs(), stable=True).indices

    flushes = torch.set_flush_denormal(True)
    try:
        kept = compute_mask({"w": scores}, 0.02, min_keep=0).kept
    finally:
        torch.set_flush_denormal(False)

    assert flushes
    assert not kept[order[:4000]].any()
    assert kept[order[4000:]].all()


@pytest.mark.parametrize("sample", ["lowest", "highest"])
def test_a_sample_that_misleads_costs_time_only(monkeypatch, sample):
    """The lowest are found wherever the bracket lies."""
    scores = torch.randn(300_000, dtype=torch.float64)
    order = scores.abs().sort().indices
    chosen = order[:200] if sample == "lowest" else order[-200:]
    monkeypatch.setattr(
        threshold.Scores,
        "sample",
        lambda self, stride, dtype: self.keys_at(chosen.sort().values, dtype),
    )

    for count in (1, 150_000, 299_999, 300_000):
        kept = threshold.remove_lowest([threshold.Scores([scores])], count).kept[0]
        assert set(order[:count].tolist()) == set((~kept).nonzero().flatten().tolist())


@pytest.mark.parametrize("equal", ["half", "all"])
def test_equal_scores_are_found_without_bisection(monkeypatch, equal):
    """A score that a large share has is found by a guess, which two passes prove."""
    scores = torch.randn(200_000)
    scores[: 120_000 if equal == "half" else 200_000] = 0.7
    monkeypatch.setattr(threshold, "_bisect", None)

    selection = threshold.remove_lowest([threshold.Scores([scores])], 100_000)

    order = scores.abs().sort(stable=True).indices
    assert not selection.kept[0][order[:100_000]].any()
    assert selection.n_tied == (120_000 if equal == "half" else 200_000)


def test_numbers_that_round_to_infinity_are_finite():
    """The largest single precision number is no infinity, though bfloat16 takes it for one."""
    scores = torch.randn(100_000)
    scores[7] = torch.finfo(torch.float32).max

    assert compute_mask({"w": scores}, 0.5).kept[7]
    scores[8] = -math.inf
    equal = torch.full((100_000,), 0.5)  # so many that no bracket holds few
    equal[9] = math.nan
    for ratio, bad in itertools.product((0.0, 0.5), (scores, equal)):
        with pytest.raises(ValueError, match="'w': it has NaN or infinite"):
            compute_mask({"w": bad}, ratio)


@pytest.mark.parametrize("width", [640, 768, 896, 1024, 1152, 1280, 2048])
@pytest.mark.parametrize("rows", [2000, 30_000])
def test_a_sample_sees_all_columns(width, rows):
    """Columns differ in scale: were some left out, the threshold would be looked for elsewhere."""
    weights = torch.arange(1.0, width + 1).repeat(rows, 1)
    scores = threshold.Scores([weights])

    sampled = scores.sample(threshold._stride(scores.n), torch.float32)

    assert len(sampled.unique()) == width
    assert len(sampled) < scores.n / 4


@given(
    st.lists(st.integers(0, 7), min_size=1),
    st.integers(0, 9),
    st.integers(0, 90_000) | st.integers(31_000, 90_000),  # fewer are counted in another way
    st.integers(1, 90_000) | st.just(90_000),
    st.integers(0, 99),
)
@example([4, 0, 7], 3, 8 * 240 * 33 + 5, 90_000, 1)
@example([0], 0, 8 * 240 * 44, 8 * 240 * 20 + 1, 0)
@example([0, 0], 0, 30_721, 30_720, 0)  # asked for twice
@example([1], 0, 8 * 240 * 44, 90_000, 0)  # the highest lane's sum is a negative word, or is not
@example([7, 3], 0, 8 * 240 * 44, 90_000, 0)
def test_bits_are_counted_eight_bytes_at_a_time(bits, start, n, part, seed):
    """Lanes neither overflow nor miss a byte, wherever the bytes begin."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (start + n,), dtype=torch.uint8, generator=generator)
    if seed % 2:
        values.fill_(255)
    if seed % 3 == 2:  # some lanes are as full as they get, some are not
        values[start + n // 3 :] = 0

    counted = count_bits(torch.split(values[start:], part), bits).tolist()

    assert counted == [int((values[start:].numpy() >> bit & 1).sum()) for bit in bits]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_words", [240 * 420, 240 * 421])  # shares are equal or not
def test_counts_are_the_same_for_any_number_of_threads(n_threads, n_words):
    """Each adds a share of its own, of so many that there is one for each."""
    assert n_words > 3 * counting._GRAIN
    values = torch.randint(256, (8 * n_words,), dtype=torch.uint8)
    values[: 4 * n_words] = 255  # lanes as full as they get
    flags = values > 99
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        counts, n_flags = count_bits([values], range(8)), count_flags(flags)
    finally:
        torch.set_num_threads(before)

    assert counts.tolist() == [int((values.numpy() >> bit & 1).sum()) for bit in range(8)]
    assert int(n_flags) == flags.numpy().sum()


@given(st.integers(0, 20_000), st.integers(0, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0))
@example(200_000, 3, 1.0, 0)  # every lane as full as it gets, words that do not begin at the flags
def test_flags_are_counted_as_one_by_one(n, start, share, seed):
    """Wherever they lie in memory, however many: a wrong count would only make a mask slower."""
    flags = torch.rand(start + n, generator=torch.Generator().manual_seed(seed % 2**63)) < share

    assert int(count_flags(flags[start:])) == sum(flags[start:].tolist())


@given(st.integers(0, 300), st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.integers(0))
@example(8, 1.0, 0)
@example(7, 1.0, 0)  # no eight of them
def test_set_flags_are_found_as_one_by_one(n, share, seed):
    """Eight at a time and what is left over, few or many."""
    flags = torch.rand(n, generator=torch.Generator().manual_seed(seed % 2**63)) < share

    assert threshold.where_set(flags).tolist() == [i for i, on in enumerate(flags.tolist()) if on]


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
        kept = compute_mask({"w": scores}, ratio, min_keep=0).kept
        order = torch.sort(scores.abs().flatten(), stable=True).indices
        expected = torch.ones(scores.numel(), dtype=torch.bool)
        expected[order[: round(ratio * scores.numel())]] = False
        assert torch.equal(expected, kept)


@pytest.mark.parametrize("n", [100_000, 1_000_003, 4_000_003])
def test_large_masks_equal_a_sort(n):
    """At sizes of real networks the mask is still the one that a stable sort gives."""
    scores = torch.randn(n).abs().round(decimals=3)

    kept = compute_mask({"w": scores}, 0.5).kept

    order = torch.sort(scores, stable=True).indices
    expected = torch.ones(n, dtype=torch.bool)
    expected[order[: round(0.5 * n)]] = False
    assert torch.equal(expected, kept)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(masks(n), masks(n), masks(n))))
def test_distance_is_a_metric(three):
    """Zero for equal masks only, symmetric, and never longer than the way through a third."""
    a, b, c = (torch.tensor(mask) for mask in three)

    assert mask_distance(a, b) == reference_distance(*three[:2])
    assert (mask_distance(a, b) == 0) == torch.equal(a, b)
    assert mask_distance(a, b) == mask_distance(b, a)
    assert mask_distance(a, c) <= mask_distance(a, b) + mask_distance(b, c) + 1e-12
    assert mask_distance(a, ~a) == 1


def test_masks_of_two_shapes_have_no_distance():
    """Shapes must agree; broadcasting would count entries that are not there."""
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(1,\)"):
        mask_distance(torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.bool))


@given(mask_sequences(), st.one_of(st.integers(2, 9), st.integers(10, 20)))
# Older rows were once shifted in a copy, so that windows of more than eight forgot.
@example([[True]] * 12, 9)
@example([[False], [True]] * 10, 17)
@pytest.mark.parametrize("few", [0, 1 << 15])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_window_distances_equal_the_distances_one_by_one(monkeypatch, few, sequence, window):
    """One pass over the packed window gives what comparing the masks two by two gives."""
    monkeypatch.setattr(masks_module, "_FEW", few)
    bits = new_window(len(sequence[0]), window)
    for mask in sequence:
        push_mask_(bits, torch.tensor(mask))

    held = sequence[-window:]
    assert newest_mask(bits).tolist() == held[-1]
    assert window_distances(bits, len(held)) == tuple(
        reference_distance(held[-1], older) for older in held[:-1]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_the_same_on_every_device(dtype, scope):
    """CPU and CUDA draw one mask, ties included, and measure one distance."""
    weights = {name: torch.randn(4000).to(dtype) for name in "abc"}
    on_gpu = {name: tensor.cuda() for name, tensor in weights.items()}

    kept = [compute_mask(w, 0.5, scope=scope).kept for w in (weights, on_gpu)]

    assert torch.equal(kept[0], kept[1].cpu())
    windows = [new_window(12000, 5, device=mask.device) for mask in kept]
    for bits, mask in zip(windows, kept, strict=True):
        push_mask_(bits, mask)
        push_mask_(bits, mask.roll(1))
    assert window_distances(windows[0], 2) == window_distances(windows[1], 2)


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

    scores = unit_magnitudes([(entries, units)])
    mask = torch.rand(n_units, generator=generator) < 0.5
    spread = spread_mask(mask, units, shape)

    for unit, indices in enumerate(members):
        mean = sum(abs(float(entries[index])) for index in indices) / len(indices)
        assert math.isclose(float(scores[unit]), mean, rel_tol=1e-12)
        assert all(bool(spread[index]) == bool(mask[unit]) for index in indices)
    both = unit_magnitudes([(entries, units), (2 * entries, units)])
    torch.testing.assert_close(both, scores * 1.5)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_units_are_summed_in_single_precision_at_least(dtype):
    """In half precision a long sum would stop growing."""
    entries = torch.ones(2, 4096).to(dtype)

    scores = unit_magnitudes([(entries, (2,))])

    assert scores.dtype == torch.float32
    assert scores.equal(torch.ones(2))


def test_a_mask_of_entries_spreads_to_itself():
    """Without units every entry has its own place."""
    mask = torch.tensor([True, False, True, True])

    assert spread_mask(mask, (), (2, 2)).equal(mask.view(2, 2))
