"""`python -m spalign.cli`."""

from spalign.cli import main

main()
