"""A version of transformers that was not tested is named at load."""

from core_hf_fallback import versions


def test_the_version_that_the_tests_run_with_is_a_tested_one(caplog):
    versions.warn_if_untested()
    assert not caplog.records


def test_another_version_is_warned_of_by_number(caplog, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "5.99.1")
    versions.warn_if_untested()
    assert "transformers 5.99.1 is installed; the fallback was tested with 5.23" in caplog.text
