"""Procedural street scenes: a picture and its classes from a seed and an index, with nothing to download.

A scene is laid out in metres (road, pavements, buildings, trees, people, cars, the hour and the weather), and then
painted from far to near through a pinhole camera, so that size follows depth. One number drawn per scene, its
crowdedness, leads from the empty country road to the full street: what a picture costs to learn varies, which is what
data slimming lives on. The classes and their order are CamVid's.
"""

from math import pi
from random import Random

import cv2
import numpy as np

from dance_seg.randomness import paired_generators
from dance_seg.sample import IGNORE, Sample
from datamodules.scenery.painter import (
    BUILDING,
    CLASSES,
    NEAREST,
    PAVEMENT,
    ROAD,
    SKY,
    TREE,
    Camera,
    Colour,
    Light,
    Painter,
)
from datamodules.scenery.roadside import WALLS, lots, street_furniture
from datamodules.scenery.street import (
    CIRCLE,
    FAR,
    Scene,
    Street,
    how_many,
    one_of,
    rectangles_on_wall,
    shifted,
    upright,
)
from datamodules.scenery.traffic import people, traffic

__all__ = ["CLASSES", "PALETTE", "render_scene"]

PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
"""CamVid's colours (red, green, blue), one per class."""

SMALLEST_SIDE = 16
SCENES = 0x5CE7E5  # keeps these draws apart from others of the same seed and index

# How strongly a surface's brightness varies from pixel to pixel, beside what is painted on it.
ROUGHNESS = np.full(256, 0.04, np.float32)
ROUGHNESS[: len(CLASSES)] = (0.0, 0.09, 0.05, 0.08, 0.1, 0.3, 0.02, 0.1, 0.03, 0.08, 0.08)


def render_scene(seed: int, index: int, size: tuple[int, int] = (192, 256)) -> Sample:
    """Scene number `index` of the endless set that `seed` names, at any size (H, W) from 16 x 16.

    The same index at another size is the same street seen through the same camera; a wider picture shows more of it.
    Raises ValueError for a smaller size, and for a negative seed or index.

    >>> image, label = render_scene(seed=0, index=3, size=(48, 64))
    >>> image.shape, label.shape, bool((render_scene(0, 3, (48, 64)).image == image).all())
    ((48, 64, 3), (48, 64), True)
    """
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"size is {tuple(size)}; a street scene needs at least {SMALLEST_SIDE} rows and columns")
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; both count from 0")
    rng, draw = paired_generators(seed, index, SCENES)
    crowdedness = draw.random()
    light = draw_light(draw)
    scene = Scene(draw, draw_street(draw, crowdedness), light, crowdedness, taken=[])
    camera = Camera(
        draw.uniform(1.35, 1.8), draw.uniform(0.9, 1.25), draw.uniform(0.4, 0.54), draw.uniform(-0.12, 0.12)
    )
    painter = Painter(camera, light, size)
    paint_sky(painter, rng, cloudiness=draw.uniform(0, 0.3 + 0.7 * crowdedness))
    paint_skyline(painter, draw, crowdedness)
    paint_ground(painter, scene)
    paint_road(painter, scene)
    things = [*lots(scene), *street_furniture(scene), *traffic(scene), *people(scene)]
    painter.darken([thing.shadow for thing in things if thing.shadow is not None], light.shadow)
    for thing in sorted(things, key=lambda thing: -thing.depth):
        thing.paint(painter)
    if draw.random() < 0.25:
        paint_bonnet(painter, draw)
    image, label = painter.finish()
    return Sample(develop(image, label, rng, crowdedness), label)


