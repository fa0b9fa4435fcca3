"""The smallest real run: drawn scenes of 64x64, a real network, a few steps. Used wherever a whole run is needed."""

from dance_seg.recipe import Recipe, parse_recipe

TINY = """
data:
  name: shapes
  args: {num_train: 14, num_val: 3, num_test: 2, size: [64, 64], crop: [64, 64], batch_size: 4,
         random_scale: [0.75, 1.5], statistics_images: 4, cache_gb: 0.1}
model: {name: smp, args: {arch: fpn, encoder_name: resnet18}}
optimizer: {name: adamw, lr: 1.0e-3}
trainer: {max_epochs: 3, log_every: 1, accelerator: cpu, threads: 1}
tracking: {wandb: disabled}
"""

SLIM = """
data_slimming:
  {scales: [0.5, 1.0], quantiles: [0.5], warm_up: 0.0, ramp_until: 0.2, full_resolution_tail: 0.34, drop_below: 0.4}
"""


def tiny(*overrides: str, slim: bool = False, cache: object = None) -> Recipe:
    """A tiny recipe with overrides; `cache` is a folder for what is decoded and scored."""
    given = [*overrides, *([f"data.args.cache_dir={cache}"] if cache else [])]
    return parse_recipe(TINY + (SLIM if slim else ""), given, name="tiny")
