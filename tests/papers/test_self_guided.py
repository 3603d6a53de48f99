"""Self-guided training: schedule, guides, the callback, the recipe's section, the card's criteria of training."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_with_min_lr_schedule_with_warmup,
)

import llmcompress
from llmcompress import InputError, Recipe, RunError
from llmcompress.checkpoint.install import structured_layers
from llmcompress.compressors.structured_ffn import level_within, projected_layer, random_layer
from llmcompress.finetune.flops import equal_flops_fraction, flops_per_token, replaced_flops
from llmcompress.finetune.self_guided import (
    FILE,
    GuideSchedule,
    SelfGuidedCallback,
    attach_guides,
    drop_guides,
    guided_layers,
    set_guides,
)
from llmcompress.finetune.train import train
from llmcompress.finetune.trainer import Rows, last_checkpoint
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.recipe import Finetune
from tests.tiny import recipe, save_tiny, tiny_model, write_text

TOKENS = torch.randint(4, 120, (24, 16), generator=torch.Generator().manual_seed(3))
STRUCTURES = ("low_rank", "block_dense", "block_shuffle")


def structured(structure="block_dense", **changes):
    return llmcompress.structured_ffn(tiny_model(**changes), structure, 0.5, init="project")


def arguments(folder, steps=8, **changes):
    options = {
        "max_steps": steps, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "per_device_train_batch_size": 4, "log_level": "error", "data_seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **options | changes)


# --- schedule and FLOPs ----------------------------------------------------------------------------------------------


def test_the_schedule_is_the_published_one():
    schedule = GuideSchedule(400)
    found = [schedule.alpha(step) for step in (0, 50, 100, 150, 199, 200, 399)]
    assert found == pytest.approx([1, 0.8536, 0.5, 0.1464, found[4], 0, 0], abs=1e-4)
    assert 0 < found[4] < 1e-4
    linear = GuideSchedule(400, 0.25, "linear")
    assert [linear.alpha(step) for step in (0, 25, 75, 100)] == [1, 0.75, 0.25, 0]


@pytest.mark.parametrize(
    ("layers", "width", "expected"), [(12, 768, 0.301), (24, 1024, 0.380), (24, 1536, 0.413), (24, 2048, 0.432)]
)
def test_equal_flops_of_the_published_models(layers, width, expected):
    """FFN at 31 %, the first one dense, 32,000 tokens, context 1,024."""
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=32000, n_positions=1024)
    with init_empty_weights():
        model = GPT2LMHeadModel(config)
    dense = flops_per_token(model, 1024)
    assert dense == 2 * (12 * layers * width**2 + 32000 * width) + 4 * 1024 * width * layers
    if width == 2048:
        assert 3 * dense * 25.5e9 == pytest.approx(2.10e20, rel=0.005)  # the paper's own count
    for block in model.transformer.h[1:]:
        block.mlp.c_fc = LowRankLinear(width, 4 * width, width // 4, device="meta")
        block.mlp.c_proj = LowRankLinear(4 * width, width, width // 4, device="meta")
    replaced = replaced_flops(model)
    assert replaced == 2 * 8 * width**2 * (layers - 1)
    found = equal_flops_fraction(dense, flops_per_token(model, 1024), replaced)
    assert found == pytest.approx(expected, abs=0.005)
    assert equal_flops_fraction(dense, flops_per_token(model, 1024), replaced, stochastic=False) < found


# --- guides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_attaching_a_guide_leaves_the_output_and_the_state(structure):
    model = structured(structure)
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(TOKENS).logits
        attach_guides(model)
        for training in (True, False):
            model.train(training)
            assert float((model(TOKENS).logits - before).abs().max() / before.abs().max()) < 1e-6
    assert set(model.state_dict()) == keys
    assert any(name.endswith(".guide") for name, _ in model.named_parameters())


def test_what_is_mixed_and_what_is_evaluated():
    model = structured()
    name = attach_guides(model)[0]
    layer = model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    layer.guide.data = torch.randn(layer.guide.shape, generator=generator)
    layer.bias = nn.Parameter(torch.randn(layer.d_out, generator=generator))
    x = torch.randn(3, layer.d_in, generator=generator)
    own, dense = (F.linear(x, weight, layer.bias) for weight in (layer.to_dense(), layer.guide))
    set_guides(model, 0.3)
    layer.train()
    torch.testing.assert_close(layer(x), 0.3 * dense + 0.7 * own)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.guide.grad, 0.3 * x.sum(0).expand_as(layer.guide))
    layer.eval()
    torch.testing.assert_close(layer(x), own)


def test_a_guide_may_start_at_the_dense_weight():
    dense = tiny_model()
    names = list(structured_layers(structured()))
    weights = {name: dense.get_submodule(name).weight for name in names}
    model = structured()
    attach_guides(model, weights)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(TOKENS).logits, dense(TOKENS).logits, rtol=0, atol=1e-5)


def test_the_stochastic_variant_uses_half_of_the_guides():
    model, schedule, used = structured(), GuideSchedule(4000), 0
    layer = model.get_submodule(attach_guides(model)[0])
    for step in range(2000):
        set_guides(model, schedule.alpha(step), torch.Generator().manual_seed(step))
        used += layer.guidance.open
        assert float(layer.guidance.alpha) == pytest.approx(schedule.alpha(step))
    assert used / 2000 == pytest.approx(0.5, abs=0.03)


def test_dropping_guides_frees_them_and_their_moments():
    model = structured()
    attach_guides(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    set_guides(model, 0.5)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    values = sum(p.numel() for p in structured().parameters())
    drop_guides(model, optimizer)
    assert sum(p.numel() for p in model.parameters()) == values
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == values
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    copy.deepcopy(model)
    assert not guided_layers(model)


def test_a_state_without_guides_loads_into_a_guided_model():
    model, other = structured(), structured(vocab_size=120, attention_dropout=0.0)
    for parameter in other.parameters():
        parameter.data *= 1.5
    attach_guides(model)
    guides = {name: layer.guide.clone() for name, layer in guided_layers(model).items()}
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(layer.guide, guides[name]) for name, layer in guided_layers(model).items())
    assert torch.equal(model.model.layers[1].mlp.up_proj.V, other.model.layers[1].mlp.up_proj.V)


# --- in any Trainer --------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """What the model is like while it trains."""

    def __init__(self):
        self.guided, self.alphas, self.optimizer = [], [], None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layers = guided_layers(kwargs["model"])
        self.guided.append(len(layers))
        self.alphas.append(float(next(iter(layers.values())).guidance.alpha) if layers else 0.0)
        self.optimizer = kwargs["optimizer"]


def test_the_callback_guides_half_of_a_training_and_leaves_nothing(tmp_path):
    model, watch = structured(), Watch()
    plain = copy.deepcopy(model)
    args = arguments(tmp_path / "run")
    Trainer(model, args, train_dataset=Rows(TOKENS), callbacks=[SelfGuidedCallback(), watch]).train()
    assert watch.guided == [6, 6, 6, 6, 0, 0, 0, 0]
    assert watch.alphas[:4] == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    assert set(model.state_dict()) == set(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    held = sum(s["exp_avg"].numel() for s in watch.optimizer.state.values())
    assert held == sum(p.numel() for p in model.parameters())
    Trainer(plain, args, train_dataset=Rows(TOKENS)).train()
    layers = (m.model.layers[1].mlp.up_proj.to_dense().detach() for m in (model, plain))
    assert float(torch.sub(*layers).norm()) > 1e-3, "the guide changes what is learned"


@pytest.mark.parametrize("stopped_at", [2, 6])
def test_a_guided_training_goes_on_from_its_checkpoints(stopped_at, tmp_path):
    """Inside and after the guidance, to the same weights; the checkpoint's model has no guide."""

    def run(folder, resume=None, **changes):
        model = structured()
        args = arguments(folder, save_strategy="steps", save_steps=2, **changes)
        Trainer(model, args, train_dataset=Rows(TOKENS), callbacks=[SelfGuidedCallback(GuideSchedule(8))]).train(
            resume_from_checkpoint=resume
        )
        return model.state_dict()

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{stopped_at}"
    assert (checkpoint / FILE).is_file() == (stopped_at == 2)
    again = run(tmp_path / "whole", str(checkpoint))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert set(saved.state_dict()) == set(whole)
    if stopped_at == 2:
        (checkpoint / FILE).unlink()
        with pytest.raises(RunError, match=f"checkpoint-2: holds no {FILE}"):
            run(tmp_path / "whole", str(checkpoint))


