"""What to do, in data: the recipe and its checks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticSerializationError

from llmcompress import catalog
from llmcompress.backends.choice import Backend
from llmcompress.errors import InputError, one_line
from llmcompress.recipe_file import read_recipe
from llmcompress.validation import check_backend, check_choice, check_options, first_error

#: options of methods and allocations that say how much is kept in place of `ratio`
REPLACES_RATIO = ("rank_fraction", "err")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Choice(BaseModel):
    """A backend by name with its options: `name`, or `{name: ..., option: value}`."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description="name in the catalogue")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Optimizer(Choice):
    """An optimiser by name with its options."""


class Mix(Section):
    """Several texts in the proportions that make their inputs look like those of a target text."""

    method: Literal["bures"] = Field(
        "bures", description="bures: the mixture of Grams nearest to the target's in Bures-Wasserstein distance"
    )
    domains: list[str] = Field(min_length=1, description="further text sources, mixed with the calibration's dataset")
    target: str = Field(description="text source whose inputs the mixture is to match")
    tokens: int = Field(400, ge=2, description="tokens of the target that are looked at")


class Calibration(Section):
    dataset: str = Field(
        "wikitext2",
        description="hub data set, .txt/.jsonl/.parquet file, python-docs, or self; NAME:SPLIT chooses a split",
    )
    field: str = Field("text", description="column or key that holds the text")
    samples: int = Field(128, ge=1, description="sequences")
    length: int = Field(1024, ge=2, description="tokens in a sequence")
    batch_tokens: int = Field(4096, ge=1, description="tokens that pass through a block at a time")
    backward_samples: int | None = Field(
        None, ge=1, description="sequences for gradient statistics, where a method needs them; all if absent"
    )
    targets: Literal["labels", "sampled"] = Field(
        "labels", description="what gradient statistics predict: the text's own tokens, or tokens the model draws"
    )
    mix: Mix | None = Field(None, description="calibrate on several texts, in proportions fitted to a target")
    sampler: Backend | None = Field(
        None, description="backend that chooses and weights the rows of each input that its Gram sums; all if absent"
    )
    stream: Backend | None = Field(
        None, description="backend that summarises each input's rows in one pass; its findings are logged"
    )
    gram: Backend | None = Field(
        None, description="recovery backend that finds each input's Gram from readings of its rows; summed if absent"
    )

    @model_validator(mode="after")
    def _has_text_to_mix(self) -> Self:
        if self.mix is not None and self.dataset == "self":
            raise ValueError("mix: mixes texts, and dataset self has none; name a text source")
        return self

    @property
    def sources(self) -> list[str]:
        """All texts that calibration reads."""
        return [self.dataset, *([*self.mix.domains, self.mix.target] if self.mix else [])]

    def build_sampler(self) -> Any:
        return self.sampler.build("sampler") if self.sampler else None

    def stream_factory(self) -> Any:
        """Builds a new summary at every call; None without one."""
        return functools.partial(self.stream.build, "stream") if self.stream else None

    def gram_factory(self) -> Any:
        """Builds a new recovery of a Gram at every call; None without one."""
        return functools.partial(self.gram.build, "recovery") if self.gram else None

    @model_validator(mode="after")
    def _one_way_to_a_gram(self) -> Self:
        if self.gram is not None and self.sampler is not None:
            raise ValueError("gram: is recovered from all rows; leave sampler out")
        return self


