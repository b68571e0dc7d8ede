from stoker_core.runner import main
from stoker_gateway.app import serve
from stoker_gateway.settings import GatewaySettings

if __name__ == "__main__":
    main("gateway", GatewaySettings, serve)
