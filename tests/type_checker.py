"""The checker that jaxtyping applies to our packages under pytest: beartype, where NumPy's scalars count as numbers.

As PEP 484 has it, an int may stand for a float: configs write 1 for 1.0.
"""

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

NUMBERS = FrozenDict({float: float | int | np.floating | np.integer, int: int | np.integer})
checked = beartype(conf=BeartypeConf(hint_overrides=NUMBERS))
