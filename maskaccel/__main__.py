"""`python -m maskaccel`."""

from .cli import main

main()
