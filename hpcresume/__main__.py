"""`python -m hpcresume`: the command line."""

from hpcresume.cli import main

if __name__ == "__main__":
    main()
