"""Contract tests that run on fakes and real adapters alike."""

import pytest

# pytest explains failed asserts only in test files, and in modules registered here.
pytest.register_assert_rewrite("tests.contract.runtime_contract")
