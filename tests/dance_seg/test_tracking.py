"""metrics.jsonl is complete and readable whatever happens, and Weights & Biases can fail at any point."""

import ast
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader

from dance_seg import tracking
from dance_seg.metrics_file import MetricsFile, read_metrics
from dance_seg.tracking import GuardedWandbLogger, JsonlLogger, guarded_wandb_logger, wandb_mode, without_secrets

SECRET = "0123456789abcdef0123456789abcdef01234567"


def figures(path: Path, key: str = "loss") -> dict[int, Any]:
    return {row["step"]: row[key] for row in read_metrics(path) if key in row}


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path)
    assert not path.exists()
    file.append(1, {"loss": 0.5, "epoch": 0})
    file.append(2, {"loss": torch.tensor(0.25), "count": np.int64(3)})
    first, second = read_metrics(path)
    assert (first["step"], first["loss"], first["epoch"]) == (1, 0.5, 0)
    assert (second["step"], second["loss"], second["count"]) == (2, 0.25, 3)
    assert first["time"].endswith("+00:00")


def test_a_line_is_with_the_system_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.append(step, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step + 1  # by another reader, nothing closed


def test_the_disk_is_waited_for_only_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (waits.append(fd), fsync(fd)))
    file = MetricsFile(tmp_path / "metrics.jsonl", sync_seconds=1000)
    for step in range(50):
        file.append(step, {"loss": 1.0})
    assert len(waits) == 1
    file.sync()
    assert len(waits) == 2


def test_values_that_json_does_not_know_are_null_and_named(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"loss": float("nan"), "grad": torch.tensor(float("-inf")), "miou": 50.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert (row["loss"], row["grad"], row["miou"]) == (None, None, 50.0)
    assert row["not_finite"] == {"loss": "nan", "grad": "-inf"}


def test_rows_past_the_step_that_was_resumed_from_are_superseded(tmp_path: Path) -> None:
    """Trained to step 6, killed, resumed from the checkpoint after 4 steps: steps 4 and 5 are done again."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(7):
        file.append(step, {"loss": float(step)})
    file.append(3, {"val/miou": 40.0})
    file.mark_resumed(4)
    for step in (4, 5):
        file.append(step, {"loss": step + 0.5})
    assert figures(tmp_path / "metrics.jsonl") == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.5, 5: 5.5}
    assert figures(tmp_path / "metrics.jsonl", "val/miou") == {3: 40.0}


def test_a_run_resumed_twice_reads_as_one(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for begin, end in [(0, 5), (3, 9), (2, 6)]:
        if begin:
            file.mark_resumed(begin)
        for step in range(begin, end):
            file.append(step, {"loss": float(10 * begin + step)})
    found = figures(tmp_path / "metrics.jsonl")
    assert found == {0: 0.0, 1: 1.0, 2: 22.0, 3: 23.0, 4: 24.0, 5: 25.0}


def test_an_unfinished_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(0, {"loss": 0.0})
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "lo')  # killed here
    assert figures(path) == {0: 0.0}
    MetricsFile(path).append(1, {"loss": 1.0})
    assert figures(path) == {0: 0.0, 1: 1.0}
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("line", ["not json", "5", '{"loss": 1.0}', '{"step": "x"}'])
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(0, {"loss": 0.0})
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(path)


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.mark_resumed(3)
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


# -- Weights & Biases --------------------------------------------------------------------------------------------------


class Module(LightningModule):
    """Five steps whose losses are 0, 1, 2, 3, 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.save_hyperparameters({"lr": 0.1, "sizes": (1, 2)})

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).sum() * 0 + batch_idx
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, mirror: GuardedWandbLogger | None) -> None:
    loggers = [JsonlLogger(folder), *([mirror] if mirror else [])]
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=loggers, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(torch.ones(5, 1)))
    (folder / "cost.json").write_text(json.dumps({"inference": {"gmacs": 3.5}}))
    if mirror:
        show_pictures(mirror)
        mirror.finish()
    assert figures(folder / "metrics.jsonl") == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def show_pictures(mirror: GuardedWandbLogger) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    masks = {"prediction": [np.ones((4, 6), np.int64)], "label": [np.full((4, 6), 255, np.uint8)]}
    mirror.log_images("val/pictures", [image], masks, ("road", "sky"), step=5)
    mirror.log_histogram("plan/scale", [0.5, 0.5, 1.0], step=5)


