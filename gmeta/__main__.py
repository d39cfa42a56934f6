"""`gmeta …`, `python -m gmeta …` and `torchrun -m gmeta …`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from gmeta.cli import run_quietly
        from gmeta.parallel.launch import follow_launcher, leave

        follow_launcher()
        leave(run_quietly(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
