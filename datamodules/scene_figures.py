"""The shapes of vehicles, people and bicycles, in metres, before they get a place, a turn, colours and a class.

A figure stands on the ground around (0, 0, 0): x to its right, y up, z ahead of it. Its parts have roles ("coat",
"glass") that get their colours when it is painted.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Point = tuple[float, float, float]
Part = tuple[str, Sequence[Point]]  # a role and a convex polygon


class FaceSeen(NamedTuple):
    """Parts to paint in this order: (role, first point, behind the last point)."""

    parts: tuple[tuple[str, int, int], ...]
    brightness: float


class Figure:
    """Faces, each a plane polygon with details painted over it; a solid figure hides the faces turned away."""

    def __init__(self, faces: Sequence[Sequence[Part]], *, solid: bool, shining: frozenset[str] = frozenset()) -> None:
        self.solid, self.shining = solid, shining
        polygons = [np.asarray(points, np.float64) for parts in faces for _, points in parts]
        self.points = np.concatenate(polygons)
        ends = np.cumsum([len(polygon) for polygon in polygons]).tolist()
        spans = iter(zip([0, *ends], ends, strict=False))
        self.parts = tuple(tuple((role, *next(spans)) for role, _ in parts) for parts in faces)
        planes = [np.asarray(parts[0][1], np.float64) for parts in faces]
        self.centres = np.stack([plane.mean(0) for plane in planes])
        self.normals = np.stack([np.cross(plane[1] - plane[0], plane[2] - plane[0]) for plane in planes])
        self.normals /= np.linalg.norm(self.normals, axis=1, keepdims=True)
        inward = ((self.centres - self.points.mean(0)) * self.normals).sum(1) < 0
        self.normals[inward] *= -1

    def faces_seen(self, turn: np.ndarray, camera: np.ndarray) -> list[FaceSeen]:
        """The faces that a camera at this place, relative to the figure's, sees once it is turned; far to near."""
        if not self.solid:
            return [FaceSeen(parts, 1.0) for parts in self.parts]
        normals, towards = self.normals @ turn, camera - self.centres @ turn
        seen = (normals * towards).sum(1) > 0
        far_to_near = np.argsort(-(towards**2).sum(1), kind="stable")
        brightness = 0.86 + 0.16 * normals[:, 1] - 0.1 * np.abs(normals[:, 0])
        return [FaceSeen(self.parts[i], float(brightness[i])) for i in far_to_near if seen[i]]


def across(z: float, low: float, high: float, left: float, right: float, z_high: float | None = None) -> list[Point]:
    """A quadrilateral across the figure's width; its upper edge may lie further ahead than the lower one."""
    top = z if z_high is None else z_high
    return [(left, low, z), (right, low, z), (right, high, top), (left, high, top)]


def wheel(x: float, y: float, z: float, radius: float, corners: int = 10) -> list[Point]:
    """A disc that rolls along z."""
    angles = np.arange(corners) * (2 * np.pi / corners)
    return [(x, y + radius * float(np.sin(a)), z + radius * float(np.cos(a))) for a in angles]


def ball(x: float, y: float, z: float, radius: float, corners: int = 8) -> list[Point]:
    """A disc turned to the viewer."""
    angles = np.arange(corners) * (2 * np.pi / corners)
    return [(x + radius * float(np.cos(a)), y + radius * float(np.sin(a)), z) for a in angles]


def limb(start: tuple[float, float], end: tuple[float, float], width: float, z: float = 0.0) -> list[Point]:
    """A bar between two points (x, y), turned to the viewer."""
    (x0, y0), (x1, y1) = start, end
    length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-6)
    dx, dy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return [(x0 + dx, y0 + dy, z), (x1 + dx, y1 + dy, z), (x1 - dx, y1 - dy, z), (x0 - dx, y0 - dy, z)]


