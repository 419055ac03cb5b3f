"""Puts the vocabulary (`conf/`) and the experiments' yamls inside the built package; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithVocabulary(build_py):
    """In a checkout `conf/` lies beside the package; an installed package finds it inside."""

    def run(self) -> None:
        """Build as usual, then copy the yamls; an editable install reads them where they are."""
        super().run()
        if getattr(self, "editable_mode", False):
            return
        package = Path(self.build_lib) / "peftbench"
        for folder, pattern in (("conf", "*.yaml"), ("experiments", "experiment.yaml")):
            shutil.rmtree(package / folder, ignore_errors=True)
            for source in (ROOT / folder).rglob(pattern):
                target = package / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithVocabulary})
