"""dance-seg VERB ... is the same as python -m tools.VERB ..."""

import runpy
import sys
from pathlib import Path


def verbs() -> list[str]:
    """The names of the tools."""
    hidden = {"__init__", "__main__", "cli"}
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in hidden)


def main() -> None:
    """Run the tool that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: dance-seg VERB ...\n\nverbs: " + ", ".join(verbs()) + "\n\ndance-seg VERB --help says more")
        raise SystemExit(0)
    verb = sys.argv[1]
    if verb not in verbs():
        print(f"error: {verb!r} is no verb; choose one of {', '.join(verbs())}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"dance-seg {verb}", *sys.argv[2:]]
    runpy.run_module(f"tools.{verb}", run_name="__main__")


if __name__ == "__main__":
    main()
