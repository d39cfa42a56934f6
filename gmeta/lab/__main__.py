"""A worker of a laboratory run, as the launcher starts it: `python -m gmeta.lab FOLDER`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from gmeta.config.train import TrainConfig
from gmeta.lab.device import Device, bind_to, contended_core, machines_so_far
from gmeta.lab.folder import LabFolder
from gmeta.parallel.launch import EXIT_PEER_LOST, EXIT_USER_ERROR, follow_launcher, report_error, worker_rank
from gmeta.parallel.mesh import PeerLost
from gmeta.runs.directory import read_config
from gmeta.training.trainer import Trainer


def main(folder: str) -> int:
    """Train as folder/config.yaml says, on the device of this rank; the exit codes are `gmeta train`'s."""
    lab, rank = LabFolder(Path(folder)), worker_rank()
    device = None
    try:
        scenario, config = lab.scenario(), read_config(lab.path)
        kind = scenario.device(rank)
        if kind is not None:
            elastic = replace(config.elastic, device_class=kind.name, max_slots=kind.max_slots or 0)
            config = replace(config, elastic=elastic)
        device = Device(scenario, rank, machines_so_far(lab.trace, rank), lab)
        if device.contended:
            bind_to(contended_core())
        return train_on(device, config)
    except (ValueError, OSError) as error:
        report_error(f"gmeta lab: error: {error}")
        return EXIT_USER_ERROR
    except PeerLost as error:
        report_error(f"gmeta lab: error: {error}")
        return EXIT_PEER_LOST
    except KeyboardInterrupt:
        return 130
    finally:
        if device is not None:
            device.close()


def train_on(device: Device, config: TrainConfig) -> int:
    """Train as `gmeta train` does, with each micro-batch taking as long as the emulated device would."""
    with Trainer(config) as trainer:
        for batch in trainer:
            begun_s = time.perf_counter()
            loss, _ = trainer.forward(batch)
            trainer.backward(loss)
            step = trainer.run.state.progress.step
            device(step, batch.work, batch.number == 0, time.perf_counter() - begun_s)
            trainer.step()
    return trainer.result.exit_code


if __name__ == "__main__":
    follow_launcher()
    sys.exit(main(sys.argv[1]))
