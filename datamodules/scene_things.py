"""What stands beside the road and moves on it: buildings, fences, trees, lamps, signs, cars, people, bicycles.

Everything random is drawn when a thing is laid out, in metres, never when it is painted: the size of the picture
decides how much of a thing is seen, not what it looks like.
"""

from collections.abc import Callable, Iterator, Sequence
from math import exp, log, pi, sin
from random import Random
from typing import NamedTuple

import numpy as np

from dance_seg.sample import IGNORE
from datamodules.scene_figures import CROWNS, POSES, Point, crown, cyclist, vehicles, walker
from datamodules.scene_painter import (
    BICYCLIST, BUILDING, CAR, FENCE, NEAREST, PEDESTRIAN, POLE, ROAD, SIGN, TREE, Colour, Light, Painter,
)  # fmt: skip

FAR = 130.0  # metres; behind it there is only the skyline

WALLS: tuple[Colour, ...] = (
    (158, 96, 76), (134, 82, 68), (186, 164, 134), (204, 194, 176), (150, 146, 142), (120, 116, 116), (196, 172, 120),
    (170, 178, 186), (214, 208, 200), (104, 88, 80),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((96, 60, 50), (72, 72, 80), (120, 78, 60), (88, 84, 82))
LEAVES: tuple[Colour, ...] = ((70, 102, 44), (92, 118, 52), (56, 84, 44), (78, 108, 60), (128, 118, 54), (150, 106, 50))
CLOTHES: tuple[Colour, ...] = (
    (40, 44, 60), (120, 34, 38), (60, 76, 110), (190, 184, 172), (80, 70, 58), (200, 150, 60), (46, 92, 78),
    (30, 30, 32), (150, 80, 120),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((222, 178, 150), (186, 132, 100), (120, 82, 60), (236, 200, 176))
HAIR: tuple[Colour, ...] = ((40, 30, 24), (120, 90, 50), (150, 146, 140), (24, 22, 22))
PAINT: tuple[Colour, ...] = (
    (36, 38, 44), (168, 172, 178), (214, 214, 212), (150, 28, 32), (34, 60, 118), (92, 96, 102), (60, 92, 74),
    (196, 160, 60), (120, 58, 40),
)  # fmt: skip


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
    """A Poisson number: arrivals, a unit of time long, of a process with this rate."""
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
    corner: Point, direction: Point, columns: Sequence[float], rows: Sequence[float], width: float, height: float
) -> np.ndarray:
    """A grid of rectangles (rows x columns, 4, 3) on an upright wall; columns and rows say where each begins."""
    along = np.asarray(columns)[:, None] + (0, width, width, 0)
    quads = np.empty((len(rows), len(columns), 4, 3))
    quads[..., 0] = corner[0] + along * direction[0]
    quads[..., 1] = (np.asarray(rows)[:, None] + (0, 0, height, height))[:, None]
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


# Beside the road ----------------------------------------------------------------------------------------------------


def lots(scene: Scene) -> Iterator[Thing]:
    """What borders the pavements, lot after lot: houses, or gardens with fences, hedges and trees."""
    draw, street, _, crowdedness = scene
    floors = draw.uniform(1.5, 2.5 + 4.5 * crowdedness)
    for side in (-1, 1):
        depth = draw.uniform(-6, 4)
        setback = 0.0 if draw.random() < 0.2 + 0.6 * crowdedness else draw.uniform(2.5, 9)
        fenced = draw.random() < 0.7
        while depth < FAR:
            near, far = max(depth, NEAREST), depth + draw.uniform(7, 20)
            depth = far + (draw.uniform(1, 6) if draw.random() < 0.35 else 0.0)
            if far < NEAREST + 1:
                continue
            is_built = draw.random() < 0.03 + 0.94 * crowdedness
            if is_built:
                yield building(scene, side, setback, near, far, max(1, round(draw.gauss(floors, 0.8))))
            if is_built and setback < 2:
                continue
            border = draw.random()
            if fenced and border < 0.75:
                yield fence(scene, side, near, far)
            elif border > 0.85:
                yield hedge(scene, side, near, far)
            room = setback if is_built else 14.0
            for _ in range(how_many(draw, (far - near) * (0.02 + 0.07 * crowdedness) * (1 if is_built else 1.6))):
                lateral = street.edge(side) + side * draw.uniform(1.0, max(room - 1, 1.5))
                yield tree(scene, lateral, draw.uniform(near, far))


def building(scene: Scene, side: int, setback: float, near: float, far: float, floors: int) -> Thing:
    """A house from `near` to `far`: a wall along the road, one towards the camera, a roof, windows, a shop."""
    draw, street, light, crowdedness = scene
    storey, body = draw.uniform(2.8, 3.5), draw.uniform(8, 14)
    height = storey * floors + draw.uniform(0.3, 1.2)
    inner, length = street.edge(side) + side * setback, far - near
    x_near, x_far = street.x(inner, near), street.x(inner, far)
    x_back, lean = x_near + side * body, (x_far - x_near) / length
    wall, roof = one_of(draw, WALLS), one_of(draw, ROOFS)
    ridge = draw.uniform(1.5, 3.5) if draw.random() < 0.65 and floors < 5 else 0.0
    chimney = draw.uniform(0.2, 0.8) if draw.random() < 0.5 else 0.0
    sunny = 0.84 if light.sun[0] * side < 0 else 1.0
    glass = one_of(draw, ((52, 60, 74), (86, 104, 126), (38, 40, 46)), 8)
    frame: Colour = (216, 212, 202) if draw.random() < 0.7 else (92, 70, 58)
    width, tall, margin = draw.uniform(0.9, 1.6), draw.uniform(1.1, 1.9), draw.choice((0.0, 0.08, 0.15))
    pitch = width + draw.uniform(0.7, 2.4) * (1.3 - 0.6 * crowdedness)
    is_shop = draw.random() < 0.1 + 0.5 * crowdedness
    shop = one_of(draw, ((160, 40, 40), (40, 90, 60), (40, 60, 120), (200, 160, 60), (60, 50, 48)), 14)
    rows = np.arange(int(is_shop), floors) * storey + (storey - tall) * 0.55
    step, phase, lit_share = draw.random(), draw.random(), 0.5 if light.is_dusk else 0.03
    corner, middle = (x_near, 0.0, near), min((near + far) / 2, near + 8)
    walls = ((lean, 0.0, 1.0), length, middle), ((float(side), 0.0, 0.0), body, near)  # along the road; across it

    def paint(painter: Painter) -> None:
        if ridge:
            x_ridge, top = (x_near + x_back) / 2, height + ridge
            slope = [(x_near, height, near), (x_far, height, far), (x_ridge + x_far - x_near, top, far)]
            painter.polygon([*slope, (x_ridge, top, near)], roof, BUILDING, middle)
            if chimney:
                z = near + length * chimney
                painter.post(x_ridge + lean * length * chimney, z, top - 0.5, top + 1.1, 0.8, shifted(wall, -14), BUILDING)
            painter.polygon([(x_near, height, near), (x_back, height, near), (x_ridge, top, near)], wall, BUILDING, near, 0.93)
        painter.polygon(upright(x_near, x_back, -0.2, height, near), wall, BUILDING, near, 0.92)
        for low, colour in ((-0.2, wall), (height - 0.25, roof)):
            strip = [(x_near, low, near), (x_far, low, far), (x_far, height, far), (x_near, height, near)]
            painter.polygon(strip, colour, BUILDING, middle, sunny)
        for direction, extent, depth in walls:
            if painter.pixels(pitch, depth) < 4:
                # Single windows would be smaller than a pixel: a band per storey looks the same.
                bands = rectangles_on_wall(corner, direction, [0.5], rows, extent - 1, tall * 0.7)
                painter.pattern(bands, glass, BUILDING, depth, 1.3)
                continue
            columns = np.arange(0.7, extent - width - 0.3, pitch)
            if margin and painter.pixels(margin, near) > 0.7:
                larger = (columns - margin, rows - margin, width + 2 * margin, tall + 2 * margin)
                painter.pattern(rectangles_on_wall(corner, direction, *larger), frame, BUILDING, depth, sunny)
            panes = rectangles_on_wall(corner, direction, columns, rows, width, tall)
            lit = (phase + step * np.arange(len(panes))) % 1 < lit_share
            painter.pattern(panes[~lit], glass, BUILDING, depth)
            painter.pattern(panes[lit], (390, 400, 270), BUILDING, depth)
        if is_shop:
            paint_shop(painter)
        elif painter.pixels(1.0, middle) > 4:
            door = rectangles_on_wall(corner, walls[0][0], [length * 0.4], [0.0], 1.0, 2.1)
            painter.pattern(door, shop, BUILDING, middle, 0.75)

    def paint_shop(painter: Painter) -> None:
        ends = [(x_near + lean * length * share, near + length * share) for share in (0.05, 0.95)]
        (x0, z0), (x1, z1) = ends
        inside: Colour = (330, 320, 220) if light.is_dusk else glass
        painter.polygon([(x0, 0.4, z0), (x1, 0.4, z1), (x1, 2.3, z1), (x0, 2.3, z0)], inside, BUILDING, near)
        painter.polygon([(x0, 2.3, z0), (x1, 2.3, z1), (x1, 3.0, z1), (x0, 3.0, z0)], shop, BUILDING, near)
        awning = [(x0, 2.5, z0), (x1, 2.5, z1), (x1 - side, 2.15, z1), (x0 - side, 2.15, z0)]
        painter.polygon(awning, shop, BUILDING, near, 1.15)

    reach = min(height, 12.0)
    shadow = [(x_near, 0, near), (x_far, 0, far), fallen(light, x_far, far, reach), fallen(light, x_near, near, reach)]
    return Thing(far, paint, np.array(shadow) if light.sun[0] * side < 0 else None)


def fence(scene: Scene, side: int, near: float, far: float) -> Thing:
    """Railings, pickets or boards along the pavement."""
    draw, street, _, _ = scene
    lateral, length = street.edge(side) + side * 0.15, far - near
    height = draw.uniform(0.9, 1.7)
    colour = one_of(draw, ((60, 62, 66), (206, 204, 196), (120, 88, 60), (70, 96, 76), (150, 150, 152)), 8)
    pitch, share = draw.choice(((0.16, 0.35), (0.24, 0.6), (0.5, 0.94)))
    pitch = max(pitch * draw.uniform(0.9, 1.3), length / 90)
    corner = (street.x(lateral, near), 0.0, near)
    direction = ((street.x(lateral, far) - corner[0]) / length, 0.0, 1.0)
    bars = np.arange(0, length, pitch)

    def paint(painter: Painter) -> None:
        middle = min(far, near + 6)
        behind = rectangles_on_wall(corner, direction, [0.0], [0.0], length, height)
        painter.pattern(behind, shifted(colour, 10), FENCE, middle, 0.5)
        if painter.pixels(share * pitch, near) > 0.8:
            upright_bars = rectangles_on_wall(corner, direction, bars, [0.05], share * pitch, height - 0.09)
            painter.pattern(upright_bars, colour, FENCE, middle)
        rails = rectangles_on_wall(corner, direction, [0.0], [0.12, height - 0.2], length, 0.1)
        painter.pattern(rails, colour, FENCE, middle)

    return Thing(far, paint)


def hedge(scene: Scene, side: int, near: float, far: float) -> Thing:
    """A clipped hedge along the pavement."""
    draw, street, _, _ = scene
    lateral, height = street.edge(side) + side * 0.2, draw.uniform(0.8, 1.9)
    leaf = one_of(draw, LEAVES[:4])
    x0, x1 = street.x(lateral, near), street.x(lateral, far)
    twigs = sorted((-draw.uniform(near, far), draw.uniform(0.2, height)) for _ in range(int(5 * (far - near))))
    centres = np.array([(x0 + (x1 - x0) * (-z - near) / (far - near), y, -z) for z, y in twigs])
    tones = [draw.choice((0.62, 0.95, 1.2)) for _ in twigs]

    def paint(painter: Painter) -> None:
        middle = min(far, near + 6)
        painter.polygon(upright(x0, x0 + side, 0, height, near), leaf, TREE, near, 0.62)
        painter.polygon([(x0, 0, near), (x1, 0, far), (x1, height, far), (x0, height, near)], leaf, TREE, middle, 0.62)
        step = 1 if painter.pixels(0.16, middle) > 2 else 4  # fewer and larger leaves far away
        painter.discs(centres[::step], 0.16 if step == 1 else 0.3, leaf, TREE, tones[::step])

    return Thing(far, paint)


def tree(scene: Scene, lateral: float, depth: float) -> Thing:
    """A trunk and a crown: round, tall or a conifer's."""
    draw, street, light, _ = scene
    x = street.x(lateral, depth)
    trunk, total = draw.uniform(0.8, 2.6), draw.uniform(4, 10)
    leaf, bark = one_of(draw, LEAVES), one_of(draw, ((84, 66, 50), (104, 92, 78)), 6)
    spread, high = (total - trunk) * draw.uniform(0.32, 0.62), (total - trunk) * 0.92
    is_conifer = draw.random() < 0.2
    leaves = crown(draw.randrange(CROWNS), is_conifer)
    sunward = -1.0 if light.sun[0] < 0 else 1.0  # crowns are lighter on their left
    vague = draw.random() < 0.5

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, trunk + 0.3 * high, 0.12 + 0.03 * total, bark, TREE)
        step = 1 if painter.pixels(spread, depth) > 24 else 3  # fewer and larger leaves on far trees
        places = leaves.places[::step]
        centres = np.empty((len(places), 3))
        centres[:, 0] = x + sunward * spread * places[:, 0]
        centres[:, 1] = trunk + high * places[:, 1]
        centres[:, 2] = depth
        radii = leaves.radii[::step] * (spread if step == 1 else 1.5 * spread)
        if vague:
            rim = leaves.rim[::step]
            painter.discs(centres[rim], radii[rim] + 0.12, leaf, IGNORE, 0.8)
        if is_conifer:
            for low, wide in ((0.0, 1.0), (0.3, 0.8), (0.58, 0.5)):
                foot, tip = trunk + low * high, trunk + min(low + 0.55, 1.05) * high
                skirt = [(x - wide * spread, foot, depth), (x + wide * spread, foot, depth), (x, tip, depth)]
                painter.polygon(skirt, leaf, TREE, depth, 0.55 + 0.3 * low)
        painter.discs(centres, radii, leaf, TREE, 0.5 + 0.185 * leaves.tones[::step])

    top_x, _, top_z = fallen(light, x, depth, (trunk + total) / 2)
    long = 0.8 * spread * (1 + 0.5 * light.sun[1])
    shadow = np.array((top_x, 0.0, top_z)) + CIRCLE * (spread, 0.0, long)
    return Thing(depth, paint, shadow)


