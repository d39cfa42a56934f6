"""What a command of gmeta makes once a process, made in the server of forks.py before it forks."""

import tensorboard.summary  # noqa: F401 - rank 0 of a training writes one

from gmeta.cli import COMMANDS, command_parser
from gmeta.config.parse import known_keys
from gmeta.config.train import TrainConfig

for name, command in COMMANDS.items():
    if command.distributed:
        command_parser(name)
known_keys(TrainConfig)
