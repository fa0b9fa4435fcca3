"""The shapes of trees, vehicles, people and bicycles, before they get a place, a turn, colours and a class.

A figure stands on the ground around (0, 0, 0), in metres: x to its right, y up, z ahead of it. Its parts have roles
("coat", "glass") that get their colours when it is painted.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from math import cos, hypot, pi, sin, sqrt
from typing import NamedTuple

import numpy as np

Point = Sequence[float]  # x, y, z
Part = tuple[str, Sequence[Point]]  # a role and a convex polygon
Span = tuple[str, int, int, float]  # a role, the first of its points, the one behind its last, its larger extent


class Figure:
    """Faces, each a plane polygon with details painted over it; a solid figure hides the faces turned away."""

    def __init__(self, faces: Sequence[Sequence[Part]], *, solid: bool) -> None:
        polygons = [np.asarray(points, float) for parts in faces for _, points in parts]
        self.points = np.concatenate(polygons)
        ends = np.cumsum([len(polygon) for polygon in polygons]).tolist()
        extents = [float(np.ptp(polygon, axis=0).max()) for polygon in polygons]
        spans = iter(zip([0, *ends[:-1]], ends, extents, strict=True))
        self.faces: list[list[Span]] = [[(role, *next(spans)) for role, _ in parts] for parts in faces]
        self.roles = frozenset(role for parts in faces for role, _ in parts)
        self.half_length = float(np.abs(self.points[:, 2]).max())
        self.half_width = float(np.abs(self.points[:, 0]).max())
        self.solid = solid
        if solid:
            planes = [np.asarray(parts[0][1], float) for parts in faces]
            self.centres = np.stack([plane.mean(0) for plane in planes])
            normals = np.stack([np.cross(plane[1] - plane[0], plane[2] - plane[0]) for plane in planes])
            inward = ((self.centres - self.points.mean(0)) * normals).sum(1) < 0
            normals[inward] *= -1
            self.normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)

    def faces_seen(self, turn: np.ndarray, camera: np.ndarray) -> list[tuple[list[Span], float]]:
        """The faces, far to near, that a camera at this place (3,) sees, with their brightness.

        `turn` (3, 3) turns the figure's points from the right; the camera's place is relative to the figure's.
        """
        if not self.solid:
            return [(spans, 1.0) for spans in self.faces]
        normals, towards = self.normals @ turn, camera - self.centres @ turn
        far_to_near = np.argsort(-(towards * towards).sum(1), kind="stable").tolist()
        seen = ((normals * towards).sum(1) > 0).tolist()
        brightness = (0.86 + 0.16 * normals[:, 1] - 0.1 * np.abs(normals[:, 0])).tolist()
        return [(self.faces[i], brightness[i]) for i in far_to_near if seen[i]]


def across(z: float, low: float, high: float, left: float, right: float, z_high: float | None = None) -> list[Point]:
    """A quadrilateral across the figure's width; its upper edge may lie further ahead than the lower one."""
    top = z if z_high is None else z_high
    return [(left, low, z), (right, low, z), (right, high, top), (left, high, top)]


def wheel(x: float, y: float, z: float, radius: float, corners: int = 10) -> list[Point]:
    """A disc that rolls along z."""
    angles = [2 * pi * corner / corners for corner in range(corners)]
    return [(x, y + radius * sin(angle), z + radius * cos(angle)) for angle in angles]


def ball(x: float, y: float, z: float, radius: float, corners: int = 8) -> list[Point]:
    """A disc turned to the viewer."""
    return [(x + u, v, z) for _, v, u in wheel(0, y, 0, radius, corners)]


def limb(start: tuple[float, float], end: tuple[float, float], width: float, z: float = 0.0) -> list[Point]:
    """A bar between two points (x, y), turned to the viewer."""
    (x0, y0), (x1, y1) = start, end
    length = max(hypot(x1 - x0, y1 - y0), 1e-6)
    dx, dy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return [(x0 + dx, y0 + dy, z), (x1 + dx, y1 + dy, z), (x1 - dx, y1 - dy, z), (x0 - dx, y0 - dy, z)]


def rod(start: tuple[float, float], end: tuple[float, float], width: float, x: float = 0.0) -> list[Point]:
    """A bar between two points (z, y), in the plane in which a bicycle rolls."""
    return [(x, y, z) for z, y, _ in limb(start, end, width)]


class Crown(NamedTuple):
    """The leaves of a tree as discs, in units of its spread: places (N, 2), radii, tones 0 (dark) to 4, dark first."""

    places: np.ndarray  # x in [-1, 1], y in [0, 1] of the crown's height
    radii: np.ndarray
    tones: np.ndarray
    rim: np.ndarray  # which discs lie outside, where hand-made labels are vague


CROWNS = 16


