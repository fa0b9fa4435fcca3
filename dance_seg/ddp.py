"""The strategy of several ranks: validation of unequal shares, networks that shrink, ranks that may be lost."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dance_seg.errors import LostRankError

GRACE_SECONDS = 30.0
"""How long a process may take to say what happened once another has ended; then it is ended."""


class UnevenValidation(DDPStrategy):
    """DDP whose validation does not pass through the wrapper, which would wait for ranks that have fewer images."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One rank's validation step, on its own."""
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    def renew(self) -> None:
        """Wrap the module anew, since its parameters are others after a cut."""
        assert self.lightning_module is not None
        self.model = self._setup_model(self.lightning_module)
        self._register_ddp_hooks()

    def end_ranks(self) -> None:
        """End the ranks that this process has started, if they do not end by themselves within the grace."""
        if isinstance(self.launcher, PatientLauncher):
            self.launcher.end(GRACE_SECONDS)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            assert self.cluster_environment is not None
            self._launcher = PatientLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


class PatientLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine; when one fails, this process has time to say so before it ends.

    Lightning's own kills it within seconds, whatever it is doing: naming the lost rank, or writing a checkpoint.
    """

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, then call the function in this one."""
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        return function(*args, **kwargs)

    def end(self, grace_seconds: float) -> None:
        """Wait for the ranks, and kill those that have not ended after the grace."""
        until = time.monotonic() + grace_seconds
        for process in self.procs:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def _watch(self) -> None:
        while all(process.poll() is None or process.returncode == 0 for process in self.procs):
            if all(process.poll() == 0 for process in self.procs):
                return
            time.sleep(1.0)
        time.sleep(GRACE_SECONDS)
        codes = [process.poll() for process in self.procs]
        print(
            f"error: other ranks ended with {codes}; this one waited in vain and is ended", file=sys.stderr, flush=True
        )
        for process in self.procs:
            process.kill()
        os._exit(LostRankError.status)
