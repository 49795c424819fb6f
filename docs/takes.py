"""Shows functions under `@_takes(other)` with the arguments of `other`, in the API reference."""

from __future__ import annotations

from typing import Any

import griffe


class Takes(griffe.Extension):
    """A Griffe extension: it reads code without running it, so it does not see what the decorator does."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when all modules of the package are read."""
        module = pkg["generation.generate"]
        for function in module.functions.values():
            for decorator in function.decorators:
                name, _, other = str(decorator.value).partition("(")
                if name == "_takes":
                    function.parameters = module[other.rstrip(")")].final_target.parameters
