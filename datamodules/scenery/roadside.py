"""What stands beside the road: buildings, fences, hedges, trees, lamps, signs, bins."""

from collections.abc import Iterator

import numpy as np

from dance_seg.sample import IGNORE
from datamodules.scenery.figures import CROWNS, Point, crown
from datamodules.scenery.painter import BUILDING, FENCE, NEAREST, POLE, SIGN, TREE, Colour, Painter
from datamodules.scenery.street import (
    CIRCLE,
    FAR,
    Scene,
    Thing,
    fallen,
    how_many,
    one_of,
    rectangles_on_wall,
    shadow_under,
    shifted,
    spaced,
    upright,
)

WALLS: tuple[Colour, ...] = (
    (158, 96, 76), (134, 82, 68), (186, 164, 134), (204, 194, 176), (150, 146, 142), (120, 116, 116), (196, 172, 120),
    (170, 178, 186), (214, 208, 200), (104, 88, 80),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((96, 60, 50), (72, 72, 80), (120, 78, 60), (88, 84, 82))
LEAVES: tuple[Colour, ...] = ((70, 102, 44), (92, 118, 52), (56, 84, 44), (78, 108, 60), (128, 118, 54), (150, 106, 50))


def lots(scene: Scene) -> Iterator[Thing]:
    """What borders the pavements, lot after lot: houses, or gardens with fences, hedges and trees."""
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
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
    draw, street, light, crowdedness = scene[:4]
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
                painter.post(
                    x_ridge + lean * length * chimney, z, top - 0.5, top + 1.1, 0.8, shifted(wall, -14), BUILDING
                )
            painter.polygon(
                [(x_near, height, near), (x_back, height, near), (x_ridge, top, near)], wall, BUILDING, near, 0.93
            )
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
    draw, street = scene[:2]
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
    draw, street = scene[:2]
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
    draw, street, light = scene[:3]
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
    draw, street, crowdedness = scene.draw, scene.street, scene.crowdedness
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
    _, street, light = scene[:3]
    x = street.x(lateral, depth)
    arm = x - side * height * 0.22

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, height, 0.2, (tone, tone, tone), POLE)
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
    draw, street, light = scene[:3]
    x = street.x(lateral, depth)
    post, size, tone = draw.uniform(2.0, 2.8), draw.uniform(0.4, 0.62), draw.uniform(110, 170)
    board = one_of(draw, ((36, 70, 150), (30, 110, 70), (200, 190, 60), (190, 50, 44)), 10)
    head = draw.choice((round_sign, round_sign, warning_sign, direction_board, banner, traffic_light))
    variant = draw.randrange(3)

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, post + size, 0.13, (tone, tone, tone), POLE)
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
    draw, street = scene[:2]
    x = street.x(lateral, depth)
    height, width = draw.uniform(0.8, 1.4), draw.uniform(0.4, 0.9)
    colour = one_of(draw, ((40, 60, 48), (150, 36, 36), (90, 92, 92), (44, 44, 48)))

    def paint(painter: Painter) -> None:
        painter.post(x, depth, 0.0, height, width, colour, IGNORE)
        painter.post(x, depth, height - 0.12, height, width * 1.1, shifted(colour, 26), IGNORE)

    return Thing(depth, paint)
