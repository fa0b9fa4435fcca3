"""Look at a recipe's images and labels before training: python -m tools.check_data RECIPE [key=value ...].

Every file of every split is decoded once. Reported are files that cannot be used, label ids outside the table with a
diagnosis, how much of each class there is, labels that are ignored everywhere, and images that occur twice.
Exit status: 0 when all files can be used (there may be warnings), 1 when some cannot, 2 when the check could not run.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tools.cli import add_recipe, parser, run, write_json

if TYPE_CHECKING:
    from datamodules.audit import Report
    from datamodules.base import SegmentationDataModule


def main() -> int:
    """Check the files a recipe names, print a table, and write the figures where --json says."""
    arguments_parser = parser(__doc__, figures=True)
    add_recipe(arguments_parser)
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from datamodules import build_datamodule
    from datamodules.audit import check_pairs, errors_found, find_twins, warnings_found

    datamodule = build_datamodule(recipe)
    found = datamodule.sources_for_check()
    reports = {split: check_pairs(pairs, label_table) for split, (pairs, label_table) in found.items()}
    errors, warnings = errors_found(reports), warnings_found(reports)
    if not errors:
        errors, more = training_refuses(datamodule)
        warnings += more
    print(describe(reports))
    print(
        "\n".join([*(f"error: {text}" for text in errors), *(f"warning: {text}" for text in warnings)]) or "no faults"
    )
    write_json(
        arguments.json,
        {
            "splits": {split: report.as_record() for split, report in reports.items()},
            "twins": [[str(item) for item in twin] for twin in find_twins(reports)],
            "errors": errors,
            "warnings": warnings,
        },
    )
    return 1 if errors else 0


def training_refuses(datamodule: "SegmentationDataModule") -> tuple[list[str], list[str]]:
    """What training would refuse although every file is fine: errors of the split, warnings of the recipe."""
    try:
        number = len(datamodule.raw_source("train"))
    except ValueError as error:
        return [str(error)], []
    if number < datamodule.batch_size:
        said = f"data.args.batch_size is {datamodule.batch_size}, and there are {number} training images; lower it"
        return [], [said]
    return [], []


def describe(reports: "Mapping[str, Report]") -> str:
    """Tables of the splits, of the classes in them, and of the files that cannot be used."""
    lines = []
    for split, report in reports.items():
        sizes = [f"{height}x{width} ({number})" for (height, width), number in report.sizes.items()]
        shown = ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else "")
        unlabelled = f", {report.num_unlabelled} without label" if report.num_unlabelled else ""
        lines.append(f"{split}: {report.num_pairs} pairs{unlabelled}, {len(report.bad)} bad; {shown}")
    lines.append("")
    names = next(iter(reports.values())).label_table.classes
    width = max(len("class"), *(len(name) for name in names))
    lines.append("  ".join(["class".ljust(width), *(f"{split + ' pixels':>14}  {'images':>6}" for split in reports)]))
    totals = {split: max(1, sum(report.raw_pixels.values())) for split, report in reports.items()}
    for number, name in enumerate(names):
        shares = (
            f"{100 * report.class_pixels[number] / totals[split]:>12.3f} %  {report.class_images[number]:>6}"
            for split, report in reports.items()
        )
        lines.append("  ".join([name.ljust(width), *shares]))
    ignored = (f"{100 * report.ignored_pixels / totals[split]:>12.3f} %  {'':>6}" for split, report in reports.items())
    lines.append("  ".join(["(ignored)".ljust(width), *ignored]).rstrip())
    for split, report in reports.items():
        if report.bad:
            lines += ["", f"{split}, files that cannot be used:", *(f"  {file.reason}" for file in report.bad[:20])]
            lines += [f"  and {len(report.bad) - 20} more"] if len(report.bad) > 20 else []
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