def test_schedules_and_models_that_do_not_fit(tmp_path):
    def guided(model, schedule=None):
        return Trainer(
            model, arguments(tmp_path / "run"), train_dataset=Rows(TOKENS), callbacks=[SelfGuidedCallback(schedule)]
        )

    with pytest.raises(InputError, match="the guide lasts 9 steps and the training 8; shorten the schedule"):
        guided(structured(), GuideSchedule(18)).train()
    with pytest.raises(InputError, match="self_guided: guides structured layers, and this model has none"):
        guided(tiny_model())
    trainer = guided(structured())
    trainer.train()
    with pytest.raises(InputError, match="no guide is there; give the callback to a new Trainer's constructor"):
        trainer.train()
    model = structured()
    name = attach_guides(model)[0]
    with pytest.raises(InputError, match=f"{name}: has a guide already"):
        attach_guides(model)
    with pytest.raises(InputError, match=r"the guide must be \(48, 32\); got \(2, 2\)"):
        attach_guides(structured(), {name: torch.ones(2, 2)})
    for fraction in (0.0, 1.0):
        with pytest.raises(InputError, match=r"fraction must be in \(0, 1\)"):
            GuideSchedule(10, fraction)
    with pytest.raises(InputError, match="steps must be at least 1"):
        GuideSchedule(0)
    with pytest.raises(InputError, match="the structured model's FLOPs must be between 0 and 10"):
        equal_flops_fraction(10, 12, 5)


