"""Your own training loop, with everything that `gmeta train` has: here a penalty on confident logits is added.

python examples/own_loop.py PACK RUN_DIR                                # by default on the pack of `make demo`
torchrun --nproc_per_node 2 examples/own_loop.py PACK RUN_DIR           # two processes learn the same model
"""

import sys

import gmeta


def main(pack: str, run_dir: str) -> int:
    """Train. Stop with Ctrl-C, and go on with the same command. Returns the exit code that launchers understand."""
    config = {"pack": pack, "run_dir": run_dir, "resume": True, "schedule": {"epochs": 2}}
    with gmeta.Trainer(config) as trainer:
        for batch in trainer:
            loss, output = trainer.forward(batch)
            confident = output.query_logits.square() * batch.tasks.query.mask
            trainer.backward(loss + 1e-4 * confident.sum() / batch.tasks.num_tasks_global)
            trainer.step()
    print(f"best loss {trainer.result.best:.4f} on valid at step {trainer.result.best_step}")
    return trainer.result.exit_code


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ("runs/demo/pack", "runs/own_loop"))))
