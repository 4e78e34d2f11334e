"""The offline recommenders of the tests, where they are: in a checkout, beside the package.

They are no part of the service (it learns online) but its competition, so they are kept with the tests.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import stream_app
from stream_app.evaluation.baselines import Log

__all__ = ["OFFLINE_FILE", "Judge", "offline_judge"]

OFFLINE_FILE = Path(stream_app.__file__).parent.parent / "tests" / "offline.py"

#: Given a log, the event from which on recommenders are judged, the discoveries among the events (by number)
#: and the half-life of the profiles, returns by name of a recommender the ranks of the discoveries that are
#: not before that event.
Judge = Callable[[Log, int, Sequence[int], float], Mapping[str, NDArray[np.float64]]]


def offline_judge(file: Path = OFFLINE_FILE) -> Judge | None:
    """Load the recommenders by path, since tests are not installed; `None` where there are none."""
    if not file.is_file():
        return None
    name = "_stream_app_offline"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    judge: Judge = module.judge
    return judge
