"""The example for several ranks, run as a user runs it: stopped, and resumed on another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"

if not EXAMPLE.exists():
    pytest.skip("needs the repository's examples", allow_module_level=True)
pytest.importorskip("sklearn", reason="needs scikit-learn for its digits")
if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("needs FSDP2", allow_module_level=True)


def torchrun(n, out, code, *arguments):
    """Run the example on so many ranks, to this exit code; what it says, its results and ticket."""
    # Large batches, so that an epoch has few steps; the CPU, though there be GPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n}", str(EXAMPLE), f"--out={out}", "--batch-size=168"]
    command += ["--stopping-point=0.14", "--margin=0.05", "--retrain-epochs=1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    results = json.loads((out / "results.json").read_text())
    ticket = torch.load(out / "ticket.pt", weights_only=True)
    return said, results, ticket


def test_a_run_stopped_on_two_ranks_finds_its_ticket_on_one(tmp_path):
    """The search goes on where it was, and what was drawn before is still known."""
    said, before, ticket = torchrun(2, tmp_path, 1, "--max-epochs=5")
    assert "No ticket within 5 epochs" in said
    assert (before["ranks"], before["epochs"], ticket) == (2, 5, {})
    assert [row[0] for row in before["distances"]] == [8, 16, 24, 32, 40]
    assert before["distances"][-1][-1] == "truncating"

    said, after, ticket = torchrun(1, tmp_path, 0, "--resume")
    assert "epoch 5:" not in said
    assert after["distances"][:5] == before["distances"]
    step, largest, _, phase = after["distances"][-1]
    assert (after["ranks"], after["epochs"]) == (1, step // 8 + 1)
    assert phase == "converged"
    assert largest < 0.14

    assert sorted(ticket) == sorted(
        f"blocks.{block}.attn.{name}.weight" for block in (0, 1) for name in ("q_proj", "k_proj")
    )
    assert all(mask.shape == (64, 64) for mask in ticket.values())
    for mask in ticket.values():
        assert int(mask.sum()) == mask.numel() - round(0.7 * mask.numel())
    assert after["scores"]["before pruning"] > 80
    assert after["scores"]["in the end"] > 80


def test_what_two_ranks_shrink_one_rank_shrinks_as_far(tmp_path):
    """Sharded, and resumed from the pruned checkpoint in one replica, the network is as small."""
    shrink = ("--shrink", "--prune-ratio=0.5")
    said, sharded, ticket = torchrun(2, tmp_path, 0, *shrink)
    _, alone, same_ticket = torchrun(1, tmp_path, 0, *shrink, "--resume", "--mode=ddp")

    before, after = sharded["parameters"]
    assert f"{before} -> {after} parameters" in said
    assert after < before / 2
    assert alone["parameters"] == sharded["parameters"]
    assert all(torch.equal(mask, same_ticket[name]) for name, mask in ticket.items())
    assert all(run["scores"]["in the end"] > 80 for run in (sharded, alone))