def make_logger(folder: Path, **options: Any) -> GuardedWandbLogger:
    logger = guarded_wandb_logger(
        folder, **{"project": "test", "run_id": "run1", "config": {}, "mode": "offline", **options}
    )
    assert logger is not None
    return logger


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The real library, without a key, ended after the test."""
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    yield wandb
    wandb.teardown()


def broken(*args: object, **keywords: object) -> None:
    raise ConnectionError("the server is gone")


def break_init(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", broken)


def break_log(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log, calls = wandb.Run.log, []

    def third_call_fails(run: Any, *args: Any, **keywords: Any) -> None:
        calls.append(args)
        log(run, *args, **keywords) if len(calls) < 3 else broken()

    monkeypatch.setattr(wandb.Run, "log", third_call_fails)


def break_finish(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb.Run, "finish", broken)


def break_pictures(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Image", broken)


def break_summary(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb.sdk.wandb_summary.Summary, "update", broken)


@pytest.mark.parametrize("break_it", [break_init, break_log, break_finish, break_pictures, break_summary])
def test_a_failure_anywhere_warns_once_and_stops_nothing(
    break_it: Callable[[Any, pytest.MonkeyPatch], None], wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(wandb, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, make_logger(tmp_path))
    ours = [str(warning.message) for warning in caught if "the server is gone" in str(warning.message)]
    assert len(ours) == 1
    assert "the run goes on without it" in ours[0]
    monkeypatch.undo()


def test_what_could_not_be_said_at_the_end_does_not_keep_a_run_from_being_finished(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_summary(wandb, monkeypatch)
    monkeypatch.setattr(wandb.Run, "log_artifact", broken)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    finished, finish = [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run: (finished.append(run.id), finish(run)))
    with pytest.warns(UserWarning, match="the server is gone") as caught:
        train(tmp_path, make_logger(tmp_path, artifacts=True))
    ours = [str(warning.message) for warning in caught if "the server is gone" in str(warning.message)]
    assert ["could not note what inference costs" in ours[0], "could not keep the checkpoints" in ours[1]] == [True] * 2
    assert finished == ["run1"]


def test_checkpoints_are_kept_only_when_asked_for(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def keep(run: Any, artifact: Any, aliases: list[str]) -> None:
        kept.append((artifact.name, artifact.type, sorted(artifact.manifest.entries), aliases))

    monkeypatch.setattr(wandb.Run, "log_artifact", keep)
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "step-00000004", "step-00000008"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").write_bytes(name.encode())
    for wanted in (False, True):
        logger = make_logger(tmp_path, artifacts=wanted)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finish()
        assert len(kept) == wanted
    assert kept == [("model-run1", "model", ["best.ckpt", "last.ckpt"], ["latest", "best", "last"])]


def test_a_run_that_kept_no_checkpoint_yet_has_no_model(wandb: Any, tmp_path: Path) -> None:
    logger = make_logger(tmp_path, artifacts=True)
    logger.log_metrics({"loss": 1.0}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logger.finish()


@pytest.mark.parametrize(
    ("name", "seed", "group", "expected"),
    [
        ("camvid_dance_seed2", 2, None, "camvid_dance"),
        ("camvid_dance", 0, None, "camvid_dance"),
        ("camvid_dance_seed2", 0, None, "camvid_dance_seed2"),  # not its own seed: a name that means something else
        ("camvid_resnet18", 18, None, "camvid_resnet18"),
        ("_1", 1, None, "_1"),
        ("a_seed1", 1, "mine", "mine"),
    ],
)
def test_the_seeds_of_a_recipe_are_one_group_unless_another_is_given(
    name: str, seed: int, group: str | None, expected: str, tmp_path: Path
) -> None:
    assert make_logger(tmp_path, name=name, group=group, config={"seed": seed}).options["group"] == expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, ["dense"]),
        ({"data_slimming": {}, "network_slimming": None}, ["data_slimming"]),
        ({"network_slimming": {"keep": 0.5}}, ["network_slimming"]),
        ({"data_slimming": {}, "network_slimming": {}}, ["data_slimming", "network_slimming", "dance"]),
    ],
)
def test_a_run_is_tagged_by_method_data_and_model_and_what_the_user_adds(
    sections: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    model = {"name": "smp", "args": {"arch": "fpn", "encoder_name": "x" * 100, "encoder_weights": None}}
    config = {"data": {"name": "camvid", "args": {}}, "model": model, **sections}
    tags = make_logger(tmp_path, config=config, tags=["mine", "fpn"]).options["tags"]
    assert tags == [*expected, "camvid", "smp", "fpn", "x" * 64, "mine"]


def test_the_summary_holds_the_highest_miou_and_the_last_of_all_else(wandb: Any, tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    for step, miou in enumerate([40.0, 50.0, 45.0]):
        logger.log_metrics({"val/miou": miou, "cost/train_gmacs": 10.0 * step}, step)
    summary = logger.experiment.summary
    assert dict(summary["val/miou"]) == {"max": 50.0, "last": 45.0}
    assert summary["cost/train_gmacs"] == 20.0
    logger.finish()


def test_after_a_failure_the_experiment_takes_any_call(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_init(wandb, monkeypatch)
    logger = make_logger(tmp_path)
    with pytest.warns(UserWarning, match="could not start"):
        assert isinstance(logger.experiment, DummyExperiment)
    logger.experiment.anything(1, 2)


def test_a_run_without_network_is_kept_offline(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a failure would have warned
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        train(tmp_path, make_logger(tmp_path, config={"model": {"sizes": (1, 2)}, "note": f"key {SECRET}"}, name="a"))
    wandb.teardown()  # what finishing has handed over is then written
    (run,) = (tmp_path / "wandb").glob("offline-run-*-run1")
    kept = (run / "run-run1.wandb").read_bytes()
    for key in (b"trainer/global_step", b"loss", b"val/pictures", b"plan/scale", b"sizes", b"<removed>"):
        assert key in kept
    assert len(list(run.rglob("*.mask.png"))) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert "WANDB_MODE" not in os.environ


def test_the_run_goes_on_under_its_id_when_resumed(wandb: Any, tmp_path: Path) -> None:
    for _ in range(2):
        logger = make_logger(tmp_path)
        assert logger.experiment.id == logger.version == "run1"
        assert logger.experiment.settings.resume == "allow"
        logger.finish()


def test_neither_what_is_printed_nor_code_is_sent(wandb: Any, tmp_path: Path) -> None:
    settings = make_logger(tmp_path).experiment.settings
    assert (settings.console, settings.save_code) == ("off", False)


def test_a_run_that_has_half_begun_is_given_up_before_the_next_attempt(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights & Biases would otherwise hold its id in use, and refuse the same run offline."""
    calls = []
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(tracking, "_look_for_server", lambda url: None)
    monkeypatch.setattr(wandb, "init", lambda mode, **options: (calls.append(mode), broken()))
    monkeypatch.setattr(wandb, "teardown", lambda: calls.append("teardown"))
    with pytest.warns(UserWarning, match="the server is gone"):
        make_logger(tmp_path, mode="online").log_metrics({"loss": 1.0}, 0)
    assert calls == ["online", "teardown", "offline", "teardown"]


