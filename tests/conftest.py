"""What every test shares: a seed, a tiny model, a tiny batch, and no network."""

import os

# Before any library reads them: tests neither ask the network nor write to anybody's account.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from dance_seg.sample import IGNORE, Batch  # noqa: E402

NUM_CLASSES = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make goldens` writes the golden figures instead of comparing with them."""
    parser.addoption("--rewrite-goldens", action="store_true", help="write tests/goldens anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that others run beside them to the end; skip what this machine cannot run, saying why."""
    items.sort(key=lambda item: "long" not in item.keywords)
    has_accelerator = torch.accelerator.is_available()
    has_camvid = bool(os.environ.get("DANCE_SEG_CAMVID"))
    for item in items:
        if "gpu" in item.keywords and not has_accelerator:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
        if "data" in item.keywords and not has_camvid:
            item.add_marker(pytest.mark.skip(reason="needs CamVid: set DANCE_SEG_CAMVID to its folder"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> nn.Module:
    """A network with BatchNorm and dropout: images (N, 3, H, W) -> logits (N, 3, H, W), for even H and W."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, NUM_CLASSES, 1),
        nn.Upsample(scale_factor=2),
    )


@pytest.fixture
def tiny_batch() -> Batch:
    """Two images of 16x24, normalised, with labels of 3 classes and some pixels to ignore."""
    labels = torch.randint(0, NUM_CLASSES, (2, 16, 24))
    labels[:, :2] = IGNORE
    return Batch(torch.randn(2, 3, 16, 24), labels, torch.ones(2), ("first", "second"))
