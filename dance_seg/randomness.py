"""Randomness from counters: what is drawn depends on (seed, where), never on what was drawn before.

So resuming, the number of workers and the number of ranks cannot change a draw, and there is no state to save.
"""

import random
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """One stream of random numbers for each decision, so that changing one leaves the others as they were."""

    DROP = 1  # which images an epoch drops
    SIZE = 2  # drawn sizes
    ORDER = 3  # of the images in an epoch
    BATCHES = 4  # their order
    STATISTICS = 5  # which images BatchNorm statistics are re-estimated on
    AUGMENTATION = 6
    STEP = 7  # dropout and its like
    CUTS = 8  # the random control of network slimming
    SUBNETS = 9  # which networks of a supernet a step trains
    SEARCH = 10  # the candidates of a search


def generator(seed: int, *counters: int) -> np.random.Generator:
    """The NumPy generator of one place in training, such as (seed, epoch, image).

    >>> bool(generator(0, 1, 2).random() == generator(0, 1, 2).random())
    True
    >>> bool(generator(0, 1, 2).random() == generator(0, 2, 1).random())
    False
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *counters))))


def paired_generators(seed: int, *counters: int) -> tuple[np.random.Generator, random.Random]:
    """A NumPy and a Python generator of one place, for libraries that draw from both."""
    first, second = np.random.SeedSequence((seed, *counters)).spawn(2)
    return np.random.Generator(np.random.Philox(first)), random.Random(int(second.generate_state(2, np.uint64)[0]))


def seed_torch(seed: int, *counters: int) -> None:
    """Seed torch's CPU and accelerator generators for one place, such as a training step of one rank."""
    import torch  # here alone, so that who only draws numbers need not wait for it

    torch.manual_seed(int(np.random.SeedSequence((seed, *counters)).generate_state(1, np.uint64)[0]) & (2**63 - 1))
