"""See `kvjax.testing`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvjax.caches import registry
from kvjax.errors import KvjaxError
from kvjax.extras import needed

# Plugins of pytest that the package itself imports were imported before pytest could rewrite them.
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def main() -> int:
    """Runs the contract suite; the exit code is pytest's, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.testing", description="The contract suite of cache methods."
    )
    parser.add_argument("--plugins", default="", help="modules or files that register methods, separated by commas")
    parser.add_argument("--cache", default="", help="one plan name; the examples of the plugins' methods where empty")
    own, rest = parser.parse_known_args()
    sys.path.insert(0, "")
    try:
        with needed("pytest"):
            import pytest
        before = registry.methods()
        registry.load_plugins(own.plugins)
        added = [method for method in registry.methods() if method not in before] or registry.methods()
        names = [own.cache] if own.cache else [text for method in added for text in method.examples]
        for name in names:
            registry.parse_spec(name)
    except KvjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pytest.register_assert_rewrite("kvjax.testing.contract")

    class Names:
        """Parametrises the suite."""

        @staticmethod
        def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
            if "text" in metafunc.fixturenames:
                metafunc.module.SETTINGS.update(plugins=own.plugins)
                metafunc.parametrize("text", names)

    suite = Path(__file__).with_name("contract.py")
    return pytest.main(
        [str(suite), "-p", "no:cacheprovider", "--import-mode=importlib", *QUIET, *rest], plugins=[Names]
    )


if __name__ == "__main__":
    sys.exit(main())
