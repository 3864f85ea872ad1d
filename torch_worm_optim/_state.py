"""The search as plain data inside an optimizer's ``state_dict``, and back, checked.

The record holds numbers, strings and tensors, so that ``torch.load(weights_only=True)`` reads it.
History and identity vary in length and are strings of JSON: checkpointers that take containers
apart restore only those that the live optimizer has already, and lose empty ones. The record
travels in the first parameter group, since ``state`` and ``param_groups`` are all that
checkpointers carry. Live groups hold its key with None: checkpointers load into the structure that
they find, and drop a key that is not there.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.layout import Layout
from torch_worm_optim.report import KeptCount
from torch_worm_optim.search import MaskSample, Phase, Window
from torch_worm_optim.ticket import HeldTicket

RECORD_KEY = "worm"
_VERSION = 2


@dataclass
class SearchState:
    """All of a search that decides its future.

    Attributes:
        step: Optimizer steps taken.
        pruned: Whether the ticket is applied and held.
        fading_steps: Steps until it is, while removed entries fade; else 0.
        history: All samples, oldest first.
        window: The masks that the next one is compared with.
        fingerprint: What was ranked for the newest mask, as one number; None before the first.
        ticket: The ticket of a network that is shrunk, or one that was given; else None.
    """

    step: int
    pruned: bool
    fading_steps: int
    history: list[MaskSample]
    window: Window
    fingerprint: int | None = None
    ticket: HeldTicket | None = None

    @property
    def phase(self) -> Phase:
        """How far the search is."""
        if self.pruned:
            return Phase.PRUNED
        if self.fading_steps:
            return Phase.FADING
        return self.history[-1].phase if self.history else Phase.SEARCHING


def with_record(
    state_dict: dict[str, Any], search: SearchState, identity: dict[str, Any], layout: Layout
) -> dict[str, Any]:
    """The base optimizer's ``state_dict`` with the search put into its first parameter group.

    Args:
        state_dict: What the base optimizer's ``state_dict()`` returned; not modified.
        search: The search to save.
        identity: What the masks depend on, to be compared when the record is read.
        layout: Where the entries are that the masks are of.

    Returns:
        A new dict of the same form.
    """
    groups = [{**group, RECORD_KEY: None} for group in state_dict["param_groups"]]
    groups[0][RECORD_KEY] = {
        "version": _VERSION,
        "step": search.step,
        "pruned": search.pruned,
        "fading_steps": search.fading_steps,
        "history": json.dumps(
            [
                [
                    sample.step,
                    list(sample.distances),
                    sample.max_distance,
                    sample.mean_distance,
                    sample.phase.value,
                ]
                for sample in search.history
            ]
        ),
        # A string, since checkpointers may keep numbers in fewer bits.
        "fingerprint": "" if search.fingerprint is None else str(search.fingerprint),
        "window": {} if search.ticket else _saved_window(search.window, layout),
        "identity": json.dumps(identity),
        "ticket": _packed(search.ticket) if search.ticket else "",
    }
    return {**state_dict, "param_groups": groups}


def _packed(ticket: HeldTicket) -> str:
    """A held ticket in one string, which loads into a search that has none yet.

    Of what is gathered whole torch puts only strings and numbers in their places whose keys the
    live optimizer has, on every rank, and tensors only where it has tensors of that shape.
    """
    file = io.BytesIO()
    parts = {key: value for key, value in vars(ticket).items() if key != "identity"}
    # A string, since torch.load(weights_only=True) refuses named tuples.
    parts["counts"] = json.dumps(ticket.counts)
    torch.save(parts, file)
    return base64.b64encode(file.getvalue()).decode()


def _unpacked(packed: str, identity: dict[str, Any], layout: Layout) -> HeldTicket:
    """What :func:`_packed` was given, with this model's names and on its devices."""
    file = io.BytesIO(base64.b64decode(packed))
    parts = torch.load(file, map_location="cpu", weights_only=True)
    named = layout.model.named_parameters(remove_duplicate=False)
    own = {canonical_name(name): (name, parameter) for name, parameter in named}
    for key in ("final_mask", "ticket"):
        masks = {}
        for saved_name, mask in parts[key].items():
            name, parameter = own.get(canonical_name(saved_name), (saved_name, mask))
            masks[name] = mask.to(parameter.device)
        parts[key] = masks
    # Records from before there was a summary lack them.
    parts["counts"] = [KeptCount(*each) for each in json.loads(parts.get("counts", "[]"))]
    return HeldTicket(**parts, identity=identity)


