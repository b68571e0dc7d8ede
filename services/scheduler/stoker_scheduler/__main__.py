from stoker_core.runner import main
from stoker_scheduler.app import serve
from stoker_scheduler.settings import SchedulerSettings

if __name__ == "__main__":
    main("scheduler", SchedulerSettings, serve)
