"""Checks of the arithmetic: the recipe's loss and network on two narrow layers, in fp64, where equal means 1e-9."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmkit.data.examples import ExampleBatch
from llmkit.data.feedback import FeedbackBatch
from llmkit.data.loader import Batch
from llmkit.data.packing import IGNORE
from llmkit.data.preferences import PreferenceBatch
from llmkit.data.steps import StepBatch
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.gpt import GPT, KVCache, init_weights
from llmkit.model.heads import SequenceClassifier
from llmkit.tools.doctor.check import Check
from llmkit.tools.doctor.patient import NotHere, Patient, Trainer
from llmkit.training.freeze import frozen_names
from llmkit.training.policy import PolicyTask
from llmkit.training.preferring import loss_at_start

_NEAR = 1e-9


def _off(a: Tensor | float, b: Tensor | float) -> float:
    """The largest difference, in units of the larger of the two."""
    x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    scale = max(float(x.abs().max()), float(y.abs().max()), 1e-12)
    return float((x - y).abs().max()) / scale


def _supervised(patient: Patient) -> None:
    if patient.is_policy:
        raise NotHere("the rows are what the policy samples: see ratio and prompt-sharing")


# --- the loss --------------------------------------------------------------------------------------------------------


def _accumulation(patient: Patient) -> str | None:
    _supervised(patient)
    found = []
    for micro in (1, 4):
        sizes = {"micro_tokens": 1 if micro == 1 else patient.small.batch.micro_tokens}
        with patient.trainer(batch=patient.batch_of(**sizes)) as small:
            batches = small.loader.step(0)
            found.append((len(batches), *small.gradient(batches)))
    (n, loss, gradient), (m, whole_loss, whole) = found
    if n == m:
        raise NotHere("a step is a single row")
    off = max(_off(loss, whole_loss), _off(gradient, whole))
    return (
        None
        if off <= _NEAR
        else f"{n} micro-batches give loss {loss:.6f}, {m} give {whole_loss:.6f} (off by {off:.1e})"
    )


def _spoilt(batch: Any, other: int) -> Any:
    """The batch with another id in every place of padding, and more of it where the shape allows."""
    if isinstance(batch, FeedbackBatch):
        return replace(batch, matched=_spoilt(batch.matched, other), mismatched=_spoilt(batch.mismatched, other))
    if isinstance(batch, Batch):
        pad = torch.nn.functional.pad
        wide: dict[str, Any] = {
            "ids_BT": pad(batch.ids_BT, (0, 8), value=other),
            "labels_BT": pad(batch.labels_BT, (0, 8), value=IGNORE),
            "positions_BT": pad(batch.positions_BT, (0, 8)),
            "docs_BT": pad(batch.docs_BT, (0, 8), value=-1),
        }
        wide["ids_BT"][wide["docs_BT"] < 0] = other
        return replace(batch, **wide, full=False, one_document=bool((wide["docs_BT"] <= 0).all()))
    ids = torch.nn.functional.pad(batch.ids_BT, (0, 8), value=other)
    here = torch.arange(ids.shape[1])[None] < batch.lengths_B[:, None]
    changes: dict[str, Any] = {"ids_BT": ids.where(here, other)}
    if isinstance(batch, PreferenceBatch) and batch.shared is not None:
        shared = batch.shared
        changes["shared"] = replace(shared, ids_RT=shared.ids_RT.where(shared.groups_RT >= 0, other))
    return replace(batch, **changes)


def _padding(patient: Patient) -> str | None:
    _supervised(patient)
    if patient.row_len + 8 > patient.shape.max_seq_len and patient.shape.positions == "learned":
        raise NotHere("there is no position for more padding")
    with patient.trainer() as small:
        batches = small.loader.step(0)
        if not isinstance(batches[0], Batch | PreferenceBatch | FeedbackBatch | ExampleBatch | StepBatch):
            raise NotHere("the rows hold what a teacher says")
        other = next(i for i in range(small.task.tokenizer.vocab_size) if i != small.task.tokenizer.pad_id)
        loss, gradient = small.gradient(batches)
        spoilt_loss, spoilt = small.gradient([_spoilt(batch, other) for batch in batches])
    off = max(_off(loss, spoilt_loss), _off(gradient, spoilt))
    return None if off <= _NEAR else f"other padding changes the loss from {loss:.6f} to {spoilt_loss:.6f}"


def _alone(batch: Batch) -> list[Batch]:
    """A batch of one document for each of the documents of a batch."""
    found = []
    for b, docs_T in enumerate(batch.docs_BT):
        for d in range(int(docs_T.max()) + 1):
            here = docs_T == d
            labels = batch.labels_BT[b][here][None]
            n = int(here.sum())
            rows = (batch.ids_BT[b][here][None], labels, torch.arange(n)[None], torch.zeros(1, n, dtype=torch.int32))
            found.append(Batch(*rows, float((labels != IGNORE).sum()), float(n), True, True))
    return found


def _packing(patient: Patient) -> str | None:
    if not patient.is_text or not patient.recipe.data.packing:
        raise NotHere("rows hold one text each")
    if patient.recipe.data.cross_document_attention:
        raise NotHere("data.cross_document_attention: documents of a row are one text")
    with patient.trainer() as small:
        batches = small.loader.step(0)
        if not all(type(batch) is Batch for batch in batches):
            raise NotHere("the rows hold what a teacher says")
        loss, gradient = small.gradient(batches)
        alone = [one for batch in batches for one in _alone(batch)]
        if len(alone) == sum(len(b.ids_BT) for b in batches):
            raise NotHere("no row of the step holds two documents")
        parted_loss, parted = small.gradient(alone)
    off = max(_off(loss, parted_loss), _off(gradient, parted))
    return None if off <= _NEAR else f"packed rows have loss {loss:.6f}, their documents alone {parted_loss:.6f}"


def _first_loss(patient: Patient) -> str | None:
    """What is not learnt yet costs what guessing costs."""
    recipe = patient.recipe
    if recipe.stage == "dpo":
        return _start_of_preferences(patient)
    if recipe.stage not in ("pretrain", "sft"):
        raise NotHere("what guessing costs is not known here")
    with patient.trainer() as small:
        module: Any = small.engine.module
        if recipe.lora is None:
            init_weights(module, 0)
            module.model.norm.weight.fill_(1.0) if not module.model.norm.weight.requires_grad else None
        else:
            raise NotHere("with lora the base is a trained model")
        batches = small.loader.step(0)
        with torch.no_grad():
            total = sum(float(small.loss(module, b).parts["loss"]) for b in batches)
        loss, guess = total / sum(b.denominator for b in batches), math.log(module.head_weight.shape[0])
    return None if abs(loss - guess) < 0.7 else f"{loss:.3f} nats a token, guessing costs {guess:.3f}"


def _start_of_preferences(patient: Patient) -> str | None:
    expected = loss_at_start(patient.recipe)
    if expected is None:
        raise NotHere(f"the loss {patient.recipe.loss} at the start is not known")
    with patient.trainer() as small:
        batches = small.loader.step(0)
        with torch.no_grad():
            outs = [small.loss(small.engine.module, batch) for batch in batches]
        total = sum(float(out.parts.get("preference", out.parts["loss"])) for out in outs)
        found = total / sum(b.denominator for b in batches)
    if abs(found - expected) <= 1e-6 * max(1.0, expected):
        return None
    return f"{found:.6f} where policy and reference are one model, which costs {expected:.6f}"


# --- the gradient and the step ---------------------------------------------------------------------------------------


def _step_of(small: Trainer) -> list[Any]:
    """The micro-batches of the first step; of a policy those of its first rollout."""
    if not isinstance(small.task, PolicyTask):
        return small.loader.step(0)
    seen: list[Any] = []
    update = small.engine.update

    def watching(batches: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(batches)
        return update(batches, *args, **kwargs)

    small.engine.update = watching  # type: ignore[method-assign]
    try:
        small.task.step(small.engine, small.ctx)
    finally:
        small.engine.update = update  # type: ignore[method-assign]
    return seen


def _gradients(patient: Patient) -> str | None:
    """Every parameter that is trained gets a gradient, and only those."""
    with patient.trainer() as small:
        if isinstance(small.task, PolicyTask):
            small.task.step(small.engine, small.ctx)
        else:
            small.gradient(small.loader.step(0))
        missing = [n for n, g in small.engine.grads.items() if not g.any() and "experts" not in n and "lora_A" not in n]
        if bad := [n for n, g in small.engine.grads.items() if not g.isfinite().all()]:
            return f"{bad[0]}: its gradient is not finite"
    # At B = 0 an adapter's A has none, and of a bias under a softmax's shift it is 0 but for rounding.
    missing = [n for n in missing if not n.endswith(("k_proj.bias", "embed_positions.weight", "dense.bias"))]
    return f"{', '.join(missing[:3])}: no gradient ({len(missing)} parameters)" if missing else None


def _frozen(patient: Patient) -> str | None:
    if not patient.small.freeze and patient.small.lora is None:
        raise NotHere("nothing is frozen" if not patient.recipe.freeze else "the layers that are frozen are not here")
    with patient.trainer() as small:
        module, trained = small.engine.module, set(small.engine.parameters)
        if patient.small.lora is None:
            own = [n for n, _ in getattr(module, "student", module).named_parameters()]
            wanted = frozen_names(own, patient.small.freeze)
        else:
            beside = ("lora_", "magnitude", "score.", "classifier.", "dense.")
            wanted = {n for n, _ in module.named_parameters() if not any(k in n for k in beside)}
    left = sorted(wanted & {n.removeprefix("student.") for n in trained})
    return f"{left[0]} is trained ({len(left)} such parameters)" if left else None


def _learns(patient: Patient) -> str | None:
    """A step on a batch makes that batch cheaper."""
    _supervised(patient)
    optim = patient.small.optim.model_copy(update={"lr": 3e-3, "schedule": "constant", "warmup_steps": 0})
    with patient.trainer(optim=optim, steps=40) as small:
        batches, losses = small.loader.step(0), []
        for _ in range(12):
            losses.append(small.engine.update(batches, small.loss)["loss"])
    return (
        None
        if losses[-1] < losses[0] - 1e-4
        else f"12 steps on one batch: the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"
    )


# --- the network -----------------------------------------------------------------------------------------------------


def _network(small: Trainer) -> Any:
    return small.policy.eval()


def _ids(small: Trainer, n: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, small.task.tokenizer.vocab_size, (2, n), generator=generator)


@torch.no_grad()
def _causality(patient: Patient) -> str | None:
    if not patient.shape.causal:
        raise NotHere("the model sees both sides")
    with patient.trainer() as small:
        model, ids = _network(small), _ids(small)
        other = ids.clone()
        other[:, 16:] = other[:, 16:].flip(1)
        hidden = [model.model(i, torch.arange(24)[None], None, True, None)[:, :16] for i in (ids, other)]
    off = _off(*hidden)
    return None if off <= _NEAR else f"what comes later changes what was said before (by {off:.1e})"


def _writer(patient: Patient, small: Trainer) -> GPT:
    model = _network(small)
    if isinstance(model, SequenceClassifier):
        raise NotHere("the model writes no text")
    if not patient.shape.causal:
        raise NotHere("the model sees both sides")
    assert isinstance(model, GPT)
    return model


@torch.no_grad()
def _cache(patient: Patient) -> str | None:
    with patient.trainer() as small:
        model, ids = _writer(patient, small), _ids(small)
        whole = model(ids)
        cache = KVCache(model.config, 2, 24, torch.float64)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 14), (14, 24))]
    off = _off(whole, torch.cat(parts, 1))
    return None if off <= _NEAR else f"with the cache the states are off by {off:.1e}"


@torch.no_grad()
def _ragged(patient: Patient) -> str | None:
    with patient.trainer() as small:
        model, ids = _writer(patient, small), _ids(small)
        prompts = [ids[0, :5].tolist(), ids[1, :17].tolist(), ids[0, :11].tolist()]
        sampling, tokenizer = SamplingConfig(max_new_tokens=8, temperature=0.0), small.task.tokenizer
        together = generate(model, prompts, sampling, tokenizer=tokenizer)
        alone = [generate(model, [p], sampling, tokenizer=tokenizer)[0] for p in prompts]
    wrong = [
        i
        for i, (a, b) in enumerate(zip(together, alone, strict=True))
        if a.ids != b.ids or _off(torch.tensor(a.logprobs), torch.tensor(b.logprobs)) > 1e-6
    ]
    return (
        f"prompt {wrong[0]} of {len(prompts[wrong[0]])} tokens is answered otherwise beside longer ones"
        if wrong
        else None
    )


def _sharing(patient: Patient) -> str | None:
    """Answers behind one copy of their prompt cost what they cost apart."""
    recipe = patient.recipe
    if not patient.is_policy and recipe.stage not in ("dpo", "reward"):
        raise NotHere("answers share no prompts")
    with patient.trainer() as small:
        batches = _step_of(small)
        if not any(getattr(batch, "shared", None) is not None for batch in batches):
            raise NotHere("no prompt of the step is shared")
        loss, gradient = small.gradient(batches)
        apart_loss, apart = small.gradient([replace(batch, shared=None) for batch in batches])
    off = max(_off(loss, apart_loss), _off(gradient, apart))
    return (
        None
        if off <= 1e-7
        else f"sharing prompts changes the loss from {apart_loss:.6f} to {loss:.6f} (off by {off:.1e})"
    )


CHECKS = (
    Check("causality", "no token sees what comes after it", "an attention mask that is missing or shifted",
          "pass causal masks, and is_causal where there is none", _causality),
    Check("accumulation", "a step's gradient does not depend on how it is cut into micro-batches",
          "a loss that is divided by its micro-batch's own count", "return sums, and let the engine divide once",
          _accumulation, ("padding",)),
    Check("packing", "documents of a row cost what they cost alone", "attention or positions that cross documents",
          "mask by document and count positions within each", _packing, ("accumulation", "positions", "labels")),
    Check("padding", "padding changes nothing", "padding that is attended to, learnt, or scored",
          "take lengths from the batch, never from the id of padding", _padding, ("causality",)),
    Check("prompt-sharing", "answers that share a prompt cost what they cost apart", "answers that see each other",
          "mask by answer within a group", _sharing, ("accumulation", "ratio")),
    Check("first-loss", "before training the loss is that of guessing", "a wrong sum, a wrong denominator or a wrong "
          "reference", "delete *.logprobs.* in data.cache_dir; compare the loss with cross entropy by hand", _first_loss,
          ("accumulation", "prompt-sharing")),
    Check("gradients", "every trained parameter has a finite gradient", "a detached tensor, or a part that is not used",
          "look where the parameter's output goes; freeze what is not to be trained", _gradients, ("ratio",)),
    Check("frozen", "what the recipe freezes is frozen", "names that match nothing, or a freeze that comes too late",
          "see the names with `llmkit inspect MODEL`", _frozen),
    Check("learns", "a batch that is learnt gets cheaper", "an optimizer that goes the wrong way, or changes nothing",
          "check optim.lr, and the sign of the loss", _learns, ("accumulation", "gradients", "causality")),
    Check("cache", "a model writes with the cache what it would write without", "keys and values at the wrong columns",
          "append at the cache's length, and rotate before", _cache, ("causality",)),
    Check("ragged-prompts", "prompts of several lengths are answered as each alone",
          "padding on the left that is seen or counted", "mask it, and count positions from the text's beginning",
          _ragged, ("cache",)),
)  # fmt: skip
