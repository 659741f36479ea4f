"""Acting on a module as soon as somebody imports it, and not before."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action(module)` once the module `name` is imported: now if it is already, else right after it was run."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    """Finds one module by way of the other finders, once, and has `action` follow its execution."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name = name
        self.action = action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_act(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self.name:  # a zip file's loader serves all its modules
                    self.action(module)

            setattr(spec.loader, "exec_module", execute_then_act)  # noqa: B010 (a method, to the type checker)
        return spec
