"""How much of the saved arithmetic a data-slimmed epoch turns into saved time: python -m tools.bench.epoch.

One epoch in full force of recipes/camvid_data_slimming.yaml's slimming against a dense one, on drawn scenes at
352x480, with the network of that recipe: data, forward, backward and the optimiser's step, the sides taking turns.
"""

import time
from dataclasses import replace

from tools.bench.common import ratio, spread, write_result
from tools.cli import parser, run


def main() -> int:
    """Measure `epoch_time_over_macs`: the ratio of times over the ratio of executed MACs; 1 is perfect."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--runs", type=int, default=5, help="rounds; default 5")
    arguments_parser.add_argument("--images", type=int, default=48, help="images offered in an epoch; default 48")
    arguments_parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    arguments = arguments_parser.parse_args()
    import torch

    from dance_seg.build import build_model, build_module
    from dance_seg.cost.ledger import MacsPerSize
    from dance_seg.losses import per_sample_loss, weighted_mean
    from dance_seg.module import make_optimizer
    from dance_seg.part import Part
    from dance_seg.recipe import load_recipe
    from datamodules import build_datamodule

    scenes = {"num_train": arguments.images, "num_val": 1, "size": [360, 480], "crop": [352, 480], "batch_size": 8}
    sides = {}
    for name in ("dense", "data_slimming"):
        recipe = replace(load_recipe(f"recipes/camvid_{name}.yaml"), data=Part("shapes", scenes))
        torch.manual_seed(0)
        datamodule = build_datamodule(recipe)
        model = build_model(recipe, len(datamodule.classes))
        datamodule.fit_to(stride=model.stride, epochs=10, seed=0, data_slimming=recipe.data_slimming)  # type: ignore[arg-type]
        datamodule.prepare_data()
        module = build_module(recipe, model, datamodule)
        sides[name] = (recipe, datamodule, module, make_optimizer(model, recipe.optimizer), MacsPerSize(model))

    def epoch(name: str, number: int) -> tuple[float, int]:
        recipe, datamodule, module, optimizer, macs_per_size = sides[name]
        datamodule.batches.set_position(number)
        module.train()
        macs, began = 0, time.perf_counter()
        for batch in datamodule.train_dataloader():
            batch = datamodule.on_after_batch_transfer(batch, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16-mixed"):
                losses = per_sample_loss(module.model(batch.images), batch.labels, recipe.loss)
            loss = weighted_mean(losses, batch.weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            macs += len(batch.weights) * macs_per_size((batch.images.shape[-2], batch.images.shape[-1])).macs
        return time.perf_counter() - began, macs

    number = 4  # of 10: all three sizes are present
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for turn in range(arguments.runs + 1):  # the first warms up: memory, kernels, MAC counts
        for name in sides:
            measured = epoch(name, number)
            if turn:
                found[name].append(measured)
    seconds = {name: [t for t, _ in values] for name, values in found.items()}
    macs_ratio = found["data_slimming"][0][1] / found["dense"][0][1]
    times = [a / b for a, b in zip(seconds["data_slimming"], seconds["dense"], strict=True)]
    write_result(
        "epoch",
        arguments.runs,
        {
            "epoch_time_over_macs": spread([value / macs_ratio for value in times]),
            "epoch_time": ratio(seconds["data_slimming"], seconds["dense"]),
        },
        {
            "macs_ratio": round(macs_ratio, 4),
            "precision": arguments.precision,
            "images_per_scale": sides["data_slimming"][1].schedule[number].images_per_scale,
            "dense_epoch_seconds": round(min(seconds["dense"]), 2),
        },
    )
    return 0


if __name__ == "__main__":
    run(main)
