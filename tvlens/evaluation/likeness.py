"""How like in-context learning a method makes a model: next-token distributions and hidden states.

Accuracy says whether the answer is right; these say whether the model is in the state that the
demonstrations would have put it in. Every prompt is compared with the clean prompt that asks the
same query.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from torch import Tensor

from tvlens.errors import TaskError
from tvlens.evaluation.methods import RESULT_COLUMNS, Draws, Method, by_kind, draws_of
from tvlens.lens.edits import Edit, NoEdit
from tvlens.lens.lens import Lens
from tvlens.lens.readout import kl_divergence
from tvlens.stats import bootstrap_mean
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.text.task import Task
from tvlens.vectors.vector import edits_of

PAIRED = ("d_ntp", "d_ntp_labels", "hidden_mse", "hidden_cosine")
"""Measures that every prompt has."""

DISTRIBUTIONS = ("hidden_frechet", "hidden_mmd")
"""Measures of all prompts together."""

N_COMPONENTS = 10
_RESAMPLES = 200


@dataclass(frozen=True)
class Likeness:
    """What methods make of one kind of prompts, beside clean prompts that ask the same.

    Attributes:
        task: name of the task.
        kind: of the prompts.
        methods: names of the methods; `none`, which adds nothing, is the first.
        paired: the measures of `PAIRED` on every prompt.
        states: residual streams behind the last block at the query position, under every method.
        icl: those of the clean prompts.
    """

    task: str
    kind: PromptKind
    methods: tuple[str, ...]
    paired: Float[Tensor, "prompt method measure"]
    states: Float[Tensor, "prompt method d_model"]
    icl: Float[Tensor, "prompt d_model"]

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each method and measure, in the columns of `tvlens.evaluate`.

        Fréchet distance and MMD are of the first principal components of all states together
        (`N_COMPONENTS`); their intervals are of 200 bootstrap samples of prompts.

        Args:
            seed: seed of the bootstrap.
        """
        rows: list[dict[str, Any]] = []
        flat = torch.cat([self.states.flatten(0, 1), self.icl]).double().numpy()
        n = min(N_COMPONENTS, *flat.shape)
        reduced = PCA(n, random_state=0).fit_transform(flat)
        each = reduced[: -len(self.icl)].reshape(*self.states.shape[:2], n)
        clean = reduced[-len(self.icl) :]
        picks = np.random.default_rng(seed).integers(
            len(clean), size=(_RESAMPLES, len(clean)), dtype=np.int64
        )
        for i, method in enumerate(self.methods):
            for j, name in enumerate(PAIRED):
                found = bootstrap_mean(self.paired[:, i, j], seed=seed)
                rows.append(self._row(method, name, found.value, found.low, found.high))
            for name, distance in (("hidden_frechet", frechet), ("hidden_mmd", mmd)):
                drawn = [distance(each[pick, i], clean[pick]) for pick in picks]
                low, high = np.quantile(drawn, [0.025, 0.975])
                rows.append(self._row(method, name, distance(each[:, i], clean), low, high))
        return pd.DataFrame(rows, columns=RESULT_COLUMNS)

    def _row(self, method: str, name: str, value: float, low: float, high: float) -> dict[str, Any]:
        ends = {"value": float(value), "ci_low": float(low), "ci_high": float(high)}
        names = {"task": self.task, "method": method, "prompt": self.kind, "metric": name}
        return names | ends | {"n": len(self.icl), "answers": 1}

    def projection(self) -> pd.DataFrame:
        """Every state on the two directions in which clean prompts and bare ones differ most.

        Columns method (`icl` for the clean prompts), prompt (its number), first, second: the first
        two principal components of the states of clean prompts and of prompts without a vector.
        """
        both = torch.cat([self.states[:, 0], self.icl]).double().numpy()
        axes = PCA(2, random_state=0).fit(both)
        parts = [("icl", self.icl)]
        parts += [(name, self.states[:, i]) for i, name in enumerate(self.methods)]
        frames = []
        for name, states in parts:
            points = axes.transform(states.double().numpy())
            frame = pd.DataFrame({"prompt": range(len(points))})
            frames.append(
                frame.assign(method=name, first=points[:, 0], second=points[:, 1], task=self.task)
            )
        return pd.concat(frames, ignore_index=True)


