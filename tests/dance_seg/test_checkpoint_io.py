"""A Lightning Trainer saves and resumes through it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.checkpoint_io import AtomicCheckpointIO
from dance_seg.errors import CheckpointError


def test_lightning_saves_and_resumes_through_it(tmp_path: Path) -> None:
    """Two epochs, and one epoch resumed for another, end with the same weights."""
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.layer(batch).square().mean()
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def fit(epochs: int, ckpt_path: Path | None = None) -> tuple[Module, Trainer]:
        torch.manual_seed(0)
        module, keeper = Module(), ModelCheckpoint(tmp_path, monitor="train/loss", save_top_k=1)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, plugins=[AtomicCheckpointIO()], callbacks=[keeper],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        data = torch.linspace(-1, 1, 32).view(8, 4)
        trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=str(ckpt_path) if ckpt_path else None)
        return module, trainer

    straight, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer.strategy.checkpoint_io.teardown()  # it is written in the background
    assert load_checkpoint(tmp_path / "half.ckpt")["global_step"] == 2
    resumed, _ = fit(2, tmp_path / "half.ckpt")
    assert torch.equal(straight.layer.weight, resumed.layer.weight)


def test_lightning_cannot_save_what_could_not_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint({"global_step": 1}, path)
    plugin = AtomicCheckpointIO()
    with pytest.raises(CheckpointError, match=r"callbacks\.X is a "):
        plugin.save_checkpoint({"callbacks": {"X": Path("x")}}, path)
    assert [other.name for other in tmp_path.iterdir()] == ["a.ckpt"]
    assert plugin.load_checkpoint(path, weights_only=False) == {"global_step": 1}
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert not path.exists()
