"""The searches of an inspection, in their order, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from inflight_edge.calibration.reversal.all_to_all import SharedPatch
from inflight_edge.calibration.reversal.decision import (
    NEAR,
    ONE_WAY,
    P_VALUE,
    SMALL_MASK,
    Floats,
    additions_fit,
    anomaly_indices,
    near_targets,
    one_way_ratios,
    one_way_targets,
    perturbation_p_values,
    relative_norms,
    small_pairs,
    suspicious,
)
from inflight_edge.calibration.reversal.estimates import (
    AdditionEstimate,
    Estimate,
    Logits,
    PatchEstimate,
    predicted,
)
from inflight_edge.calibration.reversal.neural_cleanse import Search, Settings, search_patches
from inflight_edge.calibration.reversal.perturbation import AdditionSettings, search_additions

__all__ = ["FOUND_BY", "Finding", "Method", "Searcher", "not_searched"]

Method = Literal["auto", "neural-cleanse", "perturbation"]
FOUND_BY = (
    "neural-cleanse", "neural-cleanse all to all", "neural-cleanse per source", "perturbation", "one-way perturbation",
    "perturbation per source",
)  # fmt: skip
MAX_CLASSES = 20  # of a search per pair of classes: with more classes there are too many pairs
PAIR = Settings(steps=150, batch=8)
# Where a step is dear, classes and pairs are compared after fewer and larger steps on fewer images.
COARSE = Settings(steps=100, batch=16, rate=0.2, success=0.95, patience=3)
COARSE_PAIR = Settings(steps=60, batch=4, rate=0.2, success=0.9, patience=3)
FURTHER_PATCHES = 3
HELD_OUT = 5  # every fifth image
BATCH = 256
TRANSFER, CONFIRMED = 0.5, 0.8
# Of an addition that is compared, and of one that is embedded.  Measured on a LeNet-5 of seed 10 with CB in all classes: from
# 64, 64, 800, 800 and 800 images with a success of .9, .99, .9, .97 and .99 the held-out source errors were .153, .164, .150,
# .147 and .152.
ADDITION = AdditionSettings(images=64, success=0.9)
FINAL_ADDITION = AdditionSettings(images=256, success=0.97)


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a class is suspected.

    method  one of FOUND_BY.
    score   the anomaly index of the mask; all to all the share of held-out images that get to the target of their class; per
            source the pair's relative norm; the p-value of the model; of one-way additions the norm over that of the way back.
    """

    target: int
    method: str
    score: float


def _by_pairs(n_classes: int) -> bool:
    """Whether every pair of classes is searched, and what rests on comparing pairs."""
    return 2 < n_classes <= MAX_CLASSES


def not_searched(method: str, n_classes: int) -> tuple[str, ...]:
    """What the searches of a method leave out where there are fewer or more classes than 3 to 20."""
    if _by_pairs(n_classes):
        return ()
    patches = () if method == "perturbation" else ("patches of single-class and all-to-all attacks",)
    return patches if method == "neural-cleanse" else (*patches, "additions")


