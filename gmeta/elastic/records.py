"""The records of a coordinator's journal: those of the ledger, of the controller, and of a worker group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmeta.elastic import ledger
from gmeta.elastic.actions import action_from_json, setting_from_json, to_json
from gmeta.elastic.controller import Decided, Granted
from gmeta.elastic.wire import from_wire, to_wire


@dataclass(frozen=True)
class Began:
    """A worker group was started, or started again: this follows its `RolledBack`. A new controller begins with it."""

    generation: int
    world_size: int
    batch: int  # tasks of the global batch
    first_step: int
    ahead: int  # batches that a rank loads before it needs them
    report_s: float


@dataclass(frozen=True)
class Introduced:
    """Fixed facts of a rank, such as its memory. Policies count on them after the coordinator was restarted, too."""

    rank: int
    about: Mapping[str, Any]  # role, device, node, max_slots


Record = ledger.LedgerRecord | Granted | Decided | Began | Introduced

_PLAIN: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (ledger.Committed, ledger.Returned, ledger.RolledBack, Granted, Began, Introduced)
}


def to_row(record: Record) -> tuple[str, dict[str, Any]]:
    """Return (kind, body for JSON)."""
    if isinstance(record, ledger.Leased):
        return "Leased", {"leases": [to_wire(lease) for lease in record.leases]}
    if isinstance(record, ledger.Renewed):
        return "Renewed", {"lease": to_wire(record.lease)}
    if isinstance(record, Decided):
        actions = [to_json(action) for action in record.actions]
        return "Decided", {"now": record.now, "actions": actions, "setting": to_wire(record.setting)}
    return type(record).__name__, to_wire(record)


def from_row(kind: str, body: Mapping[str, Any]) -> Record:
    """Return the record that `to_row` wrote. KeyError or TypeError says that this is no record of ours."""
    if kind == "Leased":
        return ledger.Leased(tuple(ledger.Lease(**from_wire(lease)) for lease in body["leases"]))
    if kind == "Renewed":
        return ledger.Renewed(ledger.Lease(**from_wire(body["lease"])))
    if kind == "Decided":
        actions = tuple(action_from_json(action) for action in body["actions"])
        return Decided(body["now"], actions, setting_from_json(body["setting"]))
    record: Record = _PLAIN[kind](**from_wire(body))
    return record
