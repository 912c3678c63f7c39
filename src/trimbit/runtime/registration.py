"""Register compressed directories with transformers once it is imported, without importing it.

Importing transformers takes seconds; a command that only reads JSON should not wait for it.
"""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_transformers() -> None:
    """Make transformers' Auto classes know compressed directories: now if it is imported, else when it is."""
    when_imported("transformers", _register)


def _register() -> None:
    from trimbit.runtime.transformers import register

    register()


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` is imported: now if it already is, else at the end of its import.

    An import in another thread waits until `action` is done. If the import or `action` fails, the import raises the
    error, and the next import tries again.
    """
    finder = _Finder(name, action)
    if not any(isinstance(one, _Finder) and one.name == name for one in sys.meta_path):
        sys.meta_path.insert(0, finder)
    if name in sys.modules:  # checked last: another thread may have just imported it
        finder.remove()
        action()


class _Finder(MetaPathFinder):
    """Lets later finders find one module, and wraps its loader."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self,
        fullname: str,
        path: Any = None,  # noqa: ANN401 # a Sequence in typeshed, but not for a namespace package
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
        """Remove this finder, and restore the import system."""
        sys.meta_path[:] = [one for one in sys.meta_path if not (isinstance(one, _Finder) and one.name == self.name)]

    def imported(self) -> None:
        """Act, and remove this finder; only once, even if another hook had the loader wrapped twice."""
        if self in sys.meta_path:
            self.action()
            self.remove()


class _Loader(Loader):
    """Loads a module by the wrapped loader, then runs the action."""

    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the wrapped loader does."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the wrapped loader does; the module is first given that loader, so that it keeps no trace of this one."""
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.finder.imported()
