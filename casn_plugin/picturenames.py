"""What the names of pictures say: identity, camera, time, and whatever a pattern asks for."""

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from typing import NamedTuple

from casn_plugin.doors import check_kind
from casn_plugin.identities import UNKNOWN

MARKET1501 = (
    r"(?:^|/)(?P<pid>-1|[0-9]{1,18})_c(?P<camid>[0-9]{1,18})(?:s[0-9]+)?"
    r"_f?(?P<time>[0-9]{1,18})(?![0-9])[^/]*$"
)
"""Names as Market-1501 and DukeMTMC-reID have them: ``0002_c1s1_000451_03.jpg``.

Any other name matches nothing, so it stops no folder: digits are those of ASCII, 18 at most.
"""

Value = int | float | str
"""What a name says of a picture."""


class Said(NamedTuple):
    """What the name of a picture says.

    Attributes:
        pid: its identity, -1 where it is not said.
        camid: its camera as it is written, -1 where it is not said.
        fields: the other groups of the pattern.
    """

    pid: int
    camid: int
    fields: dict[str, Value]


def read_name(name: str, pattern: str = MARKET1501) -> Said:
    r"""Returns what a name says by a pattern; of one that does not match, nothing is known.

    Args:
        name: a path in the folder, "/" between its parts.
        pattern: a regular expression that is searched for in it. Of its named groups, `pid` and
            `camid` are integers; `time` is a number (seconds or frames), or a date and time as
            ``datetime.fromisoformat`` reads it, which becomes seconds since 1970 (UTC where no
            zone is said); any other is an integer where it has digits alone, else text.

    Raises:
        ValueError: no regular expression, a pid or camid that is no number below 10**18, a time
            that is none.

    Example:
        >>> read_name("day 1/0002_c1s1_000451_03.jpg")
        Said(pid=2, camid=1, fields={'time': 451})
        >>> read_name("hall/7.jpg", r"(?P<place>\w+)/(?P<camid>\d+)")
        Said(pid=-1, camid=7, fields={'place': 'hall'})
        >>> read_name("holiday.jpg")
        Said(pid=-1, camid=-1, fields={})
    """
    found = _compiled(check_kind("pattern", pattern, str)).search(check_kind("name", name, str))
    said = {} if found is None else found.groupdict()
    values: dict[str, Value] = {}
    for group, text in said.items():
        if text is not None:
            values[group] = _value(name, group, text)
    pid, camid = (int(values.pop(group, UNKNOWN)) for group in ("pid", "camid"))
    return Said(pid, camid, values)


def fields_of(names: Sequence[str], pattern: str = MARKET1501) -> dict[str, list[Value | None]]:
    """Returns what the names of pictures say besides pids and camids, by the group's name.

    For filters: ``milvus.update(fields_of(index.names))``.

    Args:
        names: such as an index has.
        pattern: as :func:`read_name` takes it.

    Returns:
        A value for each name, None where it is not said.

    Raises:
        ValueError: as :func:`read_name`.

    Example:
        >>> fields_of(["0002_c1s1_000451_03.jpg", "holiday.jpg"])
        {'time': [451, None]}
    """
    said = [read_name(name, pattern).fields for name in names]
    groups = [group for group in _compiled(pattern).groupindex if group not in ("pid", "camid")]
    return {group: [each.get(group) for each in said] for group in groups}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern must be a regular expression, got {pattern!r}: {error}"
        ) from error


def _value(name: str, group: str, text: str) -> Value:
    """Returns what a group of a name says."""
    if group in ("pid", "camid"):
        if not re.fullmatch(r"-1|[0-9]{1,18}", text):
            raise ValueError(f"{group} of {name!r} must be a number below 10**18, got {text!r}")
        return int(text)
    if group != "time":
        return int(text) if re.fullmatch("[0-9]{1,18}", text) else text
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    try:
        return float(text) if re.fullmatch(r"-?[0-9]+\.[0-9]+", text) else _seconds(text)
    except ValueError as error:
        raise ValueError(
            f"time of {name!r} must be a number or a date and time in ISO 8601, got {text!r}"
        ) from error


def _seconds(text: str) -> float:
    """Returns a date and time as seconds since 1970."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