def street_furniture(scene: Scene) -> Iterator[Thing]:
    """Lamps, traffic lights, signs, street trees, bins."""
    draw, street, _, crowdedness = scene
    height, tone = draw.uniform(5, 8.5), draw.uniform(60, 150)
    has_lamps = draw.random() < 0.35 + 0.6 * crowdedness
    is_avenue = draw.random() < 0.1 + 0.5 * crowdedness
    for side in (-1, 1):
        kerb, pavement = side * (street.half + 0.45), street.pavements[side > 0]
        if has_lamps:
            for depth in spaced(draw, draw.uniform(4, 18), FAR * 0.8, draw.uniform(16, 30)):
                yield lamp(scene, side, kerb, depth, height, tone)
        for depth in spaced(draw, draw.uniform(5, 25), FAR * 0.6, 42 - 24 * crowdedness):
            if draw.random() < 0.75:
                yield sign(scene, kerb, depth)
        if is_avenue:
            for depth in spaced(draw, draw.uniform(7, 14), FAR * 0.8, draw.uniform(8, 14)):
                yield tree(scene, side * (street.half + min(pavement * 0.45, 1.3)), depth)
        for depth in spaced(draw, draw.uniform(6, 20), 50, 40 - 25 * crowdedness):
            if draw.random() < 0.3 + 0.3 * crowdedness:
                yield bin_or_box(scene, street.edge(side) - side * 0.4, depth)


