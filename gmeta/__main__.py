"""`gmeta …`, `python -m gmeta …` and `torchrun -m gmeta …`."""

import sys

from gmeta.cli import run


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
