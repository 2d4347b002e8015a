"""The one shape of every complaint: what came, what was expected, what to do."""


def bad_argument(name: str, came: str, expected: str, advice: str) -> ValueError:
    """A `ValueError` that names the argument and says all three parts; the caller raises it."""
    return ValueError(f"{name}: got {came}; expected {expected}. {advice}")
