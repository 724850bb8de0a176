"""Read a torch.export program and turn it into one that returns logits and features, for any batch size."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export.passes import move_to_device_pass

from inflight_edge.calibration.graph import (
    REMEDY,
    feature_choices,
    free_batch,
    input_node,
    input_shape,
    insert_input_reshape,
    is_recurrent,
    logits_node,
    refuse_training_mode,
    with_outputs,
    works_for_any_batch,
)
from inflight_edge.errors import ModelError
from inflight_edge.guard import MAX_FEATURES

__all__ = [
    "Classifier",
    "classifier_from_program",
    "input_channels",
    "input_pixels",
    "load_classifier",
    "load_program",
    "refuse_too_many",
]


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A frozen classifier that returns logits and features.

    graph          images (N, channels, height, width) float32 -> logits (N, classes), features (N, D).
    input_shape    (channels, height, width).
    feature_layer  name of the graph node whose value the features are; several joined by ``+``.
    fixed_batch    batch size the graph is bound to, None when any N works.
    alternatives   the same classifier with other feature layers to choose from; none where a layer was asked for.
    together       where there are alternatives: the classifier whose features are its own, then those of each of them.
    """

    graph: fx.GraphModule
    input_shape: tuple[int, int, int]
    n_classes: int
    n_features: int
    feature_layer: str
    fixed_batch: int | None
    alternatives: tuple[Classifier, ...] = ()
    together: Classifier | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and features (N, D) of normalised images (N, channels, height, width), any N >= 1."""
        batch = self.fixed_batch
        if batch is None or batch == images.shape[0]:
            return self.graph(images)
        padding = -images.shape[0] % batch
        padded = torch.cat([images, images[-1:].expand(padding, *images.shape[1:])]) if padding else images
        parts = [self.graph(part) for part in padded.split(batch)]
        logits, features = (torch.cat(outputs)[: images.shape[0]] for outputs in zip(*parts, strict=True))
        return logits, features


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read a .pt2 file.  Raises ModelError when it is no torch.export program."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a torch.export program (.pt2)"
        )
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: not a torch.export program, which is a zip archive; {REMEDY}")
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)  # they print a traceback beside the error that is raised
    try:
        with _no_code_from_pickles():
            # Images come from the CPU, whatever the program was exported on.
            return move_to_device_pass(torch.export.load(path), "cpu")
    except Exception as error:
        text = str(error).strip()
        first_line = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        raise ModelError(f"{path}: not a readable torch.export program ({first_line[:200]}); {REMEDY}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_code_from_pickles() -> Iterator[None]:
    """Keep torch from unpickling parts of a .pt2 with code execution allowed, as it otherwise does (torch 2.13)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def input_channels(program: torch.export.ExportedProgram) -> int | None:
    """Channels of the program's images; None where the program leaves them open."""
    shape = _image_shape(program)
    if len(shape) != 4:
        return 1 if len(shape) == 3 else None
    return shape[1] if isinstance(shape[1], int) else None


def input_pixels(program: torch.export.ExportedProgram) -> int | None:
    """Numbers of an image, where the program takes it as one row; else None."""
    shape = _image_shape(program)
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def _image_shape(program: torch.export.ExportedProgram) -> tuple[object, ...]:
    """Shape of the program's first input, with the batch; () where it is no tensor."""
    names = program.graph_signature.user_inputs
    node = next((n for n in program.graph.nodes if n.op == "placeholder" and n.name in names), None)
    value = None if node is None else node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def load_classifier(
    path: str | Path, *, image_shape: tuple[int, int, int], feature_layer: str | None = None
) -> Classifier:
    """``load_program`` and ``classifier_from_program`` in one."""
    return classifier_from_program(load_program(path), image_shape=image_shape, feature_layer=feature_layer)


def classifier_from_program(
    program: torch.export.ExportedProgram,
    *,
    image_shape: tuple[int, int, int],
    feature_layer: str | None = None,
) -> Classifier:
    """Turn an exported program into a Classifier.

    image_shape    (channels, height, width) of the data, used where the program leaves a size open.
    feature_layer  name of a graph node or of a module, several joined by ``+``; ``penultimate`` is the input of the last
                   linear layer; None takes the hidden fully connected layers before it (before their activation), or
                   that input where there are none, and offers the last of these layers, that input, and the channel means
                   of the last feature map of each of the last three image sizes, and of the first two of these joined, as
                   alternatives.
    Raises ModelError when the program is not an image classifier.
    """
    module = program.module(check_guards=False)
    module.requires_grad_(False)
    image_input = input_node(module.graph)
    refuse_training_mode(module.graph)
    shape, batch = input_shape(image_input, image_shape)
    rank = len(image_input.meta["val"].shape)
    output = logits_node(module.graph)
    choices = feature_choices(module.graph, output, feature_layer)

    def rebuilt(layers: list[fx.Node], bound_to: int | None) -> fx.GraphModule:
        graph = with_outputs(module.graph, output, layers)
        if bound_to is not None:
            free_batch(graph, bound_to)
        result = fx.GraphModule(module, graph)
        if rank != 4:
            insert_input_reshape(result, rank)
        return result

    fixed = None
    if batch is not None and is_recurrent(module.graph):
        fixed = batch
    elif batch is not None:
        original = fx.GraphModule(module, with_outputs(module.graph, output, []))
        if not works_for_any_batch(rebuilt(choices[0], batch), original, shape, batch, rank):
            fixed = batch

    def classifier(layers: list[fx.Node]) -> Classifier:
        graph = rebuilt(layers, batch if fixed is None else None)
        name = "+".join(node.name for node in layers)
        n_classes, n_features = _widths(graph, torch.zeros(batch or 2, *shape))
        return Classifier(graph, shape, n_classes, n_features, name, fixed)

    result, *others = (classifier(layers) for layers in choices)
    for network in (result, *others):
        refuse_too_many(network)
    if others:
        together = classifier([node for layers in choices for node in layers])
        result = replace(result, alternatives=tuple(others), together=together)
    _refuse_changing_answers(result)
    return result


def _widths(graph: fx.GraphModule, images: Tensor) -> tuple[int, int]:
    """Classes and features that a graph gives for images.  Raises ModelError when they are not those of a classifier."""
    with torch.no_grad():
        try:
            logits, features = graph(images)
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"model: cannot run on images of shape {tuple(images.shape[1:])} ({reason}); check the data's size"
            ) from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ModelError(f"model: expected logits of shape (batch, classes), got {tuple(logits.shape)}")
    for what, values in (("logits", logits), ("features", features)):
        if values.dtype != torch.float32:
            raise ModelError(f"model: expected float32 {what}, got {values.dtype}; export it in float32")
    return int(logits.shape[1]), int(features.shape[1])


def refuse_too_many(classifier: Classifier) -> None:
    """Raise ModelError when there are more features than a guard takes."""
    if classifier.n_features > MAX_FEATURES:
        raise ModelError(
            f"feature layer: expected at most {MAX_FEATURES} features, got {classifier.n_features} from "
            f"{classifier.feature_layer}; name a smaller layer with --feature-layer"
        )


def _refuse_changing_answers(classifier: Classifier) -> None:
    """Raise ModelError when an image's logits change from call to call, or with the other images of its batch."""
    images = torch.rand(3, *classifier.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = classifier(images)[0]
        again = classifier(images)[0]
        alone = torch.cat([classifier(image[None])[0] for image in images])
    for what, other in (("from call to call", again), ("with the other images of its batch", alone)):
        if not torch.allclose(together, other, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ModelError(f"model: an image's logits change {what}: exported in training mode; {REMEDY}")
