"""`python -m stoker_cli`: the `stoker` command."""

from stoker_cli.main import main

if __name__ == "__main__":
    main()
