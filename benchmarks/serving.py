"""A server for many users against a loop over `generate` and against `transformers serve`: the same questions, the same
answers.

    uhr-bat bench serve [--backend vllm] [--users 1,4,16] [--repetitions 3] [--output benchmarks]
    uhr-bat bench serve --backend vllm --soak 1000     a thousand requests: memory, errors, answers

Every user asks eight questions about an image of its own, one after the other. The sides take turns. Exit status 1 where
they do not answer the same.
"""

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..common import asking
from ..common.commands import tells_errors
from ..common.extras import require
from ..common.files import whole_files, write_json
from ..common.loading import ROOT, load_model
from ..common.outputs import Output, check_outputs
from ..common.tables import table
from ..scenes.layout import make_scene
from ..scenes.painting import render
from ..scenes.questions import draw_question
from ..serving.serve import BACKENDS
from .compare import Disagreement, expect, show_ratio, spread
from .servers import Reply, ask_at_once, request_body, resident_of, server, worked_by
from .sides import one_process
from .tables import machine

QUESTIONS, IMAGE_SIDE = 8, 2048
MAX_TOKENS = 32
# What the goal of the issue is: so many times the questions a second of the loop, with the most users.
GOAL = 4.0
# Images that a loop is timed on, whose pace does not depend on the number of users, and questions of every user to
# `transformers serve`, which encodes the image for each.
LOOP_IMAGES, TRANSFORMERS_QUESTIONS = 4, 2
# Growth of memory from the first fifth of a soak to its end that is allowed, in percent.
GROWTH_PERCENT = 5.0
SOAK_USERS = 16
# Of the cache in a soak: what a few of its images take, so that images come and go.
SOAK_CACHE_BYTES = 10 * 2**20
LOOP, LOOP_ONCE = "loop over generate", "the same, each image encoded once"
TRANSFORMERS = "transformers serve"


class AskedScene:
    """An image file and questions about it.

    Attributes:
        content: bytes of a JPEG.
        questions: texts.
    """

    def __init__(self, seed: int, side: int, num_questions: int):
        scene, rng = make_scene(seed, 1.0), np.random.default_rng(seed)
        file = BytesIO()
        render(scene, (side, side)).save(file, "JPEG", quality=90)
        self.content = file.getvalue()
        self.questions = []
        while len(self.questions) < num_questions:
            text = draw_question(scene, rng).text
            if text not in self.questions:
                self.questions.append(text)

    def url(self) -> str:
        """The image as no server has seen it before: the same pixels in a file with another end."""
        return "data:image/jpeg;base64," + base64.b64encode(self.content + uuid4().bytes).decode()


# ---- The loop, in a process of its own -------------------------------------------------------------------------------

_loaded = []  # processor and model of this process


def ask_in_a_loop(
    folder: str, content: bytes, questions: list[str], encode_once: bool, threads: int
) -> tuple[list[Reply], float]:
    """What a script does: a call of `generate` for each question; and the processor's seconds of all."""
    torch.set_num_threads(threads)
    if not _loaded:
        _loaded.extend(load_model(folder))
    processor, model = _loaded
    worked = time.process_time()
    answers, begun, features = [], time.perf_counter(), None
    for question in questions:
        image = Image.open(BytesIO(content))
        if encode_once:
            if features is None:
                features = asking.encode(model, processor.image_processor(image, return_tensors="pt"))
            images = {"image_features": features}
        else:
            images = {"images": image}
        text = asking.prompt_text(processor, question)
        inputs = processor(text=text, **images, return_tensors="pt").to(model.device)
        (text,) = asking.answer_texts(processor, asking.generate(model, inputs, max_new_tokens=MAX_TOKENS))
        seconds, begun = time.perf_counter() - begun, time.perf_counter()
        answers.append(Reply(text, seconds, seconds))
    return answers, time.process_time() - worked


# ---- Turns -----------------------------------------------------------------------------------------------------------


