"""`python -m moecli` is the `moecli` command."""

from moecli.cli import main

if __name__ == "__main__":
    main()
