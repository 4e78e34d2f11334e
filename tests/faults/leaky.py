"""The real `stream-app` that keeps every record it was given: run as ``python -m tests.faults.leaky``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from stream_app.adapters.assignment import Assignment
from stream_app.adapters.transport import Slice


def arrange() -> None:
    """Wrap what takes the records in."""
    kept: list[Slice] = []
    submit = Assignment.submit

    def kept_too(assignment: Assignment, part: Slice, acknowledge: Callable[[], object]) -> None:
        kept.append(part)
        submit(assignment, part, acknowledge)

    assignment: Any = Assignment
    assignment.submit = kept_too


if __name__ == "__main__":
    arrange()
    from stream_app.__main__ import main

    sys.exit(main())
