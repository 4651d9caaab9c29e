"""The tests compile with few optimisations, and a program once: each worker, and the processes that its tests start, keep them
for the session. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests fully optimised programs."""

import os
import tempfile

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"  # of its own, for JAX writes these files without a lock
else:
    SESSION = tempfile.TemporaryDirectory(prefix="pdo_jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = SESSION.name
