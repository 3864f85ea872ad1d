"""Check what the main job wrote: each search found its ticket, of exactly the promised size."""

import json
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
results = json.loads((out / "results.json").read_text())
tickets = torch.load(out / "ticket.pt", weights_only=True)
ratio = float(results["arguments"]["prune_ratio"])
limit = int(results["arguments"]["max_epochs"])
stopping_point = float(results["arguments"]["stopping_point"])

for run, ticket in zip(results["runs"], tickets, strict=True):
    if run["found"] is None:
        continue  # dense training, which the searches are compared with
    n = sum(mask.numel() for mask in ticket.values())
    removed = sum(int((~mask).sum()) for mask in ticket.values())
    last_largest = run["distances"][-1][1]
    if not (run["found"] and run["search_epochs"] <= limit and last_largest < stopping_point):
        sys.exit(f"{run['method']} found no ticket by the rule: {run}")
    if removed != round(ratio * n):
        sys.exit(f"{run['method']} removes {removed} of {n}, not {round(ratio * n)}.")
    print(
        f"{run['method']}: ticket after {run['search_epochs']:g} epochs, {removed} of {n} removed"
    )
pictures = sorted(out.glob("*.png"))
if len(pictures) < 2 or any(picture.stat().st_size < 10_000 for picture in pictures):
    sys.exit(f"Of two pictures these are there, some nearly empty: {pictures}")
