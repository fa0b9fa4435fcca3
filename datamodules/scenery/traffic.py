"""What moves on the street: cars, vans, lorries and buses, people on foot and on bicycles."""

from collections.abc import Iterator
from math import pi, sin

from datamodules.scenery.figures import POSES, cyclist, vehicles, walker
from datamodules.scenery.painter import BICYCLIST, CAR, PEDESTRIAN, ROAD, Colour, Painter
from datamodules.scenery.street import (
    FAR,
    Scene,
    Thing,
    how_many,
    log_uniform,
    one_of,
    shadow_under,
    shifted,
    spaced,
)

PAINT: tuple[Colour, ...] = (
    (36, 38, 44), (168, 172, 178), (214, 214, 212), (150, 28, 32), (34, 60, 118), (92, 96, 102), (60, 92, 74),
    (196, 160, 60), (120, 58, 40),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (40, 44, 60), (120, 34, 38), (60, 76, 110), (190, 184, 172), (80, 70, 58), (200, 150, 60), (46, 92, 78),
    (30, 30, 32), (150, 80, 120),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((222, 178, 150), (186, 132, 100), (120, 82, 60), (236, 200, 176))
HAIR: tuple[Colour, ...] = ((40, 30, 24), (120, 90, 50), (150, 146, 140), (24, 22, 22))


def is_free(scene: Scene, lateral: float, depth: float, half_width: float, half_length: float) -> bool:
    """Whether no vehicle stands there."""
    return not any(
        abs(lateral - other) < half_width + width and abs(depth - there) < half_length + length
        for other, there, width, length in scene.taken
    )


def traffic(scene: Scene) -> Iterator[Thing]:
    """Cars parked at the kerb, driving and crossing; vans, lorries and buses among them."""
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
    wanted: list[tuple[int, float, float, float]] = []  # kind, lateral, depth, heading
    if draw.random() < 0.08 + 0.1 * crowdedness:
        heading = draw.choice((-pi / 2, pi / 2))
        wanted.append((draw.randrange(4), draw.uniform(-3, 3), draw.uniform(11, 40), heading))
    for side in (-1, 1):
        heading = 0.0 if side * street.offset < 0 else pi  # the camera's side of the road drives away from it
        lane = side * (street.half - 2.4 if street.half > 5 else street.half * 0.45)
        for depth in spaced(draw, draw.uniform(12, 33), FAR, 70 - 56 * crowdedness):
            if draw.random() < 0.25 + 0.6 * crowdedness:
                wanted.append((draw.choices(range(6), (35, 23, 17, 10, 7, 8))[0], lane, depth, heading))
        if draw.random() < 0.2 + 0.7 * crowdedness:
            for depth in spaced(draw, draw.uniform(6, 16), FAR * 0.7, 6.6):
                if draw.random() < 0.15 + 0.75 * crowdedness:
                    kind = draw.choices(range(4), (45, 25, 20, 10))[0]
                    wanted.append((kind, side * (street.half - 1.0), depth, heading))
    for kind, lateral, depth, heading in wanted:
        half_width, half_length = vehicles()[kind].half_width, vehicles()[kind].half_length
        if abs(sin(heading)) > 0.7:
            half_width, half_length = half_length, half_width
        if is_free(scene, lateral, depth, half_width, half_length + 0.3):
            scene.taken.append((lateral, depth, half_width, half_length))
            yield vehicle_on_road(scene, kind, lateral, depth, heading)


def vehicle_on_road(scene: Scene, kind: int, lateral: float, depth: float, heading: float) -> Thing:
    """A vehicle that drives away from the camera (heading 0), towards it (pi) or across."""
    draw, street, light = scene[:3]
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
    _, _, half_width, half_length = scene.taken[-1]
    beneath = shadow_under(light._replace(sun=(0.0, 0.0)), x, depth, half_width * 0.95, half_length * 0.97)

    def paint(painter: Painter) -> None:
        painter.polygon(beneath.tolist(), (26, 26, 28), ROAD, depth)
        painter.figure(figure, colours, CAR, (x, depth), yaw, (scale, scale))

    return Thing(depth + 0.2, paint, shadow_under(light, x, depth, half_width + 0.1, half_length + 0.2))


def people(scene: Scene) -> Iterator[Thing]:
    """People on the pavements, a few on the road, and some on bicycles."""
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
    for side in (-1, 1):
        pavement = street.pavements[side > 0]
        for _ in range(how_many(draw, 0.35 + 9 * crowdedness**2)):
            depth = log_uniform(draw, 5.5, 60)
            lateral = side * (street.half + draw.uniform(0.4, pavement - 0.2))
            for member in range(1 + how_many(draw, 0.3)):
                yield pedestrian(scene, lateral + 0.6 * member * side, depth + 0.2 * member)
    for _ in range(how_many(draw, 0.1 + 0.8 * crowdedness)):
        lateral, depth = draw.uniform(-street.half, street.half), log_uniform(draw, 7, 40)
        if is_free(scene, lateral, depth, 0.4, 0.5):
            yield pedestrian(scene, lateral, depth)
    for _ in range(how_many(draw, 0.15 + 1.2 * crowdedness)):
        lateral = draw.choice((-1, 1)) * street.half * draw.uniform(0.5, 0.9)
        turn = draw.uniform(0.6, 2.4) if draw.random() < 0.25 else 0.0
        depth = log_uniform(draw, 5.5, 30)
        if is_free(scene, lateral, depth, 0.4, 1.1):
            yield bicyclist(scene, lateral, depth, turn)


def pedestrian(scene: Scene, lateral: float, depth: float) -> Thing:
    """Somebody who stands or walks."""
    draw, street, light = scene[:3]
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
    draw, street, light = scene[:3]
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
