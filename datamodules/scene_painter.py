"""A painter with a pinhole camera: shapes given in metres become pixels with a colour and a class.

World: x metres to the right of the camera, y metres above the ground, z metres ahead (the depth). The canvas has four
channels, red, green, blue and the class, so one stroke always sets what is seen and what it is called together.
"""

from collections.abc import Mapping, Sequence
from math import exp
from typing import NamedTuple

import cv2
import numpy as np

from datamodules.scene_figures import Figure

Colour = tuple[float, float, float]  # red, green, blue in 0..255, before the light falls on it
Ink = tuple[int, int, int, int]  # red, green, blue as seen, and the class

NEAREST = 1.8  # metres; what is nearer is drawn as if it were this far
SUBPIXEL_BITS = 3  # cv2 takes coordinates in eighths of a pixel
SUPERSAMPLED_PIXELS = 2**19  # larger pictures are drawn at their own size: twice the size would only cost time


class Camera(NamedTuple):
    """Where the picture is taken from; lengths in the picture are in picture heights, so any size shows the scene."""

    height: float = 1.5  # metres above the ground
    focal: float = 1.05  # focal length, in picture heights
    horizon: float = 0.46  # row of the horizon, from the top, in picture heights
    shift: float = 0.0  # column of the vanishing point, right of the middle, in picture heights


class Light(NamedTuple):
    """What the hour and the weather do to every colour."""

    sky_top: Colour
    sky_low: Colour
    tint: Colour  # factors on red, green, blue
    haze: Colour  # what far things fade to
    haze_depth: float  # metres after which 63 % is haze
    sun: tuple[float, float]  # where shadows fall: metres to the right and ahead, per metre of height
    shadow: float  # how much a shadow darkens, in [0, 1]
    dusk: float  # 0 by day; 1: lamps, headlights and windows are lit


class Painter:
    """A canvas (H, W, 4) seen through a camera; later strokes cover earlier ones, so paint from far to near."""

    def __init__(self, camera: Camera, light: Light, size: tuple[int, int]) -> None:
        height, width = size
        self.zoom = 2 if height * width <= SUPERSAMPLED_PIXELS else 1
        self.camera, self.light = camera, light
        self.canvas = np.zeros((height * self.zoom, width * self.zoom, 4), np.uint8)
        self.unit = camera.focal * height * self.zoom  # canvas pixels per metre at a depth of one metre
        self.column = (width / 2 + camera.shift * height) * self.zoom
        self.row = camera.horizon * height * self.zoom

    def ink(self, colour: Colour, class_id: int, depth: float, brightness: float = 1.0) -> Ink:
        """The colour as the light and the haze show it at that depth, with its class."""
        clear = exp(-depth / self.light.haze_depth)
        tint, haze = self.light.tint, self.light.haze
        red, green, blue = (
            min(255, max(0, int(c * t * brightness * clear + h * (1 - clear))))
            for c, t, h in zip(colour, tint, haze, strict=True)
        )
        return red, green, blue, class_id

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) to canvas points (..., 2), in eighths of a pixel."""
        points = np.asarray(points, np.float64)
        per_metre = self.unit / np.maximum(points[..., 2], NEAREST)
        canvas = np.empty((*points.shape[:-1], 2))
        canvas[..., 0] = self.column + points[..., 0] * per_metre
        canvas[..., 1] = self.row + (self.camera.height - points[..., 1]) * per_metre
        # cv2 computes in 16.16 fixed point: keep far outside points within its range.
        return np.rint(np.clip(canvas, -30000, 30000) * 2**SUBPIXEL_BITS).astype(np.int32)

    def pixels(self, metres: float, depth: float) -> float:
        """How many canvas pixels a length has at a depth."""
        return metres * self.unit / max(depth, NEAREST)

    def polygon(self, points: np.ndarray | Sequence[Sequence[float]], ink: Ink) -> None:
        """Fill a convex polygon of world points (K, 3)."""
        cv2.fillConvexPoly(self.canvas, self.project(np.asarray(points)), ink, cv2.LINE_8, SUBPIXEL_BITS)

    def polygons(self, points: np.ndarray, ink: Ink) -> None:
        """Fill polygons (N, K, 3) that do not overlap, all alike: much faster than one by one."""
        if len(points):
            cv2.fillPoly(self.canvas, list(self.project(points)), ink, cv2.LINE_8, SUBPIXEL_BITS)

    def post(self, x: float, depth: float, low: float, high: float, width: float, ink: Ink) -> None:
        """Fill an upright bar, never thinner than a pixel of the picture."""
        half = max(width / 2, 0.5 * self.zoom * max(depth, NEAREST) / self.unit)
        self.polygon(
            [(x - half, low, depth), (x + half, low, depth), (x + half, high, depth), (x - half, high, depth)], ink
        )

    def discs(self, centres: np.ndarray, radii: np.ndarray, inks: Sequence[Ink]) -> None:
        """Fill a disc around each world point (N, 3), with a radius in metres, one after the other."""
        middle = self.project(centres).tolist()
        radius = np.rint(radii * (self.unit * 2**SUBPIXEL_BITS) / np.maximum(centres[:, 2], NEAREST)).astype(int)
        for point, r, ink in zip(middle, radius.tolist(), inks, strict=True):
            cv2.circle(self.canvas, point, r, ink, -1, cv2.LINE_8, SUBPIXEL_BITS)

    def figure(
        self,
        figure: Figure,
        colours: Mapping[str, Colour],
        class_id: int,
        place: tuple[float, float],
        yaw: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Put a figure on the ground at (x, z), turned by yaw radians, its width and height scaled."""
        x, depth = place
        cosine, sine = np.cos(yaw), np.sin(yaw)
        turn = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
        across, up = scale
        screen = self.project((figure.points * (across, up, abs(across))) @ turn + (x, 0.0, depth))
        for face in figure.faces_seen(turn, np.array([-x, self.camera.height, -depth])):
            for role, start, stop in face.parts:
                brightness = 1.0 if role in figure.shining else face.brightness
                ink = self.ink(colours[role], class_id, depth, brightness)
                cv2.fillConvexPoly(self.canvas, screen[start:stop], ink, cv2.LINE_8, SUBPIXEL_BITS)

    def darken(self, polygons: Sequence[np.ndarray], strength: float) -> None:
        """Let shadows, polygons (K, 3), fall on what is painted so far; its classes stay."""
        mask = np.zeros(self.canvas.shape[:2], np.uint8)
        for polygon in polygons:
            cv2.fillPoly(mask, [self.project(polygon)], 255, cv2.LINE_8, SUBPIXEL_BITS)
        left = 1 - strength
        dark = cv2.multiply(self.canvas, (left, left, min(1.0, left * 1.08), 1.0))
        cv2.copyTo(dark, mask, self.canvas)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture (H, W, 3), smoothed when it was drawn larger, and its classes (H, W), never mixed."""
        canvas = self.canvas
        label = np.ascontiguousarray(canvas[self.zoom - 1 :: self.zoom, self.zoom - 1 :: self.zoom, 3])
        if self.zoom > 1:
            canvas = cv2.resize(canvas, label.shape[::-1], interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(canvas, cv2.COLOR_RGBA2RGB), label
