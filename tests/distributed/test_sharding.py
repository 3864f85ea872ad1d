"""Sharded weights: the masks of all ranks together are those of one process, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("needs fully_shard, which torch has from 2.6 on", allow_module_level=True)

import sharded_jobs as jobs
from ranks import run_on_ranks
from soak import difference
from training import PAPER

CASES = [
    {"prune_ratio": 0.5, "scope": "global", "min_keep": 1},
    {"prune_ratio": 0.97, "scope": "global", "min_keep": 3},
    {"prune_ratio": 0.3, "scope": "global", "min_keep": 0},
    {"prune_ratio": 0.6, "scope": "layer", "min_keep": 1},
]


@pytest.mark.parametrize(
    ("n", "layout", "which"),
    [
        (4, "fsdp", "scales"),  # five channels: the last rank has none
        (2, "blocks", "fused"),
        (3, "fsdp", "all"),
        (4, "hybrid", "all"),
        (4, "tp", "queries and keys"),
        (4, "tp+fsdp", "all"),
        (4, "tp+fsdp", "ties"),
        (2, "fsdp", "heads and rows"),
        (4, "tp+fsdp", "heads and rows"),
    ],
)
def test_masks_of_sharded_weights_are_those_of_one_process(n, layout, which):
    """Uneven and empty shards, two meshes, ties over ranks: masks and distances are equal."""
    cases = CASES if layout == "blocks" else CASES[1 : 2 if n == 4 else 3]
    alone = jobs.drawn("plain", which, cases)

    for result in run_on_ranks(n, jobs.drawn, layout, which, cases):
        assert difference(result, alone) == ""


def all_equal(results, expected):
    """Whether every rank has what is expected, and where not."""
    return [difference(result, expected) for result in results] == [""] * len(results)


@pytest.mark.parametrize(
    ("n", "layout", "truncate", "after", "how"),
    [
        (2, "fsdp", "gradient", False, {}),
        (2, "fsdp", "update", True, {}),
        (2, "fsdp", "update", False, PAPER),
        (4, "hybrid", "gradient", True, {}),
    ],
)
def test_training_sharded_is_training_alone(n, layout, truncate, after, how):
    """Weights, masks, history and ticket are equal; means of equal gradients are exact here."""
    options = {**jobs.OPTIONS, "truncate": truncate, "prune": True, **how}
    alone = jobs.trained("plain", "queries and keys", 24, **options)
    assert {row[-1] for row in alone["history"]} >= {"truncating", "converged"}
    assert alone["phase"] == "pruned"

    job = functools.partial(jobs.trained, layout, "queries and keys", 24, after, **options)
    assert all_equal(run_on_ranks(n, job), alone)


@pytest.mark.parametrize(
    ("before", "after", "flatten"),
    [(1, 2, True), (2, 4, False), (4, 1, True), (2, 2, False), (2, 2, True)],
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(tmp_path, before, after, flatten):
    """Loaded on more or fewer ranks, or unsharded, the search is the same and finds its ticket."""
    which, how = "queries and keys", {"flatten_optimizer_state_dict": flatten}
    alone = jobs.trained("plain", which, 20, **jobs.OPTIONS)
    halfway = jobs.trained("plain", which, 8, **jobs.OPTIONS)

    job = functools.partial(jobs.saved, "fsdp", which, 8, str(tmp_path), **how)
    assert all_equal(run_on_ranks(before, job), halfway)
    job = functools.partial(jobs.resumed, "fsdp", which, range(8, 20), str(tmp_path), **how)
    assert all_equal(run_on_ranks(after, job), (halfway, alone))


def test_a_pruned_network_resumes_on_another_number_of_ranks(tmp_path):
    """Saved on two ranks once pruned, it goes on on four as it does unsharded on one."""
    ends = []
    for before, after, layout in ((1, 1, "plain"), (2, 4, "fsdp")):
        folder = f"{tmp_path}/{layout}"
        job = functools.partial(jobs.saved, layout, "queries and keys", 20, folder, prune=True)
        saved = run_on_ranks(before, job)
        job = functools.partial(jobs.resumed, layout, "queries and keys", range(22, 27), folder)
        resumed = run_on_ranks(after, job)
        assert all_equal([loaded for loaded, _ in resumed], saved[0])
        ends += [end for _, end in resumed]

    assert saved[0]["phase"] == "pruned"
    assert all_equal(ends[1:], ends[0])


def test_a_checkpoint_of_two_meshes_resumes_on_one(tmp_path):
    """Split over columns and shards, saved, loaded on two shards, the search goes on."""
    which = "queries and keys"
    job = functools.partial(jobs.saved, "tp+fsdp", which, 8, str(tmp_path))
    saved = run_on_ranks(4, job)
    job = functools.partial(jobs.resumed, "fsdp", which, range(8, 20), str(tmp_path))
    results = run_on_ranks(2, job)

    assert all_equal([loaded for loaded, _ in results], saved[0])
    assert results[0][1]["history"][: len(saved[0]["history"])] == saved[0]["history"]
    assert len(results[0][1]["history"]) > len(saved[0]["history"])


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_whole_state_goes_between_one_process_and_ranks(broadcast):
    """What is gathered for one file loads unsharded, and what is saved unsharded loads sharded."""
    which = "fused"
    alone = jobs.trained("plain", which, 20, **jobs.OPTIONS)

    states = run_on_ranks(2, jobs.whole_state, "fsdp", which, 8)
    assert all_equal([jobs.from_whole_state("plain", which, range(8, 20), states[0], False)], alone)
    state = jobs.whole_state("plain", which, 8)
    assert difference(states[0]["opt"]["param_groups"], state["opt"]["param_groups"]) == ""
    results = run_on_ranks(2, jobs.from_whole_state, "fsdp", which, range(8, 20), state, broadcast)
    assert all_equal(results, alone)


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path):
    """Four ranks lose one in the middle of the search; one rank finds the same ticket."""
    which = "queries and keys"
    alone = jobs.trained("plain", which, 20, **jobs.OPTIONS)

    with pytest.raises(AssertionError):
        run_on_ranks(4, jobs.killed, "fsdp", which, str(tmp_path))
    job = functools.partial(jobs.resumed, "fsdp", which, range(8, 20), f"{tmp_path}/7")
    [(_, end)] = run_on_ranks(1, job)
    assert difference(end, alone) == ""


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_sample_gathers_one_parameter_at_a_time(scope):
    """Nothing larger than one whole parameter travels, with one ranking of all layers too."""
    width = 16
    for n_gathers, largest in run_on_ranks(2, jobs.gathered, scope):
        assert n_gathers >= 2
        assert largest == width * width


@pytest.mark.parametrize("layout", ["fsdp"])
def test_weights_that_are_nan_on_one_rank_raise_on_all(layout):
    """No rank goes on with a mask that another did not draw."""
    results = run_on_ranks(2, jobs.bad_weights, layout)

    assert all(len(messages) == 2 for messages in results)
    for messages in results:
        assert "'attn.q_proj.weight': it has NaN" in messages[0]


def test_what_cannot_work_says_so():
    """Each message names the parameter and the way out."""
    for messages in run_on_ranks(2, jobs.refused):
        assert "partial sums" in messages["partial_sums"]
        assert "FSDP1" in messages["fsdp1"]


def test_parts_may_be_sharded_each_in_its_own_way():
    """A follower need not be sharded as its scale is, and scales may be sharded anew."""
    results = run_on_ranks(2, jobs.resharded)

    assert all_equal([after for _, after in results], results[0][0])


def test_tickets_whole_and_sharded_apply_to_sharded_weights():
    """Both do what the ticket does to weights that are not sharded."""
    alone = jobs.applied("plain")

    assert int((alone["whole"] == 0).sum()) > 50
    assert all_equal(run_on_ranks(3, jobs.applied, "fsdp"), alone)


@pytest.mark.parametrize(("n", "zero"), [(2, False), (3, False), (2, True)])
def test_replicas_draw_the_same_masks_without_traffic(n, zero):
    """Under DDP every rank has the same search, with ZeRO's optimizer as base, too."""
    results = run_on_ranks(n, functools.partial(jobs.replicated, 20, zero, **jobs.OPTIONS))

    assert all_equal(results[1:], results[0])
    assert results[0]["phase"] == "pruned"
    if n == 2:
        alone = jobs.trained("plain", "queries and keys", 20, **jobs.OPTIONS)
        assert difference(results[0]["history"], alone["history"]) == ""


