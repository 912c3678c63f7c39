"""Registers compressed directories with transformers when that is imported, without importing it.

transformers takes seconds to import; a command that only reads JSON should not wait for it.
"""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_transformers() -> None:
    """Make transformers' Auto classes know compressed directories: now if it is imported, else once it is."""
    when_imported("transformers", _register)


def _register() -> None:
    from trimbit.runtime.transformers import register

    register()


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` is imported: now if it is, else at the end of its import.

    An import in another thread waits until `action` is done. If the import or `action` fails, the import raises the
    error, and the next one tries again.
    """
    finder = _Finder(name, action)
    if not any(isinstance(one, _Finder) and one.name == name for one in sys.meta_path):
        sys.meta_path.insert(0, finder)
    if name in sys.modules:  # looked up only now: another thread may have imported it since
        finder.remove()
        action()


class _Finder(MetaPathFinder):
    """Lets the finders behind it find one module, and wraps its loader."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self,
        fullname: str,
        path: Any = None,  # noqa: ANN401 # of a namespace package it is not the Sequence that typeshed asks for
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The module's spec with a wrapped loader; None for all other modules."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def remove(self) -> None:
        """Leave the import system as it was."""
        sys.meta_path[:] = [one for one in sys.meta_path if not (isinstance(one, _Finder) and one.name == self.name)]

    def imported(self) -> None:
        """Act and leave. Another hook may have made this one wrap the loader twice: the second time does nothing."""
        if self in sys.meta_path:
            self.action()
            self.remove()


class _Loader(Loader):
    """Loads by the loader that was found, then acts."""

    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the wrapped loader does."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the wrapped loader does, which takes its place first: the module keeps no trace of this one."""
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.finder.imported()
