"""Registers the custom architectures with the Auto classes of transformers, without importing transformers for it.

What is imported already is registered with at once. Otherwise a finder at the head of `sys.meta_path` watches the modules of
transformers and of the architectures being imported. It registers once the Auto classes are among them and none of those modules
is half done: transformers' modules import each other in circles, a model imports many of them, and a model that is half done
itself has no class to register. Then the finder is gone.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
# No registration while a module of these is being imported.
_WATCHED = ("transformers.", "hf_pretrain.models.")


def register_architectures() -> None:
    """Register now or as soon as the Auto classes are imported."""
    finder = _Finder()
    finder.register_what_is_there()
    if finder.pending:
        sys.meta_path.insert(0, finder)


class _Finder(MetaPathFinder):
    """Lets the other finders find, and notes when the outermost import of a watched module is done."""

    def __init__(self) -> None:
        self.pending = {_CONFIGURATIONS, _MODELS}
        self.depth = 0

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders give, its loader wrapped."""
        if not f"{fullname}.".startswith(_WATCHED):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def register_what_is_there(self) -> None:
        """Register with the Auto classes that are imported, where that has not been done."""
        for name in (_CONFIGURATIONS, _MODELS):
            if name in self.pending and name in sys.modules:
                # First of all: what is imported for it comes by here again.
                self.pending.discard(name)
                from hf_pretrain.models import register_configurations, register_models

                (register_configurations if name == _CONFIGURATIONS else register_models)()
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """A module's own loader, with a note of the beginning and the end."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as if it had been found without us."""
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.depth -= 1
        if self.finder.depth == 0:
            self.finder.register_what_is_there()
