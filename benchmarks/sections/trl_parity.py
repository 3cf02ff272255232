"""Section on benchmarks/trl_parity.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table


def section(result: dict[str, Any]) -> str:
    """Differences from TRL, setting by setting."""
    figures = ("advantages", "loss", "gradient")
    rows = [
        [name, *("-" if found[figure] is None else f"{found[figure]:.1e}" for figure in figures)]
        for name, found in result["settings"].items()
    ]
    return f"""
## The same tensors through TRL {result["versions"]["trl"]}

{circumstances_line(result)}
Largest absolute difference over {result["draws"]} random draws in double precision, wanted {result["wanted"]:.0e}.
The remaining difference comes from TRL's Bessel correction, which is in single precision. `normalize_then_sum` is not
compared: it differs from TRL's by design (a softened, uncorrected deviation, and the root of the number of active
dimensions).

{table(["setting", *figures], rows)}"""
