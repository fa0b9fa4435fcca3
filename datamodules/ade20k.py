"""ADE20K as the scene parsing challenge of 2016 gives it: 20210 / 2000 images of many sizes, 150 classes.

Only ADEChallengeData2016 is read. The archives ADE20K_2016_07_26 and ADE20K_2021_17_01 label thousands of classes in
another form. In the files 0 means "other" and is ignored, 1 to 150 are the classes.
"""

from pathlib import Path

from dance_seg.errors import DataError
from datamodules.image_files import IMAGE_SUFFIXES, LABEL_SUFFIXES
from datamodules.label_table import LabelTable, label_table
from datamodules.listing import data_root, list_files, read_lines, some, what_is_there
from datamodules.sources import Pair

FOLDERS = {"train": ("training",), "val": ("validation",), "trainval": ("training", "validation")}
LAYOUT = "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png (ADEChallengeData2016.zip)"

_CLASSES = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of
drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic
light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"""

_PALETTE = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 8fff8c
ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47
ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00
1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300
ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8
001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff
a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00
ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc
2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff"""


def _colors(text: str) -> list[tuple[int, int, int]]:
    return [(color[0], color[1], color[2]) for color in map(bytes.fromhex, text.split())]


ADE20K: LabelTable = label_table(
    [" ".join(name.split()) for name in _CLASSES.split(",")],
    raw_to_train={train + 1: train for train in range(150)},
    ignore=[0],
    palette=_colors(_PALETTE),
)


def ade20k_split(root: str | Path, split: str) -> tuple[list[Pair], LabelTable]:
    """The pairs of a split (train, val or trainval) in order of name, and ADE20K's label table.

    root: the folder ADEChallengeData2016, or the one that holds it. The group of an image is its scene, such as
    `bathroom`, where sceneCategories.txt is there, and otherwise empty. Raises DataError, saying what is expected
    where, when a folder is missing or empty, or an image has no label or a label no image.
    """
    if split not in FOLDERS:
        raise ValueError(f"ade20k has no split {split!r}; choose one of {', '.join(FOLDERS)} (test has no labels)")
    path = data_root(root, LAYOUT)
    if not (path / "annotations").is_dir() and (path / "ADEChallengeData2016").is_dir():
        path = path / "ADEChallengeData2016"
    scenes = _scenes(path)
    return [pair for folder in FOLDERS[split] for pair in _pairs(path, folder, scenes)], ADE20K


def _pairs(root: Path, folder: str, scenes: dict[str, str]) -> list[Pair]:
    for kind in ("annotations", "images"):
        if not (root / kind / folder).is_dir():
            raise DataError(f"{root / kind / folder} is missing{_other_archive(root)}; expected in {root}: {LAYOUT}")
    images = list_files(root / "images" / folder, root, IMAGE_SUFFIXES)
    labels = list_files(root / "annotations" / folder, root, LABEL_SUFFIXES)
    if not images:
        there = what_is_there(root / "images" / folder)
        raise DataError(f"{root / 'images' / folder} holds no images but {there}; expected in {root}: {LAYOUT}")
    for name, other, what in ((images, labels, "label"), (labels, images, "image")):
        alone = [stem for stem in name if stem not in other]
        if alone:
            raise DataError(f"{root / 'annotations' / folder}: {len(alone)} files have no {what}: {some(alone)}")
    return [Pair(image, labels[name], name, scenes.get(name, "")) for name, image in images.items()]


def _scenes(root: Path) -> dict[str, str]:
    path = root / "sceneCategories.txt"
    if not path.is_file():
        return {}
    columns = [line.split() for _, line in read_lines(path)]
    return {words[0]: words[1] for words in columns if len(words) >= 2}


def _other_archive(root: Path) -> str:
    found = [path.name for path in (root, *sorted(root.iterdir())) if path.name.startswith("ADE20K_20")]
    full = (
        (root / "images" / "ADE").is_dir()
        or (root / "index_ade20k.mat").exists()
        or (root / "index_ade20k.pkl").exists()
    )
    if found or full:
        which = f"this is {found[0]}" if found else "this is a full ADE20K archive"
        return f" ({which}, which labels thousands of classes in another form; take ADEChallengeData2016.zip)"
    return f" (there: {what_is_there(root)})"
