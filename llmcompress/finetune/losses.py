"""What fine-tuning minimises: the text's cross entropy, or the distance to a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of every token but each sequence's first.

    logits (sequences, length, vocabulary), tokens (sequences, length) int64; computed in float32.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over positions of T² KL(teacher || student), both softened by T; logits (..., vocabulary), in float32.

    The factor T² keeps the gradients' size. Source: arXiv 1503.02531.
    """
    log_student = F.log_softmax(student.flatten(0, -2).float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.flatten(0, -2).float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of ||output - target||² / ||target||²; hidden states (..., d_model), in float32.

    Relative, since the norm that reads a hidden state takes its length away: a few positions of huge length, such as
    the first, would otherwise be all that counts.
    """
    target = target.float()
    missed = (output.float() - target).square().sum(-1)
    return (missed / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def block_output_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of `relative_error`; the hidden states that a model gives, the embeddings first."""
    pairs = list(zip(student, teacher, strict=True))[1:]
    return torch.stack([relative_error(output, target) for output, target in pairs]).mean()