def rod(start: tuple[float, float], end: tuple[float, float], width: float, x: float = 0.0) -> list[Point]:
    """A bar between two points (z, y), in the plane in which a bicycle rolls."""
    return [(x, y, u) for u, y, _ in limb(start, end, width)]


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
    floor, inner = 0.62 * wheel_radius, half * 0.86
    tumble = inner if roof < 2 else half * 0.97  # cars are narrower at the roof, vans and buses are not
    glass_low, glass_high = shoulder + 0.06, roof - 0.09

    def on_cabin(height: float, below: float, above: float) -> float:
        return below + (above - below) * (height - shoulder) / (roof - shoulder)

    def end_face(z: float, lamp: str, z_low: float, z_high: float) -> list[list[Part]]:
        body: list[Part] = [
            ("body", across(z, floor, shoulder, -half, half)),
            ("tyre", across(z, 0.0, floor, -half, -half + 0.22)),
            ("tyre", across(z, 0.0, floor, half - 0.22, half)),
            ("trim", across(z, floor, floor + 0.18, -half, half)),
            (lamp, across(z, shoulder - 0.24, shoulder - 0.08, -half + 0.05, -half + 0.32)),
            (lamp, across(z, shoulder - 0.24, shoulder - 0.08, half - 0.32, half - 0.05)),
            ("plate", across(z, floor + 0.2, floor + 0.32, -0.26, 0.26)),
        ]
        low, high = on_cabin(glass_low, z_low, z_high), on_cabin(glass_high, z_low, z_high)
        screen: list[Part] = [
            (
                "body",
                [(-half, shoulder, z_low), (half, shoulder, z_low), (tumble, roof, z_high), (-tumble, roof, z_high)],
            ),
            (
                "glass",
                [
                    (-half + 0.1, glass_low, low),
                    (half - 0.1, glass_low, low),
                    (tumble - 0.1, glass_high, high),
                    (-tumble + 0.1, glass_high, high),
                ],
            ),
        ]
        return [body, screen]

    def side(sign: float) -> list[list[Part]]:
        x, top = sign * half, sign * tumble
        wheels = (0.19 * length, 0.8 * length)
        body: list[Part] = [("body", [(x, floor, 0), (x, floor, length), (x, shoulder, length), (x, shoulder, 0)])]
        body += [("trim", [(x, floor, 0), (x, floor, length), (x, floor + 0.1, length), (x, floor + 0.1, 0)])]
        body += [("tyre", wheel(x, wheel_radius, z, wheel_radius)) for z in wheels]
        body += [("hub", wheel(x, wheel_radius, z, wheel_radius * 0.55, 8)) for z in wheels]
        windows: list[Part] = [
            ("body", [(x, shoulder, rear), (x, shoulder, front), (top, roof, roof_front), (top, roof, roof_rear)])
        ]
        low = np.linspace(
            on_cabin(glass_low, rear, roof_rear) + 0.1, on_cabin(glass_low, front, roof_front) - 0.1, panes + 1
        )
        high = np.linspace(
            on_cabin(glass_high, rear, roof_rear) + 0.1, on_cabin(glass_high, front, roof_front) - 0.1, panes + 1
        )
        for pane in range(panes):
            a, b, c, d = low[pane], low[pane + 1] - 0.08, high[pane + 1] - 0.08, high[pane]
            windows.append(
                ("glass", [(x, glass_low, a), (x, glass_low, b), (top, glass_high, c), (top, glass_high, d)])
            )
        return [body, windows]

    faces = end_face(0.0, "rear_lamp", rear, roof_rear) + end_face(length, "front_lamp", front, roof_front)
    faces += side(-1.0) + side(1.0)
    faces.append([("body", across(roof_rear, roof, roof, -tumble, tumble, roof_front))])
    if rear > 0.2:
        faces.append([("body", across(0.0, shoulder, shoulder, -half, half, rear))])
    if front < length - 0.2:
        faces.append([("body", across(front, shoulder, shoulder, -half, half, length))])
    middle = length / 2
    centred = [[(role, [(x, y, z - middle) for x, y, z in points]) for role, points in parts] for parts in faces]
    return Figure(centred, solid=True, shining=frozenset({"rear_lamp", "front_lamp"}))


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
    """A person 1.75 m tall in one of POSES phases of a step; the first stands still."""
    swing = 0.3 * float(np.sin(2 * np.pi * pose / POSES)) if pose else 0.06
    hip, shoulder = 0.9, 1.44
    parts: list[Part] = [
        ("sleeve", limb((-0.17, shoulder - 0.04), (-0.22 - 0.55 * swing, 0.92), 0.11)),
        ("trousers", limb((-0.08, hip), (-0.08 - swing, 0.06), 0.16)),
        ("trousers", limb((0.08, hip), (0.08 + swing, 0.06), 0.16)),
        ("shoes", limb((-0.14 - swing, 0.04), (0.0 - swing, 0.04), 0.09)),
        ("shoes", limb((0.04 + swing, 0.04), (0.18 + swing, 0.04), 0.09)),
        ("coat", [(-0.19, hip - 0.1, 0), (0.19, hip - 0.1, 0), (0.22, shoulder, 0), (-0.22, shoulder, 0)]),
        ("sleeve", limb((0.18, shoulder - 0.04), (0.22 + 0.55 * swing, 0.92), 0.11)),
        ("skin", ball(0.22 + 0.55 * swing, 0.89, 0, 0.055, 5)),
        ("skin", limb((0, shoulder - 0.03), (0, shoulder + 0.1), 0.11)),
        ("hair", ball(0, 1.635, 0, 0.125)),
        ("skin", ball(0.02, 1.605, 0, 0.095)),
    ]
    if pose % 3 == 1:
        parts.append(("bag", limb((0.26, 0.98), (0.26, 0.68), 0.2)))
    return Figure([parts], solid=False)


