"""A version of transformers outside of the tested range is named at load."""

import pytest

from core_hf_fallback import versions


def test_the_version_that_the_tests_run_with_is_in_the_range(caplog):
    versions.warn_if_untested()
    assert not caplog.records


@pytest.mark.parametrize("found", ["5.10.0", "5.17.2", "5.23.4", "5.23.0.dev0", "5.11rc1"])
def test_both_ends_and_what_lies_between_them_are_taken_without_a_warning(found, caplog, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.warn_if_untested()
    assert not caplog.records


@pytest.mark.parametrize("found", ["4.57.0", "5.9.9", "5.24.0", "6.0.0"])
def test_another_version_is_warned_of_by_number(found, caplog, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.warn_if_untested()
    assert f"transformers {found} is installed; the fallback was tested with 5.10 to 5.23" in caplog.text