def likeness(
    lens: Lens,
    task: Task,
    methods: Mapping[str, Method],
    *,
    kind: PromptKind = "zero",
    split: Split = "test",
    shots: int = 10,
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Likeness:
    """How near every method brings prompts of one kind to clean ones that ask the same queries.

    d_ntp is KL(p_icl ‖ p_method) of the next token over the whole vocabulary, d_ntp_labels over the
    first tokens of the task's answers, both in nats; hidden_mse is the mean square difference of
    the last residual streams over their dimensions, hidden_cosine the cosine of their angle. The
    first of several draws stands for a method.

    Args:
        lens: the model.
        task: where prompts are drawn from.
        methods: as in `tvlens.evaluate`.
        kind: of the prompts that vectors act on.
        split: whose pairs are asked.
        shots: examples in prompts that have any.
        n: number of prompts; each pair of the split once by default.
        seed: seed of the prompts.
        progress: called with the number of prompts finished, clean ones among them.

    Raises:
        TaskError: clean prompts are asked for, which are what the others are compared with.
        UnknownNameError: a method is given for other kinds alone.
        VectorError: a method is no vector, or has no draws.
        ShapeError: a vector does not fit the model.
    """
    if kind == "clean":
        raise TaskError(
            "likeness compares prompts with the clean ones that ask the same; expected kind 'zero' "
            "or 'shuffled'"
        )
    asked: dict[str, Draws] = {"none": None}
    for name, method in methods.items():
        asked[name] = by_kind(lens, name, method, [kind])[kind]
    vectors = [draws_of(lens, name, given)[0] for name, given in asked.items()]
    clean, prompts = (
        task.prompts(split, shots=shots, n=n, seed=seed, kind=each) for each in ("clean", kind)
    )
    icl = _states(lens, clean, [(NoEdit(lens.n_layer), [0])], 1, progress)[:, 0]
    states = _states(lens, prompts, edits_of(vectors, lens, prompts), len(vectors), progress)
    labels = _label_tokens(lens, task)
    paired = torch.stack(
        [_compared(lens, states[:, i], icl, labels) for i in range(len(vectors))], dim=1
    )
    return Likeness(task.name, kind, tuple(asked), paired, states, icl)


def _states(
    lens: Lens,
    prompts: Any,
    edits: Sequence[tuple[Edit, list[int]]],
    n_methods: int,
    progress: Callable[[int], None] | None,
) -> Float[Tensor, "prompt method d_model"]:
    """Last residual streams under every vector."""
    batch = lens.encode(prompts)
    found = torch.empty(len(batch), n_methods, lens.d_model)
    with lens.frozen(), torch.no_grad():
        for rows, read in lens.readings_for(batch, [edit for edit, _ in edits]):
            for (edit, index), (engine, reading) in zip(edits, read, strict=True):
                pieces = lens.variants(reading, edit.of_prompts(rows.start, rows.stop))
                parts = [engine.final(reading, piece) for piece in pieces]
                found[rows, index] = torch.cat(parts, dim=1).float().cpu()
            if progress is not None:
                progress(rows.stop - rows.start)
    return found


def _label_tokens(lens: Lens, task: Task) -> Int[Tensor, " label"]:
    """First tokens of all answers of the task."""
    prompts = [task.prompts(split, kind="zero") for split in ("train", "validation", "test")]
    batches = [lens.encode(each) for each in prompts]
    return torch.cat([batch.right.flatten() for batch in batches]).unique().cpu()


def _compared(
    lens: Lens,
    states: Float[Tensor, "prompt d_model"],
    icl: Float[Tensor, "prompt d_model"],
    labels: Int[Tensor, " label"],
) -> Float[Tensor, "prompt measure"]:
    device, dtype = lens.backend.device, lens.backend.dtype
    with torch.no_grad():
        logits, reference = (
            lens.backend.unembed(x[:, None].to(device, dtype))[:, 0].float().cpu()
            for x in (states, icl)
        )
    measures = [
        kl_divergence(reference, logits),
        kl_divergence(reference[:, labels], logits[:, labels]),
        (states - icl).square().mean(dim=1),
        torch.nn.functional.cosine_similarity(states, icl, dim=1),
    ]
    return torch.stack([x.double() for x in measures], dim=1)


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Fréchet distance of two samples as normal distributions: ‖μ-μ'‖² + tr(Σ+Σ'-2(ΣΣ')^½).

    Args:
        a: one sample, `[prompt dimension]`.
        b: the other.
    """
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The trace of a root is the sum of the roots of eigenvalues, which also exist where it is not.
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None))
    between = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(between + np.trace(first + second) - 2 * roots.sum())


def mmd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared maximum mean discrepancy of two samples (Gretton et al. 2012), the biased estimate.

    The kernel is Gaussian; its width is the median distance of the points of both samples.

    Args:
        a: one sample, `[prompt dimension]`.
        b: the other.
    """
    both = np.concatenate([a, b])
    distances = euclidean_distances(both)
    width = float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0
    kernel = rbf_kernel(both, gamma=0.5 / width**2)
    n = len(a)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())
