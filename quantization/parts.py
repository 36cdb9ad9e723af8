"""A base in memory taken apart: its arrays, and the little that holds them together.

For processes that share memory and no file: arrays that lie there are not copied when a base is put
together again. Products give the same bits, since values and strides are the same.
"""

from __future__ import annotations

import io
import pickle
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantization.frozen_gpt2 import FrozenBase

Array = npt.NDArray[np.generic]

#: Types that numpy does not know, and those of the same size that stand in for them.
_STAND_INS = {torch.bfloat16: torch.int16}


def take_apart(base: FrozenBase) -> tuple[bytes, list[Array]]:
    """Return what holds a base on the CPU together (of this program's own types), and its arrays.

    Arrays are views of the base's memory; a tensor that is there twice is one array.
    """
    rest = io.BytesIO()
    arrays: list[Array] = []
    places: dict[int, int] = {}

    class Apart(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, torch.Tensor):
                return None
            if id(obj) not in places:
                places[id(obj)] = len(arrays)
                arrays.append(obj.detach().view(_STAND_INS.get(obj.dtype, obj.dtype)).numpy())
            return places[id(obj)], obj.dtype

    Apart(rest, protocol=5).dump(base)
    return rest.getvalue(), arrays


def put_together(rest: bytes, arrays: list[Array]) -> FrozenBase:
    """Return the base of ``take_apart``; it is read, not written, and so may its arrays be.

    Args:
        rest: From this program itself: it is unpickled.
        arrays: In their order.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [torch.from_numpy(array) for array in arrays]

    class Together(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            place, dtype = pid
            return tensors[place].view(dtype)

    base: FrozenBase = Together(io.BytesIO(rest)).load()
    return base
