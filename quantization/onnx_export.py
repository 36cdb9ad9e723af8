"""A causal GPT-2 as one ONNX file with its key and value cache, in fp32 or dynamic int8.

The graph has the inputs and outputs of optimum's text generation with past, so ORTModelForCausalLM
loads it. In the file the token table is there once: the head multiplies by the transposed table.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from device_profiles.errors import InputError

PRECISIONS = ("fp32", "int8")
_MOST_BYTES = 2_000_000_000  # of one protobuf message, with room for the graph
_TABLE = "transformer.wte.weight"
_ADAPTER = "/adapter/"  # in the names of the nodes of an adapter


def export_onnx(model: Any, path: Path, precision: str) -> None:
    """Write a model as ONNX.

    Args:
        model: A ``GPT2LMHeadModel`` or a subclass, in fp32, with its head tied to the token table.
            The export changes its configuration; use it no more.
        path: Of the ``.onnx`` file.
        precision: ``fp32``, or ``int8``: weights in eight bits with a scale for each output, what
            they are multiplied by quantised as it comes; adapters, norms and positions in fp32.

    Raises:
        InputError: If the model does not fit into one file.
    """
    table = model.get_input_embeddings().weight
    size = 4 * (sum(p.numel() for p in model.parameters()) + table.numel())
    if size > _MOST_BYTES:
        raise InputError(
            f"the base takes {size / 1e9:.1f} GB as ONNX and one file holds at most "
            f"{_MOST_BYTES / 1e9:.0f} GB; export it with --format hf"
        )
    onnx = importlib.import_module("onnx")
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=path.parent) as folder, _quiet():
        traced = Path(folder) / "traced.onnx"
        _trace(model, traced)
        if precision == "int8":
            graph = _quantised(traced, Path(folder) / "int8.onnx")
        else:
            graph = onnx.load(traced)
            _tie(graph.graph)
        onnx.save(graph, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what exporter and quantiser say of their own future and of shape inference."""
    from torch.jit import TracerWarning  # type: ignore[attr-defined]

    before = logging.root.manager.disable
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning, TracerWarning):
            warnings.simplefilter("ignore", category)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _trace(model: Any, path: Path) -> None:
    exporter = importlib.import_module("optimum.exporters.onnx")
    configs = importlib.import_module("optimum.exporters.onnx.model_configs")
    # Made by hand: by itself optimum knows neither our class nor its model type.
    config = configs.GPT2OnnxConfig(
        model.config, task="text-generation", use_past=True, use_past_in_inputs=True
    )
    exporter.export(model, config, path, opset=config.DEFAULT_ONNX_OPSET)


def _quantised(traced: Path, path: Path) -> Any:
    """Return the model with dynamic int8 products, and one int8 table for both of its uses.

    Unsigned weights: the products of signed ones overflow on processors without VNNI, and the same
    file would give other text there.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx = importlib.import_module("onnx")
    graph = onnx.load(traced).graph
    weight = _head(graph).input[1]
    quantize_dynamic(
        traced,
        path,
        op_types_to_quantize=["MatMul"],  # and Gemm, which becomes one
        per_channel=True,
        weight_type=QuantType.QUInt8,
        nodes_to_exclude=[node.name for node in graph.node if _ADAPTER in node.name],
    )
    model = onnx.load(path)
    _share(model.graph, weight)
    return model


def _head(graph: Any) -> Any:
    """Return the product that gives the logits."""
    return next(n for n in graph.node if n.op_type == "MatMul" and n.output[0] == "logits")


def _tie(graph: Any) -> None:
    """Let the head multiply by the transposed token table instead of a copy of it."""
    helper = importlib.import_module("onnx.helper")
    head = _head(graph)
    copy, head.input[1] = head.input[1], f"{_TABLE}.transposed"
    _drop(graph, copy)
    transpose = helper.make_node("Transpose", [_TABLE], [f"{_TABLE}.transposed"], perm=[1, 0])
    _put(graph, list(graph.node).index(head), [transpose])


def _share(graph: Any, weight: str) -> None:
    """Let the embedding read its rows from the head's int8 columns instead of a table in fp32.

    The columns are ``weight`` quantised, shape (D, V), with a scale and a zero point each.
    """
    onnx = importlib.import_module("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    place = next(
        i for i, n in enumerate(graph.node) if n.op_type == "Gather" and n.input[0] == _TABLE
    )
    lookup = graph.node[place]
    tokens, rows = lookup.input[1], lookup.output[0]
    name = "embedding/{}".format
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), name("last_axis")))

    def gather(part: str, axis: int) -> list[Any]:
        """Return the nodes that look up one part of the columns, as floats."""
        return [
            helper.make_node("Gather", [f"{weight}_{part}", tokens], [name(part)], axis=axis),
            helper.make_node("Cast", [name(part)], [name(f"{part}_float")], to=floats),
        ]

    nodes = [
        *gather("quantized", 1),  # (D, B, T)
        helper.make_node(
            "Transpose", [name("quantized_float")], [name("steps")], perm=[1, 2, 0]
        ),  # (B, T, D)
        *gather("zero_point", 0),  # (B, T)
        *gather("scale", 0),
    ]
    nodes += [
        helper.make_node(
            "Unsqueeze", [name(f"{part}_float"), name("last_axis")], [name(f"{part}_column")]
        )
        for part in ("zero_point", "scale")
    ]
    nodes += [
        helper.make_node("Sub", [name("steps"), name("zero_point_column")], [name("centred")]),
        helper.make_node("Mul", [name("centred"), name("scale_column")], [rows]),
    ]
    del graph.node[place]
    _put(graph, place, nodes)
    _drop(graph, _TABLE)


def _put(graph: Any, place: int, nodes: list[Any]) -> None:
    """Insert nodes before the one at ``place``; a graph's nodes stand in the order of their use."""
    for i, node in enumerate(nodes):
        graph.node.insert(place + i, node)


def _drop(graph: Any, name: str) -> None:
    graph.initializer.remove(next(i for i in graph.initializer if i.name == name))
