"""A model for EleutherAI's lm-evaluation-harness, which runs published benchmarks by name.

    megalm evaluate RUN --task hellaswag --task mmlu                or, in Python:
    lm_eval.simple_evaluate(model=MegalmLM(load_model(find_model(Path("runs/tiny")))), tasks=["hellaswag"])

In several processes each runs the harness on all requests, and the model shares them out. An exported model is judged
alike by the harness's own `--model hf`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megalm.errors import UserError
from megalm.train.choices import encode_pairs, likelihoods
from megalm.train.generate import Sampling, continuations
from megalm.train.trained import TrainedModel

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness's own models


class MegalmLM(LM):
    """Answers the harness's three kinds of requests, in order."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.trained = trained

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        saved = self.trained.saved
        pairs = [("a request", *request.args) for request in requests]
        found = likelihoods(self.trained.passes, encode_pairs(saved.tokenizer, pairs, saved.positions))
        return [(log, greedy) for log, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        saved = self.trained.saved
        eod, limit = saved.tokenizer.eod, saved.positions
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = saved.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, eod, limit, context_len=1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, likelihoods(self.trained.passes, pairs), strict=True):
            sums[owner] += log
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests of equal settings go together."""
        texts = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_sampling(request.args[1]), []).append(number)
        saved = self.trained.saved
        learned = saved.config.model.position == "learned"
        for sampling, numbers in groups.items():
            if learned:  # there is none beyond them
                sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, saved.positions - 1))
            room = max(1, saved.positions - sampling.max_new_tokens)
            contexts = (saved.tokenizer.encode(requests[number].args[0]) for number in numbers)
            prompts = [context[-room:] or [saved.tokenizer.eod] for context in contexts]
            for piece in continuations(self.trained, prompts, sampling):
                texts[numbers[piece.document]] += piece.text
        return texts


def _sampling(settings: dict[str, Any]) -> Sampling:
    until = settings.get("until") or ()
    draws = settings.get("do_sample", settings.get("temperature", 0) > 0)
    return Sampling(
        max_new_tokens=settings.get("max_gen_toks", MAX_NEW_TOKENS),
        temperature=settings.get("temperature", 1.0) if draws else 0.0,
        top_p=settings.get("top_p", 1.0),
        top_k=settings.get("top_k", 0),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def run_tasks(
    trained: TrainedModel, tasks: Sequence[str], folder: Path | None, limit: int | None
) -> Iterable[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of the harness's `tasks`, or of those of the YAML files in `folder`.
    The harness gives them to the first process of a machine, and the others none."""
    manager = TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    for task in tasks:
        if not manager.match_tasks([task]):
            where = (
                "see `lm_eval ls tasks`" if folder is None else f"{folder} has {', '.join(manager.all_tasks) or 'none'}"
            )
            raise UserError(f"--task {task}: there is no such benchmark: {where}")
    found = simple_evaluate(MegalmLM(trained), tasks=list(tasks), task_manager=manager, limit=limit)
    for task, values in ({} if found is None else found["results"]).items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{how}")
                yield task, metric, value, error if isinstance(error, float) else None
