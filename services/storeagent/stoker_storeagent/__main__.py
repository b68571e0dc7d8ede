from stoker_core.runner import main
from stoker_storeagent.app import serve
from stoker_storeagent.settings import StoreagentSettings

if __name__ == "__main__":
    main("storeagent", StoreagentSettings, serve)