def draw_light(draw: Random) -> Light:
    """A clear day, an overcast one, or dusk."""
    kind = draw.choices(("clear", "overcast", "dusk"), (50, 30, 20))[0]
    top, low, tint, shadow, length = {
        "clear": ((80, 130, 205), (200, 220, 238), (1.06, 1.0, 0.92), draw.uniform(0.3, 0.55), draw.uniform(0.4, 1.6)),
        "overcast": ((168, 174, 184), (208, 212, 216), (0.84, 0.87, 0.92), 0.12, 0.1),
        "dusk": ((58, 62, 112), (238, 158, 104), (0.66, 0.53, 0.52), draw.uniform(0.15, 0.3), draw.uniform(1.2, 2.2)),
    }[kind]
    gain = draw.uniform(0.75, 1.12)
    sky_low = one_of(draw, (low,), 9)
    angle = draw.uniform(0, 2 * pi)
    return Light(
        sky_top=one_of(draw, (top,), 9),
        sky_low=sky_low,
        tint=(tint[0] * gain, tint[1] * gain, tint[2] * gain),
        haze=shifted(sky_low, -12),
        haze_depth=70 * (500 / 70) ** draw.random(),
        sun=(length * float(np.cos(angle)), length * abs(float(np.sin(angle)))),
        shadow=shadow,
        is_dusk=kind == "dusk",
    )


def draw_street(draw: Random, crowdedness: float) -> Street:
    """A road of two to four lanes; the camera drives in one of them."""
    half = draw.uniform(2.8, 3.6) + (3.2 if draw.random() < 0.25 + 0.3 * crowdedness else 0.0)
    left, right = (draw.uniform(1.2, 2.4) + 2.2 * crowdedness * draw.random() for _ in range(2))
    offset = draw.choice((-1, 1)) * half * draw.uniform(0.35, 0.55)
    return Street(half, (left, right), offset, slope=draw.uniform(-0.06, 0.06), bend=draw.uniform(-1, 1) ** 3 / 90)


def paint_sky(painter: Painter, rng: np.random.Generator, cloudiness: float) -> None:
    """A gradient from the zenith to the horizon with clouds over it; fills the canvas."""
    light, rows, columns = painter.light, 64, 96
    low_share = np.minimum(np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] / painter.camera.horizon, 1) ** 1.4
    top, low = np.array(light.sky_top, np.float32), np.array(light.sky_low, np.float32)
    clouds = np.full((rows, columns), cloudiness - 0.5, np.float32)
    for octave in range(4):
        grid = rng.random((4 * 2**octave, 5 * 2**octave), dtype=np.float32) - 0.5
        larger: np.ndarray = cv2.resize(grid, (columns, rows), interpolation=cv2.INTER_CUBIC)
        clouds += larger / 1.6**octave
    cover = np.clip(clouds * 1.76, 0, 0.8)[..., None]
    cloud = np.minimum(low * 0.6 + np.float32(48 if light.is_dusk else 106), 255)
    sky = (top + (low - top) * low_share) * (1 - cover) + cloud * ((1 - 0.25 * cover) * cover)
    small = np.empty((rows, columns, 4), np.uint8)
    small[..., :3] = np.clip(sky, 0, 255)
    small[..., 3] = SKY
    cv2.resize(small, painter.canvas.shape[1::-1], dst=painter.canvas, interpolation=cv2.INTER_LINEAR)


