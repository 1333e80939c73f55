"""A server with OpenAI's API: many users at a time, images encoded once, evidence in the answer.

uhr-bat serve [MODEL] [--backend vllm] [--host 127.0.0.1] [--port 8000] [--cache-bytes 4294967296]
              [--allow-local-files FOLDER] [--max-batch 16]
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.loading import WEIGHTS_NOTE, load_model
from ..common.models import add_model_argument, find_model, is_tiny, model_name, setting, stay_offline
from .doors import Named, check_origins, is_this_machine

BACKENDS = ("transformers", "vllm")
# Names the key where it should not stand among a machine's processes.
KEY_VARIABLE = "UHR_BAT_API_KEY"
# Threads that read, encode and compress at a time.
WORKERS = 2
# Seconds for answers that are on their way when the server is stopped: half of those of `docker stop`.
STOP_SECONDS = 5
# Seconds that an idle connection is kept, longer than clients and proxies do: who hangs up second loses no request.
KEPT_SECONDS = 75


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uhr-bat serve", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser):
    """The options that all servers have: model, address, who may ask, how much at a time and for what."""
    add_model_argument(parser, "model")
    parser.add_argument(
        "--name", metavar="NAME", help="as requests name the model (default: the folder's name, or the Hub's)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0],
        help="what decodes: vllm lets requests join at any step, transformers after some of them, and with every family of "
        "models (default: transformers)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 for one that is free (default: 8000)")
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"a key that requests must bring; may be repeated (default: that of the variable {KEY_VARIABLE}, else none)",
    )  # fmt: skip
    group.add_argument(
        "--allow-hosts", nargs="+", default=[], metavar="NAME",
        help="names by which the server is asked: at this machine alone its own names are known, elsewhere every name is",
    )  # fmt: skip
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="pages in browsers that may ask, as https://example.org, or * for all; may be repeated (default: none)",
    )  # fmt: skip
    group.add_argument("--access-log", action="store_true", help="a line for every request")
    group = parser.add_argument_group("how much at a time")
    group.add_argument("--max-batch", type=int, default=16, metavar="N", help="answers that are decoded (default: 16)")
    group.add_argument(
        "--max-requests", type=int, default=64, metavar="N", help="requests; more get a 429 (default: 64)"
    )
    group.add_argument(
        "--cache-bytes", type=int, default=4 * 2**30, metavar="N",
        help="of encoded images and selections that are kept (default: 4 GiB)",
    )  # fmt: skip
    group.add_argument(
        "--vllm", type=setting, action="append", default=[], metavar="NAME=VALUE",
        help="another argument of vLLM's AsyncEngineArgs, as tensor_parallel_size=2; may be repeated",
    )  # fmt: skip
    group = parser.add_argument_group("what a request may name")
    group.add_argument(
        "--allow-local-files", type=Path, metavar="FOLDER", help="paths below this folder (default: no paths)"
    )
    group.add_argument(
        "--allow-private-hosts", nargs="+", default=[], metavar="HOST[:PORT]",
        help="hosts that may have private addresses and be asked without TLS (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--max-image-bytes", type=int, default=128 * 2**20, metavar="N",
        help="of an image file that is not read where it lies (default: 128 MiB)",
    )  # fmt: skip
    group.add_argument(
        "--max-pixels", type=int, default=2**28, metavar="N", help="of the largest image (default: 2**28)"
    )


def make_service(args):
    """The `Service` of the options: model, cache and decoder."""
    require("serve", "fastapi", "prometheus_client", "httpx")
    import torch

    from .app import Service
    from .cache import ContentCache
    from .decoding import decoder_folder, end_ids
    from .engine import Engine
    from .front import Front, fingerprint
    from .sources import SourceRules
    from .structure import Forms

    folder, by_vllm = args.allow_local_files, args.backend == "vllm"
    if by_vllm:
        from .vllm_decoder import VLLMDecoder, check_alone

        check_alone(args.model)
    processor, model = load_model(args.model, **args.set)
    if processor.chat_template is None:
        raise ValueError(
            f"{model_name(args.model)}: has no chat template, so that no messages can be written as its prompt."
        )
    # The front's threads share the cores; more threads than cores wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    model_key = fingerprint(args.model)
    forms = Forms(processor.tokenizer, end_ids(model), model.get_output_embeddings().weight.shape[0])
    if by_vllm:
        decoder = VLLMDecoder(
            model, decoder_folder(model, processor.tokenizer, model_key), args.max_batch, dict(args.vllm)
        )
    else:
        from .transformers_decoder import TransformersDecoder

        decoder = TransformersDecoder(model, args.max_batch, forms)
    front = Front(processor, model, model_key, ContentCache(args.cache_bytes), WORKERS, embeds=by_vllm)
    rules = SourceRules(args.max_image_bytes, folder and folder.resolve(), frozenset(args.allow_private_hosts))
    return Service(Engine(front, decoder, args.max_requests, forms), args.name, rules, args.max_pixels)


def who_may_ask(args) -> dict:
    """`keys`, `hosts`, `origins` and `access_log` of the application's doors, as the options and the environment name them."""
    return {
        "keys": args.api_key or list(filter(None, [os.environ.get(KEY_VARIABLE)])),
        "hosts": [args.host, *args.allow_hosts] if args.allow_hosts or is_this_machine(args.host) else None,
        "origins": args.cors_origin,
        "access_log": args.access_log,
    }


def build(args):
    """The application of the options: the service and its routes."""
    service = make_service(args)
    from .app import make_app

    return make_app(service, args.max_requests, **who_may_ask(args))


def listening(app):
    """How the application is served, as uvicorn takes it."""
    import uvicorn

    return uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS, timeout_keep_alive=KEPT_SECONDS
    )


def check(args):
    """Finds the model, its name and the log of the options, before the model is loaded.

    Raises:
        ValueError, OSError: options that no server can have.
    """
    stay_offline(args.model)
    check_range(args, 1, math.inf, "max_batch", "max_requests", "max_image_bytes", "max_pixels")
    check_range(args, 0, math.inf, "cache_bytes")
    check_range(args, 0, 65535, "port")
    folder = args.allow_local_files
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: there is no such folder to allow.")
    args.model = find_model(args.model)
    args.name = args.name or ("uhr-bat-tiny" if is_tiny(args.model) else model_name(args.model))
    check_origins(args.cors_origin)
    if not all(args.api_key):
        raise ValueError("--api-key is empty: nobody could bring such a key.")
    if args.vllm and args.backend != "vllm":
        raise ValueError("--vllm is for --backend vllm.")
    if is_tiny(args.model):
        print(WEIGHTS_NOTE, file=sys.stderr)
    if args.access_log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log = logging.getLogger(Named.__module__)
        log.setLevel(logging.INFO)
        log.addHandler(handler)


def listen(args, build, path: str) -> int:
    """Serves the application that `build(args)` makes, after its port was taken; an exit code."""
    require("serve", "uvicorn")
    import uvicorn

    from .ports import take_port, url_of

    sockets = take_port(args.host, args.port)
    server = uvicorn.Server(listening(build(args)))
    address = url_of(args.host, sockets[0].getsockname()[1])
    print(f"{args.name}: {address}{path}, decoded by {args.backend}", file=sys.stderr, flush=True)
    server.run(sockets=sockets)
    return 0 if server.started else 1


@tells_errors
def main(arguments=None) -> int:
    args = parser().parse_args(arguments)
    check(args)
    return listen(args, build, "/v1")


if __name__ == "__main__":
    sys.exit(main())
