"""All that a search remembers, as one string inside an optimizer's ``state_dict()``, and back.

The record travels in the first parameter group, since ``state`` and ``param_groups`` are all that
checkpointers carry. It is a string, since checkpointers that take containers apart restore only
what the live optimizer has already. Live groups hold its key with None: checkpointers load into the
structure that they find, and drop a key that is not there.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_worm_optim._wrapper import RECORD_KEY
from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.report import KeptCount
from torch_worm_optim.search import MaskSample, MaskSearch, Phase
from torch_worm_optim.ticket import PackedMask, Restraint, Ticket

_VERSION = 3


@dataclass
class State:
    """What a ``WormOptimizer`` remembers."""

    search: MaskSearch | None  # what draws masks; None once there is a ticket
    ticket: Ticket | None = None
    step: int = 0
    phase: Phase = Phase.SEARCHING
    history: list[MaskSample] = field(default_factory=list)
    restraint: Restraint | None = None  # made from the mask when a step needs it
    warned: set[str] = field(default_factory=set)  # topics of warnings that were given

    def __getstate__(self) -> dict[str, Any]:
        """All but the restraint, whose tensors are views of this very model's."""
        return {**self.__dict__, "restraint": None}


def insert_record(state_dict: dict[str, Any], state: State) -> dict[str, Any]:
    """The base optimizer's ``state_dict`` with the record in its first parameter group; a copy."""
    search, ticket = state.search, state.ticket
    record: dict[str, Any] = {
        "version": _VERSION,
        "step": state.step,
        "phase": state.phase.value,
        "history": [[*sample[:-1], sample.phase.value] for sample in state.history],
        "search": None,
        "ticket": None,
    }
    if search is not None:
        record["search"] = {
            "identity": search.identity(),
            "rows": [torch.from_numpy(row) for row in search.window.rows],
            "fingerprints": search.fingerprints,
        }
    if ticket is not None:
        # Pickle writes the same string object once. Interned names make equal states equal records.
        record["ticket"] = {
            "masks": {
                sys.intern(canonical_name(name)): (torch.from_numpy(mask.bits), mask.shape)
                for name, mask in ticket.masks.items()
            },
            "counts": [(sys.intern(each.name), *each[1:]) for each in ticket.counts],
            "kept": {sys.intern(name): indices for name, indices in ticket.kept.items()},
            "groups": {sys.intern(name): n for name, n in ticket.groups.items()},
            "is_shrunk": ticket.is_shrunk,
        }
    file = io.BytesIO()
    torch.save(record, file)
    groups = [{**group, RECORD_KEY: None} for group in state_dict["param_groups"]]
    inner = state_dict["param_groups"][0].get(RECORD_KEY)  # of the search that this one is around
    own = base64.b64encode(file.getvalue()).decode()
    groups[0][RECORD_KEY] = f"{own} {inner}" if inner else own
    return {**state_dict, "param_groups": groups}