class Sides:
    """All sides, started; `measure` gives each the same questions."""

    def __init__(self, args, folder: Path, stack: ExitStack):
        self.args = args
        self.loop = stack.enter_context(one_process())
        name = "bench"
        own = ["-m", "uhr_bat", "serve", str(args.model), "--name", name, "--backend", args.backend]
        self.own = f"uhr-bat serve ({args.backend})"
        self.servers = {self.own: (*stack.enter_context(server(own, folder / "own.log")), name)}
        if not args.without_transformers_serve:
            command = ["-m", "transformers.cli.transformers", "serve", str(args.model), "--trust-remote-code"]
            started = stack.enter_context(server(command, folder / "transformers.log"))
            self.servers[TRANSFORMERS] = (*started, str(args.model))

    def ask_loop(self, scenes, encode_once):
        """(answers, seconds, the processor's seconds)"""
        begun = time.perf_counter()
        options = encode_once, self.args.loop_threads
        done = [
            self.loop.submit(ask_in_a_loop, str(self.args.model), scene.content, scene.questions, *options).result()
            for scene in scenes
        ]
        return [answers for answers, _ in done], time.perf_counter() - begun, sum(worked for _, worked in done)

    def ask_server(self, side, scenes):
        """(answers, seconds, the processor's seconds of the server)"""
        address, process, name = self.servers[side]
        settings, num_questions = {}, QUESTIONS
        if side == TRANSFORMERS:
            num_questions = TRANSFORMERS_QUESTIONS
            settings["generation_config"] = json.dumps({"do_sample": False, "max_new_tokens": MAX_TOKENS})
        users = []
        for scene in scenes:
            url = scene.url()
            questions = scene.questions[:num_questions]
            users.append([request_body(name, url, question, MAX_TOKENS, **settings) for question in questions])
        worked = worked_by(process)
        answers, seconds = ask_at_once(address, users)
        return answers, seconds, worked_by(process) - worked

    def functions(self, scenes):
        """{side: function of no arguments}"""
        return {
            LOOP: lambda: self.ask_loop(scenes[:LOOP_IMAGES], encode_once=False),
            LOOP_ONCE: lambda: self.ask_loop(scenes[:LOOP_IMAGES], encode_once=True),
            **{side: lambda side=side: self.ask_server(side, scenes) for side in self.servers},
        }


def check_answers(side: str, answers: list[list[Reply]], reference: list[list[Reply]]):
    """Raises `Disagreement` where a side does not answer as the loop does."""
    for of_user, expected in zip(answers, reference, strict=True):
        for reply, other in zip(of_user, expected):  # not every side is asked all
            expect(reply.ok, f"{side}: {reply.text}")
            expect(reply.text.strip() == other.text.strip(), f"{side} answers {reply.text!r}, the loop {other.text!r}.")


def time_users(sides: Sides, scenes: list[AskedScene], repetitions: int) -> dict:
    """{side: {"per_second", "first_seconds", "processor_seconds" of a question: spread, "ratio": of the questions a
    second to the loop's, turn by turn}} of one number of users."""
    functions = sides.functions(scenes)
    rates, firsts, work = ({side: [] for side in functions} for _ in range(3))
    reference, *_ = sides.ask_loop(scenes, encode_once=True)
    for turn in tqdm(range(repetitions + 1), desc="turns", leave=False):  # the first one warms up
        for side, function in functions.items():
            answers, seconds, worked = function()
            check_answers(side, answers, reference[: len(answers)])
            if turn:
                flat = [answer for of_user in answers for answer in of_user]
                rates[side].append(len(flat) / seconds)
                work[side].append(worked / len(flat))
                firsts[side] += [answer.first_seconds for answer in flat]
    return {
        side: {
            "per_second": spread(rates[side]),
            "first_seconds": spread(firsts[side]),
            "processor_seconds": spread(work[side]),
            "ratio": spread([rate / loop for rate, loop in zip(rates[side], rates[LOOP])]),
        }
        for side in functions
    }


def rows(results: dict[int, dict]) -> Iterator[list[str]]:
    for users, sides in results.items():
        for side, found in sides.items():
            first = "-" if side in (LOOP, LOOP_ONCE) else f"{found['first_seconds']['median']:.2f}"
            work = f"{found['processor_seconds']['median']:.3f}"
            yield [users, side, f"{found['per_second']['median']:.2f}", first, show_ratio(found["ratio"]), work]


def report(result: dict) -> str:
    header = ["Users", "Side", "questions a second", "seconds to the first token, median", "of the loop's questions"]
    header.append("processor's seconds of a question")
    note = (
        f"Written by `{result['command']}`. {QUESTIONS} questions for each user about an image of its own of "
        f"{IMAGE_SIDE} x {IMAGE_SIDE} px, which every request brings along; the same answers. Ratios: median (minimum to "
        f"maximum) of turns. The loop has {result['loop_threads']} threads. Machine: {result['machine']}; load of other "
        f"work when it began: {result['load']:.1f}."
    )
    users = max(result["users"])
    reached = result["users"][users][result["own"]]["ratio"]["median"]
    verdict = (
        f"Goal: {GOAL:g}x the loop with {users} users: {'met' if reached >= GOAL else '**missed**'} ({reached:.2f}x)."
    )
    return "\n\n".join(["# Serving", note, table(header, list(rows(result["users"]))), verdict]) + "\n"


