"""Set runs side by side: mIoU, training cost, inference cost, with ratios to a baseline.

python -m tools.compare RUN RUN ... [--baseline RUN] [--out DIR] [--json FILE] [--markdown FILE]

RUN is a run folder or an offline run of Weights & Biases (runs/NAME/wandb/offline-run-*). Prints the table and writes
compare.md, compare.json and compare.html, a page with pictures and curves.
"""

from pathlib import Path

from tools.cli import parser, run, write_json


def main() -> int:
    """Read the runs, print the table, write it three times."""
    arguments_parser = parser(__doc__, figures=True)
    arguments_parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folders, such as runs/shapes_dense, or offline runs"
    )
    arguments_parser.add_argument("--baseline", metavar="RUN", type=Path, help="what ratios are against; the first run")
    arguments_parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/compare"),
        help="where compare.{md,json,html} go; %(default)s",
    )
    arguments_parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the Markdown there instead")
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.machine import write_text
    from dance_seg.report.comparison import compare_runs
    from dance_seg.report.comparison_page import comparison_page
    from dance_seg.report.page import render

    comparison = compare_runs(arguments.runs, arguments.baseline)
    print(comparison.as_text())
    markdown = write_text(arguments.markdown or arguments.out / "compare.md", comparison.as_markdown())
    figures = arguments.json or arguments.out / "compare.json"
    write_json(figures, comparison.as_record())
    page = write_text(arguments.out / "compare.html", render(comparison_page(comparison)))
    print(f"written to {markdown}, {figures} and {page}")
    return 0


if __name__ == "__main__":
    run(main)
