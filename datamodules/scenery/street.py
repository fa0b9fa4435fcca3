"""The street that a scene's things stand on, and how random things are drawn for it."""

from collections.abc import Callable, Iterator
from math import exp, log, pi
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from datamodules.scenery.figures import Point
from datamodules.scenery.painter import Colour, Light, Painter

FAR = 130.0  # metres; behind it there is only the skyline
CIRCLE = np.stack([np.cos(np.arange(10) * pi / 5), np.zeros(10), np.sin(np.arange(10) * pi / 5)], -1)  # on the ground


class Street(NamedTuple):
    """The road's course and cross-section, in metres; lateral positions are measured from the middle of the road."""

    half: float  # half the width of the road
    pavements: tuple[float, float]  # width, left and right
    offset: float  # where the middle of the road is, right of the camera
    slope: float
    bend: float  # curvature, 1 / metres

    def x(self, lateral: float, depth: float) -> float:
        """Metres to the right of the camera."""
        return self.offset + lateral + self.slope * depth + self.bend * depth * depth / 2

    def yaw(self, depth: float) -> float:
        """The direction of the road, in radians right of the view."""
        return self.slope + self.bend * depth

    def edge(self, side: int) -> float:
        """Lateral position of the far edge of the left (-1) or right (1) pavement."""
        return side * (self.half + self.pavements[side > 0])


class Scene(NamedTuple):
    """What all things of a scene share."""

    draw: Random
    street: Street
    light: Light
    crowdedness: float  # 0: an empty country road; 1: a full street
    taken: list[tuple[float, float, float, float]]  # by vehicles: lateral, depth, half width, half length


class Thing(NamedTuple):
    """Something that stands in the scene."""

    depth: float  # of its far end: what is farther is painted before it
    paint: Callable[[Painter], None]
    shadow: np.ndarray | None = None  # polygon (K, 3) on the ground


def shifted(colour: Colour, by: float) -> Colour:
    """A colour made lighter, or darker if `by` is negative."""
    return colour[0] + by, colour[1] + by, colour[2] + by


def one_of(draw: Random, colours: tuple[Colour, ...], spread: float = 12.0) -> Colour:
    """One of the colours, a little changed."""
    red, green, blue = draw.choice(colours)
    lighter = draw.gauss(0, spread)
    hue = spread / 2
    return red + lighter + draw.gauss(0, hue), green + lighter + draw.gauss(0, hue), blue + lighter + draw.gauss(0, hue)


def spaced(draw: Random, first: float, last: float, gap: float) -> Iterator[float]:
    """Positions from `first` to `last`, irregularly about `gap` apart."""
    position = first
    while position < last:
        yield position
        position += draw.uniform(0.6, 1.4) * gap


def how_many(draw: Random, mean: float) -> int:
    """A Poisson number: the arrivals in a time of `mean`, one per unit of time on average."""
    count, time = 0, draw.expovariate(1.0)
    while time < mean:
        count, time = count + 1, time + draw.expovariate(1.0)
    return count


def log_uniform(draw: Random, low: float, high: float) -> float:
    """A number whose logarithm is uniform: as many near things as far ones in the picture."""
    return exp(draw.uniform(log(low), log(high)))


def upright(left: float, right: float, low: float, high: float, depth: float) -> list[Point]:
    """A rectangle that faces the camera."""
    return [(left, low, depth), (right, low, depth), (right, high, depth), (left, high, depth)]


def rectangles_on_wall(
    corner: Point, direction: Point, columns: ArrayLike, rows: ArrayLike, width: float, height: float
) -> np.ndarray:
    """A grid of rectangles (rows x columns, 4, 3) on an upright wall; columns and rows say where each begins."""
    along = np.asarray(columns)[:, None] + (0, width, width, 0)
    up = np.asarray(rows)[:, None] + (0, 0, height, height)
    quads = np.empty((len(up), len(along), 4, 3))
    quads[..., 0] = corner[0] + along * direction[0]
    quads[..., 1] = up[:, None]
    quads[..., 2] = corner[2] + along * direction[2]
    return quads.reshape(-1, 4, 3)


def fallen(light: Light, x: float, depth: float, height: float) -> tuple[float, float, float]:
    """Where the shadow of a point at that height falls on the ground."""
    return x + light.sun[0] * height, 0.0, depth + light.sun[1] * height


def shadow_under(light: Light, x: float, depth: float, half_width: float, half_length: float) -> np.ndarray:
    """The dark patch under a thing that stands on the ground, leaning away from the sun."""
    right, ahead = 0.35 * light.sun[0], 0.35 * light.sun[1]
    left, right = x - half_width + min(right, 0), x + half_width + max(right, 0)
    near, far = depth - half_length, depth + half_length + ahead
    return np.array([(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)])
