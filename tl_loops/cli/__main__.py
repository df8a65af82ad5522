"""``python -m tl_loops.cli``: the command line."""

import sys

from tl_loops.cli import main

if __name__ == "__main__":
    sys.exit(main())
