import pytest

pytest.register_assert_rewrite("kvjax.testing.contract", "kvjax.testing.layers")
