"""What a merge is told: a recipe with a `merge` section in place of a model and its compression."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator

from llmcompress.errors import InputError
from llmcompress.recipe import Analysis, Backend, Calibration, Compress, Recipe, Section
from llmcompress.recipe_file import read_recipe

#: how a match is asked for in one word -> the section's keys
WORDS: dict[str, dict[str, bool] | None] = {
    "auto": {}, "signed": {"signed": True}, "orthogonal": {"orthogonal": True}, "none": None,
}  # fmt: skip
ABSENT = ("model", "calibration", "compress", "block_recovery", "convert", "finetune", "analysis")


class Match(Section):
    """How the models are aligned before they are averaged."""

    name: Literal["weight_matching"] = Field("weight_matching", description="by inner products of weights")
    signed: bool | None = Field(
        None, description="sign flips of the residual stream too; if absent, where the model's norms allow them"
    )
    orthogonal: bool = Field(False, description="rotate the residual stream; needs RMSNorm and an untied head")
    max_iter: int = Field(20, ge=1, description="sweeps over residual stream and blocks, or rounds over many models")


class Merge(Section):
    """Models of one architecture, aligned to the first and averaged."""

    models: list[str] = Field(min_length=2, description="hub ids, folders, .gguf files or builtin:NAME")
    match: Match | None = Field(
        default_factory=lambda: Match(), description="auto, signed, orthogonal, none, or the keys of a match"
    )
    lam: float = Field(0.5, ge=0, le=1, description="share of the second of two models")
    weights: list[float] | None = Field(
        None, description="share of each model, one in sum; if absent lam says them for two models, more are equal"
    )
    barrier: str | None = Field(
        None, description="text source: measure the loss on the path between two models, as matched and as given"
    )
    plot: str | None = Field(None, description="draw these losses into this .png, .svg or .pdf")
    r_metric: bool = Field(False, description="measure how far singular vectors agree, before and after the match")

    @field_validator("match", mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return WORDS[value] if isinstance(value, str) and value in WORDS else value

    def shares(self) -> list[float]:
        """What each model contributes."""
        if self.weights is not None:
            return self.weights
        return [1 - self.lam, self.lam] if len(self.models) == 2 else [1 / len(self.models)] * len(self.models)


class MergeRecipe(Recipe):
    """A whole merge: which models, matched how, evaluated on what, written where. The first model gives the config."""

    model: str = Field("", exclude=True, description="the first of the merged models")
    calibration: Calibration = Field(default_factory=Calibration, exclude=True, description="no part of a merge")
    compress: list[Compress] = Field(default_factory=list, exclude=True, description="no part of a merge")
    block_recovery: None = Field(None, exclude=True, description="no part of a merge")
    convert: list[Backend] = Field([], exclude=True, description="no part of a merge")
    finetune: None = Field(None, exclude=True, description="no part of a merge")
    analysis: list[Analysis] = Field([], exclude=True, description="no part of a merge")
    merge: Merge

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "recipe") -> Self:
        """As for any recipe; and the shares must be one in sum, the sections those of a merge."""
        for key in ABSENT:
            if key in data:
                raise InputError(f"{source}: {key}: no part of a merge; give the merged folder to a recipe of its own")
        recipe = super().parse(data, source)
        _check(recipe.merge, source)
        if recipe.eval.speed:
            raise InputError(f"{source}: eval.speed: a merged model is as fast as those it is made of")
        return recipe.model_copy(update={"model": recipe.merge.models[0]})


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A MergeRecipe if the file has a `merge` section, otherwise a Recipe. InputError as for both."""
    data = read_recipe(path, overrides)
    kind: type[Recipe] = MergeRecipe if "merge" in data else Recipe
    return kind.parse(data, str(path))


def _check(merge: Merge, source: str) -> None:
    given, count = merge.model_fields_set, len(merge.models)
    if merge.weights is not None:
        if "lam" in given:
            raise InputError(f"{source}: merge: give lam or weights, not both")
        if len(merge.weights) != count:
            raise InputError(f"{source}: merge.weights: {len(merge.weights)} shares for {count} models")
        if not all(0 <= weight <= 1 for weight in merge.weights) or not math.isclose(
            sum(merge.weights), 1, abs_tol=1e-6
        ):
            raise InputError(
                f"{source}: merge.weights: shares in [0, 1] that are 1 in sum are needed; got {merge.weights}"
            )
    if count > 2 and "lam" in given:
        raise InputError(f"{source}: merge.lam: is the share of the second of two models; give weights for {count}")
    if merge.match is not None and merge.match.orthogonal and merge.match.signed is not None:
        raise InputError(f"{source}: merge.match: give signed or orthogonal, not both; a rotation flips signs too")
    if merge.barrier is not None and count > 2:
        raise InputError(f"{source}: merge.barrier: lies between two models; got {count}")
    if merge.plot is not None and merge.barrier is None:
        raise InputError(f"{source}: merge.plot: draws the barrier; give a text for it")
