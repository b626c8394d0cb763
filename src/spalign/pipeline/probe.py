"""What the collapse guard looks at while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import stdev
from typing import TYPE_CHECKING, Any

from spalign.evaluation import repetition

if TYPE_CHECKING:
    from spalign.pipeline.job import TrainJob
    from spalign.training.guard import Probe


class JobProber:
    """The model in training answers a few training prompts, always the same and with the same seeds.

    What its first answers' log-probabilities lose later is the drift. With several processes each asks, and what the first one found is
    what all go by: the others found the same but for rounding, and all must come to the same verdict.
    """

    def __init__(self, job: TrainJob, tokenizer: Any, autocast: Any) -> None:
        self._prompts, self._bare = job.prompts, job.constitution.bare()
        self._sample = job.config.sample.model_copy(update={"n": 1})
        self._seed, self._batch_size = job.config.seed, job.config.engine.batch_size
        self._tokenizer, self._autocast = tokenizer, autocast
        stride = max(1, len(job.rows) // len(job.prompts))
        self._chosen = [(r["prompt_ids"], r["chosen_ids"]) for r in job.rows[::stride]][: len(job.prompts)]

    def first(self, model: Any) -> dict[str, Any]:
        import torch

        with torch.no_grad():  # FSDP2 makes its buffers in the first pass: in inference mode they could not be trained with
            model(input_ids=torch.tensor([self._chosen[0][0][:1]], device=model.device), use_cache=False)
        with self._engine(model) as engine:
            answers = self._answers(engine)
            system = self._bare.system_variants[0].text
            own = [(engine.encode_chat(p.with_system(system)), r.token_ids) for p, r in zip(self._prompts, answers, strict=True)]
            own = [(list(prompt), list(answer)) for prompt, answer in own if answer]
            logps = _flat(engine.loglikelihood(own))
            found = self._figures(engine, answers, kl=0.0)
        return _of_the_first({"own": own, "logps": logps, "figures": asdict(found)})  # type: ignore[no-any-return]

    def again(self, model: Any, first: dict[str, Any]) -> Probe:
        with self._engine(model) as engine:
            answers = self._answers(engine)
            logps = _flat(engine.loglikelihood([(tuple(p), tuple(a)) for p, a in first["own"]]))
            kl = (sum(first["logps"]) - sum(logps)) / max(1, len(logps))
            return _of_the_first(self._figures(engine, answers, kl=kl))  # type: ignore[no-any-return]

    @contextmanager
    def _engine(self, model: Any) -> Iterator[Any]:
        from spalign.engines.transformers import TransformersEngine

        training = model.training
        model.eval()
        try:
            engine = TransformersEngine(getattr(model, "module", model), self._tokenizer, batch_size=self._batch_size)
            engine.autocast = self._autocast
            yield engine
        finally:
            model.train(training)

    def _answers(self, engine: Any) -> list[Any]:
        from spalign.rollout import sample

        groups = sample(engine, self._prompts, self._bare, self._sample, seed=self._seed, purpose="probe")
        return [r for g in groups for r in g.candidates]

    def _figures(self, engine: Any, answers: list[Any], *, kl: float) -> Probe:
        from spalign.training.guard import Probe

        likely, n = _flat(engine.loglikelihood(self._chosen)), len(answers)
        words = [r.words for r in answers]
        return Probe(
            words=sum(words) / n,
            words_error=stdev(words) / n**0.5 if n > 1 else 0.0,
            repetition=sum(repetition(r.text) for r in answers) / n,
            empty=sum(not r.text.strip() for r in answers) / n,
            kl=kl,
            chosen=sum(likely) / max(1, len(likely)),
        )


def _flat(found: Any) -> list[float]:
    return [x for y in found for x in y or ()]


def _of_the_first(found: Any) -> Any:
    """What the first process found."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]