def lamp(scene: Scene, side: int, lateral: float, depth: float, height: float, tone: float) -> Thing:
    """A lamp post with an arm over the road."""
    _, street, light, _ = scene
    x = street.x(lateral, depth)
    arm = x - side * height * 0.22

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, height, 0.16, (tone, tone, tone), POLE)
        half = max(0.06, 0.5 * painter.zoom / painter.pixels(1.0, depth))
        low, high = height - half, height + half
        bar = [(x, low, depth), (arm, low + 0.3, depth), (arm, high + 0.3, depth), (x, high, depth)]
        painter.polygon(bar, (tone, tone, tone), POLE, depth)
        head: Colour = (400, 420, 300) if light.is_dusk else (190, 190, 186)
        painter.polygon(upright(arm - 0.3, arm + 0.3, height + 0.12, height + 0.34, depth), head, POLE, depth)

    top_x, _, top_z = fallen(light, x, depth, height)
    shadow = [(x - 0.08, 0, depth), (x + 0.08, 0, depth), (top_x + 0.08, 0, top_z), (top_x - 0.08, 0, top_z)]
    return Thing(depth, paint, np.array(shadow))


def sign(scene: Scene, lateral: float, depth: float) -> Thing:
    """A post with a traffic sign, a direction board, a banner or a traffic light."""
    draw, street, light, _ = scene
    x = street.x(lateral, depth)
    post, size, tone = draw.uniform(2.0, 2.8), draw.uniform(0.32, 0.5), draw.uniform(110, 170)
    board = one_of(draw, ((36, 70, 150), (30, 110, 70), (200, 190, 60), (190, 50, 44)), 10)
    head = draw.choice((round_sign, round_sign, warning_sign, direction_board, banner, traffic_light))
    variant = draw.randrange(3)

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, post + size, 0.1, (tone, tone, tone), POLE)
        head(painter, (x, post, depth), size, board, variant)

    return Thing(depth, paint, shadow_under(light, x, depth, 0.1, 0.1))