def test_two_runs_in_one_process_do_not_mix(wandb: Any, tmp_path: Path) -> None:
    assert make_logger(tmp_path, run_id="first").experiment.id == "first"
    assert make_logger(tmp_path, run_id="second").experiment.id == "second"


def test_with_a_key_but_no_server_the_run_is_kept_offline(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(tracking, "_look_for_server", broken)
    logger = make_logger(tmp_path, mode="auto")
    with pytest.warns(UserWarning, match=r"could not be reached .*the server is gone.*kept offline .*wandb sync"):
        logger.log_metrics({"loss": 1.0}, 0)
    assert logger.experiment.settings.mode == "offline"


def test_a_server_that_does_not_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError):  # noqa: PT011  (the system's own words)
        tracking._look_for_server("http://127.0.0.1:1")  # a port that nobody listens on


@pytest.mark.parametrize(
    ("wanted", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": SECRET}, "online"),
        ("auto", {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": SECRET, "WANDB_MODE": "disabled"}, "disabled"),
        ("online", {}, "offline"),
        ("online", {"WANDB_API_KEY": SECRET, "WANDB_MODE": "disabled"}, "online"),
        ("offline", {"WANDB_API_KEY": SECRET}, "offline"),
        ("disabled", {"WANDB_API_KEY": SECRET}, "disabled"),
    ],
)
def test_the_mode_follows_what_is_wanted_the_environment_and_the_key(
    wanted: str, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no.netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(wanted) == mode
    logger = guarded_wandb_logger(tmp_path, project="test", run_id="run1", config={}, mode=wanted)  # type: ignore[arg-type]
    assert (logger is None) == (mode == "disabled")


@pytest.mark.parametrize(("host", "mode"), [("api.wandb.ai", "online"), ("example.org", "offline")])
def test_a_key_may_stand_in_netrc(host: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {SECRET}\n")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("auto") == mode


def test_values_of_secret_environment_variables_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("PLACE", "data/cityscapes")
    config = {"root": "data/cityscapes", "deep": [{"url": f"https://{SECRET}@host"}], SECRET: 1, "lr": 0.1}
    assert without_secrets(config) == {
        "root": "data/cityscapes",
        "deep": [{"url": "https://<removed>@host"}],
        "<removed>": 1,
        "lr": 0.1,
    }


def test_wandb_is_imported_only_when_a_run_starts() -> None:
    tree = ast.parse(Path(tracking.__file__).read_text())
    at_once = [ast.unparse(line) for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
    assert at_once
    assert not [line for line in at_once if "wandb" in line]


def test_reading_metrics_imports_nothing_heavy() -> None:
    code = "import dance_seg.metrics_file, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