def paint_skyline(painter: Painter, draw: Random, crowdedness: float) -> None:
    """Distant woods and houses, which hide where the road would end."""
    depth, hazy, step = 190.0, 80.0, 5.0
    left = np.arange(-300, 300, step)
    rough = np.array([draw.random() for _ in range(len(left) + 7)])
    tops = draw.uniform(2, 5) + draw.uniform(6, 22) * np.abs(np.convolve(rough, np.full(7, 1 / 7), "valid") - 0.35)
    tops += 1.5 * rough[: len(tops)]
    wood = np.zeros((len(left), 4, 3))
    wood[:, :, 0] = left[:, None] + (0, step, step, 0)
    wood[:, :, 1] = np.stack([np.full(len(left), -1.0), np.full(len(left), -1.0), tops[1:], tops[:-1]], 1)
    wood[:, :, 2] = depth
    leaf = one_of(draw, ((62, 86, 52), (84, 92, 58), (70, 78, 66)))
    painter.pattern(wood, leaf, TREE, hazy)
    for _ in range(int(2 + 30 * crowdedness)):
        x, width, height = draw.uniform(-200, 200), draw.uniform(8, 26), draw.uniform(5, 12 + 22 * crowdedness)
        painter.polygon(upright(x, x + width, -1.0, height, depth - 10), one_of(draw, WALLS), BUILDING, hazy)
        columns, floors = np.arange(1.5, width - 3, 4.6), np.arange(3, height - 2, 4.4)
        panes = rectangles_on_wall((x, 0, depth - 10), (1, 0, 0), columns, floors, 2.2, 2.2)
        painter.pattern(panes, (70, 75, 88), BUILDING, hazy * 0.8)


GRASS: tuple[Colour, ...] = ((88, 116, 58), (112, 122, 66), (74, 100, 54))
STONE: tuple[Colour, ...] = ((152, 148, 140), (166, 152, 136), (140, 138, 138), (158, 128, 112))
ASPHALT: tuple[Colour, ...] = ((98, 98, 102), (118, 116, 112), (82, 84, 90))


