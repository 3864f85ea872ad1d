"""Tables and pictures of what ``benchmarks.tickets`` measured.

    python -m benchmarks.ticket_tables runs/tickets
    python -m benchmarks.ticket_tables runs/tickets --pictures docs/images/tickets

Numbers are means over seeds, with standard deviations; methods of one seed share their training, so
that differences are known better than the numbers. Seconds are those of median epochs. *At equal
epochs* is the mean accuracy of the last three. *At equal seconds* it is that of the last three that
end before the method of a case that needs the fewest seconds is through.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# A number of a table, from the rows of a method and of dense training, and the equal seconds.
Cell = Callable[[Row, Row, float], float | None]


def read(folder: Path) -> list[dict[str, Any]]:
    """All cases in a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def ends(row: Row, dense: Row) -> list[float]:
    """Seconds at the end of each epoch, of median epochs, since other programs slow some down."""
    first = row.get("shrunk at epoch", len(row["seconds"]))
    before = statistics.median(dense["seconds"])
    after = row["seconds"][first:]
    seconds = (
        [before] * first + [statistics.median(after)] * len(after) if after else [before] * first
    )
    if after:
        seconds[first] += row["seconds of shrinking"]
    return list(itertools.accumulate(seconds))


def last_three(accuracies: list[float]) -> float:
    """Their mean."""
    return statistics.mean(accuracies[-3:])


def at_seconds(row: Row, dense: Row, seconds: float) -> float:
    """The mean accuracy of the last three epochs that end by then."""
    n = sum(end <= seconds for end in ends(row, dense))
    return last_three(row["accuracies"][:n])


def recovered(row: Row) -> int | None:
    """Epochs from shrinking to nine tenths of the accuracy before pruning."""
    after = row["accuracies"][row["shrunk at epoch"] :]
    return next((i for i, each in enumerate(after, 1) if each >= 0.9 * row["before pruning"]), None)


def reached(row: Row, dense: Row) -> float | None:
    """Seconds until three epochs have dense training's last mean less a point, of its seconds."""
    target, times = last_three(dense["accuracies"]) - 1, ends(row, dense)
    for n in range(row.get("shrunk at epoch", 0) + 3, len(times) + 1):
        if last_three(row["accuracies"][:n]) >= target:
            return times[n - 1] / ends(dense, dense)[-1]
    return None


AT_THE_TICKET: dict[str, Cell] = {
    "epoch of the ticket": lambda row, dense, t: row["ticket epoch"],
    "accuracy before pruning, %": lambda row, dense, t: row["before pruning"],
    "after pruning, %": lambda row, dense, t: row["after pruning"],
    "the same, BatchNorm recomputed, %": lambda row, dense, t: row["BatchNorm recomputed"],
    "fewest channels kept in a layer": lambda row, dense, t: min(n for n, _ in row["kept"]),
    "thousand parameters": lambda row, dense, t: row["parameters"][1] / 1e3,
    "million multiplications": lambda row, dense, t: row["MACs"][1] / 1e6,
}
AT_THE_END: dict[str, Cell] = {
    "epochs to 90 % of the accuracy before": lambda row, dense, t: recovered(row),
    "accuracy at equal epochs, %": lambda row, dense, t: last_three(row["accuracies"]),
    "the same less dense, points": lambda row, dense, t: (
        last_three(row["accuracies"]) - last_three(dense["accuracies"])
        if row is not dense
        else None
    ),
    "accuracy at equal seconds, %": lambda row, dense, t: at_seconds(row, dense, t),
    "seconds an epoch before": lambda row, dense, t: statistics.median(
        row["seconds"][: row.get("ticket epoch")]
    ),
    "seconds an epoch after": lambda row, dense, t: statistics.median(
        row["seconds"][row["shrunk at epoch"] :]
    ),
    "seconds in all, of dense": lambda row, dense, t: ends(row, dense)[-1] / ends(dense, dense)[-1],
    "seconds to dense - 1 point, of dense": lambda row, dense, t: reached(row, dense),
}


def cells(case: dict[str, Any], method: str) -> dict[str, float]:
    """What is known of a method in a case; of training on only if it went to its end."""
    rows = case["methods"]
    row, dense = rows[method], rows.get("dense", {})
    complete = [each for each in rows.values() if each.get("complete")]
    equal = min((ends(each, dense)[-1] for each in complete if dense in complete), default=0.0)
    known = {}
    for name, cell in (AT_THE_TICKET | (AT_THE_END if row in complete else {})).items():
        try:
            value = cell(row, dense, equal)
        except (KeyError, statistics.StatisticsError):
            # A dense network has no ticket, some cases have no dense network, and some networks
            # no epoch after the ticket.
            continue
        if value is not None:
            known[name] = value
    return known