@lru_cache(maxsize=2 * CROWNS)
def crown(kind: int, conifer: bool) -> Crown:
    """One of CROWNS crowns, the same in every scene."""
    draw = random.Random(kind)
    discs = []
    for _ in range(36):
        angle, out = draw.uniform(0, 2 * pi), 0.92 * sqrt(draw.random())
        x, y = out * cos(angle), out * sin(angle) * 0.5 + 0.5
        radius = draw.uniform(0.24, 0.42) * (1.1 - 0.5 * out)
        if conifer:
            x, radius = x * (1.02 - y), radius * (0.8 - 0.5 * y)
        tone = min(4, max(0, round(0.9 + 2.1 * y - 0.7 * x + draw.gauss(0, 0.7) + 0.6 * (out - 0.5))))
        discs.append((tone, x, y, radius, out > 0.8))
    discs.sort(key=lambda disc: disc[0])
    columns = [np.array(column) for column in zip(*discs, strict=True)]
    return Crown(np.stack(columns[1:3], -1), columns[3], columns[0], columns[4])


def vehicle(
    length: float,
    half: float,  # half its width
    shoulder: float,  # height at which the windows begin
    roof: float,
    cabin: tuple[float, float, float, float],  # z of rear window below and above, of windscreen above and below
    panes: int,
    wheel_radius: float = 0.32,
) -> Figure:
    """A body, a cabin with windows, wheels and lights; `cabin` is measured from the rear bumper."""
    rear, roof_rear, roof_front, front = cabin
    floor = 0.62 * wheel_radius
    narrow = half * (0.86 if roof < 2 else 0.97)  # cars are narrower at the roof, vans and buses are not
    glass_low, glass_high = shoulder + 0.06, roof - 0.09

    def slanted(height: float, below: float, above: float) -> float:
        return below + (above - below) * (height - shoulder) / (roof - shoulder)

    def end(z: float, lamp: str, z_low: float, z_high: float) -> list[list[Part]]:
        low, high = slanted(glass_low, z_low, z_high), slanted(glass_high, z_low, z_high)
        wide, top = half - 0.1, narrow - 0.1
        pillars = [(-half, shoulder, z_low), (half, shoulder, z_low), (narrow, roof, z_high), (-narrow, roof, z_high)]
        screen = [(-wide, glass_low, low), (wide, glass_low, low), (top, glass_high, high), (-top, glass_high, high)]
        body: list[Part] = [
            ("body", across(z, floor, shoulder, -half, half)),
            ("tyre", across(z, 0.0, floor, -half, -half + 0.22)),
            ("tyre", across(z, 0.0, floor, half - 0.22, half)),
            ("trim", across(z, floor, floor + 0.18, -half, half)),
            (lamp, across(z, shoulder - 0.24, shoulder - 0.08, -half + 0.05, -half + 0.32)),
            (lamp, across(z, shoulder - 0.24, shoulder - 0.08, half - 0.32, half - 0.05)),
            ("plate", across(z, floor + 0.2, floor + 0.32, -0.26, 0.26)),
        ]
        return [body, [("body", pillars), ("glass", screen)]]

    def flank(x: float, top: float) -> list[list[Part]]:
        wheels = (0.19 * length, 0.8 * length)
        body: list[Part] = [("body", [(x, floor, 0), (x, floor, length), (x, shoulder, length), (x, shoulder, 0)])]
        body += [("trim", [(x, floor, 0), (x, floor, length), (x, floor + 0.1, length), (x, floor + 0.1, 0)])]
        body += [("tyre", wheel(x, wheel_radius, z, wheel_radius)) for z in wheels]
        body += [("hub", wheel(x, wheel_radius, z, wheel_radius * 0.55, 6)) for z in wheels]
        pillars = [(x, shoulder, rear), (x, shoulder, front), (top, roof, roof_front), (top, roof, roof_rear)]
        windows: list[Part] = [("body", pillars)]
        low, high = (
            np.linspace(slanted(y, rear, roof_rear) + 0.1, slanted(y, front, roof_front) - 0.02, panes + 1).tolist()
            for y in (glass_low, glass_high)
        )
        for pane in range(panes):
            a, b, c, d = low[pane], low[pane + 1] - 0.08, high[pane + 1] - 0.08, high[pane]
            glass = [(x, glass_low, a), (x, glass_low, b), (top, glass_high, c), (top, glass_high, d)]
            windows.append(("glass", glass))
        return [body, windows]

    faces = end(0.0, "rear_lamp", rear, roof_rear) + end(length, "front_lamp", front, roof_front)
    faces += flank(-half, -narrow) + flank(half, narrow)
    faces.append([("body", across(roof_rear, roof, roof, -narrow, narrow, roof_front))])
    if rear > 0.2:
        faces.append([("body", across(0.0, shoulder, shoulder, -half, half, rear))])
    if front < length - 0.2:
        faces.append([("body", across(front, shoulder, shoulder, -half, half, length))])
    centred = [[(role, [(x, y, z - length / 2) for x, y, z in points]) for role, points in parts] for parts in faces]
    return Figure(centred, solid=True)


