"""Pictures of a run show what they say."""

import imageio.v3 as iio
import numpy as np
import pytest

from ditcache.report import pictures
from ditcache.report.run_folder import finite, write_json
from ditcache.video import to_uint8, write_mp4, write_png

RNG = np.random.default_rng(0)


def decisions(computed):
    return [
        {
            "video": 0,
            "expert": "transformer",
            "branch": branch,
            "segment": 0,
            "unit": 0,
            "step": step,
            "computed": c,
        }
        for branch in ("cond", "uncond")
        for step, c in enumerate(computed)
    ]


def test_cache_map_has_a_full_cell_per_computed_step():
    computed = [True, True, False, True, False, False]
    image = pictures.cache_map(decisions(computed))
    top = pictures.MARGIN + pictures.LINE
    row = image[top + 2]  # above the dots
    full = (row == pictures.INK).all(1)
    right = full[-(pictures.MARGIN + len(computed) * pictures.CELL) :][: -pictures.MARGIN]
    cells = [right[i * pictures.CELL + 2] for i in range(len(computed))]
    assert cells == computed


def test_cache_map_of_nothing_is_still_a_picture():
    assert pictures.cache_map([]).ndim == 3


def test_contact_sheet_shows_the_difference_of_two_rows():
    a, b = (pictures.sample(RNG.random((9, 32, 32, 3))) for _ in range(2))
    one = pictures.contact_sheet([("a caption", [("x", a)])], 1)
    two = pictures.contact_sheet([("a caption", [("x", a), ("y", b)])], 1)
    assert two.shape[1] == one.shape[1] and two.shape[0] == one.shape[0] + 2 * 32
    same = pictures.contact_sheet([("a caption", [("x", a), ("y", a)])], 1)
    assert (same[-32:, 150:] == 0).all() and (two[-32:, 150:] > 0).any()


def test_samples_of_large_frames_are_thinned_out():
    assert pictures.sample(np.zeros((81, 480, 832, 3)), 5).shape == (5, 120, 208, 3)
    assert pictures.sample(np.zeros((1, 64, 64, 3)), 3).shape == (3, 64, 64, 3)


def test_captions_wrap_to_the_width():
    lines = pictures.wrap("a very long caption " * 8, 200)
    assert len(lines) > 3 and " ".join(lines).split() == ("a very long caption " * 8).split()


def test_side_by_side_keeps_both_videos():
    a, b = RNG.random((3, 16, 16, 3)), RNG.random((3, 16, 16, 3))
    pair = pictures.side_by_side("a caption", [("x", a), ("y\nz", b)], 2)
    assert np.array_equal(to_uint8(pair)[:, -32:, :32], to_uint8(a, 2))
    assert np.array_equal(to_uint8(pair)[:, -32:, 32:], to_uint8(b, 2))


def test_mp4_is_near_what_went_in(tmp_path, read_mp4):
    frames = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((5, 48, 64, 3))
    write_mp4(tmp_path / "a.mp4", frames)
    back = read_mp4(tmp_path / "a.mp4", 48, 64)
    assert back.shape == (5, 48, 64, 3)
    assert np.abs(back / 255 - frames).max() < 0.03
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_mp4_leaves_nothing(tmp_path):
    with pytest.raises(Exception):  # noqa: B017 - whatever the encoder raises
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 0, 0, 3)))
    assert list(tmp_path.iterdir()) == []


def test_png_round_trip(tmp_path):
    image = RNG.integers(0, 255, (7, 9, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(iio.imread(tmp_path / "a.png"), image)


def test_json_has_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("inf"), "y": [float("nan"), 1.5], "z": "schön"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8").split() == (
        ["{", '"x":', "null,", '"y":', "[", "null,", "1.5", "],", '"z":', '"schön"', "}"]
    )
    assert finite({"a": (1, float("-inf"))}) == {"a": [1, None]}
