"""Where a run's figures go: a local metrics.jsonl, which is the truth, and Weights & Biases, which may fail.

Both are loggers for a Lightning Trainer. Only the first rank writes. metrics.jsonl itself is `dance_seg.metrics_file`.
"""

import netrc
import os
import re
import socket
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pytorch_lightning.loggers.logger import DummyExperiment, Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dance_seg.machine import secrets
from dance_seg.metrics_file import MetricsFile, read_metrics
from dance_seg.plain_data import parse_json

__all__ = [
    "GuardedWandbLogger",
    "JsonlLogger",
    "MetricsFile",
    "group_of",
    "guarded_wandb_logger",
    "read_metrics",
    "tags_of",
    "wandb_mode",
]

T = TypeVar("T")

CONNECT_SECONDS = 5  # how long the server may take to answer at all
INIT_SECONDS = 30  # how long Weights & Biases may take to start
FINISH_SECONDS = 60  # and to send the rest; what is left stays in the run folder, for `wandb sync`
MAX_TAG = 64  # characters; Weights & Biases refuses a run with a longer one


class JsonlLogger(Logger):
    """Writes every metric that Lightning logs to FOLDER/metrics.jsonl."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.metrics_file = MetricsFile(Path(folder) / "metrics.jsonl")

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.metrics_file.path.parent.name

    @property
    def version(self) -> str:
        """None: one folder is one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.metrics_file.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line."""
        self.metrics_file.append(step or 0, metrics)

    @rank_zero_only
    def mark_resumed(self, step: int) -> None:
        """Say that training goes on from a checkpoint taken after `step` steps."""
        self.metrics_file.mark_resumed(step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved recipe stands in recipe.yaml."""

    def sync(self) -> None:
        """Bring everything to the disk; from any thread."""
        self.metrics_file.sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring everything to the disk."""
        self.sync()


def guarded_wandb_logger(
    folder: str | Path,
    *,
    project: str,
    run_id: str,
    config: Mapping[str, Any],
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    artifacts: bool = False,
) -> "GuardedWandbLogger | None":
    """A Weights & Biases logger that never stops a run; None when it is disabled.

    Offline without a key or when told so, and when the server is not reached in time; files are kept in FOLDER/wandb,
    for `wandb sync`. The same `run_id` continues the same run. `config` is the resolved recipe as plain data; values of
    environment variables that look like secrets are taken out of it. Without a `group` the seeds of one recipe stand
    together (`group_of`); `tags` are added to those of the recipe (`tags_of`). With `artifacts` the best and the newest
    checkpoint are kept as a model when the run ends.
    """
    possible = wandb_mode(mode)
    if possible == "disabled":
        return None
    options = {
        "project": project,
        "id": run_id,
        "name": name,
        "group": group or (group_of(name, config.get("seed", 0)) if name else None),
        "tags": list(dict.fromkeys([*tags_of(config), *tags])),
        "config": without_secrets(config),
    }
    modes = ("online", "offline") if possible == "online" else ("offline",)
    return GuardedWandbLogger(folder, options, modes=modes, artifacts=artifacts)


def group_of(name: str, seed: Any) -> str:
    """The name of a run without its own seed at the end, so that the seeds of one recipe are one group.

    >>> group_of("camvid_dance_seed2", 2), group_of("camvid_dance-s2", 2), group_of("camvid_dance_2", 2)
    ('camvid_dance', 'camvid_dance', 'camvid_dance')
    >>> group_of("camvid_resnet18", 18), group_of("camvid_dance_1", 2)
    ('camvid_resnet18', 'camvid_dance_1')
    """
    return re.sub(rf"[-_.](seed|s)?[-_.=]?{re.escape(str(seed))}$", "", name) or name


def tags_of(config: Mapping[str, Any]) -> list[str]:
    """What a run is found by: its method, data and model, from the recipe as plain data.

    >>> tags_of({"data": {"name": "camvid"}, "model": {"name": "smp", "args": {"arch": "fpn"}}, "data_slimming": {}})
    ['data_slimming', 'camvid', 'smp', 'fpn']
    """
    methods = [
        name
        for name in ("data_slimming", "network_slimming", "supernet", "distillation")
        if config.get(name) is not None
    ] or ["dense"]
    methods += ["dance"] if methods == ["data_slimming", "network_slimming"] else []
    data, model = (config.get(key) or {} for key in ("data", "model"))
    arguments = model.get("args") or {}
    named = [data.get("name"), model.get("name"), arguments.get("arch"), arguments.get("encoder_name")]
    return [str(tag)[:MAX_TAG] for tag in (*methods, *named) if tag]


def wandb_mode(wanted: str = "auto") -> str:
    """`online`, `offline` or `disabled`: as wanted, by WANDB_MODE when left open; never online without a key."""
    if wanted == "auto":
        by_environment = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
        wanted = by_environment.get(os.environ.get("WANDB_MODE", ""), "online")
    if wanted == "online" and not _has_key():
        return "offline"  # it would ask for a key, and wait
    return wanted


class GuardedWandbLogger(Logger):
    """Passes on to Lightning's WandbLogger; at its first failure it warns once and falls silent: training goes on."""

    def __init__(
        self, folder: str | Path, options: Mapping[str, Any], modes: Sequence[str], *, artifacts: bool = False
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.artifacts = artifacts
        self.options = dict(options)
        self.modes = tuple(modes)  # tried in this order
        self._logger: Any = None
        self._failed = False

    @property
    def name(self) -> str:
        """The project's name."""
        return str(self.options["project"])

    @property
    def version(self) -> str:
        """The id of the run."""
        return str(self.options["id"])

    @property
    def save_dir(self) -> str:
        """Where the files of Weights & Biases are kept."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases, or after a failure something that takes any call and does nothing."""
        experiment = self._guard("start", lambda logger: logger.experiment)
        return DummyExperiment() if experiment is None else experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Pass metrics on, over the axis trainer/global_step."""
        self._guard("log metrics", lambda logger: logger.log_metrics(dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add to the run's config."""
        plain = vars(params) if isinstance(params, Namespace) else params
        self._guard("log the configuration", lambda logger: logger.log_hyperparams(without_secrets(plain)))

    @rank_zero_only
    def log_images(
        self,
        key: str,
        images: Sequence[np.ndarray],
        masks: Mapping[str, Sequence[np.ndarray]],
        class_names: Sequence[str],
        step: int,
    ) -> None:
        """Show images (H, W, 3), uint8, each with masks (H, W) of class indices by name: prediction, label, ..."""

        def show(logger: Any) -> None:
            import wandb

            names = {**dict(enumerate(class_names)), 255: "ignored"}
            panels = [
                wandb.Image(
                    image,
                    masks={
                        name: {"mask_data": np.asarray(of_each[number]), "class_labels": names}
                        for name, of_each in masks.items()
                    },
                )
                for number, image in enumerate(images)
            ]
            logger.log_metrics({key: panels}, step)

        self._guard("log images", show)

    @rank_zero_only
    def log_histogram(self, key: str, values: Sequence[float] | np.ndarray, step: int) -> None:
        """Show how values are distributed."""

        def show(logger: Any) -> None:
            import wandb

            logger.log_metrics({key: wandb.Histogram(np.asarray(values, dtype=float).tolist())}, step)

        self._guard("log a histogram", show)

    @rank_zero_only
    def finish(self) -> None:
        """Say what the run came to, end it and send the rest; the last call, since a Trainer may fit several times."""
        if self._logger is not None and not self._failed:
            last = [
                ("note what inference costs", self._note_inference),
                *([("keep the checkpoints", self._keep_checkpoints)] if self.artifacts else []),
                ("finish", lambda logger: logger.experiment.finish()),
            ]
            for what, act in last:
                self._failed = False  # what is already sent must be ended, whatever else could not be said
                self._guard(what, act)
        self._logger, self._failed = None, True

    def _note_inference(self, logger: Any) -> None:
        """What one forward pass costs belongs to the run, not to a step."""
        path = self.folder / "cost.json"
        costs = parse_json(path.read_bytes()) if path.is_file() else {}
        if costs.get("inference"):
            logger.experiment.summary.update({"inference": without_secrets(costs["inference"])})

    def _keep_checkpoints(self, logger: Any) -> None:
        """The best and the newest checkpoint as one version of a model; equal files are sent once."""
        import wandb

        folder = self.folder / "checkpoints"
        files = {"best.ckpt": folder / "best.ckpt", "last.ckpt": max(folder.glob("step-*.ckpt"), default=folder)}
        there = {name: path for name, path in files.items() if path.is_file()}
        if not there:
            return
        model = wandb.Artifact(f"model-{self.version}", type="model", description=str(self.options["name"] or ""))
        for name, path in there.items():
            # The file itself is sent, not a copy of it: nothing writes to a checkpoint again.
            model.add_file(str(path), name=name, policy="immutable")
        logger.experiment.log_artifact(model, aliases=["latest", *(name.removesuffix(".ckpt") for name in there)])

    def _guard(self, what: str, act: Callable[[Any], T]) -> T | None:
        if self._failed:
            return None
        try:
            if self._logger is None:
                self._logger = self._start()
            return act(self._logger)
        except Exception as error:
            self._failed = True
            warnings.warn(
                f"Weights & Biases could not {what} ({type(error).__name__}: {error}); the run goes on without it, and "
                f"everything is in {self.folder / 'metrics.jsonl'}",
                stacklevel=3,
            )
            return None

    def _start(self) -> Any:
        for mode in self.modes:
            try:
                return self._start_in(mode)
            except Exception as error:
                if mode == self.modes[-1]:
                    raise
                warnings.warn(
                    f"Weights & Biases could not be reached ({type(error).__name__}: {error}); the run is kept offline "
                    f"in {self.folder / 'wandb'}, to be sent by: wandb sync",
                    stacklevel=4,
                )

    def _start_in(self, mode: Any) -> Any:
        import wandb
        from pytorch_lightning.loggers.wandb import WandbLogger

        wanted: dict[str, Any] = {
            "console": "off",  # what is printed stays here
            "save_code": False,
            "silent": mode == "offline",
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "reinit": "finish_previous",
        }
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
        if mode == "online":
            _look_for_server(wandb.setup().settings.base_url)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(dir=str(self.folder), mode=mode, resume="allow", settings=settings, **self.options)
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            # The summary holds the highest mIoU beside the last; of all else, such as costs, what it came to.
            run.define_metric("val/miou", step_metric="trainer/global_step", step_sync=True, summary="max,last")
            return WandbLogger(save_dir=self.folder, experiment=run)
        except Exception:
            wandb.teardown()  # a run that has half begun would keep the id
            raise


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain data, in which values of environment variables that look like secrets are blanked out.

    >>> without_secrets({"lr": 0.1, "sizes": (1, 2), "root": Path("data")})
    {'lr': 0.1, 'sizes': [1, 2], 'root': 'data'}
    """
    hidden = secrets().values()

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {clean(str(key)): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [clean(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        text = str(value)
        for secret in hidden:
            text = text.replace(secret, "<removed>")
        return text

    return clean(config)


def _has_key() -> bool:
    """Whether Weights & Biases could log in without asking a person."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base_url = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(base_url).netloc] if base_url else ["api.wandb.ai", "api.forge.coreweave.com"]
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            keys = netrc.netrc(str(path))
        except (OSError, netrc.NetrcParseError):
            continue
        if any(keys.authenticators(host) for host in hosts):
            return True
    return False


def _look_for_server(base_url: str) -> None:
    """Raise OSError when nothing answers, which takes seconds; Weights & Biases itself would try for half a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return
    url = urlsplit(base_url)
    port = url.port or (80 if url.scheme == "http" else 443)
    socket.create_connection((url.hostname or "", port), timeout=CONNECT_SECONDS).close()
