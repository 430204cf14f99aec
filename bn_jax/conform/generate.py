"""Makes the vectors of vectors.json from the oracle: `python -m bn_jax.conform.generate`."""

from bn_jax.conform import other_vectors as others
from bn_jax.conform import training_vectors as training
from bn_jax.conform.vectors import FILE, Vector, as_json


def make() -> list[Vector]:
    """All vectors."""
    return [
        *training.large_means(),
        *training.formulas(),
        training.constant_features(),
        others.one_value(),
        *training.masks(),
        *training.half_precision(),
        *others.evaluation(),
        *others.running_averages(),
        *others.bad_batches(),
        *others.shards(),
        *others.renorms(),
    ]


if __name__ == "__main__":
    FILE.write_text(as_json(make()), encoding="utf-8")
