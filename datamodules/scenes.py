"""Procedural street scenes: a picture and its classes from a seed and an index, with nothing to download.

A scene is laid out in metres (road, pavements, buildings, trees, people, cars, the hour and the weather), and then
painted from far to near through a pinhole camera, so that size follows depth. One number drawn per scene, its
crowdedness, leads from the empty country road to the full street: what a picture costs to learn varies, which is what
data slimming lives on. The classes and their order are CamVid's.
"""

from collections.abc import Callable, Iterator
from math import exp
from typing import NamedTuple

import cv2
import numpy as np

from dance_seg.randomness import generator
from dance_seg.sample import IGNORE, Sample
from datamodules.scene_figures import POSES, cyclist, vehicles, walker
from datamodules.scene_painter import NEAREST, Camera, Colour, Light, Painter

CLASSES: tuple[str, ...] = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CLASSES))
PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip

SMALLEST_SIDE = 16
FAR = 130.0  # metres; behind it there is only the skyline
SCENE, TEXTURE = 0x5CE7E, 0x7E47E  # counters that keep these draws apart from others of the same seed and index

# How strongly a surface's brightness varies from pixel to pixel, beside what is painted on it.
ROUGHNESS = np.full(256, 0.04, np.float32)
ROUGHNESS[: len(CLASSES)] = (0.0, 0.09, 0.05, 0.09, 0.1, 0.3, 0.02, 0.1, 0.03, 0.08, 0.08)


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


class Thing(NamedTuple):
    """Something that stands in the scene."""

    depth: float  # of its far end: what is farther is painted before it
    paint: Callable[[Painter], None]
    shadow: tuple[np.ndarray, ...] = ()  # polygons on the ground


def render_scene(seed: int, index: int, size: tuple[int, int] = (192, 256)) -> Sample:
    """Scene number `index` of the endless set that `seed` names, at any size (H, W) from 16 x 16.

    The same index at another size is the same street seen through the same camera; a wider picture shows more of it.
    Raises ValueError for a size below 16 or a negative seed or index.

    >>> image, label = render_scene(seed=0, index=3, size=(48, 64))
    >>> image.shape, label.shape, bool((render_scene(0, 3, (48, 64)).image == image).all())
    ((48, 64, 3), (48, 64), True)
    """
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"size is {tuple(size)}; a street scene needs at least {SMALLEST_SIDE} rows and columns")
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index {index}; both are counted from 0")
    rng = generator(seed, index, SCENE)
    crowdedness = float(rng.random())
    light = draw_light(rng)
    street = draw_street(rng, crowdedness)
    camera = Camera(
        height=rng.uniform(1.35, 1.8),
        focal=rng.uniform(0.9, 1.25),
        horizon=rng.uniform(0.4, 0.54),
        shift=rng.uniform(-0.12, 0.12),
    )
    painter = Painter(camera, light, size)
    paint_sky(painter, rng, cloudiness=rng.uniform(0, 0.3 + 0.7 * crowdedness))
    paint_skyline(painter, rng, crowdedness)
    paint_ground(painter, rng, street, crowdedness)
    things = [*buildings_and_gardens(rng, street, light, crowdedness), *street_furniture(rng, street, light, crowdedness)]
    things += [*traffic(rng, street, light, crowdedness), *people(rng, street, light, crowdedness)]
    painter.darken([polygon for thing in things for polygon in thing.shadow], light.shadow)
    for thing in sorted(things, key=lambda thing: -thing.depth):
        thing.paint(painter)
    if rng.random() < 0.25:
        paint_bonnet(painter, rng)
    image, label = painter.finish()
    return Sample(develop(image, label, generator(seed, index, TEXTURE), crowdedness), label)


def draw_light(rng: np.random.Generator) -> Light:
    """A clear day, an overcast one, or dusk."""
    kind = rng.choice(3, p=(0.5, 0.3, 0.2))
    gain = rng.uniform(0.75, 1.12)
    jitter = rng.uniform(-1, 1, 3)
    if kind == 0:
        top, low, tint = (80, 130, 205), (200, 220, 238), (1.06, 1.0, 0.92)
        shadow, dusk, length = rng.uniform(0.3, 0.55), 0.0, rng.uniform(0.4, 1.6)
    elif kind == 1:
        top, low, tint = (168, 174, 184), (208, 212, 216), (0.84, 0.87, 0.92)
        shadow, dusk, length = 0.12, 0.0, 0.1
    else:
        top, low, tint = (58, 62, 112), (238, 158, 104), (0.66, 0.53, 0.52)
        shadow, dusk, length = rng.uniform(0.15, 0.3), 1.0, rng.uniform(1.2, 2.2)
    sky_top = shifted(top, jitter * 14)
    sky_low = shifted(low, jitter[::-1] * 14)
    angle = rng.uniform(0, 2 * np.pi)
    return Light(
        sky_top,
        sky_low,
        (tint[0] * gain, tint[1] * gain, tint[2] * gain),
        shifted(sky_low, np.full(3, -12.0)),
        haze_depth=float(np.exp(rng.uniform(np.log(70), np.log(500)))),
        sun=(length * float(np.cos(angle)), length * abs(float(np.sin(angle)))),
        shadow=shadow,
        dusk=dusk,
    )


def draw_street(rng: np.random.Generator, crowdedness: float) -> Street:
    """A road of one to four lanes; the camera drives in one of them."""
    half = rng.uniform(2.8, 3.6) + (3.2 if rng.random() < 0.25 + 0.3 * crowdedness else 0.0)
    widths = rng.uniform(1.2, 2.4, 2) + 2.2 * crowdedness * rng.random(2)
    return Street(
        half=half,
        pavements=(float(widths[0]), float(widths[1])),
        offset=float(rng.choice((-1.0, 1.0))) * half * rng.uniform(0.35, 0.55),
        slope=rng.uniform(-0.06, 0.06),
        bend=rng.uniform(-1, 1) ** 3 / 90,
    )


def shifted(colour: Colour, by: np.ndarray) -> Colour:
    """A colour moved along each channel, within 0..255."""
    red, green, blue = (min(255.0, max(0.0, c + float(b))) for c, b in zip(colour, by, strict=True))
    return red, green, blue


