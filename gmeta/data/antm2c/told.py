"""What `gmeta prepare` says of a log of AntM2C: its counts beside the published ones, and what its columns are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gmeta.data.antm2c.published import ITEMS, POSITIVES, ROWS, SPLITS, TEST_ITEMS, TRAIN_ITEMS, TRAIN_USERS, USERS

_PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "train": {"rows": ROWS[0], "positives": POSITIVES[0], "users": TRAIN_USERS, "items": TRAIN_ITEMS},
    "valid": {"rows": ROWS[1], "positives": POSITIVES[1]},
    "test": {"rows": ROWS[2], "positives": POSITIVES[2], "items": TEST_ITEMS},
}


def log_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Say how a log differs from the released one, and what was made of its columns."""
    for split in SPLITS:
        of = found[split]
        if not of["rows"]:
            yield f"{split}: no rows"
            continue
        told = [f"{of[name]:,} {name}{_beside(_PUBLISHED[split].get(name))}" for name in ("rows", "positives")]
        told += [f"{of[name]:,} {name}{_beside(_PUBLISHED[split].get(name))}" for name in ("users", "items")]
        scenes = " / ".join(f"{100 * count / of['rows']:.0f}" for count in of["scenes"].values())
        yield f"{split}: {', '.join(told)}; scenes {' / '.join(of['scenes'])}: {scenes} %"
    yield f"{found['users']:,} users{_beside(USERS)} and {found['items']:,} items{_beside(ITEMS)} in all"
    mark = found["separator"]
    if mark:
        yield f"entries of lists are separated by {mark!r}, which {found['separated']:.0%} of the lists have"
        if found["likeliest_separator"] != mark:
            yield f"CAREFUL: more lists have {found['likeliest_separator']!r}: leave --separator out, or look at them"
        for file in found["separated_otherwise"]:
            yield f"CAREFUL: lists of {file} seldom have {mark!r}: is something else between their entries?"
    else:
        yield "lists have no separator that is known, and count as one entry each: name it with --separator"
    kinds = [f"{len(found[name])} {word}" for name, word in (("numeric", "numbers"), ("codes", "codes"))]
    yield f"deep_features, by rows of train: {', '.join(kinds)}; left out: {', '.join(found['left_out']) or 'none'}"
    if "items_with_image" in found:
        yield f"items with an image: {found['items_with_image']:,} of {found['items']:,}"
    if found["items_of_several_titles"]:
        yield f"items of several titles, each of which counts where it stands: {found['items_of_several_titles']:,}"
    if found["rows_without_title"]:
        yield f"rows without a title: {found['rows_without_title']:,}"
    if found.get("filled_times"):
        yield f"rows whose time cannot be parsed, which public code takes for train: {found['filled_times']:,}"


def _beside(published: int | None) -> str:
    return "" if published is None else f" (published {published:,})"
