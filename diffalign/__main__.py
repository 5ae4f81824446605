"""`python -m diffalign`, and the console script."""

from diffalign.cli import app


def main() -> None:
    app(prog_name="diffalign")


if __name__ == "__main__":
    main()
