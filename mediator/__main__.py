"""`python -m mediator` is `mediator`."""

from mediator.cli import main

if __name__ == "__main__":
    main()