def one_of(rng: np.random.Generator, colours: tuple[Colour, ...], spread: float = 12.0) -> Colour:
    """One of the colours, a little changed."""
    return shifted(colours[rng.integers(len(colours))], rng.normal(0, spread, 3) * 0.5 + rng.normal(0, spread))


def spaced(rng: np.random.Generator, first: float, last: float, gap: float) -> list[float]:
    """Positions from `first` to `last`, irregularly about `gap` apart."""
    steps = rng.uniform(0.6, 1.4, int((last - first) / (0.6 * gap)) + 1) * gap
    positions = first + np.cumsum(steps) - steps[0] * 0.5
    return positions[positions < last].tolist()


# The backdrop -------------------------------------------------------------------------------------------------------


def paint_sky(painter: Painter, rng: np.random.Generator, cloudiness: float) -> None:
    """A gradient from the zenith to the horizon with clouds over it."""
    light, rows = painter.light, 64
    height = np.linspace(0, 1, rows)[:, None, None] / max(painter.camera.horizon, 0.1)
    low_share = np.clip(height, 0, 1) ** 1.4
    sky = np.array(light.sky_top) * (1 - low_share) + np.array(light.sky_low) * low_share
    clouds = np.zeros((rows, 96), np.float32)
    for octave in range(4):
        grid = rng.random((4 * 2**octave, 5 * 2**octave), dtype=np.float32) - 0.5
        clouds += cv2.resize(grid, (96, rows), interpolation=cv2.INTER_CUBIC) / 1.6**octave
    cover = np.clip((clouds - 0.5 + cloudiness) * 2.2, 0, 1)[..., None] * 0.8
    cloud = np.clip(np.array(light.sky_low) * 0.6 + np.array((105.0, 105.0, 108.0)) * (1 - 0.55 * light.dusk), 0, 255)
    sky = (sky * (1 - cover) + cloud * (1 - 0.25 * cover) * cover).astype(np.float32)
    if rng.random() < 0.3:
        centre = (int(rng.integers(0, 96)), int(rng.integers(4, 24)))
        glow = cv2.GaussianBlur(cv2.circle(np.zeros((rows, 96), np.float32), centre, 5, 1.0, -1), (0, 0), 4)
        sky += glow[..., None] * np.array((90, 80, 50), np.float32)
    height_width = painter.canvas.shape[:2]
    canvas = np.zeros((rows, 96, 4), np.uint8)
    canvas[..., :3] = np.clip(sky, 0, 255)
    canvas[..., 3] = SKY
    cv2.resize(canvas, height_width[::-1], dst=painter.canvas, interpolation=cv2.INTER_LINEAR)


def paint_skyline(painter: Painter, rng: np.random.Generator, crowdedness: float) -> None:
    """Distant woods and houses, which hide where the road would end."""
    depth, step = 190.0, 4.0
    x = np.arange(-300, 301, step)
    bumps = np.convolve(rng.random(len(x) + 6), np.ones(7) / 7, mode="valid")
    tops = rng.uniform(3, 7) + rng.uniform(4, 16) * np.abs(bumps - 0.4) * 2 + 1.5 * rng.random(len(x))
    quads = np.zeros((len(x) - 1, 4, 3))
    quads[:, 0, 0], quads[:, 1, 0], quads[:, 2, 0], quads[:, 3, 0] = x[:-1], x[1:], x[1:], x[:-1]
    quads[:, 2, 1], quads[:, 3, 1] = tops[1:], tops[:-1]
    quads[:, :2, 1] = -1.0
    quads[..., 2] = depth
    wood = painter.ink(one_of(rng, ((62, 86, 52), (84, 92, 58), (70, 78, 66))), TREE, depth * 0.4)
    for quad in painter.project(quads):
        cv2.fillConvexPoly(painter.canvas, quad, wood, cv2.LINE_8, 3)
    for x_left in rng.uniform(-200, 200, int(2 + 30 * crowdedness)):
        width, height = rng.uniform(8, 26), rng.uniform(5, 12 + 22 * crowdedness)
        wall = painter.ink(one_of(rng, WALLS), BUILDING, depth * 0.4)
        painter.polygon(upright(x_left, x_left + width, -1.0, height, depth - 10), wall)
        dark = painter.ink((70, 75, 88), BUILDING, depth * 0.3)
        columns, floors = np.arange(x_left + 1.5, x_left + width - 2, 3.4), np.arange(3, height - 2, 3.6)
        corners = np.stack(np.meshgrid(columns, floors), -1).reshape(-1, 2)
        painter.polygons(panes(corners, 1.5, 1.8, depth - 10), dark)


def upright(left: float, right: float, low: float, high: float, depth: float) -> list[tuple[float, float, float]]:
    """A rectangle that faces the camera."""
    return [(left, low, depth), (right, low, depth), (right, high, depth), (left, high, depth)]


def panes(corners: np.ndarray, width: float, height: float, depth: float) -> np.ndarray:
    """Rectangles (N, 4, 3) that face the camera, from their lower left corners (N, 2)."""
    shape = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    quads = np.empty((len(corners), 4, 3))
    quads[..., :2] = corners[:, None] + shape
    quads[..., 2] = depth
    return quads


# The ground ---------------------------------------------------------------------------------------------------------


