"""What tests leave behind in the root of the repository, where a commit would take it along."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Caches of the tools, and what `make` builds beside the tests.
USUAL = ("build", "dist", "hf_pretrain.egg-info", "htmlcov", "site", "__pycache__")


class LeftFiles:
    """Tells what is new in a folder since it was asked last.

    Fixtures of modules and of the session count too: what they leave is new at the end of the first test that has them.
    """

    def __init__(self, folder=ROOT):
        self.folder = folder
        self._known = set(os.listdir(folder))

    def new(self):
        """The names of new files and folders, in order; those that tools keep are left out."""
        now = set(os.listdir(self.folder))
        found, self._known = now - self._known, now
        return sorted(name for name in found if not name.startswith(".") and name not in USUAL)
