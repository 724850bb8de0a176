"""Surgery on an exported graph: find logits and feature layers, return both, free a baked-in batch size."""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
from torch import Tensor, fx

from inflight_edge.errors import ModelError

__all__ = [
    "PENULTIMATE",
    "REMEDY",
    "feature_choices",
    "free_batch",
    "input_node",
    "input_shape",
    "insert_input_reshape",
    "is_recurrent",
    "logits_node",
    "refuse_training_mode",
    "train_normalisation",
    "with_outputs",
    "works_for_any_batch",
]

_aten = torch.ops.aten
_SOFTMAX = {_aten.softmax.int, _aten._softmax.default, _aten.log_softmax.int, _aten._log_softmax.default}
_LINEAR = {_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default}
_CONVOLUTION = {_aten.conv2d.default, _aten.conv2d.padding, _aten.convolution.default}
_BATCH_SHAPED = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default}
# Their kernels abort the process on a state of another batch size than the images'.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer")
_TRAINING_FLAG = {_aten.batch_norm.default: 5, _aten.dropout.default: 2, _aten.feature_dropout.default: 2}
_TRAINING_FLAG |= {_aten._native_batch_norm_legit.default: 5, _aten.native_dropout.default: 2}
# Element-wise steps.
_ACTIVATION = {
    getattr(_aten, name).default
    for name in (
        "relu", "relu_", "leaky_relu", "leaky_relu_", "gelu", "silu", "silu_", "tanh", "sigmoid", "hardtanh", "hardtanh_",
        "hardswish", "hardswish_", "elu", "elu_", "dropout", "clone",
    )
}  # fmt: skip
_NORMALISATION = {_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default}
# What lies between a fully connected layer and the next: the features are taken before it.
_PASS_THROUGH = _ACTIVATION | _NORMALISATION | {operator.getitem}
_SUM = {_aten.add.Tensor, _aten.add_.Tensor}
PENULTIMATE = "penultimate"
MAX_JOINED_FEATURES = 2048
MAX_MAPS = 3
REMEDY = "export the model with torch.export.export(model.eval(), (images,)) and torch.export.save"


def input_node(graph: fx.Graph) -> fx.Node:
    """The one input of a graph whose parameters are attributes.  Raises ModelError when there are more or none."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"model: expected one input (a batch of images), got {len(inputs)}; {REMEDY}")
    return inputs[0]


def refuse_training_mode(graph: fx.Graph) -> None:
    """Raise ModelError when dropout or batch normalisation was exported in training mode."""
    for node in graph.nodes:
        position = _TRAINING_FLAG.get(node.target)
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise ModelError(f"model: exported in training mode ({node.name}); {REMEDY}")


def train_normalisation(module: fx.GraphModule, training: bool) -> None:
    """Let batch normalisation take each batch's own statistics and keep their running means, or the kept ones."""
    for node in module.graph.nodes:
        if node.target is _aten.batch_norm.default:
            node.update_arg(_TRAINING_FLAG[node.target], training)
    module.recompile()