def paint_ground(painter: Painter, rng: np.random.Generator, street: Street, crowdedness: float) -> None:
    """Verges, pavements with kerbs, the road and its marks."""
    grass = ((88, 116, 58), (112, 122, 66), (74, 100, 54))
    stone = ((152, 148, 140), (166, 152, 136), (140, 138, 138), (158, 128, 112))
    asphalt = one_of(rng, ((98, 98, 102), (118, 116, 112), (82, 84, 90)), 8)
    depths = np.concatenate([np.geomspace(NEAREST, FAR, 22), (FAR * 1.6,)])
    bands: list[tuple[float, float, Colour, int]] = []
    slabs = []
    for side in (-1, 1):
        edge = street.edge(side)
        paved = rng.random() < 0.25 + 0.5 * crowdedness
        pavement = one_of(rng, stone, 8)
        verge = (shifted(pavement, np.full(3, -10.0)), PAVEMENT) if paved else (one_of(rng, grass, 8), TREE)
        bands.append((edge, side * 140.0, *verge))
        bands.append((side * street.half, edge, pavement, PAVEMENT))
        kerb = shifted(pavement, np.full(3, rng.uniform(15, 40)))
        bands.append((side * street.half, side * (street.half + 0.22), kerb, PAVEMENT))
        slabs.append((side * (street.half + 0.22), edge, shifted(pavement, np.full(3, -28.0)), rng.uniform(0.9, 1.8)))
    bands.append((-street.half, street.half, asphalt, ROAD))
    patches = rng.normal(0, 2.0 + 3.0 * crowdedness, len(depths))
    for near, far, patch in zip(depths[:-1][::-1], depths[1:][::-1], patches, strict=False):
        for left, right, colour, class_id in bands:
            ink = painter.ink(shifted(colour, np.full(3, patch)), class_id, near)
            painter.polygon(on_ground(street, left, right, near, far), ink)
    for left, right, colour, gap in slabs:
        lines = [on_ground(street, left, right, z, z + 0.09) for z in np.arange(NEAREST, 22, gap)]
        painter.polygons(np.asarray(lines), painter.ink(colour, PAVEMENT, 8.0))
    paint_road(painter, rng, street, crowdedness)


def on_ground(street: Street, left: float, right: float, near: float, far: float) -> list[tuple[float, float, float]]:
    """A quadrilateral that lies on the ground and follows the road."""
    return [
        (street.x(left, near), 0.0, near),
        (street.x(right, near), 0.0, near),
        (street.x(right, far), 0.0, far),
        (street.x(left, far), 0.0, far),
    ]


def paint_road(painter: Painter, rng: np.random.Generator, street: Street, crowdedness: float) -> None:
    """Lane marks, repairs, manholes and, now and then, a zebra crossing; all of it is road."""
    white = one_of(rng, ((214, 214, 208), (190, 188, 180)), 6)
    yellow = one_of(rng, ((206, 168, 72), (190, 160, 90)), 6)
    half = street.half
    for _ in range(rng.poisson(1.0 + 4 * crowdedness)):
        left, near, tone = rng.uniform(-half, half * 0.7), rng.uniform(3, 35), rng.uniform(50, 120)
        right = min(half, left + rng.uniform(0.5, 2.5))
        patch = painter.ink((tone, tone, tone + 4), ROAD, near)
        painter.polygon(on_ground(street, left, right, near, near + rng.uniform(0.8, 7)), patch)
    for _ in range(rng.poisson(2.0 * crowdedness)):
        x, z = rng.uniform(-half + 0.5, half - 0.5), rng.uniform(4, 25)
        angles = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        rim = np.stack([street.x(x, z) + 0.34 * np.cos(angles), np.zeros(10), z + 0.34 * np.sin(angles)], -1)
        painter.polygon(rim, painter.ink((58, 56, 56), ROAD, z))
    marked = rng.random() < 0.35 + 0.6 * crowdedness
    edged = rng.random() < 0.6
    edge_colour = yellow if rng.random() < 0.4 else white
    dash, gap = rng.uniform(2, 4), rng.uniform(3, 6)
    start = rng.uniform(0, dash + gap)
    zebra = rng.uniform(7, 30) if rng.random() < 0.12 + 0.35 * crowdedness else None
    if marked:
        lanes = (-half / 2, 0.0, half / 2) if half > 5 else (0.0,)
        for z in np.arange(start - dash + NEAREST, FAR * 0.7, dash + gap):
            if z + dash > NEAREST:
                ink = painter.ink(white, ROAD, max(z, NEAREST))
                for lane in lanes:
                    quad = on_ground(street, lane - 0.07, lane + 0.07, max(z, NEAREST), z + dash)
                    painter.polygon(quad, ink)
    if edged:
        stretches = np.geomspace(NEAREST, FAR, 12)
        for near, far in zip(stretches[:-1], stretches[1:], strict=True):
            for side in (-1, 1):
                lateral = side * (half - 0.3)
                ink = painter.ink(edge_colour, ROAD, near)
                painter.polygon(on_ground(street, lateral - 0.06, lateral + 0.06, near, far), ink)
    if zebra is not None:
        stripes = np.arange(-half + 0.5, half - 0.5, 1.0)
        quads = [on_ground(street, left, left + 0.5, zebra, zebra + 3) for left in stripes]
        painter.polygons(np.asarray(quads), painter.ink(white, ROAD, zebra))


def fallen(light: Light, x: float, depth: float, height: float) -> tuple[float, float, float]:
    """Where the shadow of a point at that height falls on the ground."""
    across, ahead = light.sun
    return x + across * height, 0.0, depth + ahead * height


def shadow_under(light: Light, x: float, depth: float, half_width: float, half_length: float) -> np.ndarray:
    """The dark patch under a thing that stands on the ground, leaning away from the sun."""
    across, ahead = (0.35 * part for part in light.sun)
    return np.array(
        [
            (x - half_width + min(across, 0), 0, depth - half_length),
            (x + half_width + max(across, 0), 0, depth - half_length),
            (x + half_width + max(across, 0), 0, depth + half_length + ahead),
            (x - half_width + min(across, 0), 0, depth + half_length + ahead),
        ]
    )


# Beside the road ----------------------------------------------------------------------------------------------------

