"""`spcompile diff`: what differs between two plans."""

from __future__ import annotations

import json as json_text

from spcompile.command.flags import Json


def diff(before: str, after: str, /, *, json: Json = False) -> int:
    """Tell what differs between two plans. Exits with 1 if something does.

    Args:
        before: A file that `spcompile explain --json` has printed.
        after: Another one.
    """
    from spcompile.report.plan_diff import as_text, differences, read_plan

    found = differences(read_plan(before), read_plan(after))
    print(json_text.dumps([one._asdict() for one in found]) if json else as_text(found))
    return 1 if found else 0
