"""The command line: tl-loops models, metrics, check, measure, merge, report.

Starting it imports neither torch nor TransformerLens: a command is imported when it runs.
"""

import sys

try:
    from tl_loops.cli.main import main
except KeyboardInterrupt:  # a moment after the start, before main() can see to it
    print("tl-loops: interrupted; nothing was saved", file=sys.stderr)
    raise SystemExit(130) from None

__all__ = ["main"]
