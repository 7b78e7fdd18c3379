"""`torchrun ... scripts/train.py RECIPE [key=value ...]`: `llmkit train` on many ranks."""

import sys

from llmkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
