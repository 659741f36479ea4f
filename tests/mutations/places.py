"""Where mistakes are made, and which tests should see them."""

import ast
import re
from pathlib import Path

from mutate import Mutation, named

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/transformers_nextflow")
HOLDS = re.compile(
    r"^(modeling_nextflow|model_inputs|padding"
    r"|.*(layout|decod|sampling|loss|cross_entropy|scale_cache|attention|generation|compilation).*)$"
)
# Modules that the tests of others are about.
MIRRORED_BY = {
    "decoding_settings": ["decoding", "generation_nextflow"],
    "decoding_state": ["decoding", "generation_nextflow"],
    "model_inputs": ["modeling_nextflow"],
    "stream_decoding": ["session"],
    "varlen_attention": ["trainer/packing"],
}


def modules() -> list[Path]:
    """Files of the package that hold modeling, layout, decoding, sampling or losses, relative to the root."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [path.relative_to(ROOT) for path in files if HOLDS.match(path.stem) and "checkpoints" not in path.parts]


def mirror_of(module: Path) -> list[str]:
    """The test files of a module: `test_<its name>.py` and `test_<its name>_*.py`, unless those mirror another one."""
    found = _own_tests(module)
    if not found:
        found = [test for name in MIRRORED_BY.get(module.stem, ()) for test in _own_tests(PACKAGE / f"{name}.py")]
    return found


def _own_tests(module: Path) -> list[str]:
    folder = ROOT / "tests" / PACKAGE.name / module.relative_to(PACKAGE).parent
    others = {path.stem for path in (ROOT / module).parent.glob("*.py")} - {module.stem}
    tests = [folder / f"test_{module.stem}.py", *sorted(folder.glob(f"test_{module.stem}_*.py"))]
    found = [path for path in tests if path.is_file() and path.stem.removeprefix("test_") not in others]
    return [str(path.relative_to(ROOT)) for path in found]


def cases() -> list[Mutation]:
    """Mistakes that passed all tests before there was a golden file."""
    path = ROOT / PACKAGE / "modeling_nextflow.py"

    def in_length_embedding(node):
        return isinstance(node, ast.FunctionDef) and node.name == "_image_embedding"

    def scale_embedding(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "self.scale_embedding"

    def gelu(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("GELU")

    def without_length(node):
        *body, last = node.body
        node.body = [*body, ast.Return(ast.BinOp(ast.Constant(0), ast.Mult(), last.value))]
        return ast.unparse(node).replace("\n", "\n    ")

    def shifted(node):
        return f"self.scale_embedding({ast.unparse(node.args[0])} - 1)"

    return [
        named(path, in_length_embedding, "no scale-length embedding", without_length),
        named(path, scale_embedding, "scale embedding shifted by one", shifted),
        named(path, gelu, "Tanh for GELU", lambda node: ast.unparse(node).replace("GELU", "Tanh")),
    ]