def round_sign(painter: Painter, top: Point, size: float, board: Colour, variant: int) -> None:
    """A prohibition or an order."""
    x, y, depth = top
    centre = np.array([(x, y + size, depth)])
    inner: Colour = ((36, 70, 160), (236, 236, 230), (236, 236, 230))[variant]
    painter.discs(centre, size, (200, 36, 40), SIGN)
    painter.discs(centre, size * 0.68, inner, SIGN)


def warning_sign(painter: Painter, top: Point, size: float, board: Colour, variant: int) -> None:
    """A triangle."""
    x, y, depth = top
    for scale, colour in ((1.25, (200, 40, 40)), (0.75, (238, 236, 228))):
        low, high = y + size * (1 - 0.7 * scale), y + size * (1 + scale)
        triangle = [(x - size * scale, low, depth), (x + size * scale, low, depth), (x, high, depth)]
        painter.polygon(triangle, colour, SIGN, depth)


def direction_board(painter: Painter, top: Point, size: float, board: Colour, variant: int) -> None:
    """A wide board with two lines of writing."""
    x, y, depth = top
    painter.polygon(upright(x - size * 2.2, x + size * 2.2, y, y + size * 2, depth), board, SIGN, depth)
    for row in (0.5, 1.2):
        line = upright(x - size * 1.8, x + size * (0.4 + row), y + size * row, y + size * (row + 0.25), depth)
        painter.polygon(line, (235, 235, 230), SIGN, depth)


