"""Puts the recipes and the demo's data into the wheel, so that they are found outside a clone (see llmkit.config.locate)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "data/demo")


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them from the clone
            for folder in SHIPPED:
                target = Path(self.build_lib) / "llmkit" / "_shipped" / folder
                shutil.copytree(Path(__file__).parent / folder, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
