"""``python -m lmppo``: the command line, where the package is not installed."""

from lmppo.cli import main

main()
