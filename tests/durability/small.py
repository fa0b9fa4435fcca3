"""The smallest run of every method: a JITNet of 40,000 weights on drawn scenes of 64x64, under a second on one core."""

from dataclasses import replace

from dance_seg.part import Part
from dance_seg.recipe import Recipe
from tests.tiny import tiny

# Named by what is on; a network with exits or of a supernet brings its own architecture.
METHODS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "ema": ("trainer.ema=0.9", "trainer.accumulate=2"),
    "data_slimming": ("data_slimming.drop_rate=0.6",),
    "network_slimming": ("network_slimming.keep=0.6", "network_slimming.round_to=1"),
    "dance": ("data_slimming.drop_rate=0.6", "network_slimming.keep=0.6", "network_slimming.round_to=1"),
    "exits": (),
    "supernet": (),
}
CUTS = (
    "trainer.max_epochs=4",
    "network_slimming.start=0.2",
    "network_slimming.end=0.5",
    "network_slimming.cuts=2",
    "network_slimming.sparsity=0.001",
)
MODELS = {
    "exits": Part("ranet", {"size": "tiny"}),
    "supernet": Part("multi_stage_supernet", {"size": "tiny"}),
}


def small(method: str = "dense", *overrides: str, cache: object, **parts: object) -> Recipe:
    """A small recipe of a method; `parts` replace whole sections."""
    slims = method in ("data_slimming", "dance")
    cuts = CUTS if method in ("network_slimming", "dance") else ()
    # Written at every step, so that a kill loses nothing and every place is met.
    given = ("trainer.save_every_minutes=0", "trainer.log_every=1", *cuts, *METHODS[method], *overrides)
    recipe = tiny(*given, slim=slims, cache=cache)
    return replace(recipe, **{"model": MODELS.get(method, Part("jitnet", {"width": 0.125})), **parts})