def banner(painter: Painter, top: Point, size: float, board: Colour, variant: int) -> None:
    """A tall board beside its post."""
    x, y, depth = top
    painter.polygon(upright(x - size * 0.3, x + size * 1.7, y - 1.2, y + size * 2, depth), board, SIGN, depth)
    painter.polygon(upright(x, x + size * 1.3, y - 0.5, y, depth), (236, 232, 220), SIGN, depth)


def traffic_light(painter: Painter, top: Point, size: float, board: Colour, variant: int) -> None:
    """A box with three lamps, one of them lit."""
    x, y, depth = top
    painter.polygon(upright(x - 0.2, x + 0.2, y, y + 1.05, depth), (30, 32, 32), SIGN, depth)
    for row, lit in enumerate(((90, 300, 150), (320, 240, 80), (320, 80, 66))):
        lamp_colour: Colour = lit if row == variant else (60, 58, 56)
        painter.discs(np.array([(x, y + 0.18 + 0.34 * row, depth)]), 0.12, lamp_colour, SIGN)


def bin_or_box(scene: Scene, lateral: float, depth: float) -> Thing:
    """A litter bin, a letter box or a cabinet: nothing that the classes name, so its pixels are ignored."""
    draw, street, _, _ = scene
    x = street.x(lateral, depth)
    height, width = draw.uniform(0.8, 1.4), draw.uniform(0.4, 0.9)
    colour = one_of(draw, ((40, 60, 48), (150, 36, 36), (90, 92, 92), (44, 44, 48)))

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, height, width, colour, IGNORE)
        painter.post(x, depth, height - 0.12, height, width * 1.1, shifted(colour, 26), IGNORE)

    return Thing(depth, paint)