DEFAULTS = {"width": "1", "limit": "None", "epochs": "20", "l1": "0", "prune_ratio": "0.5"}
DEFAULTS |= {"scope": "global", "min_keep": "0", "scatter": "False"}


def text(values: list[float], n: int) -> str:
    """Mean and deviation, and how many there are if not all."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    form = ".0f" if abs(mean) >= 1000 else ".1f" if abs(mean) >= 100 else ".2f"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean:{form}}{spread}" + (f" ({len(values)} of {n})" if len(values) < n else "")


def groups(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cases that differ in the seed alone, by a title of what is not default."""
    by_identity: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        settings = {name: each for name, each in case["settings"].items() if name != "methods"}
        identity = [case[name] for name in ("model", "momentum", "l1", "device", "torch")]
        by_identity.setdefault(json.dumps([identity, settings], sort_keys=True), []).append(case)
    found: dict[str, list[dict[str, Any]]] = {}
    for group in by_identity.values():
        values = group[0]["settings"] | {"l1": f"{group[0]['l1']:g}"}
        title = f"{group[0]['model']}, momentum {group[0]['momentum']:g}"
        for name, default in DEFAULTS.items():
            title += f", {name} {values[name]}" if values[name] != default else ""
        found[title if title not in found else f"{title}, other settings {len(found)}"] = group
    return found


def tables(cases: list[dict[str, Any]]) -> str:
    """Markdown, a table for each group."""
    parts = []
    for title, group in groups(cases).items():
        names = list(dict.fromkeys(name for case in group for name in case["methods"]))
        known = {
            name: [cells(case, name) for case in group if name in case["methods"]] for name in names
        }
        lines = [f"{title}, seeds {', '.join(str(case['seed']) for case in group)}", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for cell in AT_THE_TICKET | AT_THE_END:
            values = [[each[cell] for each in known[name] if cell in each] for name in names]
            if any(values):
                texts = [text(each, len(group)) for each in values]
                lines.append(f"| {cell} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def picture(title: str, group: list[dict[str, Any]], path: Path) -> None:
    """Largest distances over epochs, and accuracies over epochs and over seconds."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colors = {"dense": "0.3", "EB Train": "tab:orange", "WORM": "tab:blue", "random": "tab:green"}
    for name, color in colors.items():
        pairs = [
            (each[name], each["dense"])
            for each in (case["methods"] for case in group)
            if each.get(name, {}).get("complete") and each.get("dense", {}).get("complete")
        ]
        rows = [row for row, _ in pairs]
        if not rows:
            continue
        accuracies = np.array([row["accuracies"] for row in rows])
        epochs = np.arange(1, accuracies.shape[1] + 1)
        seconds = np.mean([ends(row, dense) for row, dense in pairs], 0)
        for panel, x in ((panels[1], epochs), (panels[2], seconds)):
            panel.plot(x, accuracies.mean(0), color=color, label=name)
            low, high = accuracies.min(0), accuracies.max(0)
            panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if name in ("EB Train", "WORM"):
            for row in rows:
                points = [(i, max(d)) for i, d in enumerate(row["distances"], 1) if d]
                label = name if row is rows[0] else None
                panels[0].plot(*zip(*points, strict=True), ".-", color=color, label=label)
                panels[0].plot(*points[-1], "*", color=color, markersize=13)
    stop = float(group[0]["settings"]["stopping_point"])
    panels[0].axhline(stop, color="0.3", linewidth=1)
    for panel in panels[:2]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(xlabel="epoch", ylabel="largest mask distance", xlim=(0, None), ylim=(0, None))
    panels[1].set(xlabel="epoch", ylabel="test accuracy, %")
    panels[2].set(xlabel="seconds of training", ylabel="test accuracy, %")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    figure.suptitle(f"{title}, {len(group)} seed(s)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Print the tables, and draw if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs/tickets")])
    parser.add_argument("--pictures", metavar="PREFIX", help="draw, into files that begin so")
    args = parser.parse_args()
    cases = [case for folder in args.folders for case in read(folder)]
    print(tables(cases))
    for title, group in groups(cases).items() if args.pictures else ():
        picture(
            title, group, Path(f"{args.pictures}_{title.replace(', ', '_').replace(' ', '')}.png")
        )


if __name__ == "__main__":
    main()
