"""`python -m griffin` is `griffin`."""

from griffin.cli.main import main

if __name__ == "__main__":
    main()
