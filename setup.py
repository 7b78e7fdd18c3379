"""Puts the recipes and the demo's data into the wheel, so that they are found outside a clone (see llmkit.config.locate)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "configs",
    "data/demo",
    "data/rewards.py",
    "data/world.py",
)  # the last two: what the demo's recipes reward by


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them from the clone
            for name in SHIPPED:
                source, target = Path(__file__).parent / name, Path(self.build_lib) / "llmkit" / "_shipped" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                else:
                    shutil.copy(source, target)


setup(cmdclass={"build_py": BuildWithRecipes})
