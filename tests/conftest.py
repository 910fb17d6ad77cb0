from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' shapes are too small to share

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine must not fail a test
settings.load_profile("untimed")
