"""Pictures of predictions: read as written, errors marked where they are, small enough for a page."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.report.pictures import (
    IGNORED,
    WRONG,
    Indices,
    embedded_image,
    embedded_indices,
    fitted,
    marked_errors,
    points_right,
    read_image,
    read_indices,
)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def palette_file(path, ids: np.ndarray, palette: np.ndarray):
    picture = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
    picture.putpalette(palette.tobytes())
    picture.save(path)
    return path


def test_class_ids_and_colours_survive_a_palette_file(tmp_path):
    ids = np.array([[0, 1, 255], [2, 1, 0]], np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[:3] = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    read = read_indices(palette_file(tmp_path / "a.png", ids, palette))
    assert np.array_equal(read.ids, ids)
    assert read.palette[:3].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert tuple(read.palette[255]) == IGNORED  # whatever the file says, so that it can be told from a class


def test_a_colour_picture_is_no_label(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: a RGB picture"):
        read_indices(tmp_path / "a.png")


def test_a_damaged_picture_is_named(tmp_path):
    good = palette_file(tmp_path / "a.png", np.zeros((64, 64), np.uint8), np.zeros((256, 3), np.uint8)).read_bytes()
    for number, data in enumerate((b"", b"no picture", good[: len(good) // 2])):
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{number}.png: cannot be read as a picture"):
            read_image(path)


def test_points_right_leave_out_what_is_not_scored():
    label = np.array([[0, 1, 1, 255]], np.uint8)
    assert points_right(label, np.array([[0, 1, 0, 9]], np.uint8)) == pytest.approx(100 * 2 / 3)
    assert points_right(np.full((1, 2), 255), np.zeros((1, 2))) is None


def test_exactly_the_wrong_scored_pixels_are_red():
    label = np.array([[0, 1, 255, 1]], np.uint8)
    prediction = np.array([[0, 0, 0, 1]], np.uint8)
    marked = marked_errors(np.full((1, 4, 3), 200, np.uint8), label, prediction).astype(int)
    # 110 + 0.5 * 200 = 210 where right, 0.45 of it where not scored, a quarter of it and red where wrong.
    assert marked[0, 0].tolist() == [210, 210, 210]
    assert marked[0, 2].tolist() == [94, 94, 94]
    assert marked[0, 3].tolist() == [210, 210, 210]
    assert marked[0, 1].tolist() == [int(0.25 * 210 + 0.75 * channel) for channel in WRONG]


def test_errors_are_marked_at_the_size_of_the_label_when_the_image_is_smaller():
    assert marked_errors(np.zeros((2, 3, 3), np.uint8), *[np.zeros((4, 6), np.uint8)] * 2).shape == (4, 6, 3)


def test_label_and_prediction_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="must be of one size"):
        marked_errors(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8), np.zeros((3, 2), np.uint8))


def test_embedded_class_ids_keep_pure_colours_when_made_smaller():
    ids = np.indices((40, 60)).sum(0) % 2 * 255
    palette = np.zeros((256, 3), np.uint8)
    palette[0], palette[255] = (250, 0, 0), (0, 0, 250)
    shown = decoded(embedded_indices(Indices(ids.astype(np.uint8), palette), 30)).convert("RGB")
    assert shown.size == (30, 20)
    assert {color for _, color in shown.getcolors()} <= {(250, 0, 0), (0, 0, 250)}


def test_embedded_pictures_are_never_enlarged():
    assert decoded(embedded_image(np.zeros((6, 8, 3), np.uint8), 640)).size == (8, 6)
    assert decoded(embedded_image(np.zeros((1, 1000, 3), np.uint8), 100)).size == (100, 1)


def test_the_largest_width_within_the_budget_is_taken():
    sizes = {640: 1000, 480: 500, 360: 200, 240: 100, 160: 50}
    assert fitted(lambda width: width, 300, sizes.__getitem__) == 360
    assert fitted(lambda width: width, 10, sizes.__getitem__) == 160
