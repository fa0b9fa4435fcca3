"""What the tools share: arguments, errors in one line, figures as JSON."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(main: Callable[[], int | None]) -> None:
    """Run a tool's main function; an error a person can act on is one line and exit status 2, or the error's own."""
    quiet()
    try:
        status = main()
    except (ValueError, OSError) as error:
        if os.environ.get("DANCE_SEG_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 2)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(status or 0)


def quiet() -> None:
    """Leave out what libraries say of themselves; what concerns the user's data, recipe or machine stays."""
    for noise in (".*isinstance.treespec.*", ".*does not have many workers.*", ".*smaller than the logging interval.*"):
        warnings.filterwarnings("ignore", message=noise)

    class Unasked(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            said = record.getMessage()
            return not said.startswith(("💡", "`weights_only`", "TPU available", "HPU available"))

    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero", "pytorch_lightning"):
        logging.getLogger(name).addFilter(Unasked())


def parser(description: str, *, figures: bool = False) -> argparse.ArgumentParser:
    """An argument parser; `figures` adds --json FILE."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if figures:
        made.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON too")
    return made


def add_recipe(made: argparse.ArgumentParser) -> None:
    """The RECIPE argument and its overrides."""
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/camvid_data_slimming.yaml")
    made.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="what to change, such as trainer.max_epochs=2 data.args.root=DIR",
    )


def write_json(path: Path | None, figures: dict[str, Any] | Sequence[Any]) -> None:
    """Write figures where the user asked for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2, default=float, allow_nan=False) + "\n")
