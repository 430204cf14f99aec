"""The file of vectors is what its generator makes, and what exact arithmetic says."""

import json
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from bn_jax.conform import generate, judge, suspects, vectors
from bn_jax.conform.contract import FUNCTIONS, NAMED


def scalars(value, path=()):
    """What JSON holds, by where it is."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for n, item in items for k, v in scalars(item, (*path, n)).items()}
    return {path: value}


def test_the_file_is_what_the_generator_makes():
    """Inputs bit for bit; expected values to 11 of 12 digits, since sums vary in the 16th."""
    made = scalars(json.loads(vectors.as_json(generate.make())))
    stored = scalars(json.loads(vectors.FILE.read_text(encoding="utf-8")))
    assert made.keys() == stored.keys()
    for path, value in made.items():
        part = path[2] if len(path) > 2 else ""
        digits = {"expected": 1e-11, "tolerance": 6e-3, "lenient": 6e-3}
        if part in digits and isinstance(value, float):
            assert value == pytest.approx(stored[path], rel=digits[part], abs=1e-12), path
        else:
            assert value == stored[path], path


def test_the_file_is_small_and_complete():
    assert vectors.FILE.stat().st_size <= 200_000
    for vector in vectors.load():
        for call in vector.calls:
            positional, results = FUNCTIONS[call]
            assert set(positional) <= set(vector.inputs)
            assert set(vector.inputs) <= {*NAMED, "dy", *positional}
            if vector.check == "close":
                assert set(results) <= set(vector.expected) & set(vector.tolerance)


def test_inputs_are_numbers_of_their_dtype():
    for vector in vectors.load():
        for name in ("x", "dy"):
            if name in vector.inputs:
                value = np.asarray(vector.inputs[name])
                as_dtype = value.astype(vectors.dtype_of(vector.dtype)).astype(float)
                np.testing.assert_array_equal(as_dtype, value)


@pytest.mark.parametrize("name", ["mean 0", "mean 100000"])
def test_expected_values_are_exact(name):
    """Against fractions, and a root to 40 digits; the oracle rounds its mean at 1e5 · 2⁻⁵³."""
    (vector,) = (v for v in vectors.load() if v.name == name)
    x, epsilon = vector.inputs["x"], Fraction(vector.inputs["epsilon"])
    for feature in range(2):
        column = [Fraction(float(value)) for value in x[:, feature]]
        mean = sum(column) / len(column)
        var = sum((value - mean) ** 2 for value in column) / len(column)
        with localcontext(prec=40):
            padded = var + epsilon
            std = (Decimal(padded.numerator) / Decimal(padded.denominator)).sqrt()
            y = [
                float(Decimal((v - mean).numerator) / Decimal((v - mean).denominator) / std)
                for v in column
            ]
        expected = vector.expected
        np.testing.assert_allclose(expected["mean"][feature], float(mean), rtol=1e-11)
        np.testing.assert_allclose(expected["var"][feature], float(var), rtol=1e-10)
        np.testing.assert_allclose(expected["y"][:, feature], y, atol=1e-10)


def test_every_known_bug_shows():
    """Each suspect is off on some vector by more than what `recognize` allows it to be."""
    shown, known = set(), set()
    for vector in vectors.load():
        for call in vector.calls:
            if vector.check not in ("close", "convention"):
                continue
            for quantity, named in suspects.of(vector, call).items():
                for name, value in named:
                    known.add((call, name))
                    rights = (
                        [vector.expected]
                        if vector.check == "close"
                        else [*vector.expected.values()]
                    )
                    allowed = vector.tolerance.get(quantity, 1e-4)
                    off = min(judge.distance(value, right[quantity], allowed) for right in rights)
                    if off > 100:
                        shown.add((call, name))
    assert known - shown == set()
    assert len(known) >= 50
