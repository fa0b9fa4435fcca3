"""Score the training images of a recipe and show the plan they lead to: python -m tools.score_complexity RECIPE."""

from tools.cli import add_recipe, parser, run, write_json


def main() -> int:
    """Print the distribution of complexity, the simplest and most complex images, and the plan over the epochs."""
    arguments_parser = parser(__doc__, figures=True)
    add_recipe(arguments_parser)
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.data_slimming is None:
        raise ValueError(f"{arguments.recipe} has no data_slimming section; take a *_data_slimming recipe")
    import numpy as np

    from dance_seg.build import build_model
    from datamodules import build_datamodule

    datamodule = build_datamodule(recipe)
    model = build_model(recipe, len(datamodule.classes))
    datamodule.fit_to(
        stride=getattr(model, "stride", 32),
        epochs=recipe.trainer.max_epochs,
        seed=recipe.seed,
        data_slimming=recipe.data_slimming,
    )
    datamodule.prepare_data()
    table = datamodule.table
    order = np.argsort(table.values, kind="stable")
    print(f"{recipe.data_slimming.measure} of {len(table.values)} training images")
    for share in (0, 10, 25, 50, 75, 90, 100):
        print(f"  {share:3d} %  {np.percentile(table.values, share):.4f}")
    print("simplest:     " + ", ".join(table.names[i] for i in order[:5]))
    print("most complex: " + ", ".join(table.names[i] for i in order[::-1][:5]))
    sizes = datamodule.batches.sizes
    print(
        "\nepoch  steps  dropped  "
        + "  ".join(f"{height}x{width}" for height, width in sizes)
        + "   share of dense pixels"
    )
    dense = len(table.values) * sizes[-1][0] * sizes[-1][1]
    schedule = datamodule.schedule
    for epoch in schedule[:: max(1, len(schedule) // 20)]:
        counts = "  ".join(f"{n:{len(f'{h}x{w}')}d}" for n, (h, w) in zip(epoch.images_per_scale, sizes, strict=True))
        print(f"{epoch.epoch:5d}  {epoch.steps:5d}  {epoch.images_dropped:7d}  {counts}   {epoch.pixels / dense:.2f}")
    of_dense = sum(epoch.pixels for epoch in schedule) / (dense * len(schedule))
    print(f"all {len(schedule)} epochs: {of_dense:.3f} of the dense pixels, {sum(e.steps for e in schedule)} steps")
    write_json(
        arguments.json,
        {
            "measure": recipe.data_slimming.measure,
            "images": dict(zip(table.names, map(float, table.values), strict=True)),
            "pixels_over_dense": of_dense,
            "epochs": [vars(epoch) for epoch in schedule],
        },
    )
    return 0


if __name__ == "__main__":
    run(main)
