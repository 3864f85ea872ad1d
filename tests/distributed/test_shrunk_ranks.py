"""Shrinking on several ranks: what comes of it is what one process makes of it."""

from __future__ import annotations

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("needs fully_shard, which torch has from 2.6 on", allow_module_level=True)

import shrunk_jobs as jobs
from ranks import run_on_ranks
from soak import difference

from torch_worm_optim.shrink import cut_tensor


@pytest.fixture(scope="module")
def alone():
    """One process that shrinks."""
    return jobs.alone()


def test_one_process_that_shrinks_is_one_that_does_not(alone):
    """What ranks are compared with learns what the pruned network would, in fewer parameters."""
    dense = jobs.alone(shrinking=False)

    assert alone["kept"]
    for name, weights in alone["weights"].items():
        expected = dense["weights"][name]
        if name in alone["kept"]:
            expected = cut_tensor(expected, alone["kept"][name])
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("built_with", "old_stays"), [("module", False), ("module", True), ("wrapper", True)]
)
def test_replicas_shrink_alike_without_traffic(alone, built_with, old_stays):
    """Wrapped in DDP anew they train on as one process does, whatever the search was built with."""
    for result in run_on_ranks(2, jobs.replicated, built_with, old_stays):
        assert difference(result, alone) == ""


@pytest.mark.parametrize(("n", "layout"), [(2, "fsdp"), (4, "hybrid")])
def test_gathered_shrunk_and_sharded_again_is_one_process(alone, n, layout):
    """Weights, masks, history and momentum are those of one process, bit for bit."""
    for result in run_on_ranks(n, jobs.gathered, layout):
        assert difference(result, alone) == ""


def test_a_shrunk_run_resumes_from_one_file_on_other_ranks(alone):
    """What two ranks that shard have saved goes on in replicas, in shards and in one process."""
    file = run_on_ranks(2, jobs.saved, "fsdp", 3)[0]

    results = run_on_ranks(2, jobs.resumed, "ddp", 3, file)
    results += run_on_ranks(2, jobs.resumed, "fsdp", 3, file)
    results += run_on_ranks(2, jobs.resumed, "from rank 0", 3, file)
    results += [jobs.resumed("plain", 3, file)]
    for result in results:
        masks = {name.removeprefix("module."): mask for name, mask in result["masks"].items()}
        assert difference({**result, "masks": masks, "kept": alone["kept"]}, alone) == ""


def test_a_state_in_parts_on_ranks_is_not_cut():
    """ZeRO's optimizer is refused before anything is cut."""
    for message, weights, before in run_on_ranks(2, jobs.spread):
        assert "Load its consolidated state" in message
        assert difference(weights, before) == ""