WALLS: tuple[Colour, ...] = (
    (158, 96, 76), (134, 82, 68), (186, 164, 134), (204, 194, 176), (150, 146, 142), (120, 116, 116), (196, 172, 120),
    (170, 178, 186), (214, 208, 200), (104, 88, 80),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((96, 60, 50), (72, 72, 80), (120, 78, 60), (88, 84, 82))
LEAVES: tuple[Colour, ...] = ((70, 102, 44), (92, 118, 52), (56, 84, 44), (128, 118, 54), (150, 106, 50))
CLOTHES: tuple[Colour, ...] = (
    (40, 44, 60), (120, 34, 38), (60, 76, 110), (190, 184, 172), (80, 70, 58), (200, 150, 60), (46, 92, 78), (30, 30, 32),
    (150, 80, 120),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((222, 178, 150), (186, 132, 100), (120, 82, 60), (236, 200, 176))
PAINT: tuple[Colour, ...] = (
    (36, 38, 44), (168, 172, 178), (214, 214, 212), (150, 28, 32), (34, 60, 118), (92, 96, 102), (60, 92, 74),
    (196, 160, 60), (120, 58, 40),
)  # fmt: skip


def buildings_and_gardens(
    rng: np.random.Generator, street: Street, light: Light, crowdedness: float
) -> Iterator[Thing]:
    """What borders the pavement, lot after lot: houses, or fences, hedges and trees."""
    built = 0.03 + 0.94 * crowdedness
    floors = rng.uniform(1.5, 2.5 + 4.5 * crowdedness)
    for side in (-1, 1):
        depth = rng.uniform(-6, 4)
        setback = 0.0 if rng.random() < 0.2 + 0.6 * crowdedness else rng.uniform(2.5, 9)
        fenced = rng.random() < 0.7
        while depth < FAR:
            length = rng.uniform(7, 20)
            near, far = max(depth, NEAREST), depth + length
            depth = far + (rng.uniform(1, 6) if rng.random() < 0.35 else 0.0)
            if far < NEAREST + 1:
                continue
            inhabited = rng.random() < built
            if inhabited:
                yield building(rng, street, light, side, setback, near, far, max(1, round(rng.normal(floors, 0.8))), crowdedness)
            if setback > 2 or not inhabited:
                border = rng.random()
                if fenced and border < 0.75:
                    yield fence(rng, street, side, near, far)
                elif border > 0.85:
                    yield hedge(rng, street, side, near, far)
                room = setback if inhabited else 14.0
                for _ in range(rng.poisson(length * (0.02 + 0.07 * crowdedness) * (1 if inhabited else 1.6))):
                    lateral = street.edge(side) + side * rng.uniform(1.0, max(room - 1, 1.5))
                    yield tree(rng, street, light, lateral, rng.uniform(near, far))


def building(
    rng: np.random.Generator, street: Street, light: Light, side: int, setback: float, near: float, far: float,
    floors: int, crowdedness: float,
) -> Thing:  # fmt: skip
    """A house along the road from `near` to `far`: a wall along the road, one towards the camera, a roof, windows."""
    storey, body = rng.uniform(2.8, 3.5), rng.uniform(8, 14)
    height = storey * floors + rng.uniform(0.3, 1.2)
    inner = street.edge(side) + side * setback
    x_near, x_far = street.x(inner, near), street.x(inner, far)
    x_back = street.x(inner + side * body, near)
    wall_colour, roof_colour = one_of(rng, WALLS), one_of(rng, ROOFS)
    ridge = rng.uniform(1.5, 3.5) if rng.random() < 0.65 and floors < 5 else 0.0
    sunlit = 1.0 - 0.16 * float(np.sign(light.sun[0]) == -side)
    window, frame = rng.uniform(0.9, 1.6), rng.uniform(0.0, 0.16)
    pitch = window + rng.uniform(0.7, 2.4) * (1.3 - 0.6 * crowdedness)
    tall = rng.uniform(1.1, 1.9)
    glass = one_of(rng, ((52, 60, 74), (86, 104, 126), (38, 40, 46)), 8)
    frame_colour: Colour = (216, 212, 202) if rng.random() < 0.7 else (92, 70, 58)
    shop = rng.random() < 0.1 + 0.5 * crowdedness
    shop_colour = one_of(rng, ((160, 40, 40), (40, 90, 60), (40, 60, 120), (200, 160, 60), (60, 50, 48)), 14)
    lit_share = 0.45 * light.dusk + 0.02
    first = 1 if shop else 0
    rows = np.arange(first, floors) * storey + (storey - tall) * 0.55
    along = np.arange(near + 0.6, far - window - 0.3, pitch)
    facing = np.arange(0.8, body - window - 0.5, pitch)
    side_corners = np.stack(np.meshgrid(along, rows), -1).reshape(-1, 2)
    front_corners = np.stack(np.meshgrid(facing, rows), -1).reshape(-1, 2)
    lit_side, lit_front = rng.random(len(side_corners)) < lit_share, rng.random(len(front_corners)) < lit_share
    chimney = rng.uniform(0.2, 0.8) if ridge and rng.random() < 0.6 else None

    def windows_along(corners: np.ndarray, margin: float) -> np.ndarray:
        shape = np.array([(-margin, -margin), (window + margin, -margin), (window + margin, tall + margin), (-margin, tall + margin)])
        z_y = corners[:, None] + shape
        share = (z_y[..., 0] - near) / (far - near)
        return np.stack([x_near + (x_far - x_near) * share, z_y[..., 1], z_y[..., 0]], -1)

    def windows_facing(corners: np.ndarray, margin: float) -> np.ndarray:
        placed = corners * (side, 1) + (min(x_near, x_near + side * window) if side > 0 else x_near - window, 0)
        quads = panes(placed - margin, window + 2 * margin, tall + 2 * margin, near)
        return quads

    def paint(painter: Painter) -> None:
        middle = min((near + far) / 2, near + 8)
        if ridge:
            x_ridge_near, x_ridge_far = (x_near + x_back) / 2, x_far + (x_back - x_near) / 2
            top = height + ridge
            roof = painter.ink(roof_colour, BUILDING, middle)
            painter.polygon([(x_near, height, near), (x_far, height, far), (x_ridge_far, top, far), (x_ridge_near, top, near)], roof)
            if chimney is not None:
                z = near + (far - near) * chimney
                x = x_ridge_near + (x_ridge_far - x_ridge_near) * chimney
                painter.post(x, z, top - 0.5, top + 1.1, 0.8, painter.ink(wall_colour, BUILDING, z, 0.9))
            gable = painter.ink(wall_colour, BUILDING, near, 0.93)
            painter.polygon([(x_near, height, near), (x_back, height, near), (x_ridge_near, top, near)], gable)
        painter.polygon(upright(x_near, x_back, -0.2, height, near), painter.ink(wall_colour, BUILDING, near, 0.92))
        wall = [(x_near, -0.2, near), (x_far, -0.2, far), (x_far, height, far), (x_near, height, near)]
        painter.polygon(wall, painter.ink(wall_colour, BUILDING, middle, sunlit))
        eaves = [(x_near, height - 0.25, near), (x_far, height - 0.25, far), (x_far, height, far), (x_near, height, near)]
        painter.polygon(eaves, painter.ink(roof_colour, BUILDING, middle, sunlit))
        if painter.pixels(window, near) < 1.5:
            return
        lit = (255, 216, 140, BUILDING)
        for make, corners, is_lit, depth in (
            (windows_along, side_corners, lit_side, middle),
            (windows_facing, front_corners, lit_front, near),
        ):
            if frame > 0.05 and painter.pixels(frame, near) > 0.6:
                painter.polygons(make(corners, frame), painter.ink(frame_colour, BUILDING, depth, sunlit))
            painter.polygons(make(corners[~is_lit], 0.0), painter.ink(glass, BUILDING, depth))
            painter.polygons(make(corners[is_lit], 0.0), lit)
        if shop:
            paint_shop(painter)
        else:
            door = along[len(along) // 2] - 1.2 if len(along) else near + 0.5
            share = (np.array([door, door + 1.0, door + 1.0, door]) - near) / (far - near)
            x = x_near + (x_far - x_near) * share
            z = near + (far - near) * share
            painter.polygon(np.stack([x, (0, 0, 2.1, 2.1), z], -1), painter.ink(shop_colour, BUILDING, middle, 0.7))

    def paint_shop(painter: Painter) -> None:
        front = (200, 170, 110, BUILDING) if light.dusk else painter.ink(glass, BUILDING, near)
        x0, x1 = x_near + (x_far - x_near) * 0.05, x_near + (x_far - x_near) * 0.95
        z0, z1 = near + (far - near) * 0.05, near + (far - near) * 0.95
        painter.polygon([(x0, 0.4, z0), (x1, 0.4, z1), (x1, 2.3, z1), (x0, 2.3, z0)], front)
        ink = painter.ink(shop_colour, BUILDING, near)
        painter.polygon([(x0, 2.3, z0), (x1, 2.3, z1), (x1, 3.0, z1), (x0, 3.0, z0)], ink)
        awning = [(x0, 2.5, z0), (x1, 2.5, z1), (x1 - side * 1.0, 2.15, z1), (x0 - side * 1.0, 2.15, z0)]
        painter.polygon(awning, painter.ink(shop_colour, BUILDING, near, 1.15))

    reach = min(height, 12.0)
    shadow = np.array(
        [(x_near, 0, near), (x_far, 0, far), fallen(light, x_far, far, reach), fallen(light, x_near, near, reach)]
    )
    return Thing(far, paint, (shadow,) if np.sign(light.sun[0]) == -side else ())


def fence(rng: np.random.Generator, street: Street, side: int, near: float, far: float) -> Thing:
    """Railings, pickets or boards along the pavement."""
    lateral = street.edge(side) + side * 0.15
    height = rng.uniform(0.9, 1.7)
    colour = one_of(rng, ((60, 62, 66), (206, 204, 196), (120, 88, 60), (70, 96, 76), (150, 150, 152)), 8)
    kind = rng.integers(3)
    pitch = (0.16, 0.24, 0.5)[kind] * rng.uniform(0.9, 1.3)
    bars = np.arange(near, far, max(pitch, (far - near) / 90))
    width = (0.35, 0.6, 0.94)[kind] * (bars[1] - bars[0])

    def strip(first: np.ndarray, length: float, low: float, high: float) -> np.ndarray:
        depth = np.stack([first, first + length, first + length, first], -1)
        x = np.vectorize(lambda z: street.x(lateral, z), otypes=[float])(depth)
        return np.stack([x, np.broadcast_to((low, low, high, high), depth.shape), depth], -1)

    def paint(painter: Painter) -> None:
        whole = np.array([near])
        middle = min(far, near + 6)
        behind = painter.ink(shifted(colour, np.full(3, 10.0)), FENCE, middle, 0.5)
        painter.polygons(strip(whole, far - near, 0.0, height), behind)
        ink = painter.ink(colour, FENCE, middle)
        if painter.pixels(width, near) > 0.8:
            painter.polygons(strip(bars, width, 0.05, height - 0.04), ink)
        for low in (0.12, height - 0.2):
            painter.polygons(strip(whole, far - near, low, low + 0.1), ink)

    return Thing(far, paint)


def hedge(rng: np.random.Generator, street: Street, side: int, near: float, far: float) -> Thing:
    """A clipped hedge along the pavement."""
    lateral, height = street.edge(side) + side * 0.2, rng.uniform(0.8, 1.9)
    leaf = one_of(rng, LEAVES[:3])
    count = int(min(60, (far - near) * 5))
    depths = np.sort(rng.uniform(near, far, count))[::-1]
    heights, tones = rng.uniform(0.2, height, count), rng.integers(0, 3, count)

    def paint(painter: Painter) -> None:
        edge = [(near, street.x(lateral, near)), (far, street.x(lateral, far))]
        (z0, x0), (z1, x1) = edge
        middle = min(far, near + 6)
        inks = [painter.ink(leaf, TREE, middle, tone) for tone in (0.62, 0.95, 1.2)]
        painter.polygon([(x0, 0, z0), (x0 + side, 0, z0), (x0 + side, height, z0), (x0, height, z0)], inks[0])
        painter.polygon([(x0, 0, z0), (x1, 0, z1), (x1, height, z1), (x0, height, z0)], inks[0])
        x = np.interp(depths, [near, far], [x0, x1])
        painter.discs(np.stack([x, heights, depths], -1), np.full(count, 0.16), [inks[tone] for tone in tones])

    return Thing(far, paint)


def tree(rng: np.random.Generator, street: Street, light: Light, lateral: float, depth: float) -> Thing:
    """A trunk and a crown: round, tall or a conifer's."""
    x = street.x(lateral, depth)
    trunk, total = rng.uniform(0.8, 2.6), rng.uniform(4, 10)
    leaf, bark = one_of(rng, LEAVES), one_of(rng, ((84, 66, 50), (104, 92, 78)), 6)
    spread = (total - trunk) * rng.uniform(0.3, 0.62)
    count = 34
    conifer = rng.random() < 0.2
    angle, out = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random(count))
    across, up = out * np.cos(angle), out * np.sin(angle) * 0.5 + 0.5
    if conifer:
        across *= 1.05 - up
    radii = spread * rng.uniform(0.16, 0.4, count) * (0.5 if conifer else 1.0) * (1.15 - 0.6 * out)
    tones = np.clip(np.rint(1.2 + 1.8 * up + rng.normal(0, 0.8, count) - 0.8 * across * np.sign(light.sun[0])), 0, 4)
    order = np.argsort(tones, kind="stable")
    centres = np.stack([x + across * spread, trunk + up * (total - trunk) * 0.92, np.full(count, depth)], -1)[order]
    radii, tones = radii[order], tones[order].astype(int).tolist()
    stray = rng.random(4) < 0.5

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, trunk + 0.3 * (total - trunk), 0.12 + 0.03 * total, painter.ink(bark, TREE, depth))
        # A few outer leaves are neither tree nor what is behind them, as in data sets labelled by hand.
        outer = np.array([(x - spread, total * 0.7, depth), (x + spread, total * 0.6, depth), (x, total, depth), (x + spread * 0.8, total * 0.8, depth)])
        painter.discs(outer[stray], np.full(int(stray.sum()), 0.16 * spread), [painter.ink(leaf, IGNORE, depth, 0.8)] * int(stray.sum()))
        inks = [painter.ink(leaf, TREE, depth, tone) for tone in (0.5, 0.68, 0.86, 1.04, 1.25)]
        if conifer:
            painter.polygon([(x - spread, trunk, depth), (x + spread, trunk, depth), (x, total + 0.6, depth)], inks[0])
        painter.discs(centres, radii, [inks[tone] for tone in tones])

    angles = np.linspace(0, 2 * np.pi, 9, endpoint=False)
    top_x, _, top_z = fallen(light, x, depth, (trunk + total) / 2)
    long = 1 + 0.5 * abs(light.sun[1])
    crown = np.stack([top_x + spread * np.cos(angles), np.zeros(9), top_z + spread * long * 0.8 * np.sin(angles)], -1)
    return Thing(depth, paint, (crown,))


def street_furniture(rng: np.random.Generator, street: Street, light: Light, crowdedness: float) -> Iterator[Thing]:
    """Lamps, traffic lights, signs, street trees, bins."""
    lamp_height, lamp_tone = rng.uniform(5, 8.5), rng.uniform(60, 150)
    lamps = rng.random() < 0.35 + 0.6 * crowdedness
    avenue = rng.random() < 0.1 + 0.5 * crowdedness
    for side in (-1, 1):
        kerb = side * (street.half + 0.45)
        if lamps:
            for depth in spaced(rng, rng.uniform(4, 18), FAR * 0.8, rng.uniform(16, 30)):
                yield lamp(street, light, side, kerb, depth, lamp_height, lamp_tone)
        for depth in spaced(rng, rng.uniform(5, 25), FAR * 0.6, 42 - 24 * crowdedness):
            if rng.random() < 0.75:
                yield sign(rng, street, light, kerb, depth)
        if avenue:
            lateral = side * (street.half + min(street.pavements[side > 0] * 0.45, 1.3))
            for depth in spaced(rng, rng.uniform(7, 14), FAR * 0.8, rng.uniform(8, 14)):
                yield tree(rng, street, light, lateral, depth)
        for depth in spaced(rng, rng.uniform(6, 20), 50, 40 - 25 * crowdedness):
            if rng.random() < 0.3 + 0.3 * crowdedness:
                yield bin_or_box(rng, street, street.edge(side) - side * 0.4, depth)


def lamp(
    street: Street, light: Light, side: int, lateral: float, depth: float, height: float, tone: float
) -> Thing:
    """A lamp post with an arm over the road."""
    x = street.x(lateral, depth)
    arm = x - side * height * 0.22

    def paint(painter: Painter) -> None:
        ink = painter.ink((tone, tone, tone * 1.04), POLE, depth)
        painter.post(x, depth, 0.0, height, 0.16, ink)
        thick = max(0.06, 0.5 * painter.zoom * depth / painter.unit)
        painter.polygon([(x, height - thick, depth), (arm, height + 0.3 - thick, depth), (arm, height + 0.3 + thick, depth), (x, height + thick, depth)], ink)
        head = (255, 226, 160, POLE) if light.dusk else painter.ink((190, 190, 186), POLE, depth)
        painter.polygon(upright(arm - 0.3, arm + 0.3, height + 0.12, height + 0.34, depth), head)

    top = fallen(light, x, depth, height)
    shadow = np.array([(x - 0.08, 0, depth), (x + 0.08, 0, depth), (top[0] + 0.08, 0, top[2]), (top[0] - 0.08, 0, top[2])])
    return Thing(depth, paint, (shadow,))


def sign(rng: np.random.Generator, street: Street, light: Light, lateral: float, depth: float) -> Thing:
    """A post with a traffic sign, a direction board, a banner or a traffic light."""
    x = street.x(lateral, depth)
    kind = rng.integers(6)
    post, size, tone = rng.uniform(2.0, 2.8), rng.uniform(0.32, 0.5), rng.uniform(110, 170)
    board = one_of(rng, ((36, 70, 150), (30, 110, 70), (200, 190, 60), (190, 50, 44)), 10)
    lamps = rng.permutation(3)

    def paint(painter: Painter) -> None:
        def ink(colour: Colour, brightness: float = 1.0) -> tuple[int, int, int, int]:
            return painter.ink(colour, SIGN, depth, brightness)

        centre = np.array([(x, post + size, depth)])
        painter.post(x, depth, 0.0, post + size, 0.1, painter.ink((tone, tone, tone), POLE, depth))
        if kind <= 1:
            painter.discs(centre.repeat(2, 0), np.array([size, size * 0.68]), [ink((200, 36, 40)), ink((236, 236, 230) if kind else (36, 70, 160))])
        elif kind == 2:
            for scale, colour in ((1.25, (200, 40, 40)), (0.75, (238, 236, 228))):
                low, high = post + size * (1 - 0.7 * scale), post + size * (1 + scale)
                painter.polygon([(x - size * scale, low, depth), (x + size * scale, low, depth), (x, high, depth)], ink(colour))
        elif kind == 3:
            painter.polygon(upright(x - size * 2.2, x + size * 2.2, post, post + size * 2, depth), ink(board))
            for row in (0.5, 1.2):
                bar = upright(x - size * 1.8, x + size * (0.4 + row), post + size * row, post + size * (row + 0.25), depth)
                painter.polygon(bar, ink((235, 235, 230)))
        elif kind == 4:
            painter.polygon(upright(x - size * 0.3, x + size * 1.7, post - 1.2, post + size * 2, depth), ink(board))
            painter.polygon(upright(x, x + size * 1.3, post - 0.5, post, depth), ink((236, 232, 220)))
        else:
            painter.polygon(upright(x - 0.2, x + 0.2, post, post + 1.05, depth), ink((30, 32, 32)))
            centres = np.array([(x, post + 0.18 + 0.34 * row, depth) for row in range(3)])
            inks = [(70, 235, 120, SIGN), (250, 190, 60, SIGN), (245, 60, 50, SIGN)]
            shown = [ink_ if row == lamps[0] else ink((60, 58, 56)) for row, ink_ in enumerate(inks)]
            painter.discs(centres, np.full(3, 0.12), shown)

    return Thing(depth, paint, (shadow_under(light, x, depth, 0.1, 0.1),))


def bin_or_box(rng: np.random.Generator, street: Street, lateral: float, depth: float) -> Thing:
    """A litter bin, a letter box or a cabinet: nothing that the classes name, so its pixels are ignored."""
    x = street.x(lateral, depth)
    height, width = rng.uniform(0.8, 1.4), rng.uniform(0.4, 0.9)
    colour = one_of(rng, ((40, 60, 48), (150, 36, 36), (90, 92, 92), (44, 44, 48)))

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, height, width, painter.ink(colour, IGNORE, depth))
        painter.post(x, depth, height - 0.12, height, width * 1.1, painter.ink(colour, IGNORE, depth, 1.3))

    return Thing(depth, paint)


