"""Numbers of any size: the unit that labels are counted in, and how a number is shown."""

from __future__ import annotations

_NEAR_ONE = (0.5, 2.0)
"""Labels of such a standard deviation, as stars have, are counted as they are: settings were chosen on them."""


def label_unit(std: float) -> float:
    """Return the unit for labels of this standard deviation: 1 where that is near 1 or 0, else two digits of it."""
    low, high = _NEAR_ONE
    return 1.0 if std == 0 or low <= std <= high else float(f"{std:.2g}")


def shown(value: float, sign: str = "") -> str:
    """Return a number with four decimals or, where these would be zeros or too many digits, four significant ones."""
    plain = value == 0 or 0.01 <= abs(value) < 1e6
    return f"{value:{sign}.4f}" if plain else f"{value:{sign}.4g}"
