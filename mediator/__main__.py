"""`python -m mediator` is `mediator`."""

import sys


def main() -> None:
    """Run `mediator` with the arguments of this process, and exit; an interruption is quiet from the beginning on."""
    try:
        from mediator.cli import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # mediator.cli.output.INTERRUPTED, which may not be imported yet


if __name__ == "__main__":
    main()