# --- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_converts_trains_with_guides_and_saves_none(tmp_path):
    folder, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "letters.txt")
    section = {"steps": 6, "lr": 3e-3, "length": 16, "batch": 4, "validation": 8, "evaluate_every": 3, "loss": "ce"}
    found = {}
    for guided in (None, {"fraction": 0.5}, {"fraction": 0.5, "stochastic": False, "shape": "linear"}):
        output = tmp_path / str(len(found))
        data = recipe(folder, text, output, method="structured_ffn", structure="block_shuffle")
        data["finetune"] = {**section, "method": "full", "self_guided": guided}
        metrics = llmcompress.apply(Recipe.parse(data)).metrics
        model = AutoModelForCausalLM.from_pretrained(output)
        assert {layer.kind for layer in structured_layers(model).values()} == {"block_shuffle"}
        assert metrics["finetune"]["trained_values"] == sum(p.numel() for p in model.parameters())
        saved = json.loads((output / "config.json").read_text())["quantization_config"]["sites"]
        assert all("guide" not in str(site) for site in saved.values())
        found[json.dumps(guided)] = metrics["finetune"]["last_loss"]
    assert len(set(found.values())) == 3


def test_the_section_resumes_inside_the_guidance(tmp_path):
    section = Finetune(
        method="lrc", steps=8, lr=3e-3, length=16, batch=4, validation=0, evaluate_every=2, loss="ce", self_guided={}
    )

    class Stop(Exception):
        pass

    class Interrupting:
        def __init__(self, steps):
            self.left = steps

        def start(self, stage, total):
            pass

        def advance(self, detail):
            self.left -= 1
            if not self.left:
                raise Stop

    whole, again = structured(), structured()
    train(whole, TOKENS, section, tmp_path / "whole")
    with pytest.raises(Stop):
        train(structured(), TOKENS, section, tmp_path / "parts", progress=Interrupting(3))
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    train(again, TOKENS, section, tmp_path / "parts")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_guided": {"fraction": 1.5}}, "finetune.self_guided.fraction: input should be less than 1; got 1.5"),
        ({"self_guided": {"shape": "cosin"}}, "finetune.self_guided.shape: input should be 'cosine' or 'linear'"),
        ({"self_guided": {"faction": 0.5}}, "finetune.self_guided.faction: unknown key; did you mean 'fraction'?"),
        (
            {"self_guided": {}, "method": "lora"},
            "self_guided: guides layers that train; use method lrc or full, not lora",
        ),
        ({"self_guided": {}, "patience": 2}, "self_guided: the layers gain little before the guide has gone"),
    ],
)
def test_sections_that_are_refused(change, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        Recipe.parse({**recipe("m", "t", "o"), "finetune": change})


def test_lora_is_refused_on_block_layers(tmp_path):
    section = Finetune(method="lora", steps=2, length=16, loss="ce", lora_rank=2)
    with pytest.raises(InputError, match="lora cannot make an adapter part of a block_dense layer; use lrc or full"):
        train(structured(), TOKENS, section, tmp_path / "run")


# --- the card's criteria of training ---------------------------------------------------------------------------------

CONTEXT, WIDTH, INNER, BLOCKS = 8, 128, 512, 3
KEPT = 0.335  # the largest sizes below it keep 31 to 34 %


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ByteModel(nn.Module):
    """Predicts a byte from the 8 before it."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(256, WIDTH // CONTEXT)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, context):
        x = self.embedding(context).flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def converted(model, structure, init, seed=0):
    """The model with all FFN layers structured, at random or projected."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name in ("up", "down"):
            dense = getattr(block, name)
            d_out, d_in = dense.weight.shape
            level = level_within(structure, 4, d_in, d_out, KEPT * d_in * d_out)
            if init == "project":
                layer, _ = projected_layer(structure, 4, dense.weight.detach(), level, dense.bias.detach())
            else:
                layer = random_layer(structure, 4, d_in, d_out, level, 0.02, generator)
                layer.bias = nn.Parameter(dense.bias.detach().clone())
            setattr(block, name, layer)
    return model


def fit(model, text, steps, seed=0, guide=None):
    """As published: AdamW, decay 0.1, clipped at 1, a tenth of warm-up, a cosine to a tenth.

    guide: None, "always" or "stochastic", for the first half.
    """
    generator, schedule = torch.Generator().manual_seed(seed), GuideSchedule(steps)
    if guide:
        attach_guides(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    rate = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 10, steps, min_lr_rate=0.1)
    model.train()
    for step in range(steps):
        if guide and step < schedule.guided:
            set_guides(model, schedule.alpha(step), generator if guide == "stochastic" else None)
        elif guided_layers(model):
            drop_guides(model, optimizer)
        start = torch.randint(len(text) - CONTEXT - 1, (512, 1), generator=torch.Generator().manual_seed(step))
        rows = text[start + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1]), rows[:, -1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model


def held_out_loss(model, text):
    rows = text[: 20000 + CONTEXT].unfold(0, CONTEXT + 1, 1)
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(rows[:, :-1]), rows[:, -1]))