# On the move --------------------------------------------------------------------------------------------------------


def traffic(scene: Scene) -> Iterator[Thing]:
    """Cars parked at the kerb, driving and crossing; vans, lorries and buses among them."""
    draw, street, _, crowdedness = scene
    drives_left = street.offset > 0
    for side in (-1, 1):
        is_ours = (side < 0) == drives_left
        if draw.random() < 0.2 + 0.7 * crowdedness:
            for depth in spaced(draw, draw.uniform(6, 16), FAR * 0.7, 6.6):
                if draw.random() < 0.15 + 0.75 * crowdedness:
                    kind = draw.choices(range(4), (45, 25, 20, 10))[0]
                    yield vehicle_on_road(scene, kind, side * (street.half - 1.0), depth, 0.0 if is_ours else pi)
        lane = side * (street.half - 2.4 if street.half > 5 else street.half * 0.45)
        for depth in spaced(draw, draw.uniform(12, 33), FAR, 70 - 56 * crowdedness):
            if draw.random() < 0.25 + 0.6 * crowdedness:
                kind = draw.choices(range(6), (35, 23, 17, 10, 7, 8))[0]
                yield vehicle_on_road(scene, kind, lane, depth, 0.0 if is_ours else pi)
    if draw.random() < 0.08 + 0.1 * crowdedness:
        heading = draw.choice((-pi / 2, pi / 2))
        yield vehicle_on_road(scene, draw.randrange(4), draw.uniform(-3, 3), draw.uniform(11, 40), heading)


def vehicle_on_road(scene: Scene, kind: int, lateral: float, depth: float, heading: float) -> Thing:
    """A vehicle that drives away from the camera (heading 0), towards it (pi) or across."""
    draw, street, light, _ = scene
    x = street.x(lateral, depth)
    paint_colour = one_of(draw, PAINT, 14)
    colours: dict[str, Colour] = {
        "body": paint_colour,
        "trim": shifted(paint_colour, -26),
        "glass": draw.choice(((34, 40, 50), (34, 40, 50), (96, 112, 128))),
        "tyre": (24, 24, 26),
        "hub": (134, 134, 138),
        "plate": (226, 216, 150),
        "rear_lamp": (420, 90, 80) if light.is_dusk else (176, 30, 30),
        "front_lamp": (500, 520, 460) if light.is_dusk else (226, 226, 220),
    }
    figure, scale = vehicles()[kind], draw.uniform(0.95, 1.06)
    yaw = street.yaw(depth) + heading + draw.gauss(0, 0.02)
    half_width, half_length = figure.half_width, figure.half_length
    if abs(sin(yaw)) > 0.7:
        half_width, half_length = half_length, half_width
    beneath = shadow_under(light._replace(sun=(0.0, 0.0)), x, depth, half_width * 0.95, half_length * 0.97)

    def paint(painter: Painter) -> None:
        painter.polygon(beneath.tolist(), (26, 26, 28), ROAD, depth)
        painter.figure(figure, colours, CAR, (x, depth), yaw, (scale, scale))

    return Thing(depth + 0.2, paint, shadow_under(light, x, depth, half_width + 0.1, half_length + 0.2))


