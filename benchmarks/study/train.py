"""`gmeta train` on one rank, with parts of the study in place of the product's.

    cd benchmarks; python -m study.train separate,central --pack PACK --run_dir RUN …

The first word names switches (`study.variants`), the others are those of `gmeta train`. Several ranks are started as
torchrun starts them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gmeta import cli
from gmeta.config.parse import parse_words
from gmeta.config.train import TrainConfig
from gmeta.training.loop import training_loop
from gmeta.training.trainer import Trainer
from study.variants import parts


def run(words: Sequence[str], switches: Sequence[str]) -> int:
    """Train as `words` tell; the exit code. Errors are raised, not printed."""
    config, _ = parse_words(cli.command_parser("train"), TrainConfig, words)
    with Trainer(config, parts=parts(*switches)) as trainer:
        training_loop(trainer.run)
    return trainer.result.exit_code


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], sys.argv[1].split(",")))