# On the move --------------------------------------------------------------------------------------------------------


def traffic(rng: np.random.Generator, street: Street, light: Light, crowdedness: float) -> Iterator[Thing]:
    """Cars parked at the kerb, driving and crossing; vans, lorries and buses among them."""
    drives_left = street.offset > 0
    for side in (-1, 1):
        forward = (side < 0) == drives_left
        if street.half > 3.2 and rng.random() < 0.2 + 0.7 * crowdedness:
            for depth in spaced(rng, rng.uniform(6, 16), FAR * 0.7, 6.6):
                if rng.random() < 0.15 + 0.75 * crowdedness:
                    kind = int(rng.choice((0, 1, 2, 3), p=(0.45, 0.25, 0.2, 0.1)))
                    yield car(rng, street, light, kind, side * (street.half - 1.0), depth, forward)
        lane = side * (street.half - 2.4 if street.half > 5 else street.half * 0.45)
        for depth in spaced(rng, rng.uniform(9, 30), FAR, 70 - 56 * crowdedness):
            if rng.random() < 0.25 + 0.6 * crowdedness:
                kind = int(rng.choice(6, p=(0.35, 0.23, 0.17, 0.1, 0.07, 0.08)))
                yield car(rng, street, light, kind, lane, depth + 3, forward)
    if rng.random() < 0.08 + 0.1 * crowdedness:
        heading = float(rng.choice((-1, 1))) * np.pi / 2
        yield car(rng, street, light, int(rng.integers(4)), rng.uniform(-3, 3), rng.uniform(11, 40), True, heading)


