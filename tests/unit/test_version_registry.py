"""A registry of versions: publish, read, move the pointer, remove; in a folder and in an object store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import fails, gmeta
from versions import Growing, content, verdict

from gmeta.data.pack import manifest_checksum
from gmeta.delivery.registry import pin, prune_versions, publish, roll_back, unpin
from gmeta.runs.bundle import open_bundle
from gmeta.runs.registry import Registry, open_registry
from gmeta.runs.store import Bucket

obstore = pytest.importorskip("obstore")

DAYS = 6


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, model = tmp_path_factory.mktemp("days"), Growing(items=2000)
    for day in range(DAYS):
        if day:
            model.next_day()
        model.write(place / str(day), parent=f"run{day - 1}/{day - 1}" if day else None)
    return place


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here, and the disk is shared."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(params=["folder", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "folder":
        return open_registry(str(tmp_path / "registry"))
    return Registry(Bucket("memory://", obstore.store.MemoryStore()))


def current(registry: Registry) -> int:
    pointer = registry.current()
    assert pointer is not None
    return pointer.version


def test_versions_are_published_and_fetched(registry: Registry, days: Path, tmp_path: Path) -> None:
    assert registry.current() is None
    assert registry.versions() == []
    for day in range(3):
        assert publish(registry, days / str(day), verdict=None) == day + 1 == current(registry)
    assert [record.id for record in registry.versions()] == ["run0/0", "run1/1", "run2/2"]
    for day in range(3):
        made = registry.fetch(day + 1, tmp_path / "cache")
        assert content(made) == content(days / str(day))
    pointer = registry.current()
    assert pointer is not None
    assert pointer.id == "run2/2"
    assert pointer.xxh3 == made.name == open_bundle(made, training=True).manifest["xxh3"]


def counted(registry: Registry) -> tuple[Registry, list[str]]:
    """The registry, and the keys that are downloaded from it."""
    keys: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(registry.store, name)

        def download(self, key: str, target: Path) -> None:
            keys.append(key)
            registry.store.download(key, target)

    return Registry(Counting()), keys  # type: ignore[arg-type]


def test_deltas_are_followed_from_a_version_in_the_cache(registry: Registry, days: Path, tmp_path: Path) -> None:
    for day in range(5):
        publish(registry, days / str(day), verdict=None)
    reader, keys = counted(registry)
    for cache, training in ((tmp_path / "whole", True), (tmp_path / "served", False)):
        reader.fetch(2, cache, training=training)
        keys.clear()
        made = reader.fetch(4, cache, training=training)
        assert {key.split("/")[0] for key in keys} == {"deltas"}
        assert {key.split("/")[1] for key in keys} == {"3", "4"}
        assert any("training" in key for key in keys) is training
        full = reader.fetch(4, tmp_path / f"fresh{training}", training=training)
        assert content(made) == content(full)
        keys.clear()
        assert reader.fetch(4, cache, training=training) == made
        assert keys == []
    # what a delta does not give is asked for in full
    damaged = next(key for key in registry.store.list("deltas/5/") if "dense" in key.key).key
    (tmp_path / "other").write_bytes(b"other")
    registry.store.upload(tmp_path / "other", damaged)
    assert content(reader.fetch(5, tmp_path / "whole")) == content(days / "4")


def test_the_whole_verdict_lies_beside_the_manifest(registry: Registry, days: Path, tmp_path: Path) -> None:
    """All who look at a version read its manifest, and nobody but people an evaluation."""
    publish(registry, days / "0", verdict=None)
    told = verdict(days / "1", current="run0/0") | {"evaluation": {"records": [1, 2]}, "metrics": {"all": {"auc": 0.7}}}
    publish(registry, days / "1", verdict=told)
    manifest = registry.manifest(2)
    assert manifest["gate"] == {key: value for key, value in told.items() if key != "evaluation"}
    assert manifest["metrics"] == told["metrics"]
    held = registry.store.read("versions/2/verdict.json")
    assert held is not None
    assert json.loads(held.data) == told
    assert not (registry.fetch(2, tmp_path / "cache") / "verdict.json").exists()


def test_a_delta_is_published_for_those_that_serve_alone(registry: Registry, tmp_path: Path) -> None:
    """The history of a day's tasks is new each day, and larger than all else of this version."""
    model = Growing(items=2000)
    for day in range(2):
        model.next_day()
        publish(registry, model.write(tmp_path / str(day), history=20_000), verdict=None)
    sizes = {entry.key: entry.size for entry in registry.store.list("deltas/2/")}
    assert sum(sizes.values()) > 0.5 * sum(entry["bytes"] for entry in registry.manifest(2)["files"])
    served = sum(entry["bytes"] for entry in registry.manifest(2)["files"] if "training" not in entry["file"])
    assert sum(size for key, size in sizes.items() if "training" not in key) < 0.5 * served
    for training in (True, False):
        registry.fetch(1, tmp_path / "cache", training=training)
        made = registry.fetch(2, tmp_path / "cache", training=training)
        assert content(made) == content(registry.fetch(2, tmp_path / f"fresh{training}", training=training))