def bands(street: Street, left: float, right: float, near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Quadrilaterals (N, 4, 3) on the ground that follow the road, between the depths `near` and `far`, both (N,)."""
    depth = np.stack([near, near, far, far], -1)
    x = street.offset + np.array((left, right, right, left)) + street.slope * depth + street.bend / 2 * depth**2
    return np.stack([x, np.zeros_like(depth), depth], -1)


def paint_ground(painter: Painter, scene: Scene) -> None:
    """Verges of grass (which CamVid counts as trees) or paving, pavements with kerbs and slabs, and the road."""
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
    depths = np.append(np.geomspace(NEAREST, FAR, 16), FAR * 1.6)
    far, near = depths[:0:-1], depths[-2::-1]
    patches = [draw.gauss(1, 0.02 + 0.03 * crowdedness) for _ in near]
    for side in (-1, 1):
        kerb, edge = side * street.half, street.edge(side)
        is_paved = draw.random() < 0.25 + 0.5 * crowdedness
        pavement, grass = one_of(draw, STONE, 8), one_of(draw, GRASS, 8)
        verge = (shifted(pavement, -10), PAVEMENT) if is_paved else (grass, TREE)
        painter.stretch(bands(street, edge, side * 140.0, near, far), *verge, patches)
        painter.stretch(bands(street, kerb, edge, near, far), pavement, PAVEMENT, patches)
        joints = np.arange(NEAREST, 22, draw.uniform(0.9, 1.8))
        painter.pattern(bands(street, kerb, edge, joints, joints + 0.09), shifted(pavement, -28), PAVEMENT, 8.0)
        stone = shifted(pavement, draw.uniform(15, 40))
        painter.stretch(bands(street, kerb, kerb + side * 0.22, near, far), stone, PAVEMENT, patches)
    asphalt = one_of(draw, ASPHALT, 8)
    painter.stretch(bands(street, -street.half, street.half, near, far), asphalt, ROAD, patches)


def paint_road(painter: Painter, scene: Scene) -> None:
    """Repairs, manholes, lane marks and, now and then, a zebra crossing; all of it is road."""
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
    half = street.half
    for _ in range(how_many(draw, 1.0 + 4 * crowdedness)):
        left, tone = draw.uniform(-half, half * 0.7), draw.uniform(50, 120)
        near = np.array([draw.uniform(3, 35)])
        repair = bands(street, left, min(half, left + draw.uniform(0.5, 2.5)), near, near + draw.uniform(0.8, 7))
        painter.stretch(repair, (tone, tone, tone + 4), ROAD)
    for _ in range(how_many(draw, 2.0 * crowdedness)):
        x, z = street.x(draw.uniform(0.5 - half, half - 0.5), 10), draw.uniform(4, 25)
        painter.stretch(((x, 0, z) + CIRCLE * 0.34)[None], (58, 56, 56), ROAD)
    white = one_of(draw, ((214, 214, 208), (190, 188, 180)), 6)
    yellow = one_of(draw, ((206, 168, 72), (190, 160, 90)), 6)
    dash, gap = draw.uniform(2, 4), draw.uniform(3, 6)
    if draw.random() < 0.35 + 0.6 * crowdedness:
        first = np.arange(NEAREST - dash * draw.random(), FAR * 0.7, dash + gap)
        for lane in (-half / 2, 0.0, half / 2) if half > 5 else (0.0,):
            marks = bands(street, lane - 0.07, lane + 0.07, np.maximum(first, NEAREST), first + dash)
            painter.stretch(marks, white, ROAD)
    if draw.random() < 0.6:
        edge_colour, depths = draw.choice((white, yellow)), np.geomspace(NEAREST, FAR, 12)
        for lateral in (0.3 - half, half - 0.3):
            line = bands(street, lateral - 0.06, lateral + 0.06, depths[:-1], depths[1:])
            painter.stretch(line, edge_colour, ROAD)
    if draw.random() < 0.12 + 0.35 * crowdedness:
        zebra = np.array([draw.uniform(7, 30)])
        stripes = [bands(street, left, left + 0.5, zebra, zebra + 3) for left in np.arange(0.5 - half, half - 0.5, 1.0)]
        painter.pattern(np.concatenate(stripes), white, ROAD, float(zebra[0]))


def paint_bonnet(painter: Painter, draw: Random) -> None:
    """The bonnet of the car that carries the camera: ignored."""
    painter.paint()
    height, width = painter.canvas.shape[:2]
    tone, rise = draw.uniform(20, 100), draw.uniform(0.05, 0.11) * height
    centre = (round(width * draw.uniform(0.4, 0.6)), round(height + rise * 0.6))
    axes = (round(width * draw.uniform(0.5, 0.7)), round(rise * 1.6))
    cv2.ellipse(painter.canvas, centre, axes, 0, 0, 360, (tone, tone, tone * 1.05, IGNORE), cv2.FILLED)
    inner, shine = (axes[0] * 9 // 10, axes[1] * 8 // 10), (tone + 50, tone + 52, tone + 58, IGNORE)
    cv2.ellipse(painter.canvas, centre, inner, 0, 200, 260, shine, max(1, height // 150))


def develop(image: np.ndarray, label: np.ndarray, rng: np.random.Generator, crowdedness: float) -> np.ndarray:
    """What surfaces and sensor add: texture by class, a slight blur, noise, contrast."""
    height, width = label.shape
    rough = rng.uniform(0.2, 0.9) + 0.7 * crowdedness
    blur, noise, gamma = rng.random(), 0.05 * rng.random() ** 2, rng.uniform(0.8, 1.25)
    grain = np.zeros((height, width), np.float32)
    for rows, columns in ((12, 16), (96, 128)):
        blotches = rng.random((rows, columns), dtype=np.float32) - 0.5
        grain += cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    grain += rng.integers(0, 256, (height, width), dtype=np.uint8).astype(np.float32) / 256 - 0.5
    gain = cv2.LUT(label, ROUGHNESS * np.float32(1.3 * rough)) * grain + 1
    image = cv2.multiply(image, cv2.cvtColor(gain, cv2.COLOR_GRAY2RGB), dtype=cv2.CV_8U)
    if blur > 0.8:
        image = cv2.GaussianBlur(image, (0, 0), 0.4 + 0.008 * height * (blur - 0.8))
    speckle = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = cv2.addWeighted(image, 1.0, speckle, noise, -127.5 * noise)
    return cv2.LUT(image, np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8))
