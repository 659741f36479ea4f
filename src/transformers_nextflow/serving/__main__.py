"""Serves a model over OpenAI's API: `python -m transformers_nextflow.serving --model FOLDER`."""

import argparse
import os
import signal
import socket
import sys
import time
from typing import Any, get_args

from .settings import ServingSettings

PROGRAM = "python -m transformers_nextflow.serving"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Every setting but the key is an option: what stands on a command line others can read."""
    parser = argparse.ArgumentParser(PROGRAM, description="Serves a model over OpenAI's API.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument("--config", help="YAML file with settings; options on the command line overrule it")
    for name, field in ServingSettings.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
        if name == "api_key":
            continue
        if kinds == [bool]:
            parser.add_argument(option, action="store_const", const=True, help="see the settings")
            continue
        if name == "dtype":
            parser.add_argument(option, choices=get_args(kinds[0]), help="see the settings")
            continue
        kind = get_args(kinds[0])[0] if get_args(kinds[0]) else kinds[0]
        parser.add_argument(option, type=kind, help=f"see the settings (default: {field.default})")
    return parser.parse_args(arguments)


def read_settings(arguments: argparse.Namespace) -> ServingSettings:
    """The settings, and all that can be known to be wrong before anything is loaded."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    host, port, config = given.pop("host"), given.pop("port"), given.pop("config", None)
    settings = ServingSettings.of(given) if config is None else ServingSettings.read(config, **given)
    settings.folder  # noqa: B018  (it looks at the folder)
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be between 1 and 65535, not {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind((host, port))
    except OSError as error:
        raise ValueError(f"Can't listen at {host}:{port}: {error}. Choose another --port or --host.") from error
    return settings


def serve_forever(settings: ServingSettings, host: str, port: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes to anybody
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine takes longer than five
    import ray
    from ray import serve

    from .deployment import build

    options: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:  # a small cluster of its own
        options = {"num_cpus": max(os.cpu_count() or 1, settings.replicas), "include_dashboard": False}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        signal.signal(name, stop)
    ray.init(**options)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(settings.model_dump()))
        print(f"Serving {settings.model_name} at http://{host}:{port}/v1", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for anything that the user can put right."""
    parsed = parse_arguments(arguments)
    try:
        settings = read_settings(parsed)
        serve_forever(settings, parsed.host, parsed.port)
    except (ValueError, ImportError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
