"""Registers the custom architectures with the Auto classes of transformers, without an import of transformers.

If the Auto classes are already imported, registration happens at once. Otherwise a finder at the head of `sys.meta_path` watches
imports of transformers and of the architectures. It registers when the Auto classes are imported and no watched module is partly
imported: transformers' modules import each other in circles, and a partly imported architecture has no class to register.
Then the finder removes itself.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_TOKENIZERS = "transformers.models.auto.tokenization_auto"
# While a module of these packages is being imported, nothing is registered.
_WATCHED = ("transformers.", "hf_pretrain.models.")


def register_architectures() -> None:
    """Register now, or as soon as the Auto classes are imported."""
    finder = _Finder()
    finder.register_imported()
    if finder.pending:
        sys.meta_path.insert(0, finder)


class _Finder(MetaPathFinder):
    """Passes searches on to the other finders, and registers at the end of the outermost watched import."""

    def __init__(self) -> None:
        self.pending = {_CONFIGURATIONS, _MODELS, _TOKENIZERS}
        self.depth = 0

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the other finders; its loader runs the module with `_execute`."""
        if not f"{fullname}.".startswith(_WATCHED):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._execute, spec.loader)  # type: ignore[method-assign]
        return spec

    def _execute(self, loader: Loader, module: ModuleType) -> None:
        """Run a module as its loader does, and count the watched imports that are under way."""
        self.depth += 1
        try:
            type(loader).exec_module(loader, module)
        finally:
            self.depth -= 1
        if self.depth == 0:
            self.register_imported()

    def register_imported(self) -> None:
        """Register with each imported Auto class, once."""
        for name in (_CONFIGURATIONS, _MODELS, _TOKENIZERS):
            if name in self.pending and name in sys.modules:
                # First, because the imports below call this method again.
                self.pending.discard(name)
                if name == _MODELS:
                    # Who has the models wants the tokenizers too: they are imported then.
                    self.pending.discard(_TOKENIZERS)
                from hf_pretrain import models

                register = {
                    _CONFIGURATIONS: models.register_configurations,
                    _MODELS: models.register_models_and_tokenizers,
                    _TOKENIZERS: models.register_tokenizers,
                }
                register[name]()
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)
