"""`python -m pi05c`: the command line."""

import sys

from pi05c.cli import main

if __name__ == "__main__":
    sys.exit(main())
