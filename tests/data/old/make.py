"""Make the files beside this script: a log, its pack, a run with its checkpoint, and what they scored.

They are made once, by the release that came before the folders were rebuilt (commit 3910621), and are never made
anew: tests read them to show that packs, runs and settings of that release still work. To see how they came about,
run this script in an empty folder with that release:

    cd EMPTY_FOLDER && PYTHONPATH=CHECKOUT_OF_3910621 python .../tests/data/old/make.py

All paths are relative to the folder, so that no file names a place. The run is kept without `environment.json`,
`tensorboard/` and `.lock`, which describe the machine, and without `evaluation.json`, which is large.
"""

from __future__ import annotations

import csv
import random
import shutil
from pathlib import Path

import yaml

from gmeta.cli import run

SCHEMA = """\
task: user
label: click
time: at
item: item
categorical:
  - item
  - {name: city, hash_buckets: 5}
multi:
  - {name: tags, separator: "|"}
numeric:
  - age
  - {name: price, log: true}
item_statistics: true
hash_seed: 3
"""

TRAIN = """\
pack: pack
run_dir: run
model: {name: melu, hidden: [6], bottom: [6], embedding_dim: 4}
meta: {adapt: [head], inner_steps: 2, inner_lr: 0.1}
embedding: {optimizer: adam, lr: 0.01}
dense: {lr: 0.01, placement: NNN, group_size: 0}
loader: {tasks_per_batch: 4, ahead: ids, sequential: true, size_buckets: true}
comm: {fetch: fused, dedup: true, dense: all_reduce}
schedule: {epochs: 2, keep_last: 1}
"""


def rows() -> list[dict[str, object]]:
    """A log of 24 users with 6 to 9 clicks each."""
    draw = random.Random(0)
    out: list[dict[str, object]] = []
    for user in range(24):
        city = draw.choice(["Ulm", "Bonn", "Kiel"])
        for at in range(draw.randint(6, 9)):
            item = f"i{draw.randint(0, 8)}"
            tags = "|".join(draw.sample(["red", "blue", "green"], draw.randint(0, 2)))
            click = int(draw.random() < 0.3 + 0.05 * int(item[1:]))
            row = {"user": f"u{user}", "item": item, "city": city, "tags": tags, "age": draw.randint(18, 60)}
            out.append({**row, "price": round(draw.uniform(1, 90), 2), "at": at, "click": click})
    return out


def write(name: str, found: list[dict[str, object]]) -> None:
    """Write rows as CSV."""
    with open(name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def gmeta(*words: str) -> None:
    """Run a command of that release."""
    assert run(list(words)) == 0, words


def main() -> None:
    """Make everything in the current folder."""
    log = rows()
    write("log.csv", log)
    Path("schema.yaml").write_text(SCHEMA)
    Path("train.yaml").write_text(TRAIN)
    gmeta("prepare", "--input", "log.csv", "--schema", "schema.yaml", "--out", "pack", "--query_size", "2")
    gmeta("train", "--config", "train.yaml")
    gmeta("evaluate", "--run_dir", "run", "--resamples", "10")
    # The first user's last two rows, and one of a new user, as `predict` gets them.
    mine = [row for row in log if row["user"] == "u0"]
    query = [*mine[-2:], {**mine[-1], "user": "stranger", "item": "new"}]
    write("support.csv", mine[:-2])
    write("query.csv", [{key: row[key] for key in row if key != "click"} for row in query])
    gmeta("predict", "--run_dir", "run", "--support", "support.csv", "--query", "query.csv", "--out", "scores.csv")
    file = Path("run/config.yaml")
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "pack": "pack"}, sort_keys=False))
    shutil.rmtree("run/tensorboard")
    for name in ("environment.json", "evaluation.json", ".lock"):
        (Path("run") / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
