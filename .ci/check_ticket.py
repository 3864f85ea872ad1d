"""Check what a job wrote: each search found its ticket, of exactly the promised size."""

import csv
import json
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
results = json.loads((out / "results.json").read_text())
masks = torch.load(out / "masks.pt", weights_only=True)
arguments = results["arguments"]
limit = arguments.get("epochs") or arguments["max_epochs"]

for run in results["runs"]:
    if run["found"] is None:
        continue  # dense training and a random ticket, which the searches are compared with
    # Shifts follow their scales and are not counted.
    ticket = masks[f"{run['method']}, seed {run['seed']}"]
    ranked = [mask for name, mask in ticket.items() if name.endswith("weight")]
    n = sum(mask.numel() for mask in ranked)
    removed = sum(int((~mask).sum()) for mask in ranked)
    promised = round(arguments["prune_ratio"] * n)
    last_largest = run["distances"][-1][1]
    by_the_rule = last_largest is not None and last_largest < arguments["stopping_point"]
    if not (run["found"] and run["search_epochs"] <= limit and by_the_rule):
        sys.exit(f"{run['method']} found no ticket by the rule: {run}")
    if removed != promised:
        sys.exit(f"{run['method']} removes {removed} of {n}, not {promised}.")
    print(
        f"{run['method']}: ticket after {run['search_epochs']:g} epochs, {removed} of {n} removed"
    )
if not torch.load(out / "ticket.pt", weights_only=True):
    sys.exit("ticket.pt has no mask in it.")
with (out / "results.csv").open() as file:
    if len(list(csv.DictReader(file))) != len(results["runs"]):
        sys.exit("results.csv has not a row for each training.")
pictures = sorted(out.glob("*.png"))
if len(pictures) < 2 or any(picture.stat().st_size < 10_000 for picture in pictures):
    sys.exit(f"Of two pictures these are there, some nearly empty: {pictures}")
