"""`python -m polyscale_cli`: the `polyscale` command."""

from . import main


if __name__ == "__main__":
    main()
