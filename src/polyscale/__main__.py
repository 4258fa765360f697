"""`python -m polyscale` and `accelerate launch -m polyscale`: the `polyscale` command."""

from polyscale_cli import main


if __name__ == "__main__":
    main()
