"""What training takes of its machine (processors, memory, disk, network, NVIDIA's GPUs where `nvidia-ml-py` is installed), in the run's
system metrics: MLflow's own monitor in a thread that nobody waits for."""

from __future__ import annotations

import logging
import threading
import time

from tasks.journal_sender import Forwarder

SECONDS_BETWEEN_STARTS = 10.0
"""MLflow's monitor ends at the first request that fails; it is started anew, not more often than it measures."""


class MachineMetrics:
    """Measures while training runs. It can be late or leave gaps; it raises nothing and keeps nobody waiting."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._began = -SECONDS_BETWEEN_STARTS
        self._over = threading.Event()

    def keep_going(self, forwarder: Forwarder) -> None:
        """See to it that measuring goes on while MLflow shows the run as running, and this machine may tell of it. To be called when MLflow
        has just answered."""
        lives = self._thread is not None and self._thread.is_alive()
        if lives or self._over.is_set() or not forwarder.trains or time.monotonic() - self._began < SECONDS_BETWEEN_STARTS:
            return
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._measure, args=(forwarder,), name="machine-metrics", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Measure no more. What is on its way to MLflow may still arrive."""
        self._over.set()

    def _measure(self, forwarder: Forwarder) -> None:
        # Its complaints would be the forwarder's own once more; and a thread that writes while the process ends can abort it.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        over = self._over

        class Monitor(SystemMetricsMonitor):  # type: ignore[misc]
            def publish_metrics(self, metrics: dict[str, float]) -> None:
                if over.is_set() or not forwarder.trains:
                    raise _Over
                super().publish_metrics(metrics)

        try:
            Monitor(forwarder.run_id, resume_logging=True, tracking_uri=forwarder.tracking_uri).monitor()
        except Exception:  # psutil's, for instance, where a counter cannot be read
            return


class _Over(Exception):
    """There is nothing to tell of any more."""
