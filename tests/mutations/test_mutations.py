"""The mistakes that `run.py` makes can be made, and there are tests that could see them."""

import ast

from mutate import mutations_of
from places import ROOT, cases, mirror_of, modules

SOURCE = '''"""Says 1 < 2."""

LIMIT = 2**24


def clip(x: "tensor[1]", low=0, flag=True):
    """Between 3 and 4."""
    if not flag and x < low:
        raise ValueError(f"{1 + 1} is too low")
    x = x + max(low, 1)
    x.add_(2.5)
    return swap(x, low) if flag else -x
'''


def test_a_mistake_changes_one_place_of_the_code(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    mutations = mutations_of(path)
    assert {mutation.kind for mutation in mutations} == {
        *("comparison", "and/or", "arithmetic", "constant", "condition", "no not", "sign", "function", "dropped"),
        "swapped arguments",
    }
    for mutation in mutations:
        text = mutation.applied()
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE)), mutation
        assert [line for line in SOURCE.splitlines() if line not in text.splitlines()] != [], mutation
        for kept in ('"""Says 1 < 2."""', "2**24", "tensor[1]", '"""Between 3 and 4."""', 'raise ValueError(f"{1 + 1}'):
            assert kept in text, mutation


def test_every_module_has_a_file_that_mirrors_it():
    """Renamed ones are found by their names, and so are their tests."""
    found = modules()
    names = {path.stem for path in found}
    for area in (
        ("modeling_nextflow", "model_inputs", "token_layout", "padding", "linear_cross_entropy", "varlen_attention"),
        ("generation_nextflow", "generation_config_nextflow", "decoding", "decoding_settings", "decoding_state"),
        ("sampling", "scale_cache", "layer_compilation", "grpo_losses"),
    ):
        assert names.issuperset(area), area
    assert all(mirror_of(path) for path in found), [path for path in found if not mirror_of(path)]


def test_the_mistakes_that_once_went_unseen_can_be_made():
    for mutation in cases():
        ast.parse(mutation.applied())
        assert mutation.path.is_relative_to(ROOT)
