"""Writes tests/fixtures/scipy_linkage.json: random points, and scipy's partitions of them.

    python tools/make_linkage_fixture.py > tests/fixtures/scipy_linkage.json

Each instance holds points (the test computes their Euclidean distances), and for each linkage the
labels of several cuts. Coordinates have three decimals, so that both sides read the same numbers.
"""

import json
import sys

import numpy as np
import scipy
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

SEED = 20231001
LINKAGES = ["average", "single", "complete", "ward"]


def instance(rng: np.random.Generator, n: int) -> dict:
    dim = int(rng.integers(2, 9))
    centres = rng.normal(size=(max(2, n // 5), dim)) * rng.choice([0.0, 1.0, 4.0])
    points = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, dim))
    points = points.round(3)
    distance = pdist(points)
    assert len(np.unique(distance)) == len(distance), "ties have no unique answer"
    cuts = sorted({1, 2, n // 4, n // 2, 3 * n // 4, n - 1} - {0})
    labels = {}
    for name in LINKAGES:
        tree = linkage(distance, name)
        labels[name] = [fcluster(tree, m, "maxclust").tolist() for m in cuts]
        assert all(len(set(of)) == m for of, m in zip(labels[name], cuts))
    return {"points": points.tolist(), "cuts": cuts, "labels": labels}


def main() -> None:
    rng = np.random.default_rng(SEED)
    sizes = [4, 5, 6, 7, 8] * 4 + list(range(10, 41, 2)) + [39, 40, 40, 40]
    head = {"scipy": scipy.__version__, "numpy": np.__version__, "seed": SEED}
    json.dump(head | {"instances": [instance(rng, n) for n in sizes]}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
