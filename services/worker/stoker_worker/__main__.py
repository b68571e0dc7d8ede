"""`python -m stoker_worker`: environment → settings → run."""

from stoker_core.runner import main
from stoker_worker.app import serve
from stoker_worker.settings import WorkerSettings

if __name__ == "__main__":
    main("worker", WorkerSettings, serve)
