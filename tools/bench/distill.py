"""Online distillation beside its teacher and the baselines, in mIoU, measured milliseconds and MACs.

    python -m tools.bench.distill [key=value ...] [--root DIR] [--quick]

The options are those of recipes/video_shapes.yaml, which overrides change; a dearer teacher, whose encoder
tools.fetch_weights brings, is trained once on drawn scenes and kept under runs/teachers by the hash of its recipe, and
so is the student's beginning, trained on the same scenes, since a student that follows a stream starts from weights
trained elsewhere. Then the same table is made on CamVid's clip, by recipes/video_camvid.yaml, where its data is found;
with --root DIR on that alone, and the options are those of its recipe. Every method sees the same frames and is scored,
before it learns from a frame, against the labels that the teacher gave in one pass over the stream. --quick is to try
it: small, and no result.

The paper's streams have one to four classes of objects each, and its mIoU is the mean over these. Ours has eleven, of
which five cover less than 2 % of the pixels each: thin or far things, on which the teacher itself is poor. So the
threshold goes by the other classes, and so does the mIoU against the teacher; that over all classes stands beside it.
"""

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dance_seg.cost.latency import interleave
from dance_seg.distillation.learning import attempt, images_of, target_of
from dance_seg.distillation.objects import weighted_cross_entropy
from dance_seg.distillation.online import follow
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.scores import StreamScores, pricing
from dance_seg.distillation.state import StreamState
from dance_seg.distillation.teacher import NetworkTeacher
from dance_seg.part import Part
from dance_seg.recipe import Recipe, load_recipe
from dance_seg.sample import Frame
from dance_seg.teachers import build_student, checkpoint_teacher, recipe_hash, teacher_recipe, trained
from datamodules import build_datamodule
from datamodules.video import VideoSource, build_source
from tools.bench.common import precision, ratio, spread, write_result
from tools.cli import parser, run
from tools.fetch_weights import ENCODER, WEIGHTS, fetch

TEACHERS = Path("runs/teachers")
CAMVID = "recipes/video_camvid.yaml"
UPDATES = 8  # of the key frame whose overhead is measured
SPEED_SIZE = (360, 480)
# A network that is good after few epochs, and dear since it sees each frame at six scales and mirrored, as segmentation
# is evaluated where cost does not matter: 17 times its own MACs.
LARGE_TEACHER = (
    "name=bench_teacher",
    f"model.args.encoder_name={ENCODER}",
    "data.args.num_train=1000",
    "data.args.size=[192,256]",
    "data.args.crop=[192,256]",
    "data.args.cache_gb=2",
    "trainer.max_epochs=10",
    "trainer.validate_every=5",
    precision(),
    "trainer.ema=0.99",
)
VIEWS = {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "flip": True}
ONE_VIEW = {"scales": (1.0,), "flip": False}
CAMVID_TEACHER = (
    "model.args.arch=fpn",
    f"model.args.encoder_name={ENCODER}",
    "data.args.resolution=0.5334",
    "data.args.crop=[192,256]",
    "trainer.max_epochs=20",
    "trainer.validate_every=10",
    precision(),
)
QUICK_TEACHER = (
    "name=bench_teacher_quick",
    "data.args.num_train=16",
    "data.args.num_val=4",
    "data.args.size=[64,96]",
    "data.args.crop=[64,96]",
    "data.args.batch_size=4",
    "trainer.max_epochs=2",
)
# Settings were chosen on the scenes of another seed. Classes named background cover less than 2 % of the pixels each.
# The clip's are those of a student that begins worse: nothing is chosen on the clip.
STREAM = (
    "data.args.num_frames=1000",
    "data.args.size=[192,256]",
    "data.args.scene_frames=250",
    "data.args.scene_seed=1",
    "distillation.threshold=0.93",
    "distillation.learning_rate=0.005",
    "distillation.u_max=16",
    "distillation.background=[Pole,SignSymbol,Fence,Pedestrian,Bicyclist]",
)
QUICK_STREAM = ("data.args.num_frames=96", "data.args.size=[64,96]", "data.args.scene_frames=48")
CAMVID_STREAM = (
    "distillation.resolution=0.5334",
    "distillation.threshold=0.9",
    "distillation.learning_rate=0.02",
    "distillation.background=[Pole,SignSymbol,Car,Pedestrian]",
)
QUICK_CAMVID = (
    "data.args.resolution=0.2",
    "data.args.crop=[64,96]",
    "trainer.max_epochs=2",
    "trainer.validate_every=2",
)
METHODS: dict[str, dict[str, Any]] = {
    "online, geometric": {"method": "online", "controller": "geometric"},
    "online, linear": {"method": "online", "controller": "linear"},
    "teacher on every frame": {"method": "teacher"},
    "frozen student": {"method": "frozen"},
    "last mask held": {"method": "hold"},
    "student trained offline": {"method": "offline"},
}
COLUMNS = {
    "mIoU vs teacher": ("miou_vs_teacher", ".1f"),
    "all classes": ("miou_vs_teacher_all", ".1f"),
    "vs truth, all": ("miou_vs_truth_all", ".1f"),
    "vs teacher, last part": ("miou_vs_teacher_rest", ".1f"),
    "vs truth, all, last part": ("miou_vs_truth_all_rest", ".1f"),
    "teacher on": ("teacher_fraction", ".1%"),
    "updates": ("updates", ",d"),
    "times cheaper, ms": ("times_cheaper_ms", ".1f"),
    "times cheaper, MACs": ("times_cheaper_macs", ".1f"),
    "stability": ("stability", ".1f"),
}
STATIONARY = {"stationary": True, "cuts": None}


