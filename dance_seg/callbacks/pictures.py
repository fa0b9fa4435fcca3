"""Validation images beside their labels and predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.normalise import denormalise
from dance_seg.sample import Batch


class Pictures(Callback):
    """Keeps the first validation images with label and prediction as PNG files, and shows them to the tracker."""

    def __init__(self, folder: Path, palette: Sequence[tuple[int, int, int]], tracker: Any = None, count: int = 6):
        self.folder, self.palette, self.tracker, self.count = folder, palette, tracker, count
        self._kept: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._kept = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Keep the first few."""
        if not trainer.is_global_zero:
            return
        for name, image, label, prediction in zip(batch.names, batch.images, batch.labels, outputs, strict=True):
            if len(self._kept) < self.count:
                shown = denormalise(image).permute(1, 2, 0).cpu().numpy()
                self._kept.append((name, shown, label.cpu().numpy().astype(np.uint8), prediction.cpu().numpy()))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write them."""
        if not trainer.is_global_zero or not self._kept:
            return
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        # All 256 colours: with fewer Pillow writes 4 bits a pixel, and an ignored 255 becomes 15.
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.palette)] = self.palette
        for number, (name, image, label, prediction) in enumerate(self._kept):
            stem = f"{number}_{Path(name).name}"
            Image.fromarray(image).save(self.folder / f"{stem}_image.png")
            for kind, indices in (("label", label), ("prediction", prediction)):
                picture = Image.fromarray(indices.astype(np.uint8), mode="P")
                picture.putpalette(palette.tobytes())
                picture.save(self.folder / f"{stem}_{kind}.png")
        if self.tracker is not None:
            _, images, labels, predictions = zip(*self._kept, strict=True)
            masks = {"prediction": predictions, "label": labels}
            self.tracker.log_images("val/pictures", images, masks, pl_module.classes, step=trainer.global_step)
