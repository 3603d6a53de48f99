"""Can a sequence layer track a state? Products in small groups, learnt short and tested long (arXiv 2411.12537)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.backends.checks import choose

Task = Literal["parity", "mod", "s3", "s5"]


class StateTrackingProbe:
    """A task: tokens are elements of a group, the label at each position is their product so far.

    task: parity; mod, sums modulo `modulus`; s3, s5, permutations from the identity and the swaps. Tokens are numbered
    from 1; 0 begins every sequence. `accuracy` trains a layer between an embedding and a two-layer readout.
    """

    def __init__(
        self, task: Task = "parity", modulus: int = 3, train_length: int = 24, steps: int = 300, batch: int = 64,
        lr: float = 1e-2, test_length: int = 160, test_from: int = 40,
    ) -> None:  # fmt: skip
        choose("task", task, ("parity", "mod", "s3", "s5"))
        self.train_length, self.steps, self.batch, self.lr = train_length, steps, batch, lr
        self.test_length, self.test_from = test_length, test_from
        if task in ("parity", "mod"):
            m = 2 if task == "parity" else modulus
            self.table = (torch.arange(m)[:, None] + torch.arange(m)) % m  # (elements, tokens): the next element
        else:
            elements = list(itertools.permutations(range(3 if task == "s3" else 5)))
            number = {p: index for index, p in enumerate(elements)}
            moved = [p for p in elements if sum(i != j for i, j in enumerate(p)) in (0, 2)]
            self.table = torch.tensor([[number[tuple(s[i] for i in p)] for s in moved] for p in elements])

    @property
    def tokens(self) -> int:
        """Vocabulary, the beginning included."""
        return self.table.shape[1] + 1

    @property
    def labels(self) -> int:
        return self.table.shape[0]

    def sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (batch, length + 1), the first of them 0, and labels (batch, length)."""
        drawn = torch.randint(self.table.shape[1], (batch, length), generator=generator)
        at = torch.zeros(batch, dtype=torch.int64)
        labels = []
        for t in range(length):
            at = self.table[at, drawn[:, t]]
            labels.append(at)
        return F.pad(drawn + 1, (1, 0)), torch.stack(labels, 1)

    def accuracy(self, make: Callable[[], nn.Module], d_model: int, seed: int = 0) -> float:
        """Share of right labels at positions test_from..test_length after training on train_length.

        make: builds the layer, (B, T, d_model) -> (the same, state), from torch's random state, which is set to `seed`
        here and restored.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Classifier(self.tokens, self.labels, d_model, make())
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps)
        for _ in range(self.steps):
            tokens, labels = self.sample(self.batch, self.train_length, generator)
            loss = F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        tokens, labels = self.sample(self.batch, self.test_length, generator)
        with torch.no_grad():
            right = model(tokens)[:, 1:].argmax(-1) == labels
        return float(right[:, self.test_from - 1 :].double().mean())


class _Classifier(nn.Module):
    def __init__(self, tokens: int, labels: int, d_model: int, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(tokens, d_model), layer
        self.readout = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.SiLU(), nn.Linear(2 * d_model, labels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.layer(self.embedding(tokens))[0])
