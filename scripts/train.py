"""`torchrun ... scripts/train.py RECIPE [key=value ...]`: `llmkit train` on many ranks."""

import signal
import sys

# PyTorch takes seconds to import. A signal that comes meanwhile waits until there is somebody to mind it: training lets it
# in (training.task.Stop), and then ends as after any other signal, with the file PREEMPTED.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})

from llmkit.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