class Compress(BaseModel):
    """One step: a method on some sites. Keys beyond these are the method's own options."""

    model_config = ConfigDict(extra="allow")
    method: str = Field(description="compressor in the catalogue")
    targets: list[str] = Field(
        default=["attention", "ffn"], min_length=1,
        description="attention, ffn, a role (q k v qkv o gate up gate_up down), or regexes over module names",
    )  # fmt: skip
    ratio: float = Field(0.3, gt=0, lt=1, description="fraction of the targeted parameters removed")
    allocation: Choice = Field(
        default_factory=lambda: Choice(name="uniform"), description="how the budget is spread over the sites"
    )
    propagate: bool = Field(
        False, description="each block is calibrated with what the compressed blocks before it produce"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("targets"), str):
            return {**value, "targets": [value["targets"]]}
        return value

    @model_validator(mode="before")
    @classmethod
    def _own_targets(cls, value: Any) -> Any:
        """Those of the method where none are given."""
        if not isinstance(value, dict) or "targets" in value:
            return value
        own = [e.targets for e in catalog.entries() if e.kind == "compressor" and e.name == value.get("method")]
        return {**value, "targets": list(own[0])} if own else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def ratio_replaced_by(self) -> str | None:
        """The option that says how much is kept where `ratio` does not."""
        given = self.options | self.allocation.options
        return next((key for key in REPLACES_RATIO if given.get(key) is not None), None)

    @model_serializer(mode="wrap")
    def _without_an_unused_ratio(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        if self.ratio_replaced_by:
            data.pop("ratio", None)
        return data

    def build(self) -> Any:
        """The compressor with its options."""
        entry = catalog.get("compressor", self.method).load()
        return entry(entry.Options(**self.options))

    def build_allocation(self) -> Any:
        entry = catalog.get("allocation", self.allocation.name).load()
        return entry(entry.Options(**self.allocation.options))


class Evaluation(Section):
    perplexity: list[str] = Field(
        default_factory=list, description="text sources, as in calibration; the test split unless one is named"
    )
    length: int = Field(1024, ge=2, description="tokens in a window")
    windows: int | None = Field(16, ge=1, description="windows measured; null for the whole text")
    field: str = Field("text", description="column or key that holds the text")
    tasks: list[str] = Field(
        default_factory=list, description="lm-eval tasks, dense and compressed; piqa=FOLDER reads local records"
    )
    limit: int | None = Field(None, ge=1, description="items of each task measured, the first; null for all")
    speed: bool = Field(False, description="measure tokens per second, dense and compressed")


class BlockRecovery(Section):
    """After a block is compressed, its factors are fitted to the dense block's outputs."""

    steps: int = Field(64, ge=1, description="optimiser steps a block")
    batch: int = Field(2, ge=1, description="sequences a step")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of Adam; falls to zero by a cosine")


class SelfGuided(Section):
    """A dense guide beside each structured layer while it trains, which fades and is deleted."""

    fraction: float = Field(0.5, gt=0, lt=1, description="share of the steps in which there is a guide")
    shape: Literal["cosine", "linear"] = Field("cosine", description="how the guide's weight falls from 1 to 0")
    stochastic: bool = Field(
        True, description="each layer uses its guide with the probability that is its weight: half the cost"
    )


class Finetune(Section):
    """Training after compression."""

    method: Literal["lrc", "full", "lora", "none"] = Field(
        "lrc", description="what trains: the compressed sites' factors (lrc), all (full), adapters (lora), or nothing"
    )
    steps: int = Field(200, ge=1, description="optimiser steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate; rises linearly, then falls to zero by a cosine")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    optimizer: Optimizer = Field(
        default_factory=lambda: Optimizer(name="adamw"), description="an optimiser of the catalogue"
    )
    loss: Literal["ce", "kd"] = Field(
        "kd", description="the text's cross entropy, or the distance to a teacher's logits"
    )
    temperature: float = Field(1.0, gt=0, description="kd: both logits are divided by it")
    block_loss: float = Field(0.0, ge=0, description="kd: weight of the relative error of the blocks' outputs, added")
    teacher: str | None = Field(None, description="kd: the model to learn from; the recipe's own if absent")
    dataset: str | None = Field(None, description="text source, as in calibration; that of calibration if absent")
    field: str = Field("text", description="column or key that holds the text")
    length: int = Field(512, ge=2, description="tokens in a sequence")
    samples: int | None = Field(None, ge=2, description="sequences read; all that the text gives if absent")
    validation: int = Field(
        16, ge=0, description="sequences held out at the text's end, at most a tenth; 0: the last step is kept"
    )
    batch: int = Field(4, ge=1, description="sequences a process works on at a time")
    accumulation: int = Field(1, ge=1, description="batches that make one step")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: not clipped")
    bf16: bool = Field(False, description="multiply in bfloat16; the weights that train stay in float32")
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    evaluate_every: int | None = Field(
        None, ge=1, description="steps between checkpoints, each validated; a quarter of the steps if absent"
    )
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a gain")
    lora_rank: int = Field(16, ge=1, description="lora: rank of the adapters")
    aggregator: Backend | None = Field(
        None,
        description="backend that merges the gradients of the processes, or one's batches of a step; mean if absent",
    )
    self_guided: SelfGuided | None = Field(None, description="lrc, full: guide the structured layers by dense ones")

    @model_validator(mode="after")
    def _guides_what_trains(self) -> Self:
        if self.self_guided is not None and self.method not in ("lrc", "full"):
            raise ValueError(f"self_guided: guides layers that train; use method lrc or full, not {self.method}")
        if self.self_guided is not None and self.patience is not None:
            raise ValueError("self_guided: the layers gain little before the guide has gone; leave patience out")
        if self.self_guided is not None and self.optimizer.name == "mfac":
            raise ValueError(
                "self_guided: mfac keeps gradients of all that trains, and the guides go; use another optimizer"
            )
        return self


class Analysis(Backend):
    """A backend's look at the dense model, after the evaluation; further keys are the backend's own options."""

    dataset: str = Field("python-docs", description="text source, as in calibration")
    samples: int = Field(8, ge=1, description="sequences")
    length: int = Field(512, ge=2, description="tokens in each")
    sites: list[str] = Field([], description="roles, or regexes over module names; three blocks' inputs if empty")


class Recipe(Section):
    """A whole run: which model, calibrated on what, compressed how, evaluated on what, written where."""

    model: str = Field(description="hub id, folder, .gguf file, or builtin:smollm2-135m-instruct")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the computation and the checkpoint; auto keeps the model's"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N: where blocks are run and factorised")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    trust_remote_code: bool = Field(False, description="run code that the model's folder brings along")
    calibration: Calibration = Field(default_factory=Calibration, description="text that statistics are gathered from")
    compress: list[Compress] = Field(min_length=1, description="steps, each on sites of its own")
    block_recovery: BlockRecovery | None = Field(None, description="fit each block to the dense one's outputs")
    convert: list[Backend] = Field(
        [], description="backends that change layers of the compressed model, or add some, before it is fine-tuned"
    )
    finetune: Finetune | None = Field(None, description="training after compression")
    eval: Evaluation = Field(default_factory=Evaluation, description="what is measured at the end")
    analysis: list[Analysis] = Field([], description="analyses whose reports lie beside the result, in analysis.json")
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMG]?B$", description="largest safetensors file")
    output: str = Field(min_length=1, description="folder of the result")

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Reads a YAML recipe, applies overrides such as `compress.0.ratio=0.4`, checks every key and option.

        InputError: one line with file, key path, what is wrong, and the nearest valid name.
        """
        return cls.parse(read_recipe(path, overrides), str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "recipe") -> Self:
        """Checks a recipe given as a mapping; methods' and allocations' options included."""
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{source}: {first_error(error, cls)}") from None
        for port in ("sampler", "stream"):
            check_backend(f"{source}: calibration.{port}", getattr(recipe.calibration, port), port)
        check_backend(f"{source}: calibration.gram", recipe.calibration.gram, "recovery", "gram")
        for index, step in enumerate(recipe.compress):
            at = f"compress.{index}"
            check_choice(f"{source}: {at}.method", "compressor", step.method)
            compressor = catalog.get("compressor", step.method).load()
            check_options(f"{source}: {at}", compressor.Options, step.options, tuple(Compress.model_fields))
            for key, port in getattr(compressor.Options, "BACKENDS", {}).items():
                check_backend(f"{source}: {at}.{key}", step.options.get(key), port)
            check_choice(f"{source}: {at}.allocation", "allocation", step.allocation.name)
            allocation = catalog.get("allocation", step.allocation.name).load()
            check_options(f"{source}: {at}.allocation", allocation.Options, step.allocation.options, ("name",))
            if step.ratio_replaced_by and "ratio" in step.model_fields_set:
                raise InputError(f"{source}: {at}: give ratio or {step.ratio_replaced_by}, not both")
        if recipe.finetune is not None:
            optimizer, at = recipe.finetune.optimizer, f"{source}: finetune.optimizer"
            check_choice(at, "optimizer", optimizer.name)
            check_options(at, catalog.get("optimizer", optimizer.name).load().Options, optimizer.options, ("name",))
            check_backend(f"{source}: finetune.aggregator", recipe.finetune.aggregator, "aggregator")
        for index, chosen in enumerate(recipe.convert):
            check_backend(f"{source}: convert.{index}", chosen, "layer")
        if recipe.convert and (recipe.finetune is None or recipe.finetune.method not in ("full", "lrc")):
            raise InputError(f"{source}: convert: what it changes has to be trained: finetune by method full or lrc")
        for index, analysis in enumerate(recipe.analysis):
            check_backend(f"{source}: analysis.{index}", analysis, None)
        try:
            recipe.model_dump_json()  # it is saved beside the result
        except PydanticSerializationError as error:
            raise InputError(f"{source}: holds what cannot be saved: {one_line(str(error))}") from None
        return recipe
