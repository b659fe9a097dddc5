"""``python -m compress``: the same as the command ``compress``."""

from compress.cli.main import main

if __name__ == "__main__":
    main()
