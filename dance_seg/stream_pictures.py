"""Pictures of a stream: a few sample frames with their masks, and a film of what the user is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dance_seg.distillation.online import Followed
from dance_seg.predict import legend, overlay, palette_picture, stacked

MOST_EVENTS = 6  # cuts, or losses of accuracy, that are kept as pictures, each with the key frames after it
REGULAR_SAMPLES = 6  # further key frames kept, spread over the stream


class SampleFrames:
    """Keeps a few frames with their masks: the first, those around cuts and losses of accuracy, some key frames.

    What is kept depends on the frames alone, and `counts` on what is kept next, so that a resumed run keeps the same.
    """

    def __init__(self, folder: Path, palette: Sequence[tuple[int, int, int]], num_frames: int | None) -> None:
        self.folder, self.palette, self.num_frames = folder, palette, num_frames
        self.counts = {"events": 0, "after_event": 2, "next_regular": 0, "was_right": 0}

    def wants(self, followed: Followed) -> bool:
        """Whether to keep this frame; asked once for each, in order."""
        counts, index = self.counts, followed.frame.index
        is_first = counts["next_regular"] == 0
        right = followed.accuracy_before is not None and followed.updates == 0
        lost = followed.key_frame and bool(followed.updates) and bool(counts["was_right"])
        if followed.key_frame:
            counts["was_right"] = int(right)
        event = bool(followed.frame.cut) or (followed.frame.cut is None and lost)
        wanted = is_first
        if event and counts["events"] < MOST_EVENTS:
            counts["events"] += 1
            counts["after_event"] = 0
            wanted = True
        elif followed.key_frame and counts["after_event"] < 2:
            counts["after_event"] += 1
            wanted = True
        elif followed.key_frame and index >= counts["next_regular"]:
            wanted = True
        if wanted and index >= counts["next_regular"]:
            every = self.num_frames // REGULAR_SAMPLES if self.num_frames else max(index, 50)
            counts["next_regular"] = index + max(every, 1)
        return wanted

    def keep(self, followed: Followed, labels: np.ndarray | None) -> dict[str, np.ndarray]:
        """Write the frame and its masks; returns the masks by name."""
        from PIL import Image

        frame = followed.frame
        masks = {"student": followed.prediction}
        if labels is not None:
            masks["teacher"] = labels
        if frame.label is not None:
            masks["truth"] = frame.label
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame.image).save(self.folder / f"{frame.index:06d}_image.png", compress_level=1)
        for kind, mask in masks.items():
            palette_picture(mask, self.palette).save(self.folder / f"{frame.index:06d}_{kind}.png")
        return masks


class Film:
    """A film of what the user is shown, its colours laid over the frames; key frames have a bar at the top.

    A run that goes on begins another film, whose name ends in the number of its first frame.
    Raises OSError when it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        frames_per_second: float,
        palette: Sequence[tuple[int, int, int]],
        classes: Sequence[str],
        start: int = 0,
    ) -> None:
        path = path if path.suffix else path.with_suffix(".mp4")
        self.path = path if not start else path.with_name(f"{path.stem}_from_{start:06d}{path.suffix}")
        self.partial = self.path.with_name(f".{self.path.name}.partial{self.path.suffix}")
        self.rate, self.palette, self.classes = frames_per_second, palette, classes
        self._writer: Any = None
        self._names: np.ndarray | None = None
        self._size = (0, 0)

    def add(self, followed: Followed) -> None:
        """One frame more."""
        shown = overlay(followed.frame.image, followed.shown, self.palette)
        if followed.key_frame:
            shown[: max(2, len(shown) // 60)] = (230, 30, 50)
        if self._names is None:
            self._names = legend(self.classes, self.palette, shown.shape[1])
        shown = stacked(shown, self._names)
        if self._writer is None:
            self._size = (shown.shape[1] - shown.shape[1] % 2, shown.shape[0] - shown.shape[0] % 2)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            rate = self.rate if 0 < self.rate < 1000 else 25.0
            self._writer = cv2.VideoWriter(str(self.partial), code, rate, self._size)
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: cannot be written: OpenCV has no encoder for it here, or the disk is full")
        if shown.shape[1::-1] != self._size:
            fits = shown.shape[1] - shown.shape[1] % 2, shown.shape[0] - shown.shape[0] % 2
            shown = shown[: fits[1], : fits[0]] if fits == self._size else cv2.resize(shown, self._size)
        self._writer.write(cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Put the film in its place."""
        if self._writer is not None:
            self._writer.release()
            self.partial.replace(self.path)
            self._writer = None