def test_a_delta_that_saves_nobody_half_is_left_out(registry: Registry, tmp_path: Path) -> None:
    model = Growing(items=200)
    for day in range(2):
        model.next_day(changed=200)
        publish(registry, model.write(tmp_path / str(day)), verdict=None)
    assert registry.store.list("deltas/") == []


def test_a_cached_version_that_is_damaged_is_fetched_again(registry: Registry, days: Path, tmp_path: Path) -> None:
    publish(registry, days / "0", verdict=None)
    made = registry.fetch(1, tmp_path / "cache")
    (made / "dense.safetensors").write_bytes(b"other")
    assert registry.fetch(1, tmp_path / "cache") == made
    assert content(made) == content(days / "0")


def test_a_refused_version_is_stored_and_never_current(registry: Registry, days: Path, tmp_path: Path) -> None:
    publish(registry, days / "0", verdict=verdict(days / "0"))
    refusal = verdict(days / "1", passed=False, current="run0/0")
    assert publish(registry, days / "1", verdict=refusal) == 2
    assert current(registry) == 1
    assert [record.refused for record in registry.versions()] == [False, True]
    assert registry.manifest(2)["gate"] == refusal
    for move in (lambda: roll_back(registry, 2), lambda: pin(registry, 2)):
        with pytest.raises(ValueError, match="was refused by its gate"):
            move()
    publish(registry, days / "2", verdict=verdict(days / "2", current="run0/0"))
    manifest = open_bundle(registry.fetch(3, tmp_path / "cache"), training=True).manifest
    assert manifest["gate"]["passed"]


def test_back_and_forward(registry: Registry, days: Path) -> None:
    for day in range(3):
        publish(registry, days / str(day), verdict=None)
    assert roll_back(registry) == 2 == current(registry)
    assert roll_back(registry) == 1 == current(registry)
    with pytest.raises(ValueError, match="no version that was current before"):
        roll_back(registry)
    assert roll_back(registry, 3) == 3 == current(registry)
    assert roll_back(registry) == 2


def test_a_pin_holds_the_pointer(registry: Registry, days: Path) -> None:
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=None)
    assert pin(registry, 1) == 1 == current(registry)
    assert publish(registry, days / "2", verdict=None) == 3
    assert current(registry) == 1
    with pytest.raises(ValueError, match="is pinned"):
        roll_back(registry)
    assert unpin(registry) == 1
    assert publish(registry, days / "3", verdict=None) == 4 == current(registry)


def test_prune_keeps_what_serves(registry: Registry, days: Path, tmp_path: Path) -> None:
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=verdict(days / "1", passed=False, current="run0/0"))
    for day in (2, 3, 4):
        publish(registry, days / str(day), verdict=None)
    pin(registry, 1)
    assert prune_versions(registry, 2) == [2, 3]
    assert [record.number for record in registry.versions()] == [1, 4, 5]
    assert {listed.key.split("/")[1] for listed in registry.store.list("deltas/")} <= {"4", "5"}
    with pytest.raises(ValueError, match="has no version 3"):
        registry.fetch(3, tmp_path / "cache")
    unpin(registry)
    assert publish(registry, days / "5", verdict=None) == 6
    assert prune_versions(registry, 1) == [1, 4, 5]
    assert content(registry.fetch(6, tmp_path / "cache")) == content(days / "5")
    assert prune_versions(registry, 1) == []


