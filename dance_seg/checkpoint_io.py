"""Lets a Lightning Trainer save in the background and load without running code: Trainer(plugins=[...])."""

from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

from dance_seg.background import BackgroundWriter
from dance_seg.checkpoint import load_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole and hashed, written by a BackgroundWriter while training goes on.

    What fails in the background is raised by the next save, by `writer.check` and at the end of training.
    """

    def __init__(self, writer: BackgroundWriter | None = None) -> None:
        self.writer = writer or BackgroundWriter()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Copy what Lightning and the callbacks have gathered, and have it written. Raises CheckpointError."""
        self.writer.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU, always without running code, whatever is asked for. Raises CheckpointError."""
        self.writer.finish()
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint that Lightning no longer keeps."""
        self.writer.finish()
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Bring everything to the disk, and let go of what it took. Raises CheckpointError."""
        self.writer.close()
