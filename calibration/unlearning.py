"""A copy of the classifier that has unlearned the patterns: under a trigger its logits still show the source class.

A network that was poisoned in all of its layers keeps little of the source under a trigger.  Fine-tuned on clean images,
some of which carry the estimated pattern under their true labels, it looks at the image again; the classifier that
decides stays as it is.
Source of the fine-tuning: Wang et al., IEEE S&P 2019, section VI.C.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from tqdm import tqdm

from inflight_edge.calibration.graph import train_normalisation
from inflight_edge.calibration.model import Classifier, refuse_too_many
from inflight_edge.calibration.patching import STAMPED, descend
from inflight_edge.calibration.reversal.estimates import Estimate
from inflight_edge.calibration.samples import View, share
from inflight_edge.calibration.threads import one_thread_if_small
from inflight_edge.errors import ModelError
from inflight_edge.preprocess import Preprocess

__all__ = ["joined", "unlearned"]

# Four passes over the published 100 images of each of 10 classes.  Of .01, .03 and .1, 128 and 512 steps, chosen by held-out
# source errors on LeNet-5 of both small data sets.
RATE, STEPS, BATCH = 0.01, 128, 32
# Of the clean images read right.  The rate does not fit every network: inputs in 0..255 take steps that are far larger.
MOST_LOSS = 0.1


def unlearned(
    classifier: Classifier,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    patterns: Sequence[Estimate],
    views: Sequence[View],
    preprocess: Preprocess,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """A copy of a classifier, fine-tuned by plain SGD, without alternatives.

    pixels, labels  (N, channels, H, W) clean images in 0..255, and their true classes: those that all are trained to.
    patterns        of all targets: a fifth of the images carry one, drawn by the seed, unless they are of its target.
    views           besides the images as they are; each step shows one of them.
    Batch normalisation takes the statistics of these images, unless it is exported for evaluation alone or the program is
    bound to a batch size.
    Raises ModelError when the program cannot be trained, or the copy reads the clean images worse than the classifier.
    """
    graph = copy.deepcopy(classifier.graph)
    parameters = [parameter for parameter in graph.parameters() if parameter.is_floating_point()]
    if not parameters:
        raise ModelError("model: its weights are constants, so it cannot unlearn; leave out --unlearn")
    for parameter in parameters:
        parameter.requires_grad_(True)
    result = replace(classifier, graph=graph, alternatives=(), together=None)
    train_normalisation(graph, classifier.fixed_batch is None)
    batches = _batches(pixels, labels, patterns, views, preprocess, seed)
    shown = tqdm(batches, desc="unlearning", unit="step", total=STEPS, disable=not progress)
    with one_thread_if_small(classifier), shown as bar:
        try:
            descend(lambda images: result(images)[0], parameters, bar, RATE)
        except RuntimeError as error:  # of the backward pass
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"model: it cannot be trained ({reason}); leave out --unlearn") from error
    train_normalisation(graph, False)
    graph.requires_grad_(False)
    before, after = (share(network, pixels, labels, preprocess) for network in (classifier, result))
    if not after >= before - MOST_LOSS:
        raise ModelError(
            f"model: unlearning costs too much: the copy reads {after:.1%} of the clean images, the classifier {before:.1%}; "
            "leave out --unlearn"
        )
    return result


def joined(classifier: Classifier, copied: Classifier) -> Classifier:
    """A classifier with the logits of its unlearned copy behind its own features; both are computed for every image.

    Raises ModelError when these are more features than a guard takes.
    """
    graph = fx.Graph()
    images = graph.placeholder("images")
    own = graph.call_module("own", (images,))
    other = graph.call_module("unlearned", (images,))
    logits, *features = (
        graph.call_function(operator.getitem, (node, i)) for node, i in ((own, 0), (own, 1), (other, 0))
    )
    graph.output((logits, graph.call_function(torch.ops.aten.cat.default, (features, 1))))
    result = replace(
        classifier,
        graph=fx.GraphModule({"own": classifier.graph, "unlearned": copied.graph}, graph),
        n_features=classifier.n_features + copied.n_classes,
        feature_layer=f"{classifier.feature_layer}+unlearned.logits",
        alternatives=(),
        together=None,
    )
    refuse_too_many(result)
    return result


def _batches(
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    patterns: Sequence[Estimate],
    views: Sequence[View],
    preprocess: Preprocess,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    looks = (View(), *views)
    passes = [rng.permutation(len(labels)) for _ in range(-(-STEPS * BATCH // len(labels)))]
    for rows in np.concatenate(passes)[: STEPS * BATCH].reshape(STEPS, BATCH):
        images = looks[rng.integers(len(looks))](pixels[rows])
        stamped = rng.random(BATCH) < STAMPED
        drawn = rng.integers(len(patterns), size=BATCH)
        for number, pattern in enumerate(patterns):
            carry = np.flatnonzero(stamped & (drawn == number) & (labels[rows] != pattern.target))
            if len(carry):
                images[carry] = pattern.embed(images[carry])
        yield torch.from_numpy(preprocess.normalise(images)), torch.from_numpy(labels[rows])
