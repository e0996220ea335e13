"""``python -m rltune`` is ``rltune``."""

from rltune.cli.main import main

main()
