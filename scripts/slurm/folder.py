"""`folder.py RECIPE [key=value ...]`: prints the folder of the recipe's run, for the scripts beside it."""

import sys

from llmkit.config import UserError
from llmkit.stages import load_recipe

if __name__ == "__main__":
    try:
        print(load_recipe(sys.argv[1], sys.argv[2:]).out)
    except UserError as e:
        sys.exit(f"error: {e}")
