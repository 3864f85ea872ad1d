"""Train for long, be killed at random, resume, and end bit for bit where an undisturbed run ends.

    python tests/audits/soak.py                 # 10,000 steps, killed about every second
    python tests/audits/soak.py --steps 2000 --seed 7

One process trains undisturbed. Another does the same work and writes a checkpoint now and then; it
is killed (SIGKILL) at random moments and started again from its last checkpoint until it is done.
Gradients are infinite at random steps, so that the scaler skips them, and masks are drawn at random
steps. At the end weights, masks, history and the optimizer's state must be equal.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from torch_worm_optim import Phase, WormOptimizer


class Training:
    """A small network, a momentum or Adam optimizer with a schedule, a scaler, and a search."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.model = nn.Sequential(
            nn.Linear(6, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 3)
        )
        nn.init.uniform_(self.model[1].weight, 0.5, 1.5)
        parameters = self.model.parameters()
        if seed % 2:
            base = torch.optim.AdamW(parameters, lr=3e-3)
        else:
            base = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.opt = WormOptimizer(
            base,
            self.model,
            window=4,
            stopping_point=0.004,  # no entry may change: it takes some thousand steps
            margin=0.1,
            truncation=0.1,
            truncate="update" if seed % 2 else "gradient",
            sample_every=lambda step: random.Random(f"{seed} {step} mask").random() < 0.02,
        )
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.9995)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=50)
        self.step = 0

    def train_step(self) -> None:
        """One step on data that the step's number determines; one in a hundred overflows."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        x = torch.randn(16, 6, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5)
        self.opt.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        if random.Random(f"{self.seed} {self.step} overflow").random() < 0.01:
            loss = loss * torch.inf
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        self.schedule.step()
        if self.opt.phase is Phase.CONVERGED and self.step % 7 == 0:
            self.opt.prune()
        self.step += 1

    def state(self) -> dict[str, object]:
        """All that a run needs to go on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, object]) -> None:
        """Go on from there."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def save(state: dict[str, object], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def work(path: Path, steps: int, seed: int, checkpoints: bool) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    training = Training(seed)
    if path.exists():
        training.load(torch.load(path, weights_only=True))
    while training.step < steps:
        training.train_step()
        if checkpoints and random.random() < 0.02:
            save(training.state(), path)
    save(training.state(), path)


def difference(a: object, b: object, where: str = "state") -> str:
    """Where two states first differ, or nothing."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        same = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.equal(b)
        return "" if same else where
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        found = (difference(a[key], b[key], f"{where}[{key!r}]") for key in a)
        return next((place for place in found if place), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        found = (difference(x, y, f"{where}[{i}]") for i, (x, y) in pairs)
        return next((place for place in found if place), "")
    return "" if a == b else where


def main() -> None:
    """Run both, compare, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between kills")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.steps, args.seed, checkpoints=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole.pt", Path(folder) / "broken.pt"
        work(whole, args.steps, args.seed, checkpoints=False)
        command = [sys.executable, __file__, "--work", str(broken)]
        command += ["--steps", str(args.steps), "--seed", str(args.seed)]
        kills = 0
        while True:
            child = subprocess.Popen(command)
            # No sooner than a checkpoint can have been written, or nothing would ever be done.
            deadline = time.monotonic() + 4 + random.expovariate(1 / args.every)
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        if child.returncode:
            sys.exit(f"The interrupted run failed with {child.returncode}.")
        a, b = (torch.load(path, weights_only=True) for path in (whole, broken))
    place = difference(a, b)
    if place:
        sys.exit(f"After {kills} kills the runs differ at {place}.")
    end = Training(args.seed)
    end.load(a)
    print(
        f"{args.steps} steps, {len(end.opt.history)} masks, {end.opt.phase.value}, {kills} kills: "
        "equal bit for bit"
    )


if __name__ == "__main__":
    main()
