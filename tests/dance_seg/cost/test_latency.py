"""What is run, counted and restored; no test looks at how long anything takes."""

import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost import latency
from dance_seg.cost.latency import Latency, evaluating, measure, measure_latency


class Recorder(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.calls: list[tuple] = []

    def forward(self, images: Tensor) -> Tensor:
        output = self.norm(self.layer(images))
        self.calls.append((tuple(images.shape), self.training, torch.is_inference_mode_enabled(), output.dtype))
        return output


def test_the_model_runs_in_evaluation_and_inference_mode_at_the_size_asked_for():
    model = Recorder()
    found = measure_latency(model, (8, 12), batch=3, warm_up=2, runs=4)
    assert model.calls == [((3, 3, 8, 12), False, True, torch.float32)] * 6
    assert (found.runs, found.batch, found.input_size) == (4, 3, (8, 12))
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert 0 < found.p50_ms <= found.p90_ms


def test_half_precision_is_autocast_and_said_so():
    model = Recorder()
    assert measure_latency(model, (4, 4), dtype="bfloat16", warm_up=0, runs=1).dtype == "bfloat16"
    assert model.calls[0][-1] == torch.bfloat16
    assert measure_latency(model.double(), (4, 4), warm_up=0, runs=1).dtype == "float64"


def test_each_module_is_back_in_its_mode_afterwards_also_after_an_error():
    model = Recorder()
    model.norm.eval()
    measure_latency(model, (4, 4), warm_up=0, runs=1)
    assert (model.training, model.layer.training, model.norm.training) == (True, True, False)
    with pytest.raises(RuntimeError, match="channels"), evaluating(model):
        model(torch.zeros(1, 5, 4, 4))
    assert (model.training, model.layer.training, model.norm.training) == (True, True, False)


def test_percentiles_and_throughput_by_hand(monkeypatch):
    """Times 1, 2, ..., 11 ms: the median is 6, nine tenths of the way from first to last is 10, the mean is 6."""
    monkeypatch.setattr(latency, "measure", lambda call, **options: [float(ms) for ms in range(1, 12)])
    found = measure_latency(Recorder(), (4, 4), batch=3)
    assert (found.p50_ms, found.p90_ms, found.mean_ms, found.runs) == (6, 10, 6, 11)
    assert found.images_per_second == 500


def test_every_run_waits_for_the_device(monkeypatch):
    """A clock stopped before the accelerator has finished measures nothing."""
    order: list[str] = []
    monkeypatch.setattr(latency, "synchronise", lambda device: order.append(f"wait {device}"))
    measure(lambda: order.append("run"), device="cuda:1", warm_up=1, runs=2)
    assert order == ["run", "wait cuda:1", "run", "wait cuda:1", "run", "wait cuda:1"]


def test_as_many_runs_as_fit_into_the_time_limit_but_never_fewer_than_five(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(clock)))  # each look costs a second
    assert measure(lambda: None, warm_up=0, time_limit_s=0) == [1000.0] * 5
    assert len(measure(lambda: None, warm_up=0, time_limit_s=20)) == 10  # a run looks twice
    assert len(measure(lambda: None, warm_up=0, runs=30, time_limit_s=0)) == 30


def test_choices_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match=r"dtype is 'int8'.*bfloat16"):
        measure_latency(Recorder(), (4, 4), dtype="int8")
    with pytest.raises(ValueError, match="batch is 0"):
        measure_latency(Recorder(), (4, 4), batch=0)
    with pytest.raises(ValueError, match="runs is 0"):
        measure(lambda: None, runs=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_its_name_is_recorded():
    found = measure_latency(Recorder().cuda(), (64, 64), runs=5)
    assert isinstance(found, Latency)
    assert found.device == torch.cuda.get_device_name()