def car(
    rng: np.random.Generator, street: Street, light: Light, kind: int, lateral: float, depth: float, forward: bool,
    heading: float = 0.0,
) -> Thing:  # fmt: skip
    """A vehicle that drives away from the camera or towards it, or turned by `heading`."""
    x = street.x(lateral, depth)
    yaw = street.yaw(depth) + heading + rng.normal(0, 0.02) + (0.0 if forward else np.pi)
    paint_colour = one_of(rng, PAINT, 14)
    colours: dict[str, Colour] = {
        "body": paint_colour,
        "trim": shifted(paint_colour, np.full(3, -26.0)),
        "glass": (34, 40, 50) if rng.random() < 0.6 else (96, 112, 128),
        "tyre": (24, 24, 26),
        "hub": (134, 134, 138),
        "plate": (226, 216, 150),
        "rear_lamp": (255, 60, 50) if light.dusk else (176, 30, 30),
        "front_lamp": (500, 480, 420) if light.dusk else (226, 226, 220),
    }
    figure = vehicles()[kind]
    scale = rng.uniform(0.95, 1.06)
    half_length = float(np.abs(figure.points[:, 2]).max())
    half_width = float(np.abs(figure.points[:, 0]).max())
    if heading:
        half_length, half_width = half_width, half_length

    def paint(painter: Painter) -> None:
        ground = painter.ink((26, 26, 28), ROAD, depth)
        painter.polygon(shadow_under(light, x, depth, half_width * 0.95, half_length * 0.97), ground)
        painter.figure(figure, colours, CAR, (x, depth), yaw, (scale, scale))

    return Thing(depth + 0.2, paint, (shadow_under(light, x, depth, half_width + 0.1, half_length + 0.2),))


