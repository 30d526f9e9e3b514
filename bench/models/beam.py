"""Beam search for the translator, all sentences of a batch at once."""

import torch
from torch import Tensor

from bench.models.translator import Translator


@torch.no_grad()
def translate(
    model: Translator,
    source: Tensor,
    *,
    start: int,
    end: int,
    longest: int,
    width: int = 4,
    penalty: float = 0.6,
) -> list[list[int]]:
    """Search for the target of the highest log probability over ((5 + length) / 6)^penalty.

    Args:
        source: (N,S) int64, ids of the sources, padded.
        start, end: Ids of the first and the last token of a target.
        longest: Number of tokens, the last one included, after which a hypothesis is closed as it is.
        width: Number of hypotheses that are kept per sentence.

    Returns:
        The ids of each sentence's target without its first and last token.

    Source: Wu et al., "Google's Neural Machine Translation System", 2016, section 7, length penalty.
    """
    n, vocabulary = len(source), model.head.out_features
    source = source.repeat_interleave(width, dim=0)
    memory = model.encode(source)
    tokens = torch.full((n * width, 1), start, device=source.device)
    # All hypotheses begin alike: only the first may branch.
    scores = torch.full((n, width), -torch.inf, device=source.device)
    scores[:, 0] = 0
    first_row = torch.arange(n, device=source.device).unsqueeze(1) * width
    best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * n
    for length in range(1, longest + 1):
        logits = model.head(model.decode(memory, source, tokens)[:, -1]).float()
        continued = scores.unsqueeze(2) + logits.log_softmax(dim=1).view(n, width, vocabulary)
        ended = continued[:, :, end] / ((5 + length) / 6) ** penalty
        continued[:, :, end] = -torch.inf
        if length == longest:
            # Nothing follows: every hypothesis counts as it stands.
            closed, token_rows = (continued.amax(2) / ((5 + length) / 6) ** penalty), continued.argmax(2)
            last = torch.cat([tokens, token_rows.view(-1, 1)], dim=1)
            _keep(best, closed, last.view(n, width, -1))
        _keep(best, ended, tokens.view(n, width, -1))
        scores, choice = continued.flatten(1).topk(width)
        rows = (first_row + choice // vocabulary).flatten()
        tokens = torch.cat([tokens[rows], (choice % vocabulary).view(-1, 1)], dim=1)
        # Log probabilities only fall: no continuation gets past this.
        reachable = scores.amax(1) / ((5 + longest) / 6) ** penalty
        if all(found >= bound for (found, _), bound in zip(best, reachable.tolist(), strict=True)):
            break
    return [ids[1:] for _, ids in best]


def _keep(best: list[tuple[float, list[int]]], scores: Tensor, tokens: Tensor) -> None:
    """Replace a sentence's best target where one of its hypotheses (N,width,length) scores higher."""
    values, places = scores.max(dim=1)
    for row, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        if value > best[row][0]:
            best[row] = value, tokens[row, place].tolist()
