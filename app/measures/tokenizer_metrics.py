"""Means over validation; of a tokenizer also errors in HU, codebook use, and the shuffled-code control."""

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from jaxtyping import Float, Int

from transforms.windows import WINDOWS


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of code use: the number of codes that equal use would need."""
    share = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(share * share.log()).sum())) if share.numel() else 0.0


def is_collapsed(counts: Float[torch.Tensor, " K"]) -> bool:
    """Whether the use of a codebook is as good as one code, or under a hundredth of what there is to be used."""
    usable = min(len(counts), int(counts.sum()))
    return usable > 1 and perplexity(counts) < max(1.5, usable / 100)


def count_codes(codes: Int[torch.Tensor, "M ..."], num_codes: int) -> Float[torch.Tensor, "L K"]:
    """How often each code of each quantiser level occurs; below 0 there is none."""
    levels = codes.cpu().long().reshape(len(codes), -1).T
    return torch.stack([torch.bincount(level[level >= 0], minlength=num_codes) for level in levels]).double()


class MeanTerms(Metric):
    """Means over samples of the `terms` that an evaluator's step gives, under names that begin with val_."""

    def __init__(self) -> None:  # ignite takes a mapping for y_pred and y, so ours travels in a tuple
        super().__init__(output_transform=lambda output: (output,), skip_unrolling=True)

    @reinit__is_reduced
    def reset(self) -> None:
        self._samples = torch.zeros(1, dtype=torch.float64)
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._names: list[str] = []

    def add(self, terms: dict[str, float], *, samples: int = 1) -> None:
        if not self._names:
            self._names = list(terms)
            self._sums = torch.zeros(len(terms), dtype=torch.float64)
        self._sums += torch.tensor(list(terms.values()), dtype=torch.float64) * samples
        self._samples += samples

    @reinit__is_reduced
    def update(self, wrapped: tuple[dict]) -> None:
        (output,) = wrapped
        self.add(output["terms"], samples=output["samples"])

    @sync_all_reduce("_samples", "_sums")
    def compute(self) -> dict[str, float]:
        means = (self._sums / self._samples).tolist()
        return {f"val_{name}": mean for name, mean in zip(self._names, means, strict=True)}

    def attach(self, engine: Engine, name: str = "validation") -> None:
        """As a handler in a config: MONAI gives no name."""
        super().attach(engine, name)


class TokenizerMetrics(MeanTerms):
    """Of whole cases, one at a time: `ValidationStep`'s terms, errors in HU, and how the codebook is used."""

    @reinit__is_reduced
    def reset(self) -> None:
        super().reset()
        self._counts = torch.zeros(0, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, wrapped: tuple[dict]) -> None:
        (output,) = wrapped
        values = dict(output["terms"])
        if len(output["windows"]) == len(output["absolute_error"]):
            for name, error in zip(output["windows"], output["absolute_error"].tolist(), strict=True):
                values[f"mae_hu_{name}"] = error * WINDOWS[name][0] / 2  # features span -1..1 across the window
        if not len(self._counts):
            levels = 1 if output["codes"] is None or output["codes"].ndim == 1 else output["codes"].shape[1]
            self._counts = torch.zeros((levels, output["num_codes"]), dtype=torch.float64)
        self.add(values)
        if output["codes"] is not None:
            self._counts += count_codes(output["codes"], self._counts.shape[1])

    @sync_all_reduce("_counts")
    def compute(self) -> dict[str, float]:
        result = super().compute()
        result["val_shuffled_ratio"] = result["val_shuffled"] / max(result["val_recon"], 1e-12)
        if self._counts.sum() > 0:
            used, spread = (self._counts > 0).sum(1).tolist(), [perplexity(counts) for counts in self._counts]
            result["val_codes_used"], result["val_perplexity"] = sum(used) / len(used), sum(spread) / len(spread)
            if len(used) > 1:
                for i in range(len(used)):
                    result |= {f"val_codes_used_level{i}": used[i], f"val_perplexity_level{i}": spread[i]}
        return result
