"""What is run, counted and restored; no test looks at how long anything takes."""

import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost import latency
from dance_seg.cost.latency import Latency, evaluating, measure, measure_latency, measure_onnx_latency
from dance_seg.errors import DataError


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
    with pytest.raises(ValueError, match=r"input_size is \(0, 4\)"):
        measure_latency(Recorder(), (0, 4))
    for seconds in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="time_limit_s is"):
            measure(lambda: None, time_limit_s=seconds)


def test_a_warm_up_that_takes_too_long_ends_after_its_second_call(monkeypatch):
    clock, calls = iter(range(10_000)), []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(clock)))
    measure(lambda: calls.append(1), warm_up=50, runs=1, time_limit_s=0)
    assert len(calls) == 2 + 1


def test_a_meter_is_open_during_the_runs_that_count_and_no_others():
    events: list[str] = []

    class Meter:
        def __enter__(self):
            events.append("open")

        def __exit__(self, *error):
            events.append("shut")

    measure(lambda: events.append("run"), warm_up=2, runs=3, meter=Meter())
    assert events == ["run", "run", "open", "run", "run", "run", "shut"]


def test_the_record_says_how_the_weights_lie_and_what_else_the_machine_did(monkeypatch):
    monkeypatch.setattr(latency, "load_average", lambda: 3.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert not measure_latency(model, (4, 4), warm_up=0, runs=1).channels_last
    found = measure_latency(model.to(memory_format=torch.channels_last), (4, 4), warm_up=0, runs=1)
    assert (found.channels_last, found.load_average, found.runtime) == (True, 3.5, "torch")


def test_images_are_noise_and_leave_torchs_random_state_as_it_is():
    layer = nn.Conv2d(3, 1, 1)
    before = torch.get_rng_state()
    images = latency.images_for(layer, (50, 50), batch=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert images.shape == (2, 3, 50, 50)
    assert 0.9 < images.std() < 1.1


def write_onnx(path, shape):
    """An ONNX file of one ReLU over inputs of a shape."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["images"], ["logits"])], "network",
        [value("images", onnx.TensorProto.FLOAT, shape)], [value("logits", onnx.TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def test_an_onnx_file_is_measured_by_onnxruntime(tmp_path):
    found = measure_onnx_latency(write_onnx(tmp_path / "a.onnx", ["n", 3, "h", "w"]), (8, 12), batch=2, runs=3)
    assert (found.batch, found.input_size, found.runs, found.device, found.dtype) == (2, (8, 12), 3, "cpu", "float32")
    assert found.runtime.startswith("onnxruntime ")
    fixed = write_onnx(tmp_path / "b.onnx", [1, 3, 8, 12])
    assert measure_onnx_latency(fixed, runs=3).input_size == (8, 12)


def test_an_onnx_file_that_cannot_be_measured_is_named(tmp_path):
    anything, fixed = (tmp_path / name for name in ("a.onnx", "b.onnx"))
    write_onnx(anything, ["n", 3, "h", "w"]), write_onnx(fixed, [1, 3, 8, 12])
    with pytest.raises(ValueError, match=r"a\.onnx takes images of any size; .*--size"):
        measure_onnx_latency(anything)
    with pytest.raises(ValueError, match=r"b\.onnx takes a batch of 1 alone, not 2"):
        measure_onnx_latency(fixed, batch=2)
    with pytest.raises(ValueError, match=r"b\.onnx takes a height of 8 alone, not 9"):
        measure_onnx_latency(fixed, (9, 12))
    with pytest.raises(DataError, match=r"c\.onnx: takes images .* one input of images"):
        measure_onnx_latency(write_onnx(tmp_path / "c.onnx", [3, 8]))
    broken = tmp_path / "d.onnx"
    broken.write_bytes(b"no network")
    with pytest.raises(DataError, match=r"d\.onnx: onnxruntime cannot load it"):
        measure_onnx_latency(broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_its_name_is_recorded():
    found = measure_latency(Recorder().cuda(), (64, 64), runs=5)
    assert isinstance(found, Latency)
    assert found.device == torch.cuda.get_device_name()
