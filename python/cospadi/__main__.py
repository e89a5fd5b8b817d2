"""``python -m cospadi`` is the ``cospadi`` command."""

from cospadi.cli.app import main

if __name__ == "__main__":
    main()
