"""Compile the hot part of `stream_app/core` with mypyc, where there is a C compiler; see `backend.py`.

The same files run interpreted: without a compiler, without mypy, or where the environment says
``STREAM_APP_INTERPRETED=1``, the package is installed as it is, which costs about a quarter of a worker's time.
"""

import os

from setuptools import Extension, setup

#: What every event goes through. What is made of msgspec's Structs (event, profile, transition) stays as it is:
#: mypyc does not keep the annotations that those are made from.
COMPILED = ("decay", "fold", "segment_set", "standings", "step")


def extensions() -> list[Extension]:
    """Return what is to be compiled; a compiler that fails leaves the package interpreted."""
    if os.environ.get("STREAM_APP_INTERPRETED"):
        return []
    try:
        from mypyc.build import mypycify
    except ImportError:
        return []
    # Checked as the rest of the package is, by `make check`, so not again here with other settings.
    found = mypycify(
        ["--config-file=", "--ignore-missing-imports", *(f"stream_app/core/{name}.py" for name in COMPILED)],
        group_name="stream_app_core",
    )
    for extension in found:
        extension.optional = True
    return list(found)


setup(ext_modules=extensions())