class Setting(NamedTuple):
    """A stream with its teacher, the student all methods begin with, and the teacher's labels of every frame."""

    source: VideoSource
    frames: list[Frame]
    teacher: NetworkTeacher
    student: nn.Module
    options: OnlineDistillation
    labels: list[np.ndarray]
    teacher_row: dict[str, Any]
    seed: int


class AfterCut(NamedTuple):
    """How a student came through a scene cut."""

    cut: int  # the first frame of the new scene
    accuracy_before: float  # in [0, 1], before the updates of the first key frame from there on
    key_frames: int  # until the accuracy after the updates is at the threshold


def main() -> int:
    """Measure the drawn stream and CamVid's clip, where it is."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("overrides", metavar="key=value", nargs="*", help="of the stream's recipe")
    arguments_parser.add_argument("--root", metavar="DIR", help="CamVid, to make the table on its clip alone")
    arguments_parser.add_argument("--runs", type=int, default=5, help="rounds of the speed measurements; default 5")
    arguments_parser.add_argument("--low-threshold", type=float, default=0.87, help="a cheaper stream's; default 0.87")
    arguments_parser.add_argument("--student-epochs", type=int, default=40, help="before the stream; default 40")
    arguments_parser.add_argument("--threads", type=int, default=1, help="of the processor, for torch; default 1")
    arguments_parser.add_argument("--quick", action="store_true", help="small networks, frames and runs, to try it")
    arguments = arguments_parser.parse_intermixed_args()
    quick, overrides = arguments.quick, arguments.overrides
    if arguments.root is not None:
        measure("distill-camvid", *on_camvid(arguments.root, overrides, quick=quick), arguments)
        return 0
    measure("distill", *on_drawn_scenes(overrides, quick=quick), arguments)
    root = Path(load_recipe(CAMVID).data.args["root"])
    if root.is_dir():
        measure("distill-camvid", *on_camvid(str(root), [], quick=quick), arguments)
    else:
        print(f"CamVid's clip is left out: {root} is no folder; give its place by --root DIR")
    return 0


def measure(result: str, name: str, recipe: Recipe, teacher: Recipe, arguments: argparse.Namespace) -> None:
    """Train what is needed once, measure, write runs/bench/RESULT.json and the table beside it."""
    quick, is_drawn = arguments.quick, recipe.data.name == "video_shapes"
    epochs = 1 if quick else arguments.student_epochs
    setting = prepared(recipe, teacher, ONE_VIEW if quick else VIEWS, epochs, arguments.threads)
    rows = table(setting)
    online = rows["online, geometric"]
    low = followed_row(setting, replace(setting.options, threshold=arguments.low_threshold))
    rows[f"online, geometric, threshold {arguments.low_threshold:g}"] = low
    truth = setting.teacher_row["miou_vs_truth_all"]
    ratios = {
        "teacher_miou_vs_truth": spread([truth]),
        "cost_ratio": spread([online["times_cheaper_ms"]]),
        "miou_vs_teacher": spread([online["miou_vs_teacher"]]),
        "cost_ratio_low_threshold": spread([low["times_cheaper_ms"]]),
        "miou_vs_teacher_low_threshold": spread([low["miou_vs_teacher"]]),
        **at_cuts(online["after_cuts"], setting.options.threshold),
        **{f"{key}_low_threshold": of for key, of in at_cuts(low["after_cuts"], arguments.low_threshold).items()},
    }
    if is_drawn:
        ratios |= speed(setting, (96, 128) if quick else SPEED_SIZE, 2 if quick else arguments.runs)
        ratios["stationary_teacher_fraction"] = spread([stationary_teacher_fraction(setting, recipe)])
    notes: dict[str, Any] = {
        "quick": "yes: no result" if quick else "no",
        "threads": torch.get_num_threads(),
        "threshold": setting.options.threshold,
        "low_threshold": arguments.low_threshold,
        "teacher": f"{teacher.name}-{recipe_hash(teacher)}",
        **{name: cells(row) for name, row in rows.items()},
    }
    text = markdown(f"{name}, {len(setting.frames)} frames, teacher {truth:.1f} against ground truth", rows)
    path = write_result(result, arguments.runs, ratios, notes)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nThe last part is what the student trained offline did not learn from.")


def pretrained(overrides: Sequence[str]) -> list[str]:
    """Overrides of a teacher, with the weights that its encoder begins with."""
    return [*overrides, f"model.args.encoder_weights={fetch(WEIGHTS)}"]


def on_drawn_scenes(overrides: Sequence[str], *, quick: bool) -> tuple[str, Recipe, Recipe]:
    """What the drawn stream is called, its recipe and its teacher's."""
    stream = [*(QUICK_STREAM if quick else STREAM), "tracking.wandb=disabled", *overrides]
    recipe = load_recipe("recipes/video_shapes.yaml", stream)
    teacher = teacher_recipe("recipes/shapes_dense.yaml", QUICK_TEACHER if quick else pretrained(LARGE_TEACHER), recipe)
    return "Embedded stream", recipe, teacher


