"""Garbage is collected again after imports, whatever happens in them."""

from __future__ import annotations

import gc

import pytest

from pipeline.garbage import importing, uncollected


@pytest.fixture(autouse=True)
def _as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_imports_are_not_searched_and_nothing_of_them_is_later():
    with importing():
        assert not gc.isenabled()
        module = [[] for _ in range(1000)]
    assert gc.isenabled() and not any(each is module for each in gc.get_objects())


def test_an_import_that_fails_leaves_the_search_on():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("on", [True, False])
def test_a_block_leaves_it_as_it_was(on):
    if not on:
        gc.disable()
    with pytest.raises(ValueError, match="inside"), uncollected():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled() == on
