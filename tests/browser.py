"""Pages as a browser shows them."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=1200,3000"
)


def screenshot(page: Path, folder: Path, *, dark: bool = False) -> np.ndarray:
    """A page as grey levels (H, W), in the light or the dark theme; skips the test where there is no Chromium.

    Fails when the browser complains, as it would of anything that the page's security policy refuses.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    picture = folder / "page.png"
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [browser, *QUIET.split(), *theme, f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}",
         page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert picture.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr
    return np.asarray(Image.open(picture).convert("L"))
