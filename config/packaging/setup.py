"""Compile the hot part of `stream_app/core` with mypyc, where there is a C compiler; see `backend.py`.

The same files run interpreted: without a compiler, without mypy, or where the environment says
``STREAM_APP_INTERPRETED=1``, the package is installed as it is, which doubles a worker's time.
All of it is compiled or nothing: a part would not find the library that all parts share.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

#: What every event goes through. What is made of msgspec's Structs (event, profile, transition) stays as it
#: is: mypyc does not keep the annotations that those are made from.
COMPILED = ("decay", "fold", "partitioner", "patch", "segment_set", "standings", "step", "wire")
LIBRARY = "stream_app_core"
#: Commands that only describe the package; compiling takes 12 s.
DESCRIBING = {"dist_info", "egg_info", "sdist"}
HERE = "config/packaging"


def extensions() -> list[Extension]:
    """Return what is to be compiled; empty where that is not wanted or not possible."""
    if os.environ.get("STREAM_APP_INTERPRETED"):
        forget()
        return []
    if DESCRIBING.intersection(sys.argv):
        return []
    try:
        from mypyc.build import mypycify  # noqa: PLC0415 - may be missing

        # Checked as the rest of the package is, by `make check`, so not again here with other settings.
        options = ["--config-file=", "--ignore-missing-imports"]
        sources = [f"stream_app/core/{name}.py" for name in COMPILED]
        return list(mypycify([*options, *sources], group_name=LIBRARY))
    except (ImportError, SystemExit) as exc:  # mypyc ends the process where it cannot go on
        left_interpreted(exc)
        return []


def forget(root: str = ".") -> None:
    """Remove what was compiled before: it would be taken for what stands beside it now."""
    for pattern in ("stream_app/core/*.so", f"{LIBRARY}__mypyc*.so"):
        for compiled in Path(root).glob(pattern):
            compiled.unlink()


def left_interpreted(exc: BaseException) -> None:
    """Say that the core stays as it is, and why."""
    print(f"stream_app.core is not compiled, which costs speed only: {exc}", file=sys.stderr)


class AllOrNothing(build_ext):
    """Compiles all extensions, or leaves none."""

    def run(self) -> None:
        """Compile; what fails leaves the package interpreted."""
        if self.inplace or self.editable_mode:
            forget()
        try:
            super().run()
        except Exception as exc:  # whatever a compiler may fail with
            left_interpreted(exc)
            forget(self.build_lib)
            forget()
            self.extensions = []


class WithBackend(sdist):
    """Takes along what the package is built with: setuptools knows of a script at the top level only."""

    def make_distribution(self) -> None:
        """Write the archive."""
        self.filelist.extend([f"{HERE}/backend.py", f"{HERE}/setup.py"])
        super().make_distribution()


setup(ext_modules=extensions(), cmdclass={"build_ext": AllOrNothing, "sdist": WithBackend})
