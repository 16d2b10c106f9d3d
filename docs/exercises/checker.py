"""What all exercises are run by."""

from collections.abc import Callable, Mapping


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Print for each exercise whether it is to do, not right yet and why, or passed."""
    for name, check in checks.items():
        try:
            check()
        except NotImplementedError:
            print(f"{name}: to do")
        except AssertionError as error:
            print(f"{name}: not yet: {error}")
        else:
            print(f"{name}: passed")
