"""`gmeta publish`, `gmeta registry` and `gmeta delta`: what they print of what they did."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gmeta.config.registry import DeltaConfig, PublishConfig, RegistryConfig
from gmeta.core.files import read_mapping
from gmeta.delivery import registry as registries
from gmeta.runs.bundle import read_manifest
from gmeta.runs.delta import apply_delta, delta_bytes, make_delta
from gmeta.runs.registry import Pointer, Registry, VersionRecord, open_registry


def run_publish(config: PublishConfig) -> int:
    """Run `gmeta publish`."""
    verdict = None if config.verdict is None else read_mapping(Path(config.verdict), "give what `gmeta gate` wrote")
    found, cache = open_registry(config.registry), Path(config.cache).expanduser()
    number = registries.publish(
        found, Path(config.bundle), verdict=verdict, make_current=config.make_current, cache=cache
    )
    print(f"{found.url}: version {number} is stored{_why_not_current(number, found.current(), verdict)}")
    return 0


def _why_not_current(number: int, pointer: Pointer | None, verdict: dict[str, object] | None) -> str:
    if pointer is not None and pointer.version == number:
        return ", and current"
    if verdict is not None and not verdict["passed"]:
        return "; its gate refused it, so that it is not current"
    if pointer is not None and pointer.pinned:
        return f"; version {pointer.version} is pinned, and stays current"
    return f", and not current; `gmeta registry rollback --to {number}` makes it so"


def run_registry(config: RegistryConfig) -> int:
    """Run `gmeta registry`."""
    found = open_registry(config.registry)
    verb, *rest = config.do
    number = int(rest[0]) if rest else None
    match verb:
        case "list":
            _print_versions(found)
        case "show":
            assert number is not None
            _print_version(found, number)
        case "rollback":
            print(f"{found.url}: version {registries.roll_back(found, config.to)} is current")
        case "pin":
            print(f"{found.url}: version {registries.pin(found, number)} is current, and pinned")
        case "unpin":
            _unpin(found)
        case "prune":
            assert config.keep is not None
            gone = registries.prune_versions(found, config.keep)
            print(f"{found.url}: removed {', '.join(f'version {n}' for n in gone) or 'nothing'}")
        case "fetch":
            assert number is not None
            assert config.out is not None
            found.download(number, Path(config.out))
            print(f"version {number} of {found.url} is in {config.out}")
    return 0


def _unpin(found: Registry) -> None:
    pointer = found.current()
    was = pointer is not None and pointer.pinned
    number = registries.unpin(found)
    print(f"{found.url}: version {number} is current, and {'no longer pinned' if was else 'was not pinned'}")


def _print_versions(found: Registry) -> None:
    """Print the versions, and below them what is damaged: its cure may need their numbers."""
    pointer, notes = None, []
    try:
        pointer = found.current()
    except ValueError as error:
        notes.append(str(error))
    records = found.versions()
    if not records:
        print("\n".join(notes) or f"{found.url} holds no version: `gmeta publish` stores one")
        return
    table = Table(title=found.url, title_justify="left")
    for name in ("version", "id", "stored", "day", "bytes", "gate", ""):
        table.add_column(name, justify="right" if name in ("version", "day", "bytes") else "left")
    for record in records:
        day = record.manifest.get("day")
        table.add_row(
            str(record.number),
            record.id,
            record.created.strftime("%Y-%m-%d %H:%M"),
            "" if day is None else str(day),
            f"{record.bytes:,}",
            _gate(record),
            _mark(record.number, pointer),
        )
    Console().print(table)
    for note in (*notes, *(record.damage for record in records if record.damage)):
        print(note)


def _gate(record: VersionRecord) -> str:
    if record.damage:
        return "damaged"
    if record.manifest.get("gate") is None:
        return ""
    return "refused" if record.refused else "passed"


def _mark(number: int, pointer: Pointer | None) -> str:
    if pointer is None or pointer.version != number:
        return ""
    return "pinned" if pointer.pinned else "current"


def _print_version(found: Registry, number: int) -> None:
    manifest = found.manifest(number)
    files = manifest.pop("files")
    size = sum(entry["bytes"] for entry in files)
    print(json.dumps({**manifest, "files": len(files), "bytes": size}, indent=1))


def run_delta(config: DeltaConfig) -> int:
    """Run `gmeta delta`."""
    base, out = Path(config.base), Path(config.out)
    if config.apply is not None:
        bundle = apply_delta(base, Path(config.apply), out, training=config.training)
        print(f"bundle {out}: version {bundle.id}")
        return 0
    assert config.to is not None
    document = make_delta(base, Path(config.to), out, training=config.training)
    for table, count in document["tables"].items():
        print(f"  {table}: {count['changed']:,} of {count['ids']:,} rows")
    size = delta_bytes(document)
    full = sum(entry["bytes"] for entry in read_manifest(Path(config.to))["files"])
    print(f"delta {out}: {size:,} bytes, {size / full:.1%} of the full version")
    return 0
