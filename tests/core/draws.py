"""What the property tests draw: fixed shapes (so that nothing recompiles), any values."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

laws = settings(
    max_examples=40,
    deadline=None,  # the first example compiles
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(laws, max_examples=15)

seeds = st.integers(0, 2**32 - 1)
anything = st.sampled_from([0.0, -3.0, 1e30, np.nan, np.inf, -np.inf])
"""What padding may hold."""


@st.composite
def batches(draw, shape, dtype=np.float32, largest=1e4):
    """A batch: either normal about any mean at any scale, or small numbers with many ties."""
    if draw(st.booleans()):
        random = np.random.default_rng([1, draw(seeds)])
        center = draw(st.sampled_from([0.0, 1.0, -largest / 100, largest]))
        spread = draw(st.sampled_from([1e-3, 1.0, 1e3]))
        return (center + spread * random.standard_normal(shape)).astype(dtype)
    ties = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0, 1000.0])
    return draw(arrays(dtype, shape, elements=ties))


@st.composite
def normals(draw, shape, dtype=np.float32):
    """Independent standard normal numbers."""
    return np.random.default_rng([2, draw(seeds)]).standard_normal(shape).astype(dtype)


@st.composite
def labels(draw, size, parts):
    """To which of so many parts each of so many values belongs; parts may be empty."""
    return draw(arrays(np.int32, size, elements=st.integers(0, parts - 1)))


@st.composite
def permutations(draw, size):
    """An order."""
    return np.random.default_rng([3, draw(seeds)]).permutation(size)