class Searcher:
    """Runs the searches on clean images.

    fast, exact  images (N, channels, H, W) in 0..1 -> logits: for gradients, and to measure what was found.
    pixels       (N, channels, H, W) float32 in 0..255.      labels  (N,).
    coarse       a step is dear: compare by COARSE and COARSE_PAIR, and search only what is found or told at full length.
                 Measured on the LeNet-5 ones of seeds 10 and 11: by COARSE the smallest masks of clean ones were at .65 of
                 the median and above (.71 after 200 steps at the usual rate), of multi-class attacks at .41 and below
                 (.38), for half the passes; by COARSE_PAIR, for a fifth of PAIR's, single-class WB attacks had relative
                 norms of .22 to .32 (.12 to .23), clean ones .27 and above (.40).
    """

    def __init__(
        self,
        fast: Logits,
        exact: Logits,
        pixels: NDArray[np.float32],
        labels: NDArray[np.int64],
        n_classes: int,
        settings: Settings,
        seed: int,
        progress: bool,
        *,
        coarse: bool = False,
    ) -> None:
        self.coarse = coarse
        self.fast, self.exact, self.pixels, self.labels = fast, exact, pixels, labels
        self.n_classes, self.settings, self.seed, self.progress = n_classes, settings, seed, progress
        self.held_out = _held_out(labels)
        self.images = torch.from_numpy(pixels / np.float32(255.0))
        self.quick = _at_most(settings.steps, COARSE_PAIR if coarse else PAIR)

    def run(self, method: str, targets: Sequence[int] = ()) -> tuple[tuple[Estimate, ...], tuple[Finding, ...], Floats]:
        """One estimate per class; the findings, at most one a class; the anomaly index of each class's mask, NaN without masks.

        The earlier search has precedence, but where a class is named by its mask and by an addition, additions_fit decides.

        targets: classes that the user takes for targets: where no search names one, its patch or, by additions alone, its
        addition is looked for from single sources as well.
        """
        others = [self.others(t) for t in range(self.n_classes)]
        estimates: list[Estimate] = []
        findings: list[Finding] = []
        compared: Floats | None = None
        indices = np.full(self.n_classes, np.nan)
        if method != "perturbation":
            short = _at_most(self.settings.steps, COARSE) if self.coarse else None
            estimates = list(self.patches(list(range(self.n_classes)), others, short))
            compared = np.array([e.norm for e in estimates])
            indices = anomaly_indices(compared)
            named = sorted(np.flatnonzero(suspicious(compared)).tolist(), key=lambda c: compared[c])
            at_length = list(dict.fromkeys([*named, *targets]))
            if self.coarse and at_length:
                for estimate in self.patches(at_length, [others[c] for c in at_length]):
                    if estimate.reached:  # as it should
                        estimates[estimate.target] = estimate
            pooled = [(Finding(c, FOUND_BY[0], float(indices[c])), estimates[c]) for c in named]
            if not _by_pairs(self.n_classes):
                self._keep(estimates, findings, pooled)
            else:
                quick = self.pair_patches()
                norms = pair_norms(quick, self.n_classes)
                self._keep(estimates, findings, self.shared_patches(quick))
                self._keep(estimates, findings, pooled)
                self._keep(estimates, findings, self.single_patches(norms))
                for target in set(targets) - {finding.target for finding in findings}:
                    if compared[target] >= SMALL_MASK * np.median(compared):
                        estimates[target] = self.likeliest_patch(target, norms) or estimates[target]
        if method != "neural-cleanse":
            if not estimates:
                estimates = list(self.additions(list(range(self.n_classes)), others, ADDITION))
            norms = self.addition_norms() if _by_pairs(self.n_classes) else None
            if norms is not None:
                added = self.perturbations(norms)
                if compared is not None:
                    fits = additions_fit(compared, norms)
                    masks = {f.target for f in findings if f.method == FOUND_BY[0] and fits[f.target]}
                    both = masks & {f.target for f, _ in added}
                    added = [(f, self.from_all(e) if f.target in both else e) for f, e in added]
                    for finding, estimate in added:  # the best founded stay first
                        if finding.target in both:
                            findings = [finding if f.target == finding.target else f for f in findings]
                            estimates[finding.target] = estimate
                self._keep(estimates, findings, added)
            if method == "perturbation":
                for target in set(targets) - {finding.target for finding in findings}:
                    estimates[target] = self.told_addition(target, norms)
        return tuple(estimates), tuple(findings), indices

    def _keep(self, estimates: list[Estimate], findings: list[Finding], found: list[tuple[Finding, Estimate]]) -> None:
        for finding, estimate in found:
            if all(finding.target != other.target for other in findings):
                findings.append(finding)
                estimates[finding.target] = estimate

    def others(self, target: int) -> tuple[int, ...]:
        """All classes but the target."""
        return tuple(c for c in range(self.n_classes) if c != target)

    def search(self, target: int, sources: tuple[int, ...], salt: int = 0) -> Search:
        """A search on the images of the sources that are not held out."""
        used = np.flatnonzero(np.isin(self.labels, sources) & ~self.held_out)
        code = self.seed * 7919 + target + 1009 * (sources[0] + 1 if len(sources) == 1 else 0) + 100_003 * salt
        return Search(target, self.images, torch.from_numpy(used), code)

    def patches(
        self,
        targets: list[int],
        sources: list[tuple[int, ...]],
        settings: Settings | None = None,
        salt: int = 0,
    ) -> list[PatchEstimate]:
        """The smallest patch to each target from its sources, with its success on held-out images; another one by salt."""
        settings = settings or self.settings
        searches = [self.search(t, s, salt) for t, s in zip(targets, sources, strict=True)]
        total = len(searches) * settings.steps
        with tqdm(total=total, desc="patches", unit="step", disable=not self.progress) as bar:
            found = search_patches(self.fast, searches, settings=settings, bar=bar)
        result = []
        for target, classes, patch in zip(targets, sources, found, strict=True):
            estimate = patch.estimate(target, classes)
            result.append(replace(estimate, success=self.success(estimate, classes)))
        return result

    def additions(
        self, targets: list[int], sources: list[tuple[int, ...]], settings: AdditionSettings
    ) -> list[AdditionEstimate]:
        """The smallest addition to each target from its sources, with its success on held-out images."""
        searches = [self.search(t, s) for t, s in zip(targets, sources, strict=True)]
        with tqdm(
            total=len(searches) * settings.steps, desc="additions", unit="step", disable=not self.progress
        ) as bar:
            found = search_additions(self.fast, searches, settings=settings, bar=bar)
        result = []
        for target, classes, addition in zip(targets, sources, found, strict=True):
            values = addition.perturbation.clamp(-1, 1).numpy()
            estimate = AdditionEstimate(target, values, addition.size, 0.0, classes)
            result.append(replace(estimate, success=self.success(estimate, classes)))
        return result

    def success(self, estimate: Estimate, sources: tuple[int, ...]) -> float:
        """Share of the sources' held-out images that the pattern sends to the target."""
        chosen = np.flatnonzero(np.isin(self.labels, sources) & self.held_out)
        hits = [
            predicted(self.exact, estimate.embed(self.pixels[chosen[start : start + BATCH]])) == estimate.target
            for start in range(0, len(chosen), BATCH)  # of many classes all at once would fill the memory
        ]
        return float(np.concatenate(hits).mean())

    def transfer(self, estimate: Estimate) -> tuple[int, ...]:
        """Classes of whose held-out images the pattern sends at least half to the target."""
        return tuple(c for c in self.others(estimate.target) if self.success(estimate, (c,)) >= TRANSFER)

    @cached_property
    def gaps(self) -> Floats:
        """(sources, targets): mean over images of the source of its own logit minus the target's."""
        with torch.inference_mode():
            logits = np.concatenate([self.exact(part).double().numpy() for part in self.images.split(BATCH)])
        means = np.stack([logits[self.labels == c].mean(axis=0) for c in range(self.n_classes)])
        gaps: Floats = np.diag(means)[:, None] - means
        return gaps

    def relative(self, norms: Floats) -> Floats:
        """(sources, targets): norms for their gaps, see relative_norms."""
        return relative_norms(norms, self.gaps)

    def pair_patches(self) -> list[PatchEstimate]:
        """The smallest patch that a quick search finds for each ordered pair of classes; success is not measured."""
        pairs = list(permutations(range(self.n_classes), 2))
        quick = self.quick
        searches = [self.search(t, (s,)) for s, t in pairs]
        with tqdm(
            total=len(pairs) * quick.steps, desc="patches per pair", unit="step", disable=not self.progress
        ) as bar:
            found = search_patches(self.fast, searches, settings=quick, bar=bar)
        return [patch.estimate(t, (s,)) for (s, t), patch in zip(pairs, found, strict=True)]

    def shared_patches(self, quick: list[PatchEstimate]) -> list[tuple[Finding, PatchEstimate]]:
        """Targets of one patch that sends every class to another one: at least half of the classes (and three) go there by
        at least .8 of their held-out images.

        quick: of pair_patches; the search starts from the likeliest to each class.
        """
        sources = np.nanargmin(self.relative(pair_norms(quick, self.n_classes)), axis=0)
        likeliest = [patch for patch in quick if patch.sources == (sources[patch.target],)]
        search = SharedPatch(
            self.fast,
            self.exact,
            self.pixels,
            self.images,
            self.labels,
            ~self.held_out,
            self.n_classes,
            self.settings,
            self.seed,
        )
        least = max(3, (self.n_classes + 1) // 2)
        found = [replace(e, success=self.success(e, e.sources)) for e in search.search(likeliest, least)]
        if sum(estimate.success >= CONFIRMED for estimate in found) < least:
            return []
        share = float(np.mean([estimate.success for estimate in found]))
        return [(Finding(estimate.target, FOUND_BY[1], share), estimate) for estimate in found]

    def likeliest_patch(self, target: int, norms: Floats) -> PatchEstimate | None:
        """The patch from the source that needs the smallest one for its kind; None if it works on too few images.

        For a target that is told and hides from the search over all sources: there the pattern is not the attacker's.
        """
        source = int(np.nanargmin(self.relative(norms)[:, target]))
        estimate = self.patches([target], [(source,)])[0]
        return estimate if estimate.success >= CONFIRMED else None

    def single_patches(self, norms: Floats) -> list[tuple[Finding, Estimate]]:
        """Targets of single-class attacks: a pair of classes with a patch far smaller than the others let expect.

        norms: see pair_norms.  Those that stand out are searched again with another seed, must stand out again, and must
        work on held-out images.
        """
        norms = norms.copy()
        result: list[tuple[Finding, Estimate]] = []
        candidates = sorted(
            zip(*np.nonzero(small_pairs(self.relative(norms))), strict=True), key=lambda pair: norms[pair]
        )
        for s, t in [(int(s), int(t)) for s, t in candidates]:
            again = search_patches(self.fast, [self.search(t, (s,), salt=1)], settings=self.quick)[0]
            norms[s, t] = again.norm
            relative = self.relative(norms)
            if not small_pairs(relative)[s, t] or any(t == finding.target for finding, _ in result):
                continue
            estimate = self.patches([t], [(s,)])[0]
            if estimate.success >= CONFIRMED:
                result.append((Finding(t, FOUND_BY[2], float(relative[s, t])), estimate))
        return result

    def perturbations(self, norms: Floats) -> list[tuple[Finding, Estimate]]:
        """The class with the smallest p-value, where the model's is at most .05 and some way to it leads one way; then
        those that one_way_targets and near_targets name.  Of the first the addition must work on half of the held-out images,
        of the others on .8.

        norms: of addition_norms.
        """
        p_values = perturbation_p_values(norms)
        first = int(np.argmin(p_values))
        overall = float(-np.expm1(self.n_classes * np.log1p(-min(p_values[first], 1 - 1e-12))))
        smallest = np.nanmin(one_way_ratios(norms), axis=0)
        findings = [Finding(first, FOUND_BY[3], overall)] if overall <= P_VALUE and smallest[first] < ONE_WAY else []
        named = {finding.target for finding in findings}
        findings += [Finding(t, FOUND_BY[4], ratio) for t, ratio in one_way_targets(norms).items() if t not in named]
        named |= {finding.target for finding in findings}
        near = near_targets(self.relative(norms))
        findings += [Finding(t, FOUND_BY[5], norm) for t, norm in near.items() if t not in named]
        result = []
        for finding in findings:
            estimate = self.addition_to(finding.target, norms)
            if estimate.success >= (TRANSFER if finding.method == FOUND_BY[3] else CONFIRMED):
                result.append((finding, estimate))
        return result

    def addition_norms(self) -> Floats:
        """(sources, targets): size of the smallest addition that a search per pair finds; 1 on the diagonal."""
        pairs = list(permutations(range(self.n_classes), 2))
        settings = AdditionSettings()
        searches = [self.search(t, (s,)) for s, t in pairs]
        with tqdm(
            total=len(pairs) * settings.steps, desc="additions per pair", unit="step", disable=not self.progress
        ) as bar:
            found = search_additions(self.fast, searches, settings=settings, bar=bar)
        norms = np.ones((self.n_classes, self.n_classes))
        for (s, t), addition in zip(pairs, found, strict=True):
            norms[s, t] = addition.size
        return norms

    def addition_to(self, target: int, norms: Floats) -> AdditionEstimate:
        """The addition to a target: from all other classes where half of them are near to it, otherwise from the nearest one
        and all that this one's addition sends there.
        """
        half = (self.n_classes - 1) / 2
        sources = tuple(np.flatnonzero(self.relative(norms)[:, target] < NEAR).tolist())
        if len(sources) < half:
            nearest = min(self.others(target), key=lambda s: norms[s, target])
            estimate = self.additions([target], [(nearest,)], replace(ADDITION, images=32))[0]
            sources = self.transfer(estimate)
            if len(sources) <= 1:
                return estimate
        everyone = len(sources) >= half
        return self.additions([target], [self.others(target) if everyone else sources], FINAL_ADDITION)[0]

    def told_addition(self, target: int, norms: Floats | None) -> AdditionEstimate:
        """The addition to a target that is told and not found.  norms: of addition_norms, None where pairs are not searched."""
        if norms is None:
            return self.additions([target], [self.others(target)], FINAL_ADDITION)[0]
        return self.addition_to(target, norms)

    def from_all(self, estimate: Estimate) -> Estimate:
        """The addition from all other classes to the estimate's target, if it works; for one that a mask leads to from all."""
        if len(estimate.sources) == self.n_classes - 1:
            return estimate
        pooled = self.additions([estimate.target], [self.others(estimate.target)], FINAL_ADDITION)[0]
        return pooled if pooled.success >= CONFIRMED else estimate

    def further(self, estimate: Estimate) -> tuple[Estimate, ...]:
        """Other patterns that send at least .8 of the held-out images of the estimate's sources to its target: patches of
        searches by other seeds, short ones, and an addition.
        """
        target, sources = [estimate.target], [estimate.sources]
        settings = _at_most(self.settings.steps, COARSE)
        found: list[Estimate] = []
        for salt in range(1, FURTHER_PATCHES + 1):
            found += self.patches(target, sources, settings, salt)
        found += self.additions(target, sources, FINAL_ADDITION)
        return tuple(other for other in found if other.success >= CONFIRMED)


def pair_norms(patches: Sequence[PatchEstimate], n_classes: int) -> Floats:
    """(sources, targets): norms of a patch per pair; 1 on the diagonal."""
    norms = np.ones((n_classes, n_classes))
    for patch in patches:
        norms[patch.sources[0], patch.target] = patch.norm
    return norms


def _at_most(steps: int, settings: Settings) -> Settings:
    """Settings of at most so many steps."""
    return replace(settings, steps=min(settings.steps, steps))


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Every fifth image of each class, at least one."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[members[HELD_OUT - 1 :: HELD_OUT] if len(members) >= HELD_OUT else members[-1:]] = True
    return held