@lru_cache(maxsize=POSES)
def cyclist(pose: int) -> Figure:
    """A person on a bicycle that rolls along z, in one of POSES turns of the pedals."""
    angle = 2 * np.pi * pose / POSES
    pedal = (0.17 * float(np.cos(angle)), 0.17 * float(np.sin(angle)))
    parts: list[Part] = []
    for z in (-0.52, 0.52):
        parts += [("tyre", wheel(0, 0.34, z, 0.34, 12)), ("spokes", wheel(0, 0.34, z, 0.26, 10))]
        parts += [("tyre", across(z, 0.0, 0.62, -0.035, 0.035))]
    saddle, bars, crank = (-0.2, 0.92), (0.42, 1.0), (-0.02, 0.34)
    for start, end in ((saddle, crank), (crank, bars), (saddle, bars), (bars, (0.52, 0.34)), (saddle, (-0.52, 0.34))):
        parts.append(("frame", rod(start, end, 0.06)))
    for sign in (-1.0, 1.0):
        foot = (crank[0] + sign * pedal[0], crank[1] + sign * pedal[1])
        knee = ((saddle[0] + foot[0]) / 2 + 0.18, (saddle[1] + foot[1]) / 2 + 0.1)
        x = sign * 0.1
        parts += [("trousers", rod((saddle[0], 0.98), knee, 0.17, x)), ("trousers", rod(knee, foot, 0.13, x))]
        # The same leg seen from behind: the bars above are thin there.
        parts += [
            ("trousers", limb((x, 0.98), (1.5 * x, knee[1]), 0.16)),
            ("trousers", limb((1.5 * x, knee[1]), (x, foot[1]), 0.12)),
        ]
        parts += [("shoes", limb((x - 0.05, foot[1]), (x + 0.05, foot[1]), 0.08, foot[0]))]
        parts += [
            ("sleeve", rod((0.1, 1.42), bars, 0.1, sign * 0.2)),
            ("sleeve", limb((sign * 0.19, 1.4), (sign * 0.27, 1.05), 0.1, 0.2)),
        ]
    parts += [("frame", across(0.42, 0.98, 1.03, -0.28, 0.28))]
    parts += [
        ("coat", rod((-0.2, 0.95), (0.12, 1.46), 0.3)),
        ("coat", [(-0.17, 0.92, -0.1), (0.17, 0.92, -0.1), (0.22, 1.45, 0.1), (-0.22, 1.45, 0.1)]),
    ]
    parts += [("skin", ball(0, 1.6, 0.18, 0.1)), ("skin", wheel(0, 1.6, 0.18, 0.1, 8))]
    parts += [("helmet", ball(0, 1.67, 0.16, 0.12)), ("helmet", wheel(0, 1.67, 0.16, 0.12, 8))]
    return Figure([parts], solid=False)