def on_camvid(root: str, overrides: Sequence[str], *, quick: bool) -> tuple[str, Recipe, Recipe]:
    """What CamVid's clip is called, its recipe and its teacher's, which has not seen the clip's drive."""
    stream = ["data.args.resolution=0.2"] if quick else CAMVID_STREAM
    recipe = load_recipe(CAMVID, [f"data.args.root={root}", *stream, "tracking.wandb=disabled", *overrides])
    assert recipe.teacher is not None
    given = recipe.teacher.args
    changes = QUICK_CAMVID if quick else pretrained(CAMVID_TEACHER)
    return "CamVid's clip", recipe, teacher_recipe(given["recipe"], [*given["overrides"], *changes], recipe)


def prepared(recipe: Recipe, teacher: Recipe, views: Mapping[str, Any], student_epochs: int, threads: int) -> Setting:
    """Train teacher and student where that was not done before, and ask the teacher once for every frame.

    `views` are the scales at which the teacher sees a frame, and whether it sees it mirrored too.
    """
    assert recipe.distillation is not None
    run_of_teacher = trained(teacher, TEACHERS, build_datamodule)
    beginning = replace(
        teacher,
        name=f"{teacher.name}_student",
        model=recipe.model,
        network_slimming=None,
        trainer=replace(teacher.trainer, max_epochs=student_epochs, validate_every=student_epochs),
    )
    options = replace(recipe.distillation, warm_start=str(trained(beginning, TEACHERS, build_datamodule)))
    torch.set_num_threads(threads)
    source = build_source(recipe)
    student, _, _ = build_student(replace(recipe, distillation=options), source.classes)
    made = checkpoint_teacher(str(run_of_teacher), **views)
    empty = Setting(source, [], made, student, options, [], {}, recipe.seed)
    return recorded(empty, source)


