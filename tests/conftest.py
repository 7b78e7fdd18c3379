"""What every test runs under: one thread a process, since the tests themselves run side by side."""

import os

# Before torch is imported, and inherited by the processes that tests start. Threads that wait for others by spinning
# make a shared machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
