"""Contracts that fakes and real adapters keep alike."""

import pytest

# Its asserts explain themselves, though pytest does not take it for a file of tests.
pytest.register_assert_rewrite("tests.contract.runtime_contract")
