"""The evaluate stage: predictions and metrics of trained runs."""

import contextlib

import numpy as np

from retrieval_aug.common import distributed, files, manifest, progress
from retrieval_aug.evaluation import accuracy
from retrieval_aug.training import finetune, predict
from retrieval_aug.training.data import Data
from retrieval_aug.training.runs import Run, build, check_trained
from retrieval_aug.training.settings import Layout

EVAL_SPLITS = ("val", "test")
TOP_KS = (1, 5)


def evaluation_artifact(
  run: Run, shot_groups: str, data_fingerprint: str
) -> manifest.Artifact:
  """Predictions and metrics of a run.

  Args:
    run: trained.
    shot_groups: see `accuracy.shot_groups`.
    data_fingerprint: of the data that it predicts from; another than it was
      trained on where the memory was edited since.
  """
  inputs = {"run": run.artifact.fingerprint, "shot_groups": shot_groups}
  name = "evaluation"
  if data_fingerprint != run.data_fingerprint:
    inputs["data"] = data_fingerprint
    name = f"evaluation_{data_fingerprint[:8]}"
  return manifest.Artifact(run.folder / name, "evaluation", inputs)


def evaluate(
  runs: list[Run],
  data: Data,
  finetuning: finetune.FineTuning | None = None,
  *,
  batch_size: int,
  shot_groups: str,
  layout: Layout = Layout(),
) -> None:
  """Predicts val and test with the unevaluated among the runs of one model.

  Writes `predictions-<split>.npz` (example ids, logits, attention weights)
  and puts the metrics into the manifest.

  Args:
    runs: equal but for seed and folder, trained.
    data: shared by all.
    finetuning: for runs that fine-tune; its images are seen as `prepare` of
      the encoder makes them.
    batch_size: examples a step.
    shot_groups: see `accuracy.shot_groups`.
    layout: where arrays lie.
  """
  groups = accuracy.shot_groups(data.class_counts, shot_groups)
  artifacts = {
    r.seed: evaluation_artifact(r, shot_groups, data.fingerprint) for r in runs
  }
  todo = [run for run in runs if not artifacts[run.seed].is_complete()]
  distributed.barrier(f"evaluate {runs[0].model_name}")
  if not todo:
    return
  check_trained(todo)
  query = None
  if todo[0].finetunes:
    query = finetuning.query(todo[0].train["encoder_batch"])
  arrays = {s: data.arrays(s, todo[0].train["k"]) for s in EVAL_SPLITS}
  # One for all seeds and splits, so that it is compiled once.
  predictor = predict.predictor(
    build(todo[0], data), data.memory, arrays["test"], layout, query
  )
  for run in todo:
    artifact = artifacts[run.seed]
    progress.note(f"evaluate {run.label}")
    with contextlib.ExitStack() as stack:
      if distributed.is_first():
        stack.enter_context(files.lock(artifact.folder))
        artifact.start()
      params = run.params()
      if query is not None:
        finetune.check_params(
          params["encoder"], finetuning.encoder, run.artifact.remedy
        )
      metrics = {}
      for split in EVAL_SPLITS:
        seen, what = arrays[split], None
        if query is not None:
          seen = {"rows": seen["rows"], "images": finetuning.images[split]}
          what = f"evaluate {split}"
        logits, attention = predictor(params, seen, batch_size, what)
        logits = predict.corrected(
          logits, data.class_counts, run.train["post_hoc_tau"]
        )
        if distributed.is_first():
          _write(artifact, split, data.examples[split].ids, logits, attention)
        labels = data.examples[split].labels
        metrics[split] = {
          f"top{k}": accuracy.by_group(
            accuracy.top_k_correct(logits, labels, k), labels, groups
          )
          for k in TOP_KS
        }
      if distributed.is_first():
        artifact.finish(list(EVAL_SPLITS), {"metrics": metrics})
    distributed.barrier(f"evaluate {run.label}")


def _write(artifact, split: str, ids, logits, attention) -> None:
  path = artifact.folder / f"predictions-{split}.npz"
  with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
    np.savez(
      f,
      ids=np.asarray(ids),
      logits=logits,
      attention=attention.astype(np.float16),
    )
  artifact.record(split, [path.name])


def read_predictions(
  evaluation: manifest.Artifact, split: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """(example ids, logits [N, C], attention [N, L, k]), verified."""
  evaluation.verify()
  path = evaluation.folder / f"predictions-{split}.npz"
  with np.load(path, allow_pickle=False) as data:
    ids = [str(i) for i in data["ids"]]
    return ids, data["logits"], data["attention"].astype(np.float32)