def test_a_search_on_top_of_zeros_optimizer_resumes(tmp_path):
    """Consolidated on rank 0, saved, and loaded on all ranks, it goes on bit for bit."""
    for whole, resumed in run_on_ranks(2, jobs.consolidated, 7, str(tmp_path)):
        assert difference(resumed, whole) == ""
        assert "truncating" in {row[-1] for row in whole["history"]}


def test_ranks_that_hold_unequal_parts_look_as_often():
    """Once a rank with more than the others took one more look, and waited for them for ever."""
    alone = jobs.large("plain")

    assert all_equal(run_on_ranks(2, jobs.large, "fsdp"), alone)
    assert int(alone["0.weight"].sum()) == 1


def test_what_starts_at_zero_and_what_does_not_move_is_said_of_sharded_weights():
    """Each rank says what it sees, and one without entries sees no zeros; no mask is drawn."""
    results = run_on_ranks(4, jobs.still, "fsdp")

    n_zero = [int(zeros[0].split()[0]) if zeros else 0 for zeros, _, _ in results]
    assert n_zero == [2, 2, 2, 1]  # five channels: the last rank has none of them
    assert [said for _, said, _ in results] == [results[0][1]] * 4
    assert results[0][1] == ["Nothing that is ranked has moved since the last mask"]
    assert {n_masks for _, _, n_masks in results} == {2}


@pytest.mark.parametrize("n", [1, 2])
def test_parameters_from_before_sharding_are_noticed(n):
    """A base optimizer that steps what the model no longer has once found a ticket of nothing."""
    for message in run_on_ranks(n, jobs.forgotten):
        assert "fully_shard()" in message
        assert "build the optimizers after that" in message