def pop_record(state_dict: dict[str, Any], depth: int = 1) -> tuple[dict[str, Any], Any]:
    """The base optimizer's part of a ``state_dict``, and the record or None.

    ``depth`` is how many searches there are around one another. Where fewer were saved, they are
    the inner ones.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"The checkpoint is truncated: it has no {' and no '.join(map(repr, missing))}, only "
            f"{sorted(map(str, state_dict))}. Load what `opt.state_dict()` returned, or an "
            "earlier checkpoint."
        )
    groups = state_dict["param_groups"]
    records = [group[RECORD_KEY] for group in groups if group.get(RECORD_KEY) is not None]
    plain = [{key: value for key, value in group.items() if key != RECORD_KEY} for group in groups]
    if not records or not isinstance(records[0], str):
        return {**state_dict, "param_groups": plain}, records[0] if records else None
    inner = records[0].split(" ")
    own = inner.pop(-depth) if len(inner) >= depth else None
    if depth > 1 and inner:
        plain[0][RECORD_KEY] = " ".join(inner[1 - depth :])
    return {**state_dict, "param_groups": plain}, own


def read_record(
    record: Any, new_search: Callable[[], MaskSearch | None], model: nn.Module
) -> State:
    """The state in a record, checked whole, so that a bad one changes nothing.

    ``new_search`` makes a search without masks, which the window of a record without a ticket is
    put into; it returns None where a ticket was given or the network was shrunk.
    """
    if not isinstance(record, str):
        raise ValueError(
            "The checkpoint's record of the search was written by another release of "
            f"torch_worm_optim, or is damaged: it is a {type(record).__name__}, not a string. "
            f"Delete {RECORD_KEY!r} from its first parameter group to start the search afresh."
        )
    try:
        saved = torch.load(
            io.BytesIO(base64.b64decode(record)), map_location="cpu", weights_only=True
        )
        version = saved["version"]
        if version == _VERSION:
            state = State(None, None, int(saved["step"]), Phase(saved["phase"]))
            state.history = [
                MaskSample(step, tuple(distances), largest, mean, Phase(phase))
                for step, distances, largest, mean, phase in saved["history"]
            ]
            if saved["ticket"] is not None:
                state.ticket = _read_ticket(saved["ticket"], model)
            rows = [row.numpy() for row in saved["search"]["rows"]] if saved["search"] else []
            identity = dict(saved["search"]["identity"]) if saved["search"] else {}
            fingerprints = list(saved["search"]["fingerprints"]) if saved["search"] else []
    except Exception as error:  # whatever reading a damaged string may raise
        raise ValueError(
            f"The checkpoint's record of the search cannot be read ({error!r}): load an earlier "
            "checkpoint."
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"The checkpoint's record of the search has version {version}, this release reads "
            f"{_VERSION}. Install the release of torch_worm_optim that wrote it."
        )
    if state.ticket is not None:
        _check_shapes(state.ticket, model)
        return state
    state.search = search = new_search()
    if search is None:
        raise ValueError(
            "The checkpoint is of a search, and this optimizer holds a ticket that it was given, "
            "or its network was shrunk. Build the network and WormOptimizer anew, without "
            "`ticket`, and load it there."
        )
    _check_identity(identity, search.identity())
    search.window.rows, search.fingerprints = rows, fingerprints
    return state


def _read_ticket(saved: Mapping[str, Any], model: nn.Module) -> Ticket:
    """The ticket of a record, with the names that parameters have in this model."""
    names = dict(model.named_parameters(remove_duplicate=False))
    own = {canonical_name(name): name for name in names}
    return Ticket(
        {
            own.get(name, name): PackedMask(bits.numpy(), tuple(shape))
            for name, (bits, shape) in saved["masks"].items()
        },
        [KeptCount(*each) for each in saved["counts"]],
        dict(saved["kept"]),
        dict(saved["groups"]),
        bool(saved["is_shrunk"]),
    )


def _check_shapes(ticket: Ticket, model: nn.Module) -> None:
    """Raise if a ticket is for a network of other shapes than this one."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in ticket.masks:
        shape, parameter = tuple(ticket.mask(name).shape), own.get(name)
        if parameter is None or tuple(parameter.shape) != shape:
            actual = "none" if parameter is None else f"{tuple(parameter.shape)}"
            raise ValueError(
                f"The checkpoint is of a network in which {name!r} has shape {shape}; it has "
                f"{actual} in this one. If that network was shrunk, load the model's state_dict "
                "with load_shrunk_() first."
            )


def _check_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise if a window holds masks of something else than what this search ranks."""
    for key, expected in own.items():
        if saved.get(key) != expected:
            raise ValueError(
                f"The checkpoint was saved for other masks: its `{key}` is "
                f"{_brief(saved.get(key))}, that of this search is {_brief(expected)}. Build the "
                "model and WormOptimizer as they were when it was saved."
            )


def _brief(value: object) -> str:
    """A value short enough for a message."""
    if isinstance(value, Sequence) and not isinstance(value, (str, Tensor)) and len(value) > 4:
        return f"[{', '.join(map(repr, value[:3]))}, ... ({len(value)} in all)]"
    return repr(value)
