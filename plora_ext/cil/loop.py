"""The loop: for every task, learn it, then evaluate on all classes seen so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from plora_ext.cil import prototype_error
from plora_ext.cil.build import load_data, make_cache, make_stream, tasks_of
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.learner import Learner
from plora_ext.cil.methods import Method
from plora_ext.cil.packing import set_rng_state
from plora_ext.cil.phases import Phases
from plora_ext.cil.result import Result
from plora_ext.cil.same_run import fingerprint_of
from plora_ext.cil.settings import Settings
from plora_ext.cil.training import Trainer
from plora_ext.data import Backbone, Images, View, hold_out
from plora_ext.data.images import checked
from plora_ext.info import environment


def run(
    settings: Settings,
    *,
    data: Images | None = None,
    backbone: Backbone | None = None,
    callbacks: Sequence[Callback] = (),
    make: Callable[[Trainer, Settings], Method] | None = None,
    checkpoint: Checkpoint | None = None,
    world: World = SINGLE,
) -> Result:
    """Runs one method over the task stream; writes nothing but the checkpoint.

    Global random generators are seeded for the run, and are afterwards as they were before; likewise torch's switch of
    deterministic algorithms.

    Args:
        settings: What to run.
        data: The data set, when it is loaded already; the result says so if it is not the one that settings name.
        backbone: The backbone to use instead of the one that settings name; its model is changed in place, and the
            result names it.
        callbacks: Told of every step and task.
        make: Builds the method from (trainer, settings), instead of the one that settings name.
        checkpoint: Saved after every epoch and task; a run that it holds is continued.
        world: The processes that share the work, all of which call this (`plora_ext.cil.distributed.launched`).

    Raises:
        ValueError: Settings, labels or layers that do not fit, or a checkpoint of another run.
        TypeError: `data`, `backbone`, `checkpoint` or a callback is something else.
        OSError: The checkpoint cannot be written.
        FloatingPointError: A loss, a weight or a feature that is not finite.
        torch.OutOfMemoryError: Memory is exhausted, the device's or the host's; names the setting to lower.
    """
    if not isinstance(checkpoint, Checkpoint | None):
        raise TypeError(f"checkpoint must be plora_ext.cil.checkpoint.Checkpoint(Path(FOLDER)), got {checkpoint!r}")
    data = load_data(settings) if data is None else hold_out(checked(data), settings.validation)
    stream = make_stream(settings, data)
    tasks = tasks_of(settings, stream)
    learner = Learner(settings, backbone=backbone, callbacks=callbacks, make=make, num_tasks=len(tasks), world=world)
    method, trainer = learner.method, learner.trainer
    with learner.random():
        train, test = View(data.train_images, learner.preparation), View(data.test_images, learner.preparation)
    known = fingerprint_of(settings, data, tasks, learner.backbone_digest, train.preparation)
    result = Result(
        settings=settings.as_dict(),
        classes_seen=[task.classes.stop for task in stream],
        class_order=stream.class_order,
        class_names=None if data.class_names is None else [data.class_names[c] for c in stream.class_order],
        num_train=len(train),
        num_test=len(test),
        environment=environment(trainer.device),
        inputs=_inputs(settings, data, backbone, known),
    )
    result.learner = learner
    with learner.random():
        trainer.checkpoint, trainer.phases.seconds, trainer.phases.peak_mb = checkpoint, result.seconds, result.peak_mb
        saved = checkpoint.begin(known, settings.as_dict(), result.record()) if checkpoint else None
        trainer.callbacks.tell("begin", settings.method, len(stream))
        if saved:
            method.restore(saved["state"])
            set_rng_state(saved["state"]["rng"])
        if checkpoint:
            if world.first and (reached := checkpoint.reached()):
                trainer.callbacks.note(reached)
            changed = result.resume(checkpoint.manifest["run"], checkpoint.changed, settings.measure_drift)
            if changed and world.first:
                trainer.callbacks.note(f"the run continues, though not as it began: {changed}")
        labels = [[stream.class_order[c] for c in task.classes] for task in tasks]
        learned = len(result.matrix)
        for task in tasks[:learned]:
            learner.add_task(labels[task.index])
            trainer.steps += trainer.steps_for(len(task.train))
        for done, accuracy in enumerate(result.curve):
            trainer.callbacks.tell("task", done, accuracy)

        evaluator = Evaluator(method, tasks, test, stream.task_of_class(), make_cache(settings, trainer))
        start = time.perf_counter() - result.total_seconds
        for task in tasks[learned:]:
            held, moved = method.prototypes, None
            learner.learn(task, train, labels[task.index])
            with trainer.phases("eval"):
                curve, row = evaluator.after(task.index)
            if settings.measure_drift:
                with trainer.phases("drift"):
                    moved = prototype_error.measure(method, tasks[: task.index + 1], train, held)
            result.append(curve, row, moved, settings.measure_drift)
            result.passes, result.parameters = method.passes, method.parameters()
            result.environment |= {f"cuda_graph_{what}": said for what, said in trainer.speed.graphs.items()}
            result.costs.append(trainer.phases.lap())
            result.total_seconds = time.perf_counter() - start
            if checkpoint:
                method.head.refuse_loss()
                checkpoint.save_task(result.record(), method.state())
            for done, accuracy in enumerate(curve, len(result.curve) - len(curve)):
                trainer.callbacks.tell("task", done, accuracy)
            trainer.callbacks.tell("measured", len(result.curve) - 1, result.figures())
    trainer.checkpoint, trainer.phases = None, Phases(trainer.device)  # what the learner learns next is no part of it
    return result


def _inputs(settings: Settings, data: Images, given: Backbone | None, known: dict[str, str]) -> dict[str, str]:
    """What `Result.inputs` says."""
    inputs = {"data_digest": known["data"], "backbone_digest": known["backbone"]}
    if data.source != settings.data:
        inputs["data"] = f"given images {known['data']}"
    if given:
        inputs["backbone"] = f"given {type(given.model).__name__} {known['backbone']}"
    elif settings.weights == "random":
        inputs["backbone_digest"] = "random"  # another with every seed
    return inputs
