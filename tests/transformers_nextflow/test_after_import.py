"""Acting on a module once it is imported."""

import importlib
import sys

from transformers_nextflow._after_import import after_import


def test_it_acts_once_and_only_after_the_import(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    finders, values = list(sys.meta_path), []
    after_import("imported_later", lambda module: values.append(module.value))
    assert values == []
    importlib.import_module("imported_later")
    monkeypatch.delitem(sys.modules, "imported_later")
    importlib.import_module("imported_later")
    assert values == [1] and sys.meta_path == finders


def test_it_acts_now_on_what_is_imported_already():
    names = []
    after_import("sys", lambda module: names.append(module.__name__))
    assert names == ["sys"]


def test_several_may_wait_for_one_module_and_reloading_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "imported_later_too.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    finders, values = list(sys.meta_path), []
    after_import("imported_later_too", lambda module: values.append(module.value))
    after_import("imported_later_too", lambda module: values.append(module.value + 10))
    module = importlib.import_module("imported_later_too")
    assert sorted(values) == [1, 11]
    importlib.reload(module)
    assert len(values) == 2 and sys.meta_path == finders