def input_shape(node: fx.Node, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], int | None]:
    """(channels, height, width) of the input, and its batch size when that is fixed."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ModelError(f"model: expected a floating-point image tensor as input, got {value}; {REMEDY}")
    if value.dtype != torch.float32:
        raise ModelError(f"model: expected a float32 input, got {value.dtype}; call model.float() before the export")
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if len(sizes) == 4:
        channels, height, width = (size or open_ for size, open_ in zip(sizes[1:], image_shape, strict=True))
    elif len(sizes) == 3:
        channels, height, width = 1, sizes[1] or image_shape[1], sizes[2] or image_shape[2]
    elif len(sizes) == 2 and sizes[1] in (None, image_shape[0] * image_shape[1] * image_shape[2]):
        channels, height, width = image_shape
    elif len(sizes) == 2:
        raise ModelError(
            f"model: expected images of {sizes[1]} values, which it takes as one row, got images of (channels, height, width) "
            f"{image_shape}; give images of the network's own size and channels"
        )
    else:
        raise ModelError(f"model: expected an input (batch, channels, height, width), got {tuple(value.shape)}")
    return (channels, height, width), sizes[0]


def logits_node(graph: fx.Graph) -> fx.Node:
    """The node that holds the logits: the first (batch, classes) output, before a closing softmax."""
    outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(graph.output_node().args) if isinstance(leaf, fx.Node)]
    matrices = [node for node in outputs if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim == 2]
    if not matrices:
        shapes = [tuple(node.meta["val"].shape) for node in outputs if isinstance(node.meta.get("val"), Tensor)]
        raise ModelError(f"model: expected an output (batch, classes), got {shapes}; export the classifier alone")
    node = matrices[0]
    while node.target in _SOFTMAX:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found


def _input_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value depends on the images."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def feature_choices(graph: fx.Graph, logits: fx.Node, wanted: str | None) -> list[list[fx.Node]]:
    """The nodes whose values, joined, can be the features: those named in ``wanted`` alone, else the choices there are.

    Unless named: the head's hidden layers joined, the last of them, the input of the last layer, the last feature map of
    each of the last few image sizes, and of these all but the last joined, without repetition.
    """
    relevant, dynamic = _ancestors(logits), _input_dependent(graph)
    candidates = [node for node in graph.nodes if node in relevant and node in dynamic and node is not logits]
    candidates = [node for node in candidates if isinstance(node.meta.get("val"), Tensor)]
    if wanted is not None and wanted != PENULTIMATE:
        return [[_named(candidates, name) for name in wanted.split("+")]]
    nodes, batch = [*candidates, logits], str(input_node(graph).meta["val"].shape[0])
    for i, node in reversed(list(enumerate(nodes))):
        if node.target in _LINEAR or node.target in _CONVOLUTION:
            penultimate = _dynamic_input(node, dynamic)
            if wanted == PENULTIMATE:
                return [[penultimate]]
            hidden = _hidden_layers(penultimate, dynamic)
            maps = _feature_maps(nodes[:i], batch)
            choices = [hidden, hidden[:1], [penultimate], *([node] for node in maps)]
            if len(maps) == MAX_MAPS and sum(node.meta["val"].shape[1] for node in maps[1:]) <= MAX_JOINED_FEATURES:
                choices.append(maps[1:])
            return [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    raise ModelError("feature layer: the model has no linear layer to take the input of; name one with --feature-layer")


def _named(candidates: list[fx.Node], wanted: str) -> fx.Node:
    named = [node for node in candidates if node.name == wanted]
    named = named or [node for node in candidates if wanted in _modules_of(node)]
    if not named:
        names = [node.name for node in candidates] + sorted({m for node in candidates for m in _modules_of(node)})
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or [node.name for node in candidates[-5:]]
        raise ModelError(f"feature layer: no layer {wanted!r} before the logits; nearest: {', '.join(close)}")
    return named[-1]


def _dynamic_input(node: fx.Node, dynamic: set[fx.Node]) -> fx.Node:
    return next(source for source in node.all_input_nodes if source in dynamic)


def _hidden_layers(penultimate: fx.Node, dynamic: set[fx.Node]) -> list[fx.Node]:
    """Outputs, before their activation, of the last two fully connected hidden layers; else the penultimate values.

    A Gaussian fits values before the activation better than rectified ones, and the layer before the last keeps more
    of the source class under a trigger: measured in README.  The earlier layer is left out where both are wide.
    """
    layers: list[fx.Node] = []
    node = penultimate
    while len(layers) < 2:
        while node.target in _PASS_THROUGH:
            node = _dynamic_input(node, dynamic)
        if node.target not in _LINEAR or node.meta["val"].ndim != 2:
            break
        if sum(int(layer.meta["val"].shape[1]) for layer in [*layers, node]) > MAX_JOINED_FEATURES and layers:
            break
        layers.append(node)
        node = _dynamic_input(node, dynamic)
    return layers or [penultimate]


def _feature_maps(candidates: list[fx.Node], batch: str) -> list[fx.Node]:
    """The last map of each of the last few image sizes, before its activation where there is one, the deepest first.

    batch  the images' first axis.  Maps come from convolutions, their batch normalisation, and sums and joins with such ones.
    Under a trigger the head's layers hold little but the target; the maps before it still show the source, above all
    where there are few clean images.  Measured on a VGG-16 with 5 clean images of each of 20 classes, SQ: source errors of
    frames with the true trigger .46 (head) and .22 (second map).
    """
    maps: set[fx.Node] = set()
    last: dict[str, fx.Node] = {}
    for node in candidates:
        value = node.meta["val"]
        if value.ndim != 4 or value.dtype != torch.float32 or str(value.shape[0]) != batch or not _is_map(node, maps):
            continue
        maps.add(node)
        size = str(list(value.shape[2:]))
        if size != "[1, 1]" and value.shape[1] <= MAX_JOINED_FEATURES:
            last.pop(size, None)  # the order is that of the last ones
            last[size] = node
    return list(last.values())[: -1 - MAX_MAPS : -1]


def _is_map(node: fx.Node, maps: set[fx.Node]) -> bool:
    """Whether a node is a convolution, or the normalisation, a sum or a join of what is in ``maps``."""
    if node.target in _CONVOLUTION:
        return True
    if node.target is operator.getitem:  # the first of the normalisation's results
        node = node.all_input_nodes[0]
    sources = node.all_input_nodes
    if node.target in _NORMALISATION:
        return sources[0] in maps
    if node.target is _aten.cat.default:
        return any(_before_activation(source) in maps for source in sources)
    return node.target in _SUM and any(source in maps for source in sources)


def _before_activation(node: fx.Node) -> fx.Node:
    while node.target in _ACTIVATION:
        node = node.all_input_nodes[0]
    return node


def _modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules a node was traced in, such as ``layer4.1``."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix("L['self'].") for path, _ in stack.values() if path]


def with_outputs(graph: fx.Graph, logits: fx.Node, features: list[fx.Node]) -> fx.Graph:
    """A copy of the graph that returns (logits, features) with the features pooled and joined to (N, D)."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(graph, mapping)
    outputs = [mapping[logits]]
    pooled = []
    for feature in features:
        node, rank = mapping[feature], feature.meta["val"].ndim
        if not 2 <= rank <= 4:
            raise ModelError(f"feature layer: expected (batch, features), got {tuple(feature.meta['val'].shape)}")
        with copy.inserting_after(node):  # a later step may overwrite the value in place
            node = copy.call_function(_aten.clone.default, (node,))
        if rank > 2:  # channel means of a feature map, token means of a sequence
            node = copy.call_function(_aten.mean.dim, (node, [2, 3] if rank == 4 else [1]))
        pooled.append(node)
    if pooled:
        outputs.append(pooled[0] if len(pooled) == 1 else copy.call_function(_aten.cat.default, (pooled, 1)))
    copy.output(tuple(outputs))
    copy.eliminate_dead_code()
    copy.lint()
    return copy


