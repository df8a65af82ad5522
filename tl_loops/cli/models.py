"""``tl-loops models``."""

import argparse

from tl_loops.cli.output import print_json, print_table
from tl_loops.loading.catalogue import catalogue

HUB = "huggingface.co"
"""What a table calls the address of a model that is there under its name; JSON has it whole."""


def run(options: argparse.Namespace) -> None:
    """List the names that load, with notation, parameters and source."""
    found = [(entry, entry.config()) for entry in catalogue()]
    if options.json:
        print_json(
            [
                {
                    "name": entry.name,
                    "notation": cfg.notation,
                    "n_params": cfg.n_params,
                    "source": entry.source,
                }
                for entry, cfg in found
            ]
        )
        return
    rows = [
        (
            entry.name,
            cfg.notation,
            f"{cfg.n_params:,}",
            entry.source.replace(f"https://{HUB}/{entry.name}", HUB),
        )
        for entry, cfg in found
    ]
    print_table(("name", "notation", "parameters", "source"), rows, numbers=("parameters",))
