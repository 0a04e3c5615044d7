"""`python -m selfray`, and so `torchrun -m selfray`."""

from selfray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