def recorded(setting: Setting, source: VideoSource) -> Setting:
    """The setting on a stream, with the teacher's labels of its frames from one pass, which is a method of its own."""
    frames = list(source.frames())
    setting = setting._replace(source=source, frames=frames, labels=[])
    labels: list[np.ndarray] = []
    row = followed_row(setting, replace(setting.options, method="teacher"), keep=labels)
    return setting._replace(labels=labels, teacher_row=row)


def stationary_teacher_fraction(setting: Setting, recipe: Recipe) -> float:
    """The share of frames on which the teacher is asked where hardly anything moves; nothing is scored."""
    still = replace(recipe, data=Part("video_shapes", {**recipe.data.args, **STATIONARY}))
    source = build_source(still)
    unscored = setting._replace(source=source, frames=list(source.frames()), labels=[])
    fraction: float = followed_row(unscored, setting.options)["teacher_fraction"]
    return fraction


def table(setting: Setting) -> dict[str, dict[str, Any]]:
    """Every method on the same stream; the last mask is held between the key frames of the geometric controller."""
    rows: dict[str, dict[str, Any]] = {}
    for name, changes in METHODS.items():
        print(f"  {name} ...", flush=True)
        if changes["method"] == "teacher":
            rows[name] = setting.teacher_row
            continue
        asked = rows["online, geometric"]["asked"] if changes["method"] == "hold" else None
        rows[name] = followed_row(setting, replace(setting.options, **changes), key_frames=asked)
    return rows


