"""What the collapse guard looks at while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spalign.evaluation import repetition

if TYPE_CHECKING:
    from spalign.pipeline.job import TrainJob
    from spalign.training.guard import Probe


def probe_of(job: TrainJob, tokenizer: Any, autocast: Any) -> Callable[[Any], Probe]:
    """The guard's probe: the model in training answers a few training prompts, always the same and with the same seeds.

    Its first call, before training, keeps its answers: what their log-probabilities lose later is the drift.
    """
    from spalign.engines.transformers import TransformersEngine
    from spalign.rollout import sample
    from spalign.training.guard import Probe

    few, bare = job.prompts, job.constitution.bare()
    config = job.config.sample.model_copy(update={"n": 1})
    chosen = [(r["prompt_ids"], r["chosen_ids"]) for r in job.rows[:: max(1, len(job.rows) // len(few))]][: len(few)]
    own: list[tuple[Any, Any]] = []  # the first answers, as (prompt ids, answer ids)
    first: list[float] = []

    def probe(model: Any) -> Probe:
        training = model.training
        model.eval()
        engine = TransformersEngine(getattr(model, "module", model), tokenizer, batch_size=job.config.engine.batch_size)
        engine.autocast = autocast
        groups = sample(engine, few, bare, config, seed=job.config.seed, purpose="probe")
        answers = [r for g in groups for r in g.candidates]
        if not own:
            system = bare.system_variants[0].text
            own.extend((engine.encode_chat(g.prompt.with_system(system)), r.token_ids) for g in groups for r in g.candidates if r.token_ids)
        logps = [x for y in engine.loglikelihood(own) for x in y or ()]
        first.extend(logps if not first else [])
        likely = [x for y in engine.loglikelihood(chosen) for x in y or ()]
        model.train(training)
        n = len(answers)
        return Probe(
            words=sum(r.words for r in answers) / n,
            repetition=sum(repetition(r.text) for r in answers) / n,
            empty=sum(not r.text.strip() for r in answers) / n,
            kl=(sum(first) - sum(logps)) / max(1, len(logps)),
            chosen=sum(likely) / max(1, len(likely)),
        )

    return probe