@pytest.fixture(scope="module")
def texts(wikitext):
    return [torch.tensor(list(wikitext[split].encode()), dtype=torch.long) for split in ("valid", "test")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_guidance_helps_low_rank_from_scratch(seed, texts):
    found = {"dense": held_out_loss(fit(ByteModel(seed), texts[0], 300), texts[1])}
    for guide in (None, "always", "stochastic"):
        model = converted(ByteModel(seed), "low_rank", "random", seed)
        found[guide] = held_out_loss(fit(model, texts[0], 300, seed, guide), texts[1])
    print(seed, found)
    assert found["always"] <= found[None] - 0.06
    assert found["stochastic"] <= found[None] - 0.025


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["block_dense", "block_shuffle"])
def test_guidance_helps_blocks_from_scratch(structure, texts):
    found = {}
    for guide in (None, "always"):
        model = converted(ByteModel(0), structure, "random")
        found[guide] = held_out_loss(fit(model, texts[0], 300, 0, guide), texts[1])
    print(structure, found)
    assert found["always"] <= found[None] - 0.025


@pytest.mark.slow
def test_a_projection_is_worth_more_than_a_guide_after_a_conversion(texts):
    dense = fit(ByteModel(0), texts[0], 400)
    print("dense", held_out_loss(dense, texts[1]))
    for structure in STRUCTURES:
        found = {}
        for init, guide in (("random", None), ("project", None), ("project", "always")):
            model = fit(converted(dense, structure, init), texts[0], 100, 1, guide)
            found[init, guide] = held_out_loss(model, texts[1])
        print(structure, found)
        assert found["project", None] <= found["random", None] - 0.2
        assert abs(found["project", "always"] - found["project", None]) <= 0.01
