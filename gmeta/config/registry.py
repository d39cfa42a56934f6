"""Settings of the commands that keep versions: `gmeta delta`, `gmeta publish` and `gmeta registry`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gmeta.core.errors import nearest, require


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Make the delta from one bundle to another, or apply one."""

    base: str
    """Bundle that the delta goes on from."""
    to: str | None = None
    """Bundle that it leads to: make the delta."""
    apply: str | None = None
    """Delta to apply to the base: make the bundle that it leads to, the same bytes."""
    out: str
    """Folder to make: the delta with --to, the bundle with --apply."""
    training: bool = True
    """Take the optimizer's moments along, which the next warm start goes on with. Serving does not need them."""

    def __post_init__(self) -> None:
        require((self.to is None) != (self.apply is None), "to", self.to, "give either --to BUNDLE or --apply DELTA")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Store a bundle as the next version of a registry, and make it current."""

    registry: str
    """Folder, or s3://, gs:// or az:// URL, that holds the versions of one model. An empty one is begun."""
    bundle: str
    """Bundle made by `gmeta bundle`."""
    verdict: str | None = None
    """JSON file that `gmeta gate` wrote of this bundle. A version that it refuses is stored, and never becomes
    current."""
    make_current: bool = True
    """Make the version current, unless another one is pinned."""
    cache: str = "~/.cache/gmeta"
    """Folder with versions that were fetched from an object store: the delta to this version is made of the current
    one."""


REGISTRY_VERBS = ("list", "show", "rollback", "pin", "unpin", "prune", "fetch")
_WITH_NUMBER = {"show": True, "fetch": True, "pin": False}
"""Those that take a version's number, and whether they need it."""


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """Look at the versions of a registry, say which one serves, and remove old ones."""

    do: list[str] = field(default_factory=list)
    """What to do: list; show N (manifest and verdict); rollback (to the version that was current before, or --to N);
    pin [N] (it stays current whatever is published); unpin; prune --keep K; fetch N --out FOLDER."""
    registry: str
    """Folder or URL that `gmeta publish` wrote to."""
    to: int | None = None
    """With rollback: the version to make current."""
    keep: int | None = None
    """With prune: how many of the newest versions stay. The current one stays too."""
    out: str | None = None
    """With fetch: folder to make."""

    def __post_init__(self) -> None:
        verb = self.do[0] if self.do else ""
        require(verb in REGISTRY_VERBS, "do", verb, nearest(verb, REGISTRY_VERBS))
        rest, needed = self.do[1:], _WITH_NUMBER.get(verb)
        most = 0 if needed is None else 1
        least = 1 if needed else 0
        number = all(word.isdecimal() for word in rest) and least <= len(rest) <= most
        takes = "one number of a version" if most else "no word more"
        if verb == "rollback":
            takes += ": name the version with --to N"
        require(number, "do", " ".join(self.do), f"{verb} takes {takes}")
        for key, owner in (("to", "rollback"), ("keep", "prune"), ("out", "fetch")):
            value = getattr(self, key)
            require(value is None or verb == owner, key, value, f"it belongs to {owner}, not to {verb}: leave it out")
        for key, owner in (("keep", "prune"), ("out", "fetch")):
            require(verb != owner or getattr(self, key) is not None, key, None, f"{owner} needs --{key}")
        require(self.keep is None or self.keep >= 1, "keep", self.keep, "must be at least 1")