def people(scene: Scene) -> Iterator[Thing]:
    """People on the pavements, a few on the road, and some on bicycles."""
    draw, street, _, crowdedness = scene
    for side in (-1, 1):
        pavement = street.pavements[side > 0]
        for _ in range(how_many(draw, 0.35 + 9 * crowdedness**2)):
            depth = log_uniform(draw, 5.5, 60)
            lateral = side * (street.half + draw.uniform(0.4, pavement - 0.2))
            for member in range(1 + how_many(draw, 0.3)):
                yield pedestrian(scene, lateral + 0.6 * member * side, depth + 0.2 * member)
    for _ in range(how_many(draw, 0.1 + 0.8 * crowdedness)):
        yield pedestrian(scene, draw.uniform(-street.half, street.half), log_uniform(draw, 7, 40))
    for _ in range(how_many(draw, 0.12 + 0.9 * crowdedness)):
        lateral = draw.choice((-1, 1)) * street.half * draw.uniform(0.55, 0.75)
        turn = draw.uniform(0.6, 2.4) if draw.random() < 0.25 else 0.0
        yield bicyclist(scene, lateral, log_uniform(draw, 6, 40), turn)


def pedestrian(scene: Scene, lateral: float, depth: float) -> Thing:
    """Somebody who stands or walks."""
    draw, street, light, _ = scene
    x = street.x(lateral, depth)
    coat = one_of(draw, CLOTHES, 14)
    colours: dict[str, Colour] = {
        "coat": coat,
        "sleeve": shifted(coat, -14),
        "trousers": one_of(draw, CLOTHES[:5], 10),
        "shoes": (30, 28, 28),
        "skin": one_of(draw, SKIN, 6),
        "hair": one_of(draw, HAIR, 6),
        "bag": one_of(draw, CLOTHES, 10),
    }
    tall = draw.uniform(0.62, 0.75) if draw.random() < 0.12 else draw.uniform(0.92, 1.08)
    broad = tall * draw.uniform(0.95, 1.25) * draw.choice((-1, 1))
    figure = walker(draw.randrange(POSES))

    def paint(painter: Painter) -> None:
        painter.figure(figure, colours, PEDESTRIAN, (x, depth), scale=(broad, tall))

    return Thing(depth, paint, shadow_under(light, x, depth, 0.25, 0.2))


def bicyclist(scene: Scene, lateral: float, depth: float, turn: float) -> Thing:
    """Somebody on a bicycle, who rides along the road or turns out of it."""
    draw, street, light, _ = scene
    x = street.x(lateral, depth)
    coat = one_of(draw, (*CLOTHES, (220, 220, 60), (240, 130, 50)), 10)
    colours: dict[str, Colour] = {
        "coat": coat,
        "sleeve": shifted(coat, -16),
        "trousers": one_of(draw, CLOTHES[:5], 8),
        "shoes": (34, 32, 32),
        "skin": one_of(draw, SKIN, 6),
        "helmet": one_of(draw, ((220, 220, 216), (40, 40, 44), (190, 40, 40), (40, 90, 160)), 8),
        "frame": one_of(draw, PAINT, 10),
        "tyre": (26, 26, 28),
        "spokes": (112, 112, 112),
    }
    yaw = street.yaw(depth) + turn + draw.choice((0.0, pi))
    figure, tall = cyclist(draw.randrange(POSES)), draw.uniform(0.96, 1.06)

    def paint(painter: Painter) -> None:
        painter.figure(figure, colours, BICYCLIST, (x, depth), yaw, (tall, tall))

    return Thing(depth, paint, shadow_under(light, x, depth, 0.3, 0.7))
