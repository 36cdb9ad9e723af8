"""How accepted updates become the next global state, and the table that names each way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cloud_aggregator.aggregation.mean import mean_of_tensors
from cloud_aggregator.aggregation.product import mean_of_products
from messaging.layout import Layout, Vector

#: (global state, (update, examples) in client order, layout) -> next global state.
Aggregate = Callable[[Vector, Iterable[tuple[Vector, int]], Layout], Vector]

AGGREGATIONS: dict[str, Aggregate] = {"tensors": mean_of_tensors, "product": mean_of_products}
