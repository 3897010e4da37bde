"""The flow `re-evaluate`: register and evaluate whatever checkpoints there are. What is scored already costs nothing."""

from typing import Any

from prefect import State, flow, get_run_logger, runtime
from prefect.states import Completed, Failed

from flows import stages
from model.errors import UserError
from model.params import merge
from tasks import versioning
from tasks.project import Project, find_project


def _run_name() -> str:
    return str(runtime.flow_run.parameters["experiment"] or "every experiment")


@flow(name="re-evaluate", flow_run_name=_run_name)
@stages.ends_by_itself
def re_evaluate(experiment: str | None = None, questions: int | None = None) -> State[Any]:
    """Register and evaluate the checkpoints of one experiment, or of all that have some.

    Args:
        experiment: its name in params.yaml; by default all are evaluated, but for those that another flow works on.
        questions: how many held-out questions to ask, recorded as `evaluation.questions` in overrides.yaml; by default what is
            configured.
    """
    project = find_project()
    trained = [name for name in project.experiment_names() if any(project.run_folder(name).checkpoints.glob("step_*"))]
    if experiment is None:
        return _evaluate_all(project, trained, questions)
    if experiment not in trained:
        project.experiment(experiment)
        raise UserError(f"{experiment} has no checkpoints yet; train it first: gpt2 train {experiment}")
    return _evaluate(project, experiment, questions) or Completed(message=f"{experiment}: every checkpoint is evaluated")


def _evaluate_all(project: Project, names: list[str], questions: int | None) -> State[Any]:
    """One after the other; what keeps one from being evaluated does not keep the others from it."""
    done, failed = [], []
    for name in names:
        try:
            unfinished = _evaluate(project, name, questions)
        except stages.Busy as busy:
            get_run_logger().info("left to it: %s", busy)
            continue
        except (UserError, versioning.StageFailed) as error:
            get_run_logger().error("%s: %s", name, error)
            failed.append(name)
            continue
        if unfinished is not None:
            return unfinished
        done.append(name)
    if failed:
        return Failed(message=f"not evaluated: {', '.join(failed)}; evaluated: {', '.join(done) or 'none'}")
    return Completed(message=f"evaluated: {', '.join(done) or 'no experiment has checkpoints'}")


def _evaluate(project: Project, name: str, questions: int | None) -> State[Any] | None:
    """None if all went well, else the state in which the flow has to end."""
    with stages.sole_flow(project, name, patience=0.0):
        which: tuple[str, ...] = ("register", "evaluate")
        if questions is not None:
            overrides = merge(project.overrides(name), {"evaluation": {"questions": questions}})
            project.with_overrides(name, overrides)  # is it valid?
            project.record_overrides(name, overrides)
            which = ("build-config", *which)
        versioning.configure_remote(project, project.experiment(name))
        unfinished = stages.run_stages(project, name, which)
        if unfinished is None:
            stages.bring_up_to_date(name, finished=False)
            stages.show_checkpoints(project, name)
        return unfinished
