"""Train a recipe, or go on with an interrupted run: python -m tools.train RECIPE [key=value ...]."""

from pathlib import Path

from tools.cli import add_recipe, parser, run


def main() -> int:
    """Train and write the run folder."""
    arguments_parser = parser(__doc__)
    add_recipe(arguments_parser)
    arguments_parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where runs are kept")
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from dance_seg.build import train
    from dance_seg.run_folder import is_main
    from datamodules import build_datamodule

    folder = train(recipe, build_datamodule(recipe), arguments.runs / recipe.name)
    if is_main():
        from dance_seg.report.run_page import write_report

        print(f"{write_report(folder)} shows the run; {folder} also holds metrics.jsonl, cost.json and checkpoints/")
    return 0


if __name__ == "__main__":
    run(main)