def free_batch(graph: fx.Graph, batch: int) -> None:
    """Replace the batch size baked into views and expansions by the size of the input."""
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    dynamic = _input_dependent(graph)
    with graph.inserting_after(placeholder):
        size = graph.call_function(_aten.sym_size.int, (placeholder, 0))
    for node in list(graph.nodes):
        if node.target not in _BATCH_SHAPED or not (node in dynamic or node.target is _aten.expand.default):
            continue
        sizes = list(node.args[1])
        if sizes and sizes[0] == batch:
            node.args = (node.args[0], [size, *sizes[1:]], *node.args[2:])
    graph.eliminate_dead_code()


def insert_input_reshape(module: fx.GraphModule, rank: int) -> None:
    """Let a model of (N, height, width) or (N, pixels) take (N, channels, height, width)."""
    placeholder = next(node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(placeholder):
        end = 1 if rank == 2 else 2
        flat = module.graph.call_function(_aten.flatten.using_ints, (placeholder, 1, -1 if end == 1 else 2))
    placeholder.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
    module.recompile()


def is_recurrent(graph: fx.Graph) -> bool:
    """True when a recurrent layer is in the graph."""
    return any(getattr(node.target, "__name__", "").split(".")[0] in _RECURRENT for node in graph.nodes)


def works_for_any_batch(
    freed: fx.GraphModule, original: fx.GraphModule, shape: tuple[int, int, int], batch: int, rank: int
) -> bool:
    """True when the freed graph computes for other batch sizes what the original computes in batches of its own."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3 * batch, *shape, generator=generator)
    given = images.reshape(3 * batch, *shape[1:]) if rank == 3 else images.flatten(1) if rank == 2 else images
    with torch.no_grad():
        expected = torch.cat([original(part)[0] for part in given.split(batch)])
        for n_images in (3 * batch, 2 * batch + 1, 1):
            try:
                logits, features = freed(images[:n_images])
            except (RuntimeError, ValueError):  # a size that is still baked in: the caller keeps the batch fixed
                return False
            if logits.shape != expected[:n_images].shape or features.shape[0] != n_images:
                return False
            if not torch.allclose(logits, expected[:n_images], rtol=1e-4, atol=1e-4):
                return False
    return True
