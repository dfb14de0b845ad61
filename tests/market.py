"""A small data set in Market-1501's layout, of rendered pedestrians, with person masks."""

from pathlib import Path

import cv2

from casn_plugin.pedestrians import render_pedestrian


def write_market(root: Path) -> None:
    """Writes eight people, seen three times by each of three cameras."""
    folder = root / "market1501" / "Market-1501-v15.09.15"
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (folder / part).mkdir(parents=True)
        (root / "masks" / part).mkdir(parents=True)
    for pid in range(1, 9):
        for camid in range(3):
            for index in range(3):
                part = "bounding_box_train" if pid <= 4 else "bounding_box_test"
                if pid > 4 and index == 0:
                    part = "query"
                imgs, mask = render_pedestrian(pid, camid, index, height=64, width=32)
                name = f"{pid:04d}_c{camid + 1}s1_{index + 1:06d}_00.jpg"
                assert cv2.imwrite(str(folder / part / name), imgs[..., ::-1])
                mask_name = name.replace(".jpg", ".png")
                assert cv2.imwrite(str(root / "masks" / part / mask_name), mask)
