"""Iterative training from a recipe with an `iterate` section; the same as `alignment iterate`.

    python scripts/iterate.py recipes/quickstart/iterate.yaml
    python scripts/iterate.py recipes/quickstart/iterate.yaml --accelerate-config recipes/accelerate/cpu2.yaml

Not started by `accelerate launch`: its stages are.
"""

import sys

from alignment.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "iterate")
    main()
