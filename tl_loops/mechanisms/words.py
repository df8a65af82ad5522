"""Numbers as ``describe()`` writes them."""


def exactly(number: float | int) -> str:
    """The shortest text that stands for this number alone: ``"5"``, ``"0.1"``, ``"1e-06"``."""
    return repr(float(number)).removesuffix(".0")
