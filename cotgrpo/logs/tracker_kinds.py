"""Trackers that are known by name: Weights & Biases, MLflow and trackio. Each package is an extra."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.logs.trackers import TrackedRun, Tracker

LONGEST_PARAMETER = 500
"""Characters of a setting that every version of MLflow takes."""
PARAMETERS_AT_ONCE = 100
METRICS_AT_ONCE = 1_000


class NamedTracker(Tracker):
    """A tracker of a package."""

    package: ClassVar[str]

    @classmethod
    def check_ready(cls, offline: bool) -> None:
        """Raise OwnCodeError if it cannot be used yet, and would ask the user."""


class Wandb(NamedTracker):
    """Weights & Biases. Offline runs are in the folder `wandb`, for `wandb sync`."""

    package = "wandb"
    file: Path | None = None

    @classmethod
    def check_ready(cls, offline: bool) -> None:
        """Raise OwnCodeError without an account: `wandb.init` would ask for one."""
        import wandb

        if not offline and not wandb.login(prompt=False):
            raise OwnCodeError(
                "trackers: wandb has no account here. Run `wandb login`, or set WANDB_API_KEY or tracker.offline true."
            )

    def start(self, run: TrackedRun) -> str:
        import wandb

        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or None,
            resume="allow",
            dir=run.folder,
            mode="offline" if run.offline else "online",
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Rows that are sent late have earlier steps than wandb's own counter.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return str(self.run.id)

    def log(self, step: int, row: dict[str, float]) -> None:
        self.run.log({"step": step, **row})

    def log_file(self, path: Path) -> None:
        self.file = path

    def close(self) -> None:
        if self.file is not None:
            self.run.save(self.file, base_path=self.file.parent, policy="now")
        self.run.finish()


class Mlflow(NamedTracker):
    """MLflow. Offline runs are in `mlflow.db`, for `mlflow ui --backend-store-uri sqlite:///mlflow.db`."""

    package = "mlflow"

    def start(self, run: TrackedRun) -> str:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        folder = run.folder.resolve()
        uri = f"sqlite:///{folder / 'mlflow.db'}" if run.offline else run.uri or None
        self.client = MlflowClient(tracking_uri=uri)
        self.id = run.id
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return self.id
        artifacts = (folder / "mlflow_artifacts").as_uri() if run.offline else None
        found = self.client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.project, artifacts)
        self.id = self.client.create_run(experiment, run_name=run.name).info.run_id
        self.log_config(run.config)
        return self.id

    def log_config(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in dotted(config)]
        for first in range(0, len(params), PARAMETERS_AT_ONCE):
            self.client.log_batch(self.id, params=params[first : first + PARAMETERS_AT_ONCE])

    def log(self, step: int, row: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        metrics = [Metric(name, float(value), now, step) for name, value in row.items()]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(self.id, metrics=metrics[first : first + METRICS_AT_ONCE])

    def log_file(self, path: Path) -> None:
        self.client.log_artifact(self.id, str(path))

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio(NamedTracker):
    """Hugging Face's trackio, which keeps runs on this machine unless `tracker.uri` names a Space."""

    package = "trackio"

    def start(self, run: TrackedRun) -> str:
        import trackio

        name = run.id or run.name
        server = {"server_url" if "://" in run.uri else "space_id": run.uri} if run.uri else {}
        self.run = trackio.init(
            project=run.project, name=name, config=dict(dotted(run.config)), resume="allow", embed=False, **server
        )
        return str(self.run.name)

    def log(self, step: int, row: dict[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, type[NamedTracker]] = {kind.package: kind for kind in (Wandb, Mlflow, Trackio)}
"""Each tracker by its name."""


def check_installed(name: str) -> None:
    """Raise OwnCodeError if the package of a tracker is missing."""
    if importlib.util.find_spec(name) is None:
        raise OwnCodeError(
            f"trackers: {name} needs the package {name}: pip install 'cotgrpo[{name}]' or pip install {name}."
        )


def dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings in nested mappings by dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