def compare(args) -> int:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        side = 256 if args.quick else IMAGE_SIDE
        scenes = [AskedScene(seed, side, QUESTIONS) for seed in tqdm(range(max(args.users)), desc="scenes")]
        load = os.getloadavg()[0]
        sides = Sides(args, Path(folder), stack)
        results = {
            users: time_users(sides, scenes[:users], args.repetitions) for users in tqdm(args.users, desc="users")
        }
    command = f"uhr-bat bench serve --backend {args.backend}"
    result = {
        "command": command, "own": sides.own, "machine": machine(), "load": load, "loop_threads": args.loop_threads,
        "users": results,
    }  # fmt: skip
    text = report(result)
    if args.output:
        with whole_files(args.output) as built:
            write_json(built / f"serving_{args.backend}.json", result)
            (built / f"serving_{args.backend}.md").write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps(result))
    return 0


# ---- A soak ----------------------------------------------------------------------------------------------------------


def soak(args) -> int:
    """Requests of many kinds for a while: nothing fails, memory does not grow, answers are those of the loop."""
    num_scenes = 5 if args.quick else 4 * SOAK_USERS
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scenes = [
            AskedScene(seed, 256 if args.quick else 512, QUESTIONS) for seed in tqdm(range(num_scenes), desc="scenes")
        ]
        loop = stack.enter_context(one_process())
        expected = {}
        for scene in tqdm(scenes, desc="one by one"):
            answers, _ = loop.submit(
                ask_in_a_loop, str(args.model), scene.content, scene.questions, True, args.loop_threads
            ).result()
            expected |= {(scene, question): answer.text for question, answer in zip(scene.questions, answers)}
        command = ["-m", "uhr_bat", "serve", str(args.model), "--name", "bench", "--backend", args.backend]
        command += ["--cache-bytes", str(SOAK_CACHE_BYTES)]
        address, process = stack.enter_context(server(command, Path(folder, "own.log")))
        rng, num_wrong, resident = np.random.default_rng(0), 0, []
        asked = 0
        with tqdm(total=args.soak, desc="soak") as bar:
            while asked < args.soak:
                users = []
                for _ in range(SOAK_USERS):
                    scene = scenes[rng.integers(num_scenes)]
                    url = "data:image/jpeg;base64," + base64.b64encode(scene.content).decode()
                    chosen = rng.choice(scene.questions, 4, replace=False).tolist()
                    users.append(
                        (scene, chosen, [request_body("bench", url, question, MAX_TOKENS) for question in chosen])
                    )
                answers, _ = ask_at_once(address, [bodies for _, _, bodies in users])
                for (scene, chosen, _), of_user in zip(users, answers):
                    for question, answer in zip(chosen, of_user):
                        if not answer.ok or answer.text.strip() != expected[scene, question].strip():
                            num_wrong += 1
                            print(f"{question}: {answer.text!r}, not {expected[scene, question]!r}", file=sys.stderr)
                asked += 4 * SOAK_USERS
                bar.update(4 * SOAK_USERS)
                resident.append(resident_of(process))
    settled, last = max(resident[: -(-len(resident) // 5)]), max(resident[-3:])
    growth = 100 * (last / settled - 1)
    result = {
        "requests": asked, "users": SOAK_USERS, "wrong": num_wrong, "growth_percent": growth, "resident": resident,
        "backend": args.backend,
    }  # fmt: skip
    print(f"{asked} requests, {num_wrong} wrong or failed, memory {growth:+.1f} % from the first fifth to the end.")
    print(json.dumps(result))
    if args.output:
        with whole_files(args.output) as built:
            write_json(built / f"soak_{args.backend}.json", result)
    return int(num_wrong > 0 or growth > GROWTH_PERCENT)


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat bench serve", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT, metavar="DIR", help="model folder (default: UHR-BAT-Tiny)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument(
        "--users", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16], metavar="N,N"
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="alternating ones (default: 3)")
    parser.add_argument(
        "--loop-threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: as many as cores"
    )
    parser.add_argument("--without-transformers-serve", action="store_true", help="leave that side out")
    parser.add_argument("--soak", type=int, metavar="N", help="N requests instead of a comparison")
    parser.add_argument("--quick", action="store_true", help="images of a test: the figures mean nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the figures there")
    args = parser.parse_args(arguments)
    kind = "soak" if args.soak else "serving"
    names = tuple(f"{kind}_{args.backend}.{ending}" for ending in ("json", "md"))
    check_outputs((args.model,), Output("--output", args.output, names=names))
    require("serve", "fastapi", "uvicorn", "prometheus_client", "httpx")
    try:
        return soak(args) if args.soak else compare(args)
    except Disagreement as error:
        print(f"The sides do not agree: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
