"""Cameras: each has a viewpoint and colours of its own."""

import numpy as np

from casn_plugin.pedestrians import render_pedestrian
from casn_plugin.pedestrians.cameras import CAMERAS


def test_cameras_differ_in_colour() -> None:
    size = {"height": 64, "width": 32}
    means = np.array(
        [
            np.mean(
                [render_pedestrian(pid, c, 0, **size)[0] for pid in range(1, 7)], axis=(0, 1, 2)
            )
            for c in range(len(CAMERAS))
        ]
    )
    chroma = means / means.sum(axis=1, keepdims=True)
    for one in range(len(means)):
        for other in range(one):
            apart = np.abs(means[one] - means[other]).max()
            assert apart > 8 or np.abs(chroma[one] - chroma[other]).max() > 0.01


def test_cameras_know_their_numbers() -> None:
    assert [camera.number for camera in CAMERAS] == list(range(6))


def test_every_camera_has_its_viewpoint() -> None:
    headings = np.array([[camera.heading(0, pid) for pid in range(1, 60)] for camera in CAMERAS])
    facing = np.cos(np.radians(headings)).mean(axis=1)
    assert facing[0] > 0.5 and facing[1] < -0.5
    assert abs(facing[2]) < 0.35 and abs(facing[5]) < 0.35