def people(rng: np.random.Generator, street: Street, light: Light, crowdedness: float) -> Iterator[Thing]:
    """People on the pavements, a few on the road, and some on bicycles."""
    for side in (-1, 1):
        for _ in range(rng.poisson(0.35 + 9 * crowdedness**2)):
            depth = exp(rng.uniform(np.log(5.5), np.log(60)))
            group = 1 + rng.poisson(0.3)
            lateral = side * (street.half + rng.uniform(0.4, street.pavements[side > 0] - 0.2))
            for member in range(group):
                yield pedestrian(rng, street, light, lateral + 0.6 * member * side, depth + 0.2 * member)
    for _ in range(rng.poisson(0.1 + 0.8 * crowdedness)):
        depth = exp(rng.uniform(np.log(7), np.log(40)))
        yield pedestrian(rng, street, light, rng.uniform(-street.half, street.half), depth)
    for _ in range(rng.poisson(0.12 + 0.9 * crowdedness)):
        side = int(rng.choice((-1, 1)))
        depth = exp(rng.uniform(np.log(6), np.log(40)))
        lateral = side * street.half * rng.uniform(0.55, 0.75)
        turned = rng.random() < 0.25
        yield bicyclist(rng, street, light, lateral, depth, float(rng.uniform(0.6, 2.4)) if turned else 0.0)


