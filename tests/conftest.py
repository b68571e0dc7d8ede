pytest_plugins = [
    "tests.support.nats_server",
    "tests.support.postgres_server",
    "tests.support.buses",
    "tests.support.databases",
    "tests.support.stack",
]
