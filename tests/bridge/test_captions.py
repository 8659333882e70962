"""Captions read, and true clips found to show what theirs ask for."""

import numpy as np
import pytest

from ditcache.clips.captions import asked, obeyed
from ditcache.clips.edits import DOMAINS, draw_clip


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a red star moves left on a striped blue background", ("red", "star", "left")),
        ("it becomes green", ("green", None, None)),
        ("the star moves up and becomes a circle", (None, "circle", "up")),
        ("the cross becomes an orange square", ("orange", "square", None)),
        ("a white circle moves right over a green background", ("white", "circle", "right")),
        ("on a blue background, a red star moves left", ("red", "star", "left")),
        ("the star on a striped blue background becomes yellow", ("yellow", "star", None)),
        ("something else entirely", (None, None, None)),
    ],
)
def test_what_captions_ask_for(caption, wanted):
    names = ("colour", "shape", "direction")
    assert asked(caption) == {n: w for n, w in zip(names, wanted, strict=True) if w is not None}


def test_true_clips_obey_their_captions_and_not_others():
    clips = [
        draw_clip(domain, np.random.default_rng([9, kind, number]))
        for kind, domain in enumerate(DOMAINS)
        for number in range(8)
    ]
    own = [obeyed(clip.scene.caption, clip.frames / 255) for clip in clips]
    others = [
        obeyed(clip.scene.caption, other.frames / 255)
        for clip, other in zip(clips, [*clips[5:], *clips[:5]], strict=True)
    ]
    assert np.mean(own) >= 0.9 and np.mean(others) <= 0.2
    assert obeyed("something else entirely", clips[0].frames / 255) is None
