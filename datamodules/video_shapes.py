"""A drawn street as an endless video with ground truth: the camera pans, tilts and zooms, the light drifts, cars and
people move, and the scene changes at known frames.

Each scene is painted once, much wider than a frame, and once for each thing that moves. A frame is a window of that
panorama, warped into place, with the moving things over it from far to near, and one table of tones for the light of
the moment. Everything is a function of the seed and the frame's number, so any frame can be drawn without those before
it, and a run that is resumed sees the same ones.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, pi, sin
from random import Random
from typing import NamedTuple

import cv2
import numpy as np

from dance_seg.randomness import paired_generators
from dance_seg.sample import Frame
from datamodules.label_table import LabelTable, label_table
from datamodules.scenery.figures import vehicles
from datamodules.scenery.painter import Camera, Light, Painter
from datamodules.scenery.roadside import lots, street_furniture
from datamodules.scenery.street import Scene, Street, Thing
from datamodules.scenery.traffic import bicyclist, pedestrian, traffic, vehicle_on_road
from datamodules.scenes import (
    CLASSES,
    PALETTE,
    SMALLEST_SIDE,
    develop,
    draw_light,
    draw_street,
    paint_ground,
    paint_road,
    paint_sky,
    paint_skyline,
)
from datamodules.video import LabelledVideo, positive, whole

STREAM = 0x57EA3  # keeps these draws apart from others of the same seed and number
NOWHERE = 254  # the class of a sprite's pixels that are not the thing
TALLER, WIDER = 1.35, 2.4  # the panorama over a frame, which leaves room to tilt and to pan
ZOOM = (0.85, 1.3)
SPRITE_DEPTH = 9.0  # metres at which a moving thing is painted once
NOISE = 0.03  # of a frame's sensor
_ROOM = 61  # pixels by which the noise of one frame is shifted against that of others; a prime
_KEPT = 2  # scenes

DRAWN = label_table(CLASSES, raw_to_train={raw: raw for raw in range(len(CLASSES))}, palette=PALETTE)


class Swing(NamedTuple):
    """A smooth movement around 0, never beyond -1 and 1: a slow swing and a faster one of a quarter of it."""

    slow: float  # seconds for one swing
    fast: float
    phase: float
    fast_phase: float

    def at(self, seconds: float) -> float:
        """Where it is."""
        slow, fast = 2 * pi * seconds / self.slow + self.phase, 2 * pi * seconds / self.fast + self.fast_phase
        return 0.8 * sin(slow) + 0.2 * sin(fast)


def draw_swing(draw: Random, slow: tuple[float, float], fast: tuple[float, float]) -> Swing:
    """A swing whose times lie between those given, in seconds."""
    return Swing(draw.uniform(*slow), draw.uniform(*fast), draw.uniform(0, 2 * pi), draw.uniform(0, 2 * pi))


@dataclass(frozen=True)
class Actor:
    """Something that moves along the street, painted once."""

    image: np.ndarray  # (h, w, 3)
    label: np.ndarray  # (h, w): NOWHERE where the thing is not
    foot: tuple[float, float]  # column and row of the point on the ground that it stands on
    per_metre: float  # pixels of the sprite
    lateral: float  # metres from the middle of the road
    nearest: float  # it moves between these depths, in metres
    farthest: float
    speed: float  # metres per second; negative towards the camera
    phase: float  # metres
    turns: bool  # comes back at the end of its way; otherwise it begins anew

    def depth(self, seconds: float) -> float:
        """How far away it is."""
        way = self.farthest - self.nearest
        gone = self.phase + self.speed * seconds
        if self.turns:
            gone = way - abs(gone % (2 * way) - way)
        return self.nearest + gone % way


@dataclass(frozen=True)
class Panorama:
    """A scene between two cuts, as wide as the camera ever looks."""

    image: np.ndarray  # (h, w, 3)
    label: np.ndarray  # (h, w)
    unit: float  # pixels per metre at a depth of one metre
    vanishing: tuple[float, float]  # column and row
    camera_height: float
    street: Street
    actors: tuple[Actor, ...]
    pan: Swing
    tilt: Swing
    zoom: Swing
    roll: Swing


class VideoShapes(LabelledVideo):
    """`num_frames` drawn frames of `size` (H, W) with labels of CamVid's eleven classes, the same ones for a seed.

    The scene changes at every `scene_frames`-th frame, or at the frames that `cuts` lists; these have `cut` set.
    `motion` is how fast camera and things move, `lighting` how far brightness and colour drift, both 1 by default and 0
    for none. `stationary` is a stream without cuts and with hardly any motion or drift. Raises ValueError for values
    out of range.

    >>> source = VideoShapes(num_frames=6, size=(48, 64), scene_frames=4)
    >>> [frame.cut for frame in source.frames(start=2)], source.cuts
    ([False, False, True, False], (4,))
    """

    name = "video_shapes"

    def __init__(
        self,
        num_frames: int = 1500,
        size: Sequence[int] = (180, 240),
        scene_frames: int = 250,
        cuts: Sequence[int] | None = None,
        scene_seed: int = 0,
        frames_per_second: float = 25.0,
        motion: float = 1.0,
        lighting: float = 1.0,
        stationary: bool = False,
    ) -> None:
        if len(size) != 2 or any(whole(side, "size", SMALLEST_SIDE) > 4096 for side in size):
            raise ValueError(f"data.args.size is {list(size)}; two numbers (H, W) from {SMALLEST_SIDE} to 4096")
        self.num_frames: int = whole(num_frames, "num_frames", 1)
        self.size = (int(size[0]), int(size[1]))
        self.scene_seed = whole(scene_seed, "scene_seed")
        self.frames_per_second = positive(frames_per_second, "frames_per_second")
        for name, value in (("motion", motion), ("lighting", lighting)):
            if not 0 <= value <= 10:
                raise ValueError(f"data.args.{name} is {value!r}; from 0, none, to 10")
        calm = 0.05 if stationary else 1.0
        self.motion, self.lighting = motion * calm, lighting * calm
        if stationary and cuts:
            raise ValueError(f"data.args.cuts is {list(cuts)}, but stationary: true has no cuts; leave one of them out")
        self.cuts = () if stationary else _cuts(cuts, whole(scene_frames, "scene_frames", 1), num_frames)
        self.problems: Counter[str] = Counter()
        self._scenes: OrderedDict[int, Panorama] = OrderedDict()
        rng, draw = paired_generators(self.scene_seed, STREAM)
        self._noise = rng.integers(0, 256, (self.size[0] + _ROOM, self.size[1] + _ROOM, 3), dtype=np.uint8)
        self._brightness = draw_swing(draw, (18, 40), (7, 13))
        self._tints = [draw_swing(draw, (15, 45), (7, 13)) for _ in range(3)]

    @property
    def label_table(self) -> LabelTable:  # type: ignore[override]
        """CamVid's classes and colours."""
        return DRAWN

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from number `start` on; see VideoSource."""
        return (self.frame(index) for index in range(start, self.num_frames))

    def frame(self, index: int) -> Frame:
        """Frame number `index`, which needs none of those before it."""
        if not 0 <= index < self.num_frames:
            raise IndexError(f"frame {index} of {self.num_frames}")
        seconds = index / self.frames_per_second
        scene = self._scene(bisect_right(self.cuts, index))
        to_frame = self._view(scene, seconds * self.motion)
        height, width = self.size
        image = cv2.warpAffine(
            scene.image, to_frame, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        label = cv2.warpAffine(
            scene.label, to_frame, (width, height), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
        )
        now = [(actor.depth(seconds * self.motion), actor) for actor in scene.actors]
        for depth, actor in sorted(now, key=lambda pair: -pair[0]):
            _place(actor, depth, scene, to_frame, image, label)
        row, column = (index * step % _ROOM for step in (17, 29))
        noise = self._noise[row : row + height, column : column + width]
        image = cv2.addWeighted(cv2.LUT(image, self._tones(seconds)), 1.0, noise, NOISE, -127.5 * NOISE)
        return Frame(index, seconds, image, label, cut=index in self.cuts)

    def _view(self, scene: Panorama, seconds: float) -> np.ndarray:
        """The matrix (2, 3) from pixels of the panorama to those of the frame."""
        reach = min(1.0, self.motion)
        low, high = ZOOM
        zoom = (low * high) ** 0.5 * (high / low) ** (0.5 * reach * scene.zoom.at(seconds))
        turn = np.deg2rad(1.2 * reach * scene.roll.at(seconds))
        height, width = scene.label.shape
        # What is left beside the window, and a little less for the corners of one that is turned.
        room = [
            max(0.0, (side - of / zoom) / 2 - 0.02 * side) for side, of in zip((height, width), self.size, strict=True)
        ]
        row = height / 2 + room[0] * reach * scene.tilt.at(seconds)
        column = width / 2 + room[1] * reach * scene.pan.at(seconds)
        matrix = zoom * np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))])
        shift = (self.size[1] / 2, self.size[0] / 2) - matrix @ (column, row)
        return np.hstack([matrix, shift[:, None]])

    def _tones(self, seconds: float) -> np.ndarray:
        """The table (1, 256, 3) that the light of the moment makes of every tone."""
        gain = 0.3 * self._brightness.at(seconds)
        gains = [exp(self.lighting * (gain + 0.1 * tint.at(seconds))) for tint in self._tints]
        return np.rint(np.clip(np.arange(256)[None, :, None] * np.array(gains), 0, 255)).astype(np.uint8)

    def _scene(self, number: int) -> Panorama:
        if number not in self._scenes:
            self._scenes[number] = draw_panorama(self.scene_seed, number, self.size)
            while len(self._scenes) > _KEPT:
                self._scenes.popitem(last=False)
        return self._scenes[number]


def draw_panorama(seed: int, number: int, size: tuple[int, int]) -> Panorama:
    """Scene number `number` of the stream that `seed` names, for frames of size (H, W)."""
    rng, draw = paired_generators(seed, number, STREAM)
    crowdedness = draw.uniform(0.2, 1.0)
    light = draw_light(draw)
    street = draw_street(draw, crowdedness)
    scene = Scene(draw, street, light, crowdedness, taken=[])
    camera = Camera(draw.uniform(1.4, 1.8), draw.uniform(0.9, 1.1), draw.uniform(0.42, 0.5))
    large = (ceil(size[0] * TALLER), ceil(size[1] * WIDER))
    painter = Painter(camera, light, large)
    paint_sky(painter, rng, cloudiness=draw.uniform(0, 0.3 + 0.7 * crowdedness))
    paint_skyline(painter, draw, crowdedness)
    paint_ground(painter, scene)
    paint_road(painter, scene)
    things = [*lots(scene), *street_furniture(scene), *traffic(scene)]
    painter.darken([thing.shadow for thing in things if thing.shadow is not None], light.shadow)
    for thing in sorted(things, key=lambda thing: -thing.depth):
        thing.paint(painter)
    image, label = painter.finish()
    swings = {
        "pan": draw_swing(draw, (25, 50), (7, 14)),
        "tilt": draw_swing(draw, (12, 30), (5, 9)),
        "zoom": draw_swing(draw, (15, 40), (7, 14)),
        "roll": draw_swing(draw, (8, 20), (3, 6)),
    }
    return Panorama(
        image=develop(image, label, rng, crowdedness),
        label=label,
        unit=camera.focal * large[0],
        vanishing=(large[1] / 2, camera.horizon * large[0]),
        camera_height=camera.height,
        street=street,
        actors=tuple(_actors(draw, street, light, camera, large, crowdedness)),
        **swings,
    )


def _actors(
    draw: Random, street: Street, light: Light, camera: Camera, size: tuple[int, int], crowdedness: float
) -> Iterator[Actor]:
    """Vehicles that drive away and towards the camera, people on the pavements, somebody on a bicycle."""
    for number in range(1 + round(3 * crowdedness)):
        side, kind = (-1, 1)[number % 2], draw.choices(range(6), (35, 23, 17, 10, 7, 8))[0]
        away = side * street.offset < 0
        lane = side * (street.half - 2.4 if street.half > 5 else street.half * 0.45)
        speed = draw.uniform(5, 11) * (1 if away else -1)
        taken = (0.0, SPRITE_DEPTH, vehicles()[kind].half_width, vehicles()[kind].half_length)
        seen = Scene(draw, _straight(street, lane), light, crowdedness, taken=[taken])
        thing = vehicle_on_road(seen, kind, lane, SPRITE_DEPTH, 0.0 if away else pi)
        yield _painted(thing, seen, lane, camera, size, (5.0, 75.0), speed, draw.uniform(0, 70), turns=False)
    for number in range(2 + round(4 * crowdedness)):
        side = (-1, 1)[number % 2]
        lateral = side * (street.half + draw.uniform(0.3, 0.9) * street.pavements[side > 0])
        seen = Scene(draw, _straight(street, lateral), light, crowdedness, taken=[])
        thing = pedestrian(seen, lateral, SPRITE_DEPTH)
        way, speed = (draw.uniform(4.5, 8), draw.uniform(12, 28)), draw.uniform(0.7, 1.6)
        yield _painted(thing, seen, lateral, camera, size, way, speed, draw.uniform(0, 30), turns=True)
    lateral = draw.choice((-1, 1)) * street.half * draw.uniform(0.5, 0.85)
    seen = Scene(draw, _straight(street, lateral), light, crowdedness, taken=[])
    thing = bicyclist(seen, lateral, SPRITE_DEPTH, turn=0.0)
    yield _painted(thing, seen, lateral, camera, size, (5.0, 35.0), draw.uniform(2, 5), draw.uniform(0, 60), turns=True)


def _straight(street: Street, lateral: float) -> Street:
    """The street without its bends, a thing at that lateral position straight ahead or a little aside."""
    return street._replace(offset=0.3 * (lateral + street.offset) - lateral, slope=0.0, bend=0.0)


def _painted(
    thing: Thing,
    scene: Scene,
    lateral: float,
    camera: Camera,
    size: tuple[int, int],
    way: tuple[float, float],
    speed: float,
    phase: float,
    *,
    turns: bool,
) -> Actor:
    """A thing that stands at SPRITE_DEPTH, cut out of a picture of its own."""
    painter = Painter(camera, scene.light, (size[0], 2 * size[0]))
    painter.canvas[..., 3] = NOWHERE
    thing.paint(painter)
    painter.paint()
    rows, columns = np.nonzero(painter.canvas[..., 3] != NOWHERE)
    top, left = rows.min(), columns.min()
    cut_out = painter.canvas[top : rows.max() + 1, left : columns.max() + 1]
    label = np.ascontiguousarray(cut_out[..., 3])
    image = np.ascontiguousarray(cut_out[..., :3])
    image[label == NOWHERE] = image[label != NOWHERE].mean(0)  # what its edge is mixed with when it is made smaller
    per_metre = painter.unit / SPRITE_DEPTH
    foot = (painter.column + scene.street.x(lateral, SPRITE_DEPTH) * per_metre, painter.row + camera.height * per_metre)
    return Actor(
        image=image,
        label=label,
        foot=(foot[0] - left, foot[1] - top),
        per_metre=per_metre,
        lateral=lateral,
        nearest=way[0],
        farthest=way[1],
        speed=speed,
        phase=phase,
        turns=turns,
    )


def _place(
    actor: Actor, depth: float, scene: Panorama, to_frame: np.ndarray, image: np.ndarray, label: np.ndarray
) -> None:
    """Paint an actor at its depth over image and label, in place."""
    per_metre = scene.unit / depth
    column = scene.vanishing[0] + scene.street.x(actor.lateral, depth) * per_metre
    row = scene.vanishing[1] + scene.camera_height * per_metre
    scale = per_metre / actor.per_metre
    matrix = scale * to_frame[:, :2]
    shift = to_frame[:, :2] @ (column, row) + to_frame[:, 2] - matrix @ actor.foot
    height, width = actor.label.shape
    corners = matrix @ np.array([(0, width, 0, width), (0, 0, height, height)]) + shift[:, None]
    left, top = np.maximum(np.floor(corners.min(1)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(corners.max(1)).astype(int), label.shape[::-1])
    if right <= left or bottom <= top:
        return
    moved = np.hstack([matrix, (shift - (left, top))[:, None]])
    part = (int(right - left), int(bottom - top))
    classes = cv2.warpAffine(actor.label, moved, part, flags=cv2.INTER_NEAREST, borderValue=NOWHERE)
    colors = cv2.warpAffine(actor.image, moved, part, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    is_thing = classes != NOWHERE
    np.copyto(label[top:bottom, left:right], classes, where=is_thing)
    np.copyto(image[top:bottom, left:right], colors, where=is_thing[..., None])


def _cuts(cuts: Sequence[int] | None, scene_frames: int, num_frames: int) -> tuple[int, ...]:
    if cuts is None:
        return tuple(range(scene_frames, num_frames, scene_frames))
    for before, after in zip([0, *cuts], cuts, strict=False):
        if whole(after, "cuts", 1) <= before:
            raise ValueError(f"data.args.cuts is {list(cuts)}; frame numbers from 1 on, each above the one before")
    return tuple(cuts)
