"""Versions outside the supported range get one clear warning; the oldest are what `make compat` installs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import rank_experts.messages
from rank_experts import registration

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh():
    rank_experts.messages.warn_once.cache_clear()


def versions(monkeypatch, **found):
    monkeypatch.setattr(registration, "version", lambda package: found.get(package, registration.SUPPORTED[package][0]))


@pytest.mark.parametrize("found", ["0.18.2", "0.22.0", "1.0", "0.22.0.dev0"])
def test_a_version_outside_the_range_gets_one_warning(monkeypatch, found):
    versions(monkeypatch, peft=found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registration.check_versions()
        registration.check_versions()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert re.search(rf"tested with peft 0\.19 up to, not including, 0\.22; found {re.escape(found)}", message)
    assert "install peft>=0.19,<0.22" in message


@pytest.mark.parametrize("found", ["5.10.0", "5.10.4", "5.23.0", "5.23.1.dev0"])
def test_a_version_within_the_range_gets_none(monkeypatch, found):
    versions(monkeypatch, transformers=found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.check_versions()


def test_what_is_installed_here_is_within_the_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.check_versions()


def test_pip_takes_no_transformers_that_the_tests_have_not_been_run_with():
    requirements = (ROOT / "pyproject.toml").read_text()
    lowest, first_untested = registration.SUPPORTED["transformers"]
    assert f'"transformers>={lowest},<{first_untested}"' in requirements


def test_the_range_begins_where_the_package_says_and_compat_installs_it():
    requirements = (ROOT / "pyproject.toml").read_text()
    oldest = (ROOT / "tests" / "constraints-oldest.txt").read_text()
    for package, (lowest, _) in registration.SUPPORTED.items():
        assert f'"{package}>={lowest}' in requirements
        assert f"\n{package}=={lowest}." in oldest
