"""One case in processes of its own: python -m benchmarks.detection.alone RANKS TITLE FOLDER PERTURBATION [STEPS]

For variables of the environment that libraries read when they are loaded.
"""

import sys

from benchmarks.detection.cases import perform
from tests.pool import close_all, pool

if __name__ == "__main__":
    ranks, title, folder, perturbation, *steps = sys.argv[1:]
    try:
        pool(int(ranks)).run(perform, title, folder, perturbation, int(steps[0]) if steps else None)
    finally:
        close_all()
