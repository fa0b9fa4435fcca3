"""A student follows a video and learns from a teacher: python -m tools.distill_video RECIPE [key=value ...].

The recipe has sections `distillation` and `teacher`; its `data` names the video. A run folder is written as by
tools.train, and the same command goes on where an interrupted one was. A teacher that is to be trained is trained once
and kept under DIR/teachers.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.cli import add_recipe, parser, run, write_json


def main() -> int:
    """Follow the video, print the totals, write the page."""
    arguments_parser = parser(__doc__ or "", figures=True)
    add_recipe(arguments_parser)
    arguments_parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where runs are kept")
    arguments_parser.add_argument("--overlay", metavar="FILE", type=Path, help="a film of what the user is shown")
    arguments_parser.add_argument("--frames", metavar="N", type=int, help="stop after so many frames, state saved")
    arguments_parser.add_argument(
        "--real-time",
        action="store_true",
        help="teacher and updates run beside inference; frames that wait are dropped",
    )
    arguments_parser.add_argument("--queue", metavar="N", type=int, default=4, help="frames that may wait; default 4")
    arguments_parser.add_argument(
        "--policy", default="drop_oldest", help="what a full queue does: drop_oldest (default) or drop_newest"
    )
    arguments_parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    arguments = arguments_parser.parse_intermixed_args()
    if arguments.frames is not None and arguments.frames < 1:
        raise ValueError(f"--frames is {arguments.frames}; at least 1")
    if arguments.queue < 1:
        raise ValueError(f"--queue is {arguments.queue}; at least 1 frame has to be able to wait")
    from dance_seg.recipe import load_recipe
    from datamodules.paced import POLICIES, paced

    if arguments.policy not in POLICIES:
        raise ValueError(f"--policy is {arguments.policy!r}; choose {' or '.join(POLICIES)}")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.distillation is None:
        raise ValueError(f"{arguments.recipe}: has no section distillation; train it by python -m tools.train")
    from dance_seg.distillation.real_time import check_real_time
    from dance_seg.report.stream_page import write_stream_report
    from dance_seg.signals import StoppedBySignal
    from dance_seg.stream import follow_stream
    from dance_seg.teachers import build_teacher
    from datamodules import build_datamodule
    from datamodules.video import build_source

    if arguments.real_time:
        check_real_time(recipe.distillation)
    source = build_source(recipe)
    teacher = build_teacher(recipe, source, teachers=arguments.runs / "teachers", build_datamodule=build_datamodule)
    pace: Callable[..., Any] | None = None
    if arguments.real_time:
        pace = partial(paced, queue=arguments.queue, policy=arguments.policy)
    folder, stopped = arguments.runs / recipe.name, 0
    try:
        follow_stream(
            recipe,
            source,
            folder,
            teacher,
            overlay=arguments.overlay,
            stop_after=arguments.frames,
            pace=pace,
            progress=not arguments.no_progress,
        )
    except StoppedBySignal as stop:  # how a camera's stream ends: what it came to is shown all the same
        stopped = stop.status
    figures = totals(folder)
    print("\n".join(described(figures)))
    write_json(arguments.json, figures)
    print(f"{write_stream_report(folder)} shows the stream; {folder} also holds metrics.jsonl, scores.json, cost.json")
    return stopped


def totals(folder: Path) -> dict[str, Any]:
    """What the stream in a run folder came to, as plain data."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("scores", "cost")}
    return {"scores": read["scores"], **read["cost"]}


def described(figures: dict[str, Any]) -> list[str]:
    """The totals in lines.

    >>> described({"scores": {"frames": 0}, "stream": {}})
    ['no frame was followed']
    """
    from dance_seg.report.stream_page import foreground_miou, incidents

    scores, costs = figures["scores"], figures.get("stream", {})
    if not scores.get("frames"):
        return ["no frame was followed"]
    lines = []
    for key, what in (
        ("against_teacher", "student against teacher"),
        ("against_truth", "student against ground truth"),
        ("teacher_against_truth", "teacher against ground truth"),
    ):
        found = scores.get(key)
        if found:
            frames = scores["frames_against_teacher" if key == "against_teacher" else "frames_against_truth"]
            counted = f" ({frames:,} frames)" if key != "teacher_against_truth" else ""
            foreground = foreground_miou(found)
            of = "" if foreground is None else f", over all classes; {foreground:.2f} over the foreground"
            lines.append(f"mIoU {found['miou']:6.2f}  {what}{counted}{of}")
    lines.append(
        f"{scores['frames']:,} frames, the teacher on {scores['key_frames']:,} "
        f"({100 * scores['teacher_fraction']:.1f} %), {scores['updates']:,} updates"
    )
    stability = {who: value for who, value in (scores.get("stability") or {}).items() if value is not None}
    if stability:
        lines.append("temporal stability  " + ", ".join(f"{who} {value:.1f}" for who, value in stability.items()))
    ratios, once, macs = (costs.get(key) or {} for key in ("times_cheaper", "milliseconds", "gmacs"))
    said = [f"{name} {once[part]:.2f} ms" for part, name in PARTS if once.get(part)]
    lines.append(f"measured  {', '.join(said)}: {times(ratios.get('milliseconds'))} the teacher on every frame")
    if (model := costs.get("model")) is not None:
        spent = sum(costs["seconds"].values())
        beside = f"by the cost model {model['seconds']:.2f} s, measured {spent:.2f} s"
        off = f" ({100 * model['seconds'] / spent - 100:+.1f} %)" if spent else ""
        lines.append(f"{beside}{off}: {times(model['times_cheaper'])} the teacher on every frame")
    said = [f"{name} {macs[part]:.3g}" for part, name in PARTS if macs.get(part)]
    lines.append(
        f"GMACs  {', '.join(said)}: {times(ratios.get('macs'))} the teacher on every frame"
        if said
        else "GMACs  the teacher's are not known"
    )
    lines += incidents(scores)
    return lines


PARTS = (("student", "student"), ("teacher", "teacher"), ("updates", "update"))


def times(ratio: float | None) -> str:
    """A ratio of costs in words.

    >>> times(12.34), times(None)
    ('12.3 times cheaper than', 'not known against')
    """
    return "not known against" if ratio is None else f"{ratio:.3g} times cheaper than"


if __name__ == "__main__":
    run(main)
