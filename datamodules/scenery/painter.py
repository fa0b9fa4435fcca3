"""A painter with a pinhole camera: shapes given in metres become pixels with a colour and a class.

World: x metres to the right of the camera, y metres above the ground, z metres ahead (the depth). The canvas has four
channels, red, green, blue and the class, so one stroke always sets together what is seen and what it is called.
Strokes are collected and then projected and coloured all at once, which is several times faster than one by one.
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from math import cos, sin
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike

from datamodules.scenery.figures import Figure, Point

CLASSES: tuple[str, ...] = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
"""CamVid's eleven classes in the order of its label files."""
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CLASSES))

Colour = tuple[float, float, float]  # red, green, blue in 0..255, before the light falls on it

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
    is_dusk: bool  # lamps, headlights and windows are lit


class Painter:
    """A canvas (H, W, 4) seen through a camera; later strokes cover earlier ones, so stroke from far to near."""

    def __init__(self, camera: Camera, light: Light, size: tuple[int, int]) -> None:
        height, width = size
        self.zoom = 2 if height * width <= SUPERSAMPLED_PIXELS else 1
        self.camera, self.light = camera, light
        self.canvas = np.zeros((height * self.zoom, width * self.zoom, 4), np.uint8)
        self.unit = camera.focal * height * self.zoom  # canvas pixels per metre at a depth of one metre
        self.column = (width / 2 + camera.shift * height) * self.zoom
        self.row = camera.horizon * height * self.zoom
        self._start_over()

    def _start_over(self) -> None:
        # Flat arrays of numbers: they take bytes from NumPy, and NumPy reads them in place.
        self._points = array("d")  # x, y, z, x, y, z, ...
        self._strokes = array("d")  # first point, corners, number of polygons, radius of a disc or 0; again ...
        self._inks = array("d")  # red, green, blue, class, brightness, depth; again ...
        self._num_points = 0

    def pixels(self, metres: float, depth: float) -> float:
        """How many canvas pixels a length has at a depth."""
        return metres * self.unit / max(depth, NEAREST)

    # Strokes ------------------------------------------------------------------------------------------------------

    def polygon(
        self, points: Sequence[Point], colour: Colour, class_id: int, depth: float, brightness: float = 1.0
    ) -> None:
        """Fill a convex polygon; the haze on it is that of `depth`."""
        self._strokes.extend((self._num_points, len(points), 1, 0))
        self._points.extend(chain.from_iterable(points))
        self._inks.extend((*colour, class_id, brightness, depth))
        self._num_points += len(points)

    def pattern(
        self, polygons: np.ndarray, colour: Colour, class_id: int, depth: float, brightness: float = 1.0
    ) -> None:
        """Fill polygons (N, K, 3) that do not overlap, all in one ink: windows of a wall, bars of a fence."""
        count, corners, _ = polygons.shape
        if count:
            self._strokes.extend((self._num_points, corners, count, 0))
            self._points.frombytes(polygons.astype(np.float64).tobytes())
            self._inks.extend((*colour, class_id, brightness, depth))
            self._num_points += count * corners

    def stretch(self, polygons: np.ndarray, colour: Colour, class_id: int, brightness: ArrayLike = 1.0) -> None:
        """Fill convex polygons (N, K, 3), each with the haze of its first corner: a road that leads away."""
        self._one_by_one(polygons, 0.0, colour, class_id, brightness)

    def discs(
        self, centres: np.ndarray, radii: ArrayLike, colour: Colour, class_id: int, brightness: ArrayLike = 1.0
    ) -> None:
        """Fill a disc around each point (N, 3), one after the other."""
        self._one_by_one(centres[:, None], radii, colour, class_id, brightness)

    def _one_by_one(
        self, polygons: np.ndarray, radii: ArrayLike, colour: Colour, class_id: int, brightness: ArrayLike
    ) -> None:
        count, corners, _ = polygons.shape
        strokes, inks = np.empty((count, 4)), np.empty((count, 6))
        strokes[:, 0] = np.arange(self._num_points, self._num_points + count * corners, corners)
        strokes[:, 1:3] = corners, 1
        strokes[:, 3] = radii
        inks[:, :4] = *colour, class_id
        inks[:, 4] = brightness
        inks[:, 5] = polygons[:, 0, 2]
        self._strokes.frombytes(strokes.tobytes())
        self._points.frombytes(polygons.astype(np.float64).tobytes())
        self._inks.frombytes(inks.tobytes())
        self._num_points += count * corners

    def post(
        self, x: float, depth: float, low: float, high: float, width: float, colour: Colour, class_id: int
    ) -> None:
        """Fill an upright bar, never thinner than a pixel of the picture."""
        half = max(width / 2, 0.5 * self.zoom * max(depth, NEAREST) / self.unit)
        corners = [(x - half, low, depth), (x + half, low, depth), (x + half, high, depth), (x - half, high, depth)]
        self.polygon(corners, colour, class_id, depth)

    def figure(
        self,
        figure: Figure,
        colours: Mapping[str, Colour],
        class_id: int,
        place: tuple[float, float],
        yaw: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Put a figure on the ground at (x, depth), turned right by yaw radians, its width and height scaled."""
        x, depth = place
        across, up = scale
        turn = np.array([(cos(yaw), 0, -sin(yaw)), (0, 1, 0), (sin(yaw), 0, cos(yaw))])
        points = (figure.points @ (np.array([(across,), (up,), (abs(across),)]) * turn) + (x, 0.0, depth)).tolist()
        smallest = self.zoom / self.pixels(1.0, depth)  # metres that are a pixel of the picture
        for parts, brightness in figure.faces_seen(turn, np.array((-x, self.camera.height, -depth))):
            for role, start, stop, extent in parts:
                if extent > smallest:
                    self.polygon(points[start:stop], colours[role], class_id, depth, brightness)

    # From strokes to pixels ---------------------------------------------------------------------------------------

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (N, 3) to canvas points (N, 2), in eighths of a pixel.

        >>> plain = Light((0, 0, 0), (0, 0, 0), (1, 1, 1), (0, 0, 0), 1.0, (0, 0), 0.0, False)
        >>> painter = Painter(Camera(height=1.5, focal=1.0, horizon=0.5), plain, (100, 200))  # drawn as 200 x 400
        >>> painter.project(np.array([(0.0, 1.5, 9.0), (1.0, 0.0, 2.0)])) / 8  # the vanishing point; right and below
        array([[200., 100.],
               [300., 250.]])
        """
        per_metre = self.unit / np.maximum(points[:, 2], NEAREST)
        canvas = np.empty((len(points), 2))
        canvas[:, 0] = self.column + points[:, 0] * per_metre
        canvas[:, 1] = self.row + (self.camera.height - points[:, 1]) * per_metre
        # cv2 computes in 16.16 fixed point: keep far outside points within its range.
        return np.rint(np.clip(canvas, -30000, 30000) * 2**SUBPIXEL_BITS).astype(np.int32)

    def mix(self, inks: np.ndarray) -> np.ndarray:
        """Red, green, blue as light and haze show them, and the class (N, 4), from the strokes' inks (N, 6)."""
        clear = np.exp(inks[:, 5:] / -self.light.haze_depth)
        lit = inks[:, :3] * np.asarray(self.light.tint) * inks[:, 4:5]
        mixed = inks[:, :4].copy()
        mixed[:, :3] = np.clip(lit * clear + np.asarray(self.light.haze) * (1 - clear), 0, 255)
        return mixed

    def paint(self) -> None:
        """Bring the strokes collected so far onto the canvas."""
        if not self._strokes:
            return
        strokes = np.frombuffer(self._strokes).reshape(-1, 4)
        first, corners = strokes[:, 0].astype(int), strokes[:, 1:3].astype(int)
        points = np.frombuffer(self._points).reshape(-1, 3)
        screen = self.project(points)
        radii = np.rint(strokes[:, 3] * (self.unit * 2**SUBPIXEL_BITS) / np.maximum(points[first, 2], NEAREST))
        lowest = np.minimum.reduceat(screen, first) - radii[:, None]
        highest = np.maximum.reduceat(screen, first) + radii[:, None]
        edge = np.array(self.canvas.shape[1::-1]) << SUBPIXEL_BITS
        is_shown = ((highest >= 0) & (lowest < edge)).all(1) & (highest - lowest > 2).any(1)
        shown = np.flatnonzero(is_shown)  # in the picture, and larger than a quarter of a pixel
        inks = self.mix(np.frombuffer(self._inks).reshape(-1, 6)[shown]).tolist()
        middles = screen[first[shown]].tolist()
        rows = zip(
            first[shown].tolist(),
            corners[shown].tolist(),
            radii[shown].astype(int).tolist(),
            middles,
            inks,
            strict=True,
        )
        for start, (sides, count), radius, middle, ink in rows:
            if sides == 1:
                cv2.circle(self.canvas, middle, radius, ink, cv2.FILLED, cv2.LINE_8, SUBPIXEL_BITS)
            elif count == 1:
                cv2.fillConvexPoly(self.canvas, screen[start : start + sides], ink, cv2.LINE_8, SUBPIXEL_BITS)
            else:
                polygons = screen[start : start + sides * count].reshape(count, sides, 2)
                cv2.fillPoly(self.canvas, list(polygons), ink, cv2.LINE_8, SUBPIXEL_BITS)
        self._start_over()

    def darken(self, polygons: Sequence[np.ndarray], strength: float) -> None:
        """Let shadows, polygons (K, 3) on the ground, fall on what is painted so far; its classes stay."""
        self.paint()
        top = min(max(int(self.row), 0), len(self.canvas) - 1)
        ground = self.canvas[top:]
        mask = np.zeros(ground.shape[:2], np.uint8)
        if polygons:
            screen = self.project(np.concatenate(polygons)) - (0, top << SUBPIXEL_BITS)
            ends = np.cumsum([len(polygon) for polygon in polygons])[:-1]
            for polygon in np.split(screen.astype(np.int32), ends):
                cv2.fillConvexPoly(mask, polygon, 255, cv2.LINE_8, SUBPIXEL_BITS)
        left = 1 - strength
        tones = np.arange(256)[:, None] * (left, left, min(1.0, left * 1.08), 1.0)  # shadows are a little blue
        cv2.copyTo(cv2.LUT(ground, np.rint(tones).astype(np.uint8)[None]), mask, ground)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture (H, W, 3), smoothed when it was drawn larger, and its classes (H, W), never mixed."""
        self.paint()
        canvas: np.ndarray = self.canvas
        label = np.ascontiguousarray(canvas[self.zoom - 1 :: self.zoom, self.zoom - 1 :: self.zoom, 3])
        if self.zoom > 1:
            canvas = cv2.resize(canvas, label.shape[::-1], interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(canvas, cv2.COLOR_RGBA2RGB), label
