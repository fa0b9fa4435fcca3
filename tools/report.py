"""Write a run's page again: python -m tools.report RUN ... writes RUN/report.html."""

from pathlib import Path

from tools.cli import parser, run


def main() -> int:
    """Write report.html into each run folder."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folders, such as runs/shapes_dense"
    )
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.report.run_page import write_report
    from dance_seg.report.runs import read_run
    from dance_seg.report.stream_page import write_stream_report

    for folder in arguments.runs:
        follows_a_video = read_run(folder).recipe.get("distillation") is not None
        print(write_stream_report(folder) if follows_a_video else write_report(folder))
    return 0


if __name__ == "__main__":
    run(main)