def test_a_version_that_is_being_removed_does_not_become_current(
    registry: Registry, days: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback that decides between the mark of `prune` and the removal, and one that decides before the mark."""
    for day in range(3):
        publish(registry, days / str(day), verdict=None)

    def race(kind: type, name: str, meanwhile: Callable[[], None]) -> None:
        original = getattr(kind, name)

        def raced(self: Any, *arguments: Any) -> Any:
            monkeypatch.setattr(kind, name, original)
            meanwhile()
            return original(self, *arguments)

        monkeypatch.setattr(kind, name, raced)

    def late_rollback() -> None:
        with pytest.raises(ValueError, match="is being removed"):
            roll_back(registry, 1)

    race(type(registry.store), "delete", late_rollback)
    assert prune_versions(registry, 2) == [1]
    race(type(registry.store), "replace", lambda: roll_back(registry, 2) and None)
    assert prune_versions(registry, 1) == []  # version 2 is current, version 3 the newest
    assert current(registry) == 2


def test_a_removal_that_was_killed_is_completed(
    registry: Registry, days: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in range(4):
        publish(registry, days / str(day), verdict=None)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(registry.store), "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_versions(registry, 1)
    assert len(registry.versions()) == 4
    with pytest.raises(ValueError, match="is being removed"):
        roll_back(registry, 2)
    assert prune_versions(registry, 2) == [1, 2, 3]
    assert [record.number for record in registry.versions()] == [4]


def test_what_is_not_to_be_published(registry: Registry, days: Path, tmp_path: Path) -> None:
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=None)

    def refused(bundle: Path, told: str, verdict: dict[str, Any] | None = None) -> None:
        before = registry.store.list("")
        with pytest.raises(ValueError, match=told):
            publish(registry, bundle, verdict=verdict)
        assert registry.store.list("") == before

    refused(days / "0", "run0/0 was delivered already, as number 1")
    refused(days / "1", "run1/1 was delivered already, as number 2")
    refused(days / "2", "was judged against another version than 2", verdict(days / "2", current="run0/0"))
    refused(days / "2", "the verdict is of version 'run3/3'", verdict(days / "3", current="run1/1"))
    refused(days / "2", "none of `gmeta gate`", {"format": "other"})
    other = Growing().write(tmp_path / "other", model={"name": "dlrm", "source": None})
    refused(other, r"of another model than .*: model is dlrm, expected melu")
    schema = json.loads((days / "2" / "schema.json").read_text())
    schema["pack"]["numeric"].pop()
    odd = changed(days / "2", tmp_path / "odd", "schema.json", json.dumps(schema).encode())
    refused(odd, r"of another model than .*: numeric columns are \['age'\], expected \['age', 'price'\]")
    shutil.copytree(days / "2", tmp_path / "damaged")
    (tmp_path / "damaged" / "training" / "state.json").write_bytes(b"other")
    refused(tmp_path / "damaged", "state.json has 5 bytes")
    shutil.copytree(days / "2", tmp_path / "linked")
    (tmp_path / "linked" / "config.yaml").unlink()
    (tmp_path / "linked" / "config.yaml").symlink_to(days / "2" / "config.yaml")
    refused(tmp_path / "linked", "is a symbolic link")
    manifest = json.loads((days / "2" / "manifest.json").read_text())
    shutil.copytree(days / "2", tmp_path / "outside")
    manifest["files"].append({"file": "../2/config.yaml", "bytes": 1, "xxh3": "0"})
    manifest["xxh3"] = manifest_checksum(manifest)
    (tmp_path / "outside" / "manifest.json").write_text(json.dumps(manifest))
    refused(tmp_path / "outside", "no plain name")
    assert publish(registry, days / "2", verdict=None) == 3


def changed(bundle: Path, out: Path, file: str, data: bytes) -> Path:
    """A bundle with another file, whose manifest is right."""
    import xxhash

    shutil.copytree(bundle, out)
    (out / file).write_bytes(data)
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["file"] == file:
            entry.update(bytes=len(data), xxh3=xxhash.xxh3_64(data).hexdigest())
    manifest["xxh3"] = manifest_checksum(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


class Heedless(Bucket):
    """A store that writes whatever the condition."""

    def create(self, key: str, data: bytes) -> bool:
        obstore.put(self.store, key, data)
        return True

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        return self.create(key, data)


def test_a_store_without_conditions_is_refused(days: Path) -> None:
    registry = Registry(Heedless("memory://", obstore.store.MemoryStore()))
    with pytest.raises(ValueError, match="ignores conditional writes"):
        publish(registry, days / "0", verdict=None)
    assert registry.store.list("") == []


@pytest.fixture
def no_obstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    return


def test_without_obstore_the_extra_is_named(no_obstore: None) -> None:
    with pytest.raises(ValueError, match=r"pip install 'gmeta\[registry\]'"):
        open_registry("s3://bucket/models")


def test_a_url_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starts with s3://"):
        open_registry("ftp://host/models")
    assert open_registry(f"file://{tmp_path}").url == str(tmp_path)


def test_a_pointer_that_is_not_ours_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "current.json"
    for text, told in (
        ("{", "cannot be read"),
        ("[]", "holds no mapping"),
        ('{"format": "other"}', "is of format 'other'"),
        ('{"format": "gmeta-registry", "format_version": 2}', "upgrade"),
        ('{"format": "gmeta-registry", "format_version": 1}', "is damaged .* remove it and make another"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            open_registry(str(tmp_path)).current()


def test_a_pointer_that_was_lost_is_not_an_empty_registry(registry: Registry, days: Path) -> None:
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=None)
    for move in (lambda: roll_back(registry, 1), lambda: pin(registry, 2)):
        registry.store.delete("current.json")
        for ask in (
            registry.current,
            lambda: roll_back(registry),
            lambda: prune_versions(registry, 1),
            lambda: publish(registry, days / "2", verdict=None),
        ):
            with pytest.raises(ValueError, match=r"current.json is missing, and was there: .* rollback --to N"):
                ask()
        assert move() == current(registry)
    assert unpin(registry) == 2
    assert publish(registry, days / "2", verdict=None) == 3 == current(registry)


def test_a_first_publisher_that_was_killed_leaves_no_lost_pointer(
    registry: Registry, days: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do versions that were refused, or stored for later: any of the three is gone on with."""
    publish(registry, days / "3", verdict=verdict(days / "3", passed=False))
    assert publish(registry, days / "4", verdict=None, make_current=False) == 2
    kind = type(registry.store)
    create = kind.create

    def killed(self: Any, key: str, data: bytes) -> bool:
        if key == "current.json":
            raise KeyboardInterrupt
        return create(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, days / "0", verdict=None)
    assert registry.current() is None
    with pytest.raises(ValueError, match=r"no current version: .* `gmeta registry rollback --to N`"):
        roll_back(registry)
    assert publish(registry, days / "0", verdict=None) == 3 == current(registry)
    assert roll_back(registry, 2) == 2 == current(registry)


def test_a_verdict_of_another_registry_is_dropped(registry: Registry, days: Path, tmp_path: Path) -> None:
    first = open_registry(str(tmp_path / "first"))
    publish(first, days / "0", verdict={**verdict(days / "0"), "metrics": {"auc": 0.7}})
    first.download(1, tmp_path / "fetched")
    publish(registry, tmp_path / "fetched", verdict=None)
    manifest = registry.manifest(1)
    assert "gate" not in manifest
    assert manifest["metrics"] == {"auc": 0.7}
    assert first.manifest(1)["gate"]["passed"]


def damage(registry: Registry, key: str, place: Path, data: bytes = b"{") -> None:
    place.write_bytes(data)
    registry.store.upload(place, key)


def test_a_damaged_manifest_stops_nothing_else(registry: Registry, days: Path, tmp_path: Path) -> None:
    for day in range(4):
        publish(registry, days / str(day), verdict=None)
    sound = registry.store.read("versions/3/manifest.json")
    assert sound is not None
    for text in (b"{", b"[]", sound.data.replace(b"run2/2", b"run2/3")):
        damage(registry, "versions/3/manifest.json", tmp_path / "bytes", text)
        assert [bool(record.damage) for record in registry.versions()] == [False, False, True, False]
    for move in (lambda: roll_back(registry, 3), lambda: pin(registry, 3), lambda: registry.manifest(3)):
        with pytest.raises(ValueError, match=r"versions/3/manifest.json .*restore its files, or remove versions/3"):
            move()
    with pytest.raises(ValueError, match=r"was delivered already, as number 3 .* remove versions/3"):
        publish(registry, days / "2", verdict=None)
    assert roll_back(registry) == 2 == current(registry), "the damaged one is passed over"
    assert publish(registry, days / "4", verdict=None) == 6 == current(registry)
    damage(registry, "versions/6/manifest.json", tmp_path / "bytes")
    assert unpin(registry) == 6
    assert roll_back(registry) == 2 == current(registry)
    for listed in registry.store.list("versions/6/"):
        registry.store.delete(listed.key)
    assert publish(registry, days / "4", verdict=None) == 7, "what served once keeps its number"
    assert prune_versions(registry, 1) == [1, 2, 3, 4]


def test_a_version_whose_files_are_not_there_does_not_become_current(
    registry: Registry, days: Path, tmp_path: Path
) -> None:
    for day in range(3):
        publish(registry, days / str(day), verdict=None)
    registry.store.delete("versions/1/dense.safetensors")
    damage(registry, "versions/2/config.yaml", tmp_path / "bytes", b"")
    for number, told in ((1, "its dense.safetensors is missing"), (2, "its config.yaml has 0 bytes")):
        for move in (roll_back, pin):
            with pytest.raises(
                ValueError, match=f"version {number} of .* is damaged: {told}.* remove versions/{number}"
            ):
                move(registry, number)
    assert current(registry) == 3
    registry.store.delete("versions/3/schema.json")
    with pytest.raises(ValueError, match=r"version 3 of .* is damaged: its schema.json is missing"):
        publish(registry, days / "3", verdict=None)


def test_the_commands_on_a_damaged_registry(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "registry"
    registry, to = open_registry(str(place)), ["--registry", place]
    for day in range(3):
        publish(registry, days / str(day), verdict=None)
    (place / "versions" / "1" / "manifest.json").write_text("{")
    (place / "current.json").write_text("{")
    gmeta("registry", "list", *to)
    told = capsys.readouterr().out
    assert "damaged" in told
    assert "run1/1" in told
    assert "remove versions/1" in told
    assert "remove it and make another with `gmeta registry rollback --to N`" in told
    (place / "current.json").unlink()
    fails(["serve", *to], capsys, "current.json is missing, and was there")
    fails(["registry", "rollback", "2", *to], capsys, "name the version with --to N")
    gmeta("registry", "rollback", "--to", 2, *to)
    assert "version 2 is current" in capsys.readouterr().out
    gmeta("registry", "unpin", *to)
    assert "was not pinned" in capsys.readouterr().out


def test_the_commands(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["--registry", tmp_path / "registry"]
    gmeta("registry", "list", *to)
    assert "holds no version" in capsys.readouterr().out
    more = ["--cache", tmp_path / "cache"]
    gmeta("publish", *to, "--bundle", days / "0", *more)
    (tmp_path / "verdict.json").write_text(json.dumps(verdict(days / "1", passed=False)))
    gmeta("publish", *to, "--bundle", days / "1", "--verdict", tmp_path / "verdict.json", *more)
    gmeta("publish", *to, "--bundle", days / "2", "--make_current", "false", *more)
    gmeta("publish", *to, "--bundle", days / "3", *more)
    told = " ".join(capsys.readouterr().out.split())
    assert "version 1 is stored, and current" in told
    assert "version 2 is stored; its gate refused it" in told
    assert "registry rollback --to 3` makes it so" in told
    gmeta("registry", "rollback", *to)
    gmeta("registry", "pin", 4, *to)
    gmeta("registry", "list", *to)
    table = capsys.readouterr().out
    assert "pinned" in table
    assert "refused" in table
    gmeta("registry", "show", "2", *to)
    assert json.loads(capsys.readouterr().out)["gate"]["passed"] is False
    gmeta("registry", "unpin", *to)
    gmeta("registry", *to, "fetch", "4", "--out", tmp_path / "out")
    assert content(tmp_path / "out") == content(days / "3")
    gmeta("registry", "prune", "--keep", 1, *to)
    assert "removed version 1, version 2, version 3" in capsys.readouterr().out
    fails(["registry", "lst", *to], capsys, "did you mean 'list'?")
    fails(["registry", "show", *to], capsys, "show takes one number of a version")
    fails(["registry", "list", "--keep", "2", *to], capsys, "it belongs to prune")
    fails(["registry", "prune", *to], capsys, "prune needs --keep")
    fails(["registry", "fetch", "1", *to, "--out", tmp_path / "o"], capsys, "has no version 1")


def test_numbers_go_on_after_pruning_the_newest(days: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=None)
    roll_back(registry)
    publish(registry, days / "2", verdict=None, make_current=False)
    assert prune_versions(registry, 1) == [2]
    assert publish(registry, days / "3", verdict=None) == 4


def test_what_dead_publishers_left_is_removed_after_a_day(days: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    publish(registry, days / "0", verdict=None)
    left = {7: ["claim.json", "dense.safetensors", "tables/.partial-0"], 8: ["claim.json", "dense.safetensors"]}
    for number, files in left.items():
        for file in files:
            path = tmp_path / "versions" / str(number) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"id": f"dead/{number}"}))
            if number == 7:
                os.utime(path, (0, 0))
    (tmp_path / "deltas" / "7").mkdir(parents=True)
    (tmp_path / "deltas" / "7" / "result.json").write_text("{}")
    prune_versions(registry, 1)
    assert {entry.key for entry in registry.store.list("versions/7/")} == {
        "versions/7/claim.json",
        "versions/7/manifest.json",  # its publisher, should he live, finds that he was given up
    }
    assert len(registry.store.list("versions/8/")) == 2, "it may be alive"
    assert registry.store.list("deltas/") == []
    assert [record.number for record in registry.versions()] == [1]
    with pytest.raises(ValueError, match="has no version 7"):
        registry.manifest(7)
    assert publish(registry, days / "1", verdict=None) == 9
