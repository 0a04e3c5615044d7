"""What holds for every test: one thread each, because the tests run side by side."""

import os

# Read by torch, OpenBLAS and scikit-learn when they are imported, which is after this file.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
