"""The build backend of this package: setuptools, with the setup script that stands beside this file.

In the tree, as PEP 517 provides for, since the top level is for what people read.
"""

from pathlib import Path

from setuptools import build_meta

SCRIPT = str(Path(__file__).with_name("setup.py"))


class _Backend(build_meta._BuildMetaBackend):
    def run_setup(self, setup_script: str = SCRIPT) -> None:
        super().run_setup(SCRIPT)


_backend = _Backend()
build_editable = _backend.build_editable
build_sdist = _backend.build_sdist
build_wheel = _backend.build_wheel
get_requires_for_build_editable = _backend.get_requires_for_build_editable
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
