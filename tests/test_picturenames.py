"""What names of pictures say."""

import re
import time

import pytest

from casn_plugin.picturenames import fields_of, read_name


@pytest.mark.parametrize(
    ("name", "pattern", "pid", "camid", "fields"),
    [
        ("1501_c6s4_001902_01.jpg", None, 1501, 6, {"time": 1902}),
        ("test/-1_c3s2_000017_00.jpg", None, -1, 3, {"time": 17}),
        ("0005_c2_f0046985.jpg", None, 5, 2, {"time": 46985}),
        ("a0005_c2_f0046985.jpg", None, -1, -1, {}),
        ("0005_c2_f1/holiday.jpg", None, -1, -1, {}),
        ("٣_c٣_٣.jpg", None, -1, -1, {}),
        (f"{'1' * 19}_c1_1.jpg", None, -1, -1, {}),
        (f"1_c{'1' * 19}_1.jpg", None, -1, -1, {}),
        (f"1_c1_{'1' * 19}.jpg", None, -1, -1, {}),
        (f"{'9' * 18}_c1s{'1' * 19}_{'9' * 18}.jpg", None, 10**18 - 1, 1, {"time": 10**18 - 1}),
        ("cam7/2026-01-31T12:00:00/x.png", r"cam(?P<camid>\d+)/(?P<time>[^/]+)", -1, 7,
         {"time": 1769860800.0}),
        ("2026-01-31T13:00:00+01:00.png", r"^(?P<time>.*)\.png", -1, -1, {"time": 1769860800.0}),
        ("17.25.png", r"^(?P<time>.*)\.png", -1, -1, {"time": 17.25}),
        ("north-007.png", r"(?P<gate>\w+)-(?P<floor>\d+)(?P<more>x)?", -1, -1,
         {"gate": "north", "floor": 7}),
    ],
)  # fmt: skip
def test_names_are_read_by_a_pattern(name, pattern, pid, camid, fields, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # it says nothing of the pictures
    time.tzset()
    said = read_name(name) if pattern is None else read_name(name, pattern)
    assert said == (pid, camid, fields)
    listed = fields_of([name]) if pattern is None else fields_of([name], pattern)
    assert {key: values[0] for key, values in listed.items() if values[0] is not None} == fields
    monkeypatch.undo()
    time.tzset()


def test_names_that_a_pattern_reads_wrongly_are_refused():
    for name, pattern, message in (
        (
            "ann.jpg",
            r"(?P<pid>\w+)\.jpg",
            "pid of 'ann.jpg' must be a number below 10**18, got 'ann'",
        ),
        ("1" * 19, r"(?P<camid>\d+)", "camid of '1111111111111111111' must be a number"),
        ("noon.jpg", r"(?P<time>\w+)\.jpg", "time of 'noon.jpg' must be a number or a date"),
        ("a.jpg", "(", "pattern must be a regular expression, got '('"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_name(name, pattern)