def followed_row(
    setting: Setting,
    options: OnlineDistillation,
    *,
    key_frames: Sequence[int] | None = None,
    keep: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Follow the stream by one method from the same first weights; its row of the table."""
    student = copy.deepcopy(setting.student)
    first_scored = max(1, round(options.offline_share * len(setting.frames)))  # offline learns from what is before
    price = pricing(student, setting.teacher, options)
    whole = StreamScores(setting.teacher.classes, options, price=price, stability=True)
    rest = StreamScores(setting.teacher.classes, options, score_from=first_scored)
    asked, lessons = [], []
    stream = follow(
        setting.frames,
        student,
        setting.teacher,
        options,
        num_frames=len(setting.frames),
        seed=setting.seed,
        key_frames=None if key_frames is None else set(key_frames),
    )
    for place, followed in enumerate(stream):
        labels = setting.labels[place] if setting.labels else followed.prediction
        if keep is not None:
            keep.append(followed.prediction)
        if followed.key_frame:
            asked.append(followed.frame.index)
        if followed.accuracy_before is not None and followed.accuracy_after is not None:
            lessons.append((followed.frame.index, followed.accuracy_before, followed.accuracy_after))
        whole.add(followed, labels)
        rest.add(followed, labels)
    scores, last, costs = whole.record(), rest.record(), whole.costs()
    ratios = costs["times_cheaper"]
    once = costs["milliseconds"]["teacher"] or setting.teacher_row["milliseconds"]["teacher"]
    spent = sum(costs["seconds"].values())

    def miou(record: Mapping[str, Any], key: str, of: str = "miou") -> float | None:
        return None if record[key] is None else record[key][of]

    return {
        "miou_vs_teacher": miou(scores, "against_teacher", "miou_foreground"),
        "miou_vs_teacher_all": miou(scores, "against_teacher"),
        "miou_vs_truth_all": miou(scores, "against_truth"),
        "miou_vs_teacher_rest": miou(last, "against_teacher", "miou_foreground"),
        "miou_vs_truth_all_rest": miou(last, "against_truth"),
        "teacher_fraction": scores["teacher_fraction"],
        "updates": scores["updates"],
        "times_cheaper_ms": len(setting.frames) * once / 1000 / spent if spent else None,
        "times_cheaper_macs": ratios["macs"],
        "stability": scores["stability"]["student"],
        "milliseconds": costs["milliseconds"],
        "asked": asked,
        "after_cuts": after_cuts([frame.index for frame in setting.frames if frame.cut], lessons, options.threshold),
    }


def after_cuts(cuts: Sequence[int], lessons: Sequence[tuple[int, float, float]], threshold: float) -> list[AfterCut]:
    """How the student came through each cut, from the key frames' indices and accuracies before and after updates.

    A scene without a key frame is left out; one that ends below the threshold counts one more than it has.

    >>> lessons = [(0, 0.2, 0.9), (12, 0.3, 0.5), (16, 0.5, 0.8), (32, 0.4, 0.6)]
    >>> [tuple(found) for found in after_cuts([10, 20, 30], lessons, 0.8)]
    [(10, 0.3, 2), (30, 0.4, 2)]
    """
    found = []
    ends: list[float] = [*cuts[1:], math.inf]
    for cut, end in zip(cuts, ends, strict=False):
        scene = [(before, after) for index, before, after in lessons if cut <= index < end]
        if scene:
            back = (number for number, (_, after) in enumerate(scene, start=1) if after >= threshold)
            found.append(AfterCut(cut, scene[0][0], next(back, len(scene) + 1)))
    return found


def at_cuts(found: Sequence[AfterCut], threshold: float) -> dict[str, dict[str, float]]:
    """The ratios of what became of the cuts; none where no scene after a cut had a key frame."""
    if not found:
        return {}
    return {
        "accuracy_before_over_threshold_at_cut": spread([each.accuracy_before / threshold for each in found]),
        "key_frames_to_recover": spread([each.key_frames for each in found]),
    }


def speed(setting: Setting, size: tuple[int, int], runs: int) -> dict[str, dict[str, float]]:
    """One student's prediction against one of the teacher's, and a key frame against its parts, at a size (H, W)."""
    frame = next(build_source(Part("video_shapes", {"num_frames": 1, "size": list(size)})).frames())
    student, teacher = copy.deepcopy(setting.student), setting.teacher
    options = replace(setting.options, method="online", threshold=1 - 1e-9, u_max=UPDATES, restore_best=False)
    images = images_of(student, frame, options)
    times = interleave(
        {
            "teacher": lambda: teacher(frame),
            "student": lambda: attempt(student, images_of(student, frame, options), size, gradients=False),
        },
        runs,
    )
    state = StreamState.start(student, teacher.classes, options)
    alone = StreamState.start(copy.deepcopy(setting.student), teacher.classes, options)
    target = target_of(alone, teacher(frame), images)
    updates = []

    def key_frame() -> None:
        here = frame._replace(index=state.position)
        (followed,) = follow([here], student, teacher, options, state=state, key_frames={here.index})
        updates.append(followed.updates)

    def its_parts() -> None:
        teacher(frame)
        for _ in range(UPDATES):
            loss = weighted_cross_entropy(alone.student(images), target.labels, target.weights).mean()
            alone.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            alone.optimizer.step()

    overhead = interleave({"key frame": key_frame, "its parts": its_parts}, runs)
    if set(updates) != {UPDATES}:
        raise ValueError(f"key frames took {sorted(set(updates))} updates and not {UPDATES}; the overhead is of none")
    return {
        "student_vs_teacher_ms": ratio(times["teacher"], times["student"]),
        "key_frame_overhead": ratio(overhead["key frame"], overhead["its parts"]),
    }


def markdown(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of methods, to be read and to be kept.

    >>> print(markdown("A stream", {"frozen": {"miou_vs_teacher": 50.0}}).splitlines()[-1])
    | frozen | 50.0 | – | – | – | – | – | – | – | – | – |
    """
    lines = [f"{title}:", "", f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(cells(row).values())} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's figures as texts by column."""
    return {title: "–" if row.get(key) is None else format(row[key], form) for title, (key, form) in COLUMNS.items()}


if __name__ == "__main__":
    run(main)