@lru_cache(maxsize=1)
def vehicles() -> tuple[Figure, ...]:
    """Hatchback, saloon, estate, van, lorry and bus."""
    return (
        vehicle(3.9, 0.84, 0.92, 1.46, (0.08, 0.55, 1.9, 2.8), 2),
        vehicle(4.5, 0.88, 0.9, 1.42, (0.75, 1.4, 2.5, 3.3), 2),
        vehicle(4.6, 0.9, 0.95, 1.55, (0.05, 0.35, 2.6, 3.4), 3),
        vehicle(5.0, 0.97, 1.15, 2.2, (0.0, 0.05, 3.6, 4.3), 2, 0.36),
        vehicle(7.5, 1.15, 2.2, 3.1, (5.3, 5.4, 7.0, 7.4), 1, 0.48),
        vehicle(10.5, 1.25, 1.25, 3.0, (0.0, 0.05, 10.4, 10.5), 7, 0.48),
    )


POSES = 8


@lru_cache(maxsize=POSES)
def walker(pose: int) -> Figure:
    """A person 1.75 m tall in one of POSES phases of a step; in the first they stand still."""
    swing = 0.3 * sin(2 * pi * pose / POSES) if pose % 4 else 0.06
    hip, shoulder = 0.9, 1.44
    parts: list[Part] = [
        ("sleeve", limb((-0.17, shoulder - 0.04), (-0.22 - 0.55 * swing, 0.92), 0.11)),
        ("trousers", limb((-0.08, hip), (-0.08 - swing, 0.06), 0.16)),
        ("trousers", limb((0.08, hip), (0.08 + swing, 0.06), 0.16)),
        ("shoes", limb((-0.14 - swing, 0.04), (0.0 - swing, 0.04), 0.09)),
        ("shoes", limb((0.04 + swing, 0.04), (0.18 + swing, 0.04), 0.09)),
        ("coat", [(-0.19, hip - 0.1, 0), (0.19, hip - 0.1, 0), (0.22, shoulder, 0), (-0.22, shoulder, 0)]),
        ("sleeve", limb((0.18, shoulder - 0.04), (0.22 + 0.55 * swing, 0.92), 0.11)),
        ("skin", limb((0, shoulder - 0.03), (0, shoulder + 0.1), 0.11)),
        ("hair", ball(0, 1.635, 0, 0.125)),
        ("skin", ball(0.02, 1.605, 0, 0.095)),
    ]
    if pose % 3 == 1:
        parts.append(("bag", limb((0.26, 0.98), (0.26, 0.68), 0.2)))
    return Figure([parts], solid=False)


@lru_cache(maxsize=POSES)
def cyclist(pose: int) -> Figure:
    """A person on a bicycle that rolls along z, in one of POSES turns of the pedals.

    Everything is drawn twice, in the plane of the wheels and across it: flat shapes vanish when seen edge on.
    """
    turned_z, turned_y = 0.17 * cos(2 * pi * pose / POSES), 0.17 * sin(2 * pi * pose / POSES)
    saddle, bars, crank = (-0.2, 0.92), (0.42, 1.0), (-0.02, 0.34)  # z, y
    parts: list[Part] = []
    for z in (-0.52, 0.52):
        parts += [("tyre", wheel(0, 0.34, z, 0.34, 12)), ("spokes", wheel(0, 0.34, z, 0.26, 10))]
        parts += [("tyre", across(z, 0.0, 0.62, -0.035, 0.035))]
    for start, end in ((saddle, crank), (crank, bars), (saddle, bars), (bars, (0.52, 0.34)), (saddle, (-0.52, 0.34))):
        parts.append(("frame", rod(start, end, 0.06)))
    for sign in (-1, 1):
        x = sign * 0.1
        foot = (crank[0] + sign * turned_z, crank[1] + sign * turned_y)
        knee = ((saddle[0] + foot[0]) / 2 + 0.18, (saddle[1] + foot[1]) / 2 + 0.1)
        parts += [
            ("trousers", rod((saddle[0], 0.98), knee, 0.17, x)),
            ("trousers", rod(knee, foot, 0.13, x)),
            ("trousers", limb((x, 0.98), (1.5 * x, knee[1]), 0.16)),
            ("trousers", limb((1.5 * x, knee[1]), (x, foot[1]), 0.12)),
            ("shoes", limb((x - 0.05, foot[1]), (x + 0.05, foot[1]), 0.08, foot[0])),
            ("sleeve", rod((0.1, 1.42), bars, 0.1, sign * 0.2)),
            ("sleeve", limb((sign * 0.19, 1.4), (sign * 0.27, 1.05), 0.1, 0.2)),
        ]
    parts += [
        ("frame", across(0.42, 0.98, 1.03, -0.28, 0.28)),
        ("coat", rod((-0.2, 0.95), (0.12, 1.46), 0.3)),
        ("coat", [(-0.17, 0.92, -0.1), (0.17, 0.92, -0.1), (0.22, 1.45, 0.1), (-0.22, 1.45, 0.1)]),
        ("skin", ball(0, 1.6, 0.18, 0.1)),
        ("skin", wheel(0, 1.6, 0.18, 0.1, 8)),
        ("helmet", ball(0, 1.67, 0.16, 0.12)),
        ("helmet", wheel(0, 1.67, 0.16, 0.12, 8)),
    ]
    return Figure([parts], solid=False)
