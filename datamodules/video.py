"""Videos as frames in order of time: a file, a camera, a folder of frames, CamVid's clip, a drawn street.

A source opens its video anew for each call of `frames(start)` and leaves out the frames before `start`, so a run that
is resumed sees what it would have seen. What a source does with bad frames is in frame_checks.py.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dance_seg.errors import DataError
from dance_seg.normalise import downsampled
from dance_seg.part import Part, build_part
from dance_seg.sample import Frame
from datamodules.camvid import camvid_split
from datamodules.folder import read_classes
from datamodules.frame_checks import FrameChecks, Unreadable, checked, resized_label
from datamodules.image_files import IMAGE_SUFFIXES, LABEL_SUFFIXES, MAX_PIXELS, read_image, read_label
from datamodules.label_table import LabelTable
from datamodules.listing import data_root, list_files, some, what_is_there

if TYPE_CHECKING:
    from dance_seg.recipe import Recipe

CAMVID_RATE = 15.0  # frames per second: every other one of a film of 30


class VideoSource(Protocol):
    """Where frames come from."""

    name: str
    label_table: LabelTable | None  # of its ground truth; None where there is none
    frames_per_second: float
    num_frames: int | None  # as far as it is known; a file's header may be wrong
    problems: Counter[str]  # frames that were left out or changed, by kind, since `frames` was last called

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of its ground truth; empty where there is none."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Their colours."""

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from number `start` on, in order of time. Raises DataError for what cannot be used."""


def build_source(recipe: "Recipe | Part") -> VideoSource:
    """The video that a recipe's `data` section names.

    Raises ValueError for a name or an argument that does not exist, DataError for a file that cannot be used.

    >>> source = build_source(Part("video_shapes", {"num_frames": 3, "size": [48, 64]}))
    >>> [(frame.index, frame.image.shape) for frame in source.frames(start=1)]
    [(1, (48, 64, 3)), (2, (48, 64, 3))]
    """
    from datamodules.video_file import VideoFile
    from datamodules.video_shapes import VideoShapes

    table = {
        "video_file": VideoFile,
        "video_folder": video_folder,
        "video_camvid": video_camvid,
        "video_shapes": VideoShapes,
    }
    part = recipe if isinstance(recipe, Part) else recipe.data
    return build_part(table, part, at="data")  # type: ignore[arg-type]


class LabelledVideo:
    """What sources have in common: names and colours of their ground truth, and their length."""

    name: str
    num_frames: int | None
    label_table: LabelTable | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of its ground truth; empty where there is none."""
        return self.label_table.classes if self.label_table is not None else ()

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Their colours."""
        return self.label_table.palette if self.label_table is not None else ()

    def __len__(self) -> int:
        if self.num_frames is None:
            raise TypeError(f"{self.name}: nobody knows how many frames it has; ask num_frames")
        return self.num_frames


class ImageFile(NamedTuple):
    """One frame of a video that is kept as images."""

    image: Path
    label: Path | None  # None where there is no ground truth


class ImageFrames(LabelledVideo):
    """A video kept as one file for each frame, in order."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        label_table: LabelTable | None,
        *,
        name: str,
        frames_per_second: float,
        resolution: float = 1.0,
        max_pixels: int = MAX_PIXELS,
        cut: bool | None = None,  # what is said of every frame's `cut`
        checks: FrameChecks | None = None,
    ) -> None:
        self.files, self.label_table, self.name, self.cut = tuple(files), label_table, name, cut
        self.frames_per_second = positive(frames_per_second, "frames_per_second")
        self.resolution = positive(resolution, "resolution", most=1.0)
        self.max_pixels, self.checks = max_pixels, checks or FrameChecks()
        self.num_frames = len(self.files)
        self.problems: Counter[str] = Counter()

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from number `start` on; see VideoSource."""
        self.problems = Counter()
        return checked(self._found(start), self.checks, start=start, problems=self.problems, name=self.name)

    def _found(self, start: int) -> Iterator[Frame | Unreadable]:
        size_is_known = False
        for index, file in enumerate(self.files):
            if size_is_known and index < start - 1:
                continue
            try:
                frame = self._read(index, file)
            except DataError as error:
                yield Unreadable(index, str(error))
                continue
            size_is_known = True
            yield frame

    def _read(self, index: int, file: ImageFile) -> Frame:
        image, label = read_image(file.image, self.max_pixels), None
        if file.label is not None:
            assert self.label_table is not None
            label = self.label_table.apply(read_label(file.label, self.max_pixels), file.label)
            if label.shape != image.shape[:2]:
                raise DataError(f"{file.label} is {label.shape} and its image {image.shape[:2]} (H, W)")
        if self.resolution < 1:
            image = downsampled(image, self.resolution)
            label = None if label is None else resized_label(label, (image.shape[0], image.shape[1]))
        return Frame(index, index / self.frames_per_second, image, label, self.cut)


def video_folder(
    images: str,
    labels: str | None = None,
    classes: str | None = None,
    frames_per_second: float = 25.0,
    resolution: float = 1.0,
    first: int = 0,
    last: int | None = None,
    max_pixels: int = MAX_PIXELS,
    bad_frames: str = "skip",
    changed_size: str = "resize",
    repeated: str = "keep",
) -> ImageFrames:
    """A folder of PNG or JPEG frames as a video, in the natural order of their names: frame_9 before frame_10.

    `labels` is a folder of PNGs with class ids, named like the frames; frames without one have no ground truth.
    `classes` is their classes.yaml, by default the one beside the folder of labels. `first` and `last`, both included,
    count the images from 0. Raises DataError for a folder that is missing or holds nothing, and for labels of no frame.
    """
    folder = data_root(images, "the frames, PNG or JPEG")
    found = list_files(folder, folder, IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no frame (.png, .jpg) but {what_is_there(folder)}")
    labelled: dict[str, Path] = {}
    table = None
    if labels is not None:
        label_folder = data_root(labels, "the labels of the frames, PNG")
        labelled = list_files(label_folder, label_folder, LABEL_SUFFIXES)
        alone = [name for name in labelled if name not in found]
        if alone or not labelled:
            what = f"{len(alone)} labels of no frame in {folder}: {some(alone)}" if alone else "no label"
            raise DataError(f"{label_folder} holds {what}; a label is named like its frame")
        path = Path(classes) if classes is not None else label_folder.parent / "classes.yaml"
        table = read_classes(path, path.parent)
    order = sorted(found, key=natural)
    begin, end = frame_range(first, last)
    files = [ImageFile(found[name], labelled.get(name)) for name in order[begin:end]]
    if not files:
        raise DataError(f"{folder} has {len(order)} frames; none is left from data.args.first={first} to last={last}")
    return ImageFrames(
        files,
        table,
        name=folder.resolve().name,
        frames_per_second=frames_per_second,
        resolution=resolution,
        max_pixels=max_pixels,
        checks=FrameChecks(bad_frames, changed_size, repeated),
    )


def video_camvid(root: str = "data/camvid", resolution: float = 1.0, bad_frames: str = "stop") -> ImageFrames:
    """CamVid's val split, which is one clip: 101 frames of drive 0016E5 at 15 frames per second, each with its label.

    It was cut out of a training drive: a teacher or student for it is trained without that drive. Raises DataError like
    `camvid_split`.
    """
    pairs, table = camvid_split(root, "val")
    return ImageFrames(
        [ImageFile(pair.image, pair.label) for pair in sorted(pairs, key=lambda pair: natural(pair.name))],
        table,
        name="camvid_val",
        frames_per_second=CAMVID_RATE,
        resolution=resolution,
        cut=False,
        checks=FrameChecks(bad_frames),
    )


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts the numbers in names by their value.

    >>> sorted(["frame_10", "frame_9", "frame_9b"], key=natural)
    ['frame_9', 'frame_9b', 'frame_10']
    """
    parts = re.split(r"(\d+)", name.lower())
    return tuple((False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts if part)


def positive(value: float, name: str, most: float = 1000.0) -> float:
    """A number above 0 and at most `most`; raises ValueError, naming data.args.`name`, for any other."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f"data.args.{name} is {value!r}; a number above 0 and at most {most:g}")
    return float(value)


def whole(value: int, name: str, least: int = 0) -> int:
    """A whole number of at least `least`; raises ValueError, naming data.args.`name`, for any other."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.args.{name} is {value!r}; a whole number of at least {least}")
    return value


def frame_range(first: int, last: int | None) -> tuple[int, int | None]:
    """The numbers of the first frame and of the one behind the last; raises ValueError when nothing is between them."""
    whole(first, "first")
    if last is None:
        return first, None
    if whole(last, "last") < first:
        raise ValueError(f"data.args.last is {last} and first is {first}; the last frame, included, is not before it")
    return first, last + 1
