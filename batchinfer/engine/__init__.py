"""The native engine: never imports data/ or backends/, usable alone as batchinfer.Engine."""

import os

# A step is a few hundred short parallel regions. OpenMP's default between them, to spin until the next, is right on an
# idle machine; where anything else wants a core, a spinning thread keeps from its work the very thread it waits for,
# and steps become ten times slower. A short spin, then sleep, is as fast alone and holds up in company. libgomp reads
# this when torch loads it, so it must be said before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
