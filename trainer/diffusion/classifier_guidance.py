"""Classifier guidance (Dhariwal & Nichol 2021, section 4): towards a class as a classifier of noisy images sees it.

What guides is scale * grad log p(y | x_t), the gradient in x_t of what the classifier says. Its two uses are
algorithm 1, which shifts the mean of an ancestral step, and algorithm 2, which shifts eps for any other sampler:
predictor.py. With a scale s the samples tend to p(x) p(y | x)^s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.diffusion.predictor import Score

# (x_t [B, C, H, W], network time [B]) -> logits [B, num_classes].
Classifier = Callable[[Tensor, Tensor], Tensor]


def classifier_score(classifier: Classifier, labels: Tensor, *, scale: float) -> Score:
    """scale * grad log p(y | x_t), as samplers ask for it; also where gradients are switched off.

    Args:
        classifier: trained on the noise levels of the network that is guided.
        labels: y, [B] int64.
        scale: s. 1 is Bayes' rule.
    """

    def score(x: Tensor, time: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(x, time), dim=1).gather(1, labels[:, None])  # [B, 1]
            (gradient,) = torch.autograd.grad(chosen.sum(), x)  # no image's logits depend on another image
        return scale * gradient

    return score
