"""Tensors that keep their data elsewhere are found wherever ONNX allows a tensor to be."""

import onnx
import pytest
from bundles import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from inflight_edge.engines._wire import refuse_external_data
from inflight_edge.errors import EngineError


def outside() -> TensorProto:
    tensor = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def test_a_model_of_one_file_passes() -> None:
    refuse_external_data(tiny_model())


@pytest.mark.parametrize(
    "place", ["initializer", "sparse", "constant", "tensors", "branch", "function", "location only"]
)
def test_external_data_is_found_everywhere(place: str) -> None:
    model = onnx.load_model_from_string(tiny_model())
    if place == "initializer":
        model.graph.initializer.append(outside())
    elif place == "location only":
        model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(outside())
    elif place == "constant":
        model.graph.node.append(helper.make_node("Constant", [], ["k"], value=outside()))
    elif place == "tensors":
        model.graph.node.append(helper.make_node("X", [], ["k"], many=[outside()]))
    elif place == "branch":
        branch = helper.make_graph([helper.make_node("Constant", [], ["k"], value=outside())], "g", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["k"], then_branch=branch, else_branch=branch))
    else:
        nodes = [helper.make_node("Constant", [], ["k"], value=outside())]
        model.functions.append(helper.make_function("d", "f", [], ["k"], nodes, [helper.make_opsetid("", 18)]))
    with pytest.raises(EngineError, match="got external data; export it in one file"):
        refuse_external_data(model.SerializeToString())


@given(st.binary(max_size=200))
def test_any_bytes_end_in_silence_or_an_engine_error(data: bytes) -> None:
    try:
        refuse_external_data(data)
    except EngineError as error:
        assert "model: expected an ONNX file" in str(error)


def test_truncation_is_damage() -> None:
    model = tiny_model()
    for end in range(1, len(model), 7):
        try:
            refuse_external_data(model[:end])
        except EngineError as error:
            assert "damaged" in str(error)


def varint(value: int, length: int) -> bytes:
    """A varint of so many bytes, longer than it need be."""
    return bytes([(value >> 7 * i) & 0x7F | (0x80 if i < length - 1 else 0) for i in range(length)])


@pytest.mark.parametrize("field", [13, 14])
@pytest.mark.parametrize("high", [1 << 29, 1 << 32, 1 << 61])
def test_tags_that_other_readers_cut_to_32_bits_are_damage(field: int, high: int) -> None:
    """Read with all its bits such a tag is another field; cut to 32 bits it is the one that names a file."""
    tag = varint(((high | field) << 3) | 0, 10)
    tensor = tag + b"\x01"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    with pytest.raises(EngineError, match="damaged"):
        refuse_external_data(b"\x3a" + bytes([len(graph)]) + graph)


def test_overlong_lengths_and_field_zero_are_damage() -> None:
    for message in (b"\x3a" + varint(1 << 40, 6), b"\x02\x00", b"\x3a" + b"\xff" * 11):
        with pytest.raises(EngineError, match="damaged"):
            refuse_external_data(message)