def pedestrian(rng: np.random.Generator, street: Street, light: Light, lateral: float, depth: float) -> Thing:
    """Somebody who stands or walks."""
    x = street.x(lateral, depth)
    coat, trousers = one_of(rng, CLOTHES, 14), one_of(rng, CLOTHES[:5], 10)
    colours: dict[str, Colour] = {
        "coat": coat,
        "sleeve": shifted(coat, np.full(3, -14.0)),
        "trousers": trousers,
        "shoes": (30, 28, 28),
        "skin": one_of(rng, SKIN, 6),
        "hair": one_of(rng, ((40, 30, 24), (120, 90, 50), (150, 146, 140), (24, 22, 22)), 6),
        "bag": one_of(rng, CLOTHES, 10),
    }
    tall = rng.uniform(0.62, 0.75) if rng.random() < 0.12 else rng.uniform(0.92, 1.08)
    broad = tall * rng.uniform(0.95, 1.25) * float(rng.choice((-1, 1)))
    figure = walker(int(rng.integers(POSES)))

    def paint(painter: Painter) -> None:
        painter.figure(figure, colours, PEDESTRIAN, (x, depth), scale=(broad, tall))

    return Thing(depth, paint, (shadow_under(light, x, depth, 0.25, 0.2),))


def bicyclist(
    rng: np.random.Generator, street: Street, light: Light, lateral: float, depth: float, heading: float
) -> Thing:
    """Somebody on a bicycle, who rides along the road or turns."""
    x = street.x(lateral, depth)
    coat = one_of(rng, (*CLOTHES, (220, 220, 60), (240, 130, 50)), 10)
    colours: dict[str, Colour] = {
        "coat": coat,
        "sleeve": shifted(coat, np.full(3, -16.0)),
        "trousers": one_of(rng, CLOTHES[:5], 8),
        "shoes": (34, 32, 32),
        "skin": one_of(rng, SKIN, 6),
        "helmet": one_of(rng, ((220, 220, 216), (40, 40, 44), (190, 40, 40), (40, 90, 160)), 8),
        "frame": one_of(rng, PAINT, 10),
        "tyre": (26, 26, 28),
        "spokes": (112, 112, 112),
    }
    yaw = street.yaw(depth) + heading + (np.pi if rng.random() < 0.5 else 0.0)
    figure = cyclist(int(rng.integers(POSES)))
    tall = rng.uniform(0.96, 1.06)

    def paint(painter: Painter) -> None:
        painter.figure(figure, colours, BICYCLIST, (x, depth), yaw, (tall, tall))

    return Thing(depth, paint, (shadow_under(light, x, depth, 0.3, 0.7),))


# The camera's own share ---------------------------------------------------------------------------------------------


def paint_bonnet(painter: Painter, rng: np.random.Generator) -> None:
    """The bonnet of the car that carries the camera: ignored."""
    height, width = painter.canvas.shape[:2]
    tone = rng.uniform(20, 120)
    rise = rng.uniform(0.05, 0.11) * height
    centre = (round(width * rng.uniform(0.4, 0.6)), round(height + rise * 0.6))
    axes = (round(width * rng.uniform(0.5, 0.7)), round(rise * 1.6))
    ink = painter.ink((tone, tone, tone * 1.05), IGNORE, 0.0)
    cv2.ellipse(painter.canvas, centre, axes, 0, 0, 360, ink, -1)
    shine = painter.ink((tone + 50, tone + 52, tone + 58), IGNORE, 0.0)
    cv2.ellipse(painter.canvas, centre, (axes[0] * 9 // 10, axes[1] * 8 // 10), 0, 200, 260, shine, max(1, height // 150))


def develop(image: np.ndarray, label: np.ndarray, rng: np.random.Generator, crowdedness: float) -> np.ndarray:
    """What surfaces and sensor add: texture by class, noise, a slight blur, contrast."""
    height, width = label.shape
    rough = rng.uniform(0.5, 1.1) + 0.5 * crowdedness
    noise, blur, gamma = rng.uniform(0.01, 0.05), rng.uniform(0, 1), rng.uniform(0.8, 1.25)
    coarse = rng.random((96, 128), dtype=np.float32) - 0.5
    grain = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    grain += cv2.resize(rng.random((12, 16), dtype=np.float32) - 0.5, (width, height), interpolation=cv2.INTER_LINEAR)
    grain += rng.integers(0, 256, (height, width), dtype=np.uint8).astype(np.float32) * (1 / 256) - 0.5
    gain = cv2.LUT(label, ROUGHNESS * np.float32(1.3 * rough)) * grain + 1
    image = cv2.multiply(image, cv2.cvtColor(gain, cv2.COLOR_GRAY2RGB), dtype=cv2.CV_8U)
    if blur > 0.8:
        image = cv2.GaussianBlur(image, (0, 0), 0.45 + 0.0022 * height * (blur - 0.8) / 0.2)
    speckle = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = cv2.addWeighted(image, 1.0, speckle, noise, -127.5 * noise)
    curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return cv2.LUT(image, curve)
