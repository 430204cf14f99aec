"""Every lesson runs from top to bottom, and its exercises tell right answers from wrong ones."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_lesson = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What the first cell installs: the package with its extra "train".
INSTALLED = {"bn_jax", "jax", "numpy", "flax", "optax", "orbax", "matplotlib"}
STANDARD = {
    "functools",
    "importlib",
    "itertools",
    "pathlib",
    "subprocess",
    "sys",
    "tempfile",
    "typing",
    "warnings",
}

# For each exercise, an answer that a reader might give first, and that is wrong.
WRONG = {
    "01_functional_batch_norm": [
        # The divisor taken for a constant.
        "lambda x, g: g / jnp.sqrt((x**2).mean(0) + 1e-5)",
        # E[x²] - E[x]².
        "lambda a, v, n, b, w, k: ((a * n + b * k) / (n + k), (n * (v + a**2) + k * (w + b**2))"
        " / (n + k) - ((a * n + b * k) / (n + k)) ** 2)",
        # Var instead of its root.
        "lambda W, p, s: (W * p.scale / s.var, p.bias - s.mean * p.scale / s.var)",
    ],
    "02_flax": [
        "lambda: {'momentum': 0.1}",
        "lambda layer, v, x, _: layer.apply(v, jnp.nan_to_num(x), mutable=['batch_stats'])",
        "lambda params: jax.tree.map(lambda _: True, params)",
    ],
    "03_moments_are_a_monoid": [
        # The variance between the parts forgotten.
        "lambda m, a: bn.Moments((m.count * m.mean - a.count * a.mean) / (m.count - a.count),"
        " (m.count * m.var - a.count * a.var) / (m.count - a.count), m.count - a.count)",
        # Every batch weighs the same, whatever its size.
        "lambda m, a, d: bn.Moments(*(d * p + (1 - d) * q for p, q in zip(m[:3], a[:3])))",
        # The mean, rounded to float32.
        "lambda a, b, params, axis_name: tuple(bn.normalize(part, *bn.pool(bn.merge(bn.measure(a),"
        " bn.measure(b)), axis_name)[:2], params) for part in (a, b))",
    ],
    "04_why_evaluation_disagrees": [
        # A running average of the batches.
        "lambda v, batches: functools.reduce(lambda v, x: {**v, **forward(v, x)[1]}, batches, v)",
        # All sentences together.
        "lambda x, real: jnp.where(real[..., None], bn.standardize(x, bn.BatchNormParams(None,"
        " None), where=real)[0] ** 2, 0).sum(1)",
        # In another order, batch statistics are the same.
        "lambda f, x: not jnp.allclose(f(x[::-1]), f(x)[::-1], atol=1e-4)",
    ],
    "05_small_batches_and_shift": [
        # The distance of the two means forgotten.
        "lambda x, norm, state, n: blended(n / (n + len(x)))(x, norm, state)[0]",
        # Each batch by its own statistics.
        "lambda p, s, xs: lax.map(lambda x: network(p, s, x, blended(0.0))[0].argmax(-1), xs)",
        # The start of the variance taken for 0.
        "lambda s, d: s._replace(mean=s.mean / (1 - d**s.count), var=s.var / (1 - d**s.count))",
    ],
    "06_pitfalls": [
        # The initial variance is 1, not 0.
        "lambda mean, var, d, t: (mean / (1 - d**t), var / (1 - d**t))",
        # Not squared.
        "lambda r, b: float(1 / (jnp.abs(r - b.mean(0)) / b.std(0)).mean())",
        # What is not finite becomes 0, and is averaged.
        "lambda m, v, bm, bv, d: (d * m + (1 - d) * jnp.nan_to_num(bm, posinf=0),"
        " d * v + (1 - d) * jnp.nan_to_num(bv, posinf=0))",
    ],
    "07_training_loop": [
        # As if the seeds were not the same.
        "lambda a, b: (np.mean(a - b), np.hypot(half_width(a), half_width(b)))",
        # The statistics keep what a bad step did.
        "lambda state, rate: (lambda after, loss: (after._replace(params=jax.tree.map(lambda new,"
        " old: jnp.where(jnp.isfinite(new).all(), new, old), after.params, state.params)), loss))("
        "*step(state, rate))",
        # The same order in each epoch.
        "lambda key, number: lax.dynamic_slice(jax.random.permutation(key, len(images)),"
        " (60 * (number % 1000),), (60,))",
    ],
}


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
@each_lesson
def test_lesson_runs(path):
    notebook = read(path)
    for number, answer in enumerate(WRONG[path.stem], start=1):
        source = f"try:\n    check_{number}({answer})\nexcept AssertionError:\n    print('refused')"
        notebook.cells.append(new_code_cell(source, metadata={"tags": ["wrong"]}))
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "shows something"
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert {printed(cell) for cell in tagged(notebook, "exercise")} == {"no answer yet\n"}
    assert {printed(cell) for cell in tagged(notebook, "solution")} == {"right\n"}
    assert {printed(cell) for cell in tagged(notebook, "wrong")} == {"refused\n"}


def test_lessons_are_numbered():
    numbers = range(1, len(NOTEBOOKS) + 1)
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in numbers]
    assert {path.stem for path in NOTEBOOKS} == set(WRONG)


@each_lesson
def test_lesson_is_committed_without_outputs(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert not [cell.source for cell in cells if cell.outputs or cell.execution_count]


@each_lesson
def test_three_exercises_with_folded_answers(path):
    notebook = read(path)
    pairs = zip(tagged(notebook, "exercise"), tagged(notebook, "solution"), strict=True)
    numbers = []
    for number, (exercise, solution) in enumerate(pairs, start=1):
        numbers.append(number)
        assert f"def check_{number}(answer)" in exercise.source
        assert "...  # your answer" in exercise.source
        assert f"print(check_{number}(solution_{number}))" in solution.source
        # Jupyter folds by the first, Colab by the second, which shows the title.
        assert solution.metadata.jupyter.source_hidden
        assert solution.metadata.cellView == "form"
        assert solution.source.startswith(f"# @title Answer to exercise {number}\n")
    assert numbers == [1, 2, 3]


@each_lesson
def test_imports_only_what_the_first_cell_installs(path):
    code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    names = set()
    for node in ast.walk(ast.parse("\n".join(code))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert names <= INSTALLED | STANDARD


@each_lesson
def test_links_of_lessons_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