def _saved_window(window: Window, layout: Layout) -> dict[str, list[Tensor]]:
    """The masks of each representative, shaped and sharded as its parameter is.

    So whatever saves and reshards parameters can save and reshard them.
    """
    rows = [window.to_bytes(index) for index in range(len(layout.representatives))]
    return dict(zip(_window_keys(layout), layout.parameter_bytes(rows), strict=True))


def _load_window(saved: Any, layout: Layout, n_masks: int) -> Window:
    """The window that :func:`_saved_window` was given, on whatever ranks that was."""
    window = Window(layout.local_numels(), n_masks)
    n_rows = -(-n_masks // 8)
    for index, (key, numel, representative) in enumerate(
        zip(_window_keys(layout), layout.numels(), layout.representatives, strict=True)
    ):
        parameter = layout.parameter(representative.name)
        shape = (numel,) if representative.parts[0].units else tuple(parameter.shape)
        rows = saved.get(key) if isinstance(saved, dict) else None
        if (
            not isinstance(rows, (list, tuple))
            or len(rows) != n_rows
            or any(not isinstance(row, Tensor) or tuple(row.shape) != shape for row in rows)
            or any(row.dtype != torch.uint8 for row in rows)
        ):
            raise ValueError(
                f"The checkpoint's window of masks has no {n_rows} tensors of shape {shape} for "
                f"{key!r}: it is truncated or for another model. Load an earlier one."
            )
        window.from_bytes(index, [layout.entries_of(index, row) for row in rows])
    return window


def _window_keys(layout: Layout) -> list[str]:
    """What to call the masks of each representative. Parts of one parameter share a name."""
    names = [canonical_name(representative.name) for representative in layout.representatives]
    return [
        f"{name} (units {index})" if representative.parts[0].units else name
        for index, (name, representative) in enumerate(
            zip(names, layout.representatives, strict=True)
        )
    ]


def without_record(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The base optimizer's part of a ``state_dict``, and the record or None.

    Args:
        state_dict: What :func:`with_record` made, or the plain base optimizer's; not modified.

    Returns:
        The ``state_dict`` that the base optimizer loads, and the record for :func:`read_record`.

    Raises:
        ValueError: If ``state_dict`` lacks one of the two keys that every optimizer's has.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"The checkpoint is truncated: it has no {' and no '.join(map(repr, missing))}, only "
            f"{sorted(map(str, state_dict))}. Load what `opt.state_dict()` returned, or an "
            "earlier checkpoint."
        )
    groups = state_dict["param_groups"]
    record = next(
        (group[RECORD_KEY] for group in groups if group.get(RECORD_KEY) is not None), None
    )
    plain = [{key: value for key, value in group.items() if key != RECORD_KEY} for group in groups]
    return {**state_dict, "param_groups": plain}, record


def read_record(record: Any, identity: dict[str, Any], layout: Layout, n_masks: int) -> SearchState:
    """The search in a record, checked whole, so that a bad one changes nothing.

    Args:
        record: What :func:`without_record` found.
        identity: What the masks of this search depend on; the record's must be equal.
        layout: Where the entries are that the masks are of.
        n_masks: How many masks the window holds when full.

    Returns:
        The search as it was saved.

    Raises:
        ValueError: If the record is truncated or malformed, of another version, or for other masks.
    """
    search, saved_identity = _read_plain_parts(record)
    for key, expected in json.loads(json.dumps(identity)).items():
        saved = saved_identity.get(key)
        if saved != expected:
            raise ValueError(
                f"The checkpoint was saved for other masks: its `{key}` is {_brief(saved)}, that "
                f"of this search is {_brief(expected)}. Build the model and WormOptimizer as they "
                "were when it was saved."
            )
    if any(len(sample.distances) not in (0, n_masks - 1) for sample in search.history):
        raise ValueError(
            "The checkpoint's history does not fit its window of masks: load an earlier checkpoint."
        )
    search.window = _load_window(record["window"], layout, n_masks)
    return search


def record_has_ticket(record: Any) -> bool:
    """Whether a record is of a network that was shrunk, or of a ticket that was given."""
    return isinstance(record, dict) and bool(record.get("ticket"))


def read_record_with_ticket(record: Any, layout: Layout, window: Window) -> SearchState:
    """The search in a record that holds a ticket, checked against the network that there is.

    Args:
        record: What :func:`without_record` found.
        layout: Where the entries are, in a network of the shapes that it had when it was saved.
        window: Any window; no masks are compared any more.

    Returns:
        The search as it was saved.

    Raises:
        ValueError: If the record is malformed, or the network does not have its shapes.
    """
    search, identity = _read_plain_parts(record)
    try:
        ticket = _unpacked(record["ticket"], identity, layout)
        shapes = {name: tuple(ticket.mask(name).shape) for name in ticket.ticket}
    except Exception as error:  # whatever reading a damaged string may raise
        raise ValueError(
            f"The checkpoint's ticket cannot be read ({error!r}): load an earlier checkpoint."
        ) from error
    own = dict(layout.model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        parameter = own.get(name)
        if parameter is None or tuple(parameter.shape) != shape:
            actual = "none" if parameter is None else f"{tuple(parameter.shape)}"
            raise ValueError(
                f"The checkpoint is of a network in which {name!r} has shape {shape}; it has "
                f"{actual} in this one. If that network was shrunk, load the model's state_dict "
                "with load_shrunk_() first."
            )
    search.window, search.ticket = window, ticket
    return search


def _read_plain_parts(record: Any) -> tuple[SearchState, dict[str, Any]]:
    """All of a record but its window, and what its masks depend on."""
    keys = ["version", "step", "pruned", "history", "identity"]
    if not record_has_ticket(record):  # whose window is empty, and checkpointers drop what is empty
        keys.append("window")
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(
            f"The checkpoint's record of the search is truncated: it has no {', '.join(missing)}. "
            f"Load an earlier checkpoint, or delete {RECORD_KEY!r} from its first parameter group "
            "to start the search afresh."
        )
    if record["version"] != _VERSION:
        raise ValueError(
            f"The checkpoint's record of the search has version {record['version']}, this release "
            f"reads {_VERSION}. Install the release of torch_worm_optim that wrote it."
        )
    try:
        saved_identity, rows = json.loads(record["identity"]), json.loads(record["history"])
        step = int(record["step"])
        # Records from before there was a fade lack it.
        fading_steps = int(record.get("fading_steps", 0))
        fingerprint = int(record["fingerprint"]) if record.get("fingerprint") else None
        history = [
            MaskSample(int(step), tuple(distances), largest, mean, Phase(phase))
            for step, distances, largest, mean, phase in rows
        ]
        saved_identity = dict(saved_identity)
        if fading_steps < 0 or (fading_steps and record["pruned"]):
            raise ValueError(f"{fading_steps} steps left to fade")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's record of the search cannot be read ({error}): load an earlier "
            "checkpoint."
        ) from error
    found = record_has_ticket(record) or (history and history[-1].phase.converged)
    if (record["pruned"] or fading_steps) and not found:
        raise ValueError(
            "The checkpoint says that its ticket is applied, and has none: load an earlier one."
        )
    window = Window([], 2)
    pruned = bool(record["pruned"])
    return SearchState(step, pruned, fading_steps, history, window, fingerprint), saved_identity


def _brief(value: object) -> str:
    """A value short enough for a message."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 4:
        return f"[{', '.join(map(repr, value[:3]))}, ... ({len(value)} in all)]"
    return repr(value)
