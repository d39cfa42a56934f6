"""Rows of AntM2C's released layout, and part files of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from gmeta.data.antm2c.published import COLUMNS, DEEP_FEATURES

Row = dict[str, Any]


def row(user: str, item: str, time: str, label: int, scene: int = 1, **more: Any) -> Row:
    """A row as the released files have it; times are of August 2023."""
    found: Row = dict.fromkeys(COLUMNS, "")
    found |= {"user_id": user, "item_id": item, "log_time": f"2023-08-{time}", "label": label, "scene": scene}
    found |= {"bill_entity_seq": "tea;milk", "service_entity_seq": "taxi", "item_entity_names": "cup;pot"}
    found |= {"query_entity_seq": "", "item_title": f"about {item}"}
    kinds = [7, "c1", 0.5]
    found |= {name: kinds[place % 3] for place, name in enumerate(DEEP_FEATURES)}
    return found | more


def write_log(folder: Path, rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> Path:
    """Deal rows to three part files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(3):
        with (folder / f"antm2c_10m_part{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows[part::3])
    return folder
