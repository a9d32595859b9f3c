"""An OpenAI-compatible `/v1/completions` in front of the engine: `python -m python_models.serving`.

The engine runs in a thread of its own; Starlette and uvicorn do the rest. A request that makes no sense gets an answer
that says so; one whose client goes away gives its blocks back.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from python_models import llama_files
from python_models.llama_train import CHECKPOINT
from python_models.lora_serving import BASE, Adapters
from python_models.serving import Engine, Request, Sampling
from python_models.serving_draft import NgramDrafter

LARGEST_BODY = 4 << 20  # bytes
MOST_CHOICES = 64
# field -> (types, whether a value is allowed, how that is said)
NUMBER = (int, float)
FIELDS: dict[str, tuple[tuple[type, ...], Any, str]] = {
    "model": ((str,), lambda v: True, "a string"),
    "prompt": ((str, list), lambda v: len(v) > 0, "a text, a list of token ids, or a list of those"),
    "max_tokens": ((int,), lambda v: v >= 1, "an integer of at least 1"),
    "temperature": (NUMBER, lambda v: 0 <= v <= 100, "a number from 0 to 100"),
    "top_k": ((int,), lambda v: v >= 0, "an integer of at least 0 (none)"),
    "top_p": (NUMBER, lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "min_p": (NUMBER, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (NUMBER, lambda v: 0 < v <= 100, "a number above 0"),
    "seed": ((int,), lambda v: 0 <= v < 2**63, "an integer of at least 0"),
    "n": ((int,), lambda v: 1 <= v <= MOST_CHOICES, f"an integer from 1 to {MOST_CHOICES}"),
    "num_beams": ((int,), lambda v: 1 <= v <= MOST_CHOICES, f"an integer from 1 to {MOST_CHOICES}"),
    "stop": ((str, list), lambda v: isinstance(v, str) or all(isinstance(s, str) for s in v), "a text or a list"),
    "stream": ((bool,), lambda v: True, "true or false"),
    "echo": ((bool,), lambda v: True, "true or false"),
    "ignore_eos": ((bool,), lambda v: True, "true or false"),
    "user": ((str,), lambda v: True, "a string"),
}


class Refused(Exception):
    """A request that is answered with an error: status, and what is wrong with which field."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": field, "code": None}
        self.response = JSONResponse({"error": error}, status)


class EngineThread:
    """Steps an engine whenever it has work. Every touch of the engine holds `lock`, for as long as a step takes: the
    event loop leaves that to threads, or to the next step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lock = engine, threading.Condition()
        self.cancelled: collections.deque[Request] = collections.deque()
        # of each request: where its tokens go, and the loop that waits for them
        self.queues: dict[Request, tuple[asyncio.Queue[int | None], asyncio.AbstractEventLoop]] = {}
        self.failure: BaseException | None = None
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    async def submit(
        self, prompt: list[int], sampling: Sampling, salt: bytes, adapter: str = BASE
    ) -> tuple[Request, asyncio.Queue[int | None]]:
        """Queues a request: its tokens arrive in the queue, and None behind the last one."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def on_token(_: Request, token: int) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, token)

        def add() -> Request:
            with self.lock:
                if self.failure or self.stopping:
                    raise Refused(503, f"the engine has stopped: {self.failure or 'the server is shutting down'}")
                request = self.engine.add(prompt, sampling, on_token=on_token, salt=salt, adapter=adapter)
                self.queues[request] = queue, loop
                self.lock.notify()
                return request

        adding = asyncio.create_task(asyncio.to_thread(add))
        try:
            return await asyncio.shield(adding), queue
        except asyncio.CancelledError:
            adding.add_done_callback(lambda done: done.exception() or self.cancel(done.result()))
            raise

    def cancel(self, request: Request) -> None:
        """Before the next step; returns at once."""
        self.cancelled.append(request)

    def _cancel(self) -> None:
        while self.cancelled:
            request = self.cancelled.popleft()
            self.engine.cancel(request)
            self.queues.pop(request, None)

    def stats(self) -> dict[str, int]:
        with self.lock:
            self._cancel()
            engine = self.engine
            counts = {"running": len(engine.running), "waiting": len(engine.waiting), "steps": engine.steps}
            return {**engine.blocks.stats(), **counts}

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for request in list(self.queues):
                self.engine.cancel(request)
            self._tell_finished()
            self.lock.notify()
        self.thread.join()

    def _tell_finished(self) -> None:
        for request in [r for r in self.queues if r.state in ("done", "cancelled") or self.failure]:
            queue, loop = self.queues.pop(request)
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, None)

    def _run(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.stopping or not self.engine.idle)
                if self.stopping:
                    return
                try:
                    self._cancel()
                    self.engine.step()
                except BaseException as error:
                    self.failure = error
                self._tell_finished()
                if self.failure:
                    raise self.failure
            time.sleep(0)  # lets those in who wait for the lock


class Text:
    """Tokens to text as they arrive: a character that is not complete yet, or may begin a stop text, is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.tokens, self.prefix = list(prompt), tokenizer.decode(prompt)
        # a token is decoded with some before it, for a tokenizer whose first word is another; not with all of them
        self.begin, self.read = max(0, len(prompt) - 8), len(prompt)
        self.whole, self.sent, self.stopped = "", "", False

    def add(self, token: int | None) -> str:
        """What can be said now that it was not before; with None, all that is left."""
        if token is not None:
            self.tokens.append(token)
        known = self.tokenizer.decode(self.tokens[self.begin : self.read])
        new = self.tokenizer.decode(self.tokens[self.begin :])[len(known) :]
        if token is not None and new.endswith("\ufffd"):
            return ""
        self.begin, self.read = max(self.begin, self.read - 8), len(self.tokens)
        self.whole = whole = self.whole + new
        ends = [at for at in (whole.find(s) for s in self.stops) if at >= 0]
        if ends:
            whole, self.stopped = whole[: min(ends)], True
        elif token is not None and self.stops:
            held = max((n for s in self.stops for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
            whole = whole[: len(whole) - held]
        new, self.sent = whole[len(self.sent) :], max(self.sent, whole, key=len)
        return new


class Server:
    """The routes. `app` is what an ASGI server runs. A request's `model` is `name`, or that of an adapter."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str) -> None:
        self.engine, self.tokenizer, self.name = EngineThread(engine), tokenizer, name
        self.numbers = itertools.count()
        self.adapters = {name: BASE} | {n: n for n in (engine.adapters.names if engine.adapters else ())}
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/stats", self.stats),
        ]
        self.app = Starlette(routes=routes, lifespan=self.lifespan)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.stop)

    async def models(self, http: HttpRequest) -> Response:
        data = [{"id": name, "object": "model", "owned_by": "local"} for name in self.adapters]
        for adapted in data[1:]:
            adapted["parent"] = self.name
        return JSONResponse({"object": "list", "data": data})

    async def health(self, http: HttpRequest) -> Response:
        well = self.engine.failure is None
        return JSONResponse({"status": "ok" if well else str(self.engine.failure)}, 200 if well else 503)

    async def stats(self, http: HttpRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(self.engine.stats))

    async def completions(self, http: HttpRequest) -> Response:
        try:
            body = await self._body(http)
            prompts, sampling, stops = self._parse(body)
            return await self._answer(http, body, prompts, sampling, stops)
        except Refused as refused:
            return refused.response

    async def _body(self, http: HttpRequest) -> dict[str, Any]:
        data = bytearray()
        try:
            async for chunk in http.stream():
                data += chunk
                if len(data) > LARGEST_BODY:
                    raise Refused(413, f"expected a body of at most {LARGEST_BODY} bytes")
        except ClientDisconnect:
            raise Refused(400, "the client went away") from None
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"expected JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused(400, f"expected a JSON object, got {type(body).__name__}")
        return body

    def _parse(self, body: dict[str, Any]) -> tuple[list[list[int]], list[Sampling], list[str]]:
        for name, value in body.items():
            if name not in FIELDS:
                raise Refused(400, f"{name}: unknown field; there are {', '.join(FIELDS)}", name)
            types, allowed, wanted = FIELDS[name]
            odd = isinstance(value, bool) and bool not in types
            if odd or not isinstance(value, types) or value != value or not allowed(value):
                raise Refused(400, f"{name}: expected {wanted}, got {json.dumps(value)[:80]}", name)
        if "prompt" not in body:
            raise Refused(400, "prompt: expected one, got none", "prompt")
        if body.get("model", self.name) not in self.adapters:
            names = " or ".join(map(repr, self.adapters))
            raise Refused(404, f"model: expected {names}, got {body['model']!r}", "model")
        given = body["prompt"]
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [self._tokens(p) for p in (given if several else [given])]
        stop = body.get("stop", [])
        choices = body.get("n", 1)
        if len(prompts) * choices > MOST_CHOICES:
            raise Refused(400, f"n: expected at most {MOST_CHOICES} choices in all, got {len(prompts) * choices}", "n")
        seed = body.get("seed", int(torch.randint(2**62, ())))
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {"max_tokens": 16, "temperature": 1.0, **{k: body[k] for k in names if k in body}}
        options.update(beams=body.get("num_beams", 1), ignore_end=body.get("ignore_eos", False))
        if options["beams"] > 1:
            options["temperature"] = 0.0
        samplings = [Sampling(**options, seed=(seed + i) % 2**63) for i in range(choices)]
        return prompts, samplings, [stop] if isinstance(stop, str) else stop

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str) and prompt:
            return self.tokenizer.encode(prompt).ids
        if isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt):
            return prompt
        raise Refused(400, f"prompt: expected a text or token ids, got {json.dumps(prompt)[:80]}", "prompt")

    async def _answer(self, http, body, prompts, samplings, stops) -> Response:
        started: list[tuple[Request, asyncio.Queue[int | None], Text]] = []
        name = body.get("model", self.name)
        try:
            for prompt in prompts:
                for sampling in samplings:
                    salt, adapter = body.get("user", "").encode(), self.adapters[name]
                    request, queue = await self.engine.submit(prompt, sampling, salt, adapter)
                    started.append((request, queue, Text(self.tokenizer, prompt, stops)))
        except (ValueError, Refused) as error:
            self._cancel(started)
            raise error if isinstance(error, Refused) else Refused(400, f"prompt: {error}", "prompt") from None
        head = {"id": f"cmpl-{next(self.numbers)}", "created": int(time.time()), "model": name}
        head["object"] = "text_completion"
        if body.get("stream"):
            events = self._events(head, started, body.get("echo", False))
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            whole = asyncio.gather(*(self._text(*item) for item in started))
            gone = asyncio.create_task(self._disconnected(http))
            await asyncio.wait([whole, gone], return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not whole.done():
                whole.cancel()
                return Response(status_code=499)
            texts = whole.result()
        finally:
            self._cancel(started)
        if self.engine.failure:
            raise Refused(503, f"the engine has stopped: {self.engine.failure}")
        echo = body.get("echo", False)
        choices = [
            {"index": i, "text": text.prefix * echo + said, "finish_reason": self._reason(r, text), "logprobs": None}
            for i, ((r, _, text), said) in enumerate(zip(started, texts, strict=True))
        ]
        new = sum(len(t.tokens) - len(r.prompt) for r, _, t in started)
        old = sum(map(len, prompts))
        usage = {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}
        return JSONResponse({**head, "choices": choices, "usage": usage})

    @staticmethod
    async def _disconnected(http: HttpRequest) -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.05)

    def _cancel(self, started: list) -> None:
        for request, *_ in started:
            self.engine.cancel(request)

    @staticmethod
    def _reason(request: Request, text: Text) -> str:
        return "stop" if text.stopped else request.reason

    async def _pieces(self, request: Request, queue: asyncio.Queue[int | None], text: Text) -> AsyncIterator[str]:
        ends = self.engine.engine.config.ends
        while (token := await queue.get()) is not None:
            said = text.add(token) if token not in ends or request.sampling.ignore_end else ""
            if said:
                yield said
            if text.stopped:
                self.engine.cancel(request)
                return
        if rest := text.add(None):
            yield rest

    async def _text(self, request: Request, queue: asyncio.Queue[int | None], text: Text) -> str:
        return "".join([said async for said in self._pieces(request, queue, text)])

    async def _events(self, head: dict[str, Any], started: list, echo: bool) -> AsyncIterator[str]:
        """Server-sent events of all choices, as they come. Left early by a client, it cancels what is still running."""
        out: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

        async def follow(index: int, request: Request, queue: asyncio.Queue[int | None], text: Text) -> None:
            if echo:
                await out.put((index, text.prefix))
            async for said in self._pieces(request, queue, text):
                await out.put((index, said))
            await out.put((index, None))

        tasks = [asyncio.create_task(follow(i, *item)) for i, item in enumerate(started)]
        try:
            left = len(started)
            while left:
                index, said = await out.get()
                left -= said is None
                reason = self._reason(started[index][0], started[index][2]) if said is None else None
                choice = {"index": index, "text": said or "", "finish_reason": reason, "logprobs": None}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self._cancel(started)


def load(
    folder: Path, dtype: torch.dtype | None = None, adapters: dict[str, Path] | None = None, **options: Any
) -> tuple[Engine, Tokenizer]:
    """An engine for the checkpoint in a folder, with adapters by name, and its tokenizer."""
    model = llama_files.load(folder, dtype=dtype)
    if adapters:
        options["adapters"] = pool = Adapters(model)
        for name, where in adapters.items():
            pool.add(name, where)
    return Engine(model, **options), Tokenizer.from_file(str(folder / "tokenizer.json"))


def named(text: str) -> tuple[str, Path]:
    """`name=folder`."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected name=folder, got {text!r}")
    return name, Path(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m python_models.serving", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder in the Hugging Face layout")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the files")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--int8", action="store_true", help="keys and values as int8")
    parser.add_argument("--draft", action="store_true", help="speculative decoding with n-grams of the text itself")
    parser.add_argument(
        "--adapter", type=named, action="append", default=[], metavar="NAME=FOLDER",
        help="a LoRA adapter in PEFT's layout, which requests choose as their model; may be given several times",
    )  # fmt: skip
    parser.add_argument("--bench", action="store_true", help="measure instead of serving: see serving_bench.py")
    parser.add_argument("--requests", type=int, default=64, help="of --bench")
    parser.add_argument("--output", type=Path, help="JSON file for the figures of --bench")
    given = parser.parse_args(argv)
    adapters = dict(given.adapter)
    if len({*adapters, given.model.name, BASE}) < len(given.adapter) + 2:
        parser.error(f"--adapter: expected names that differ from each other, {given.model.name} and {BASE}")
    dtype = getattr(torch, given.dtype) if given.dtype else None
    if given.bench:
        from python_models.serving_bench import run

        return run(given.model, dtype, given.requests, given.output)
    engine, tokenizer = load(
        given.model, dtype, adapters, num_blocks=given.num_blocks, block_size=given.block_size, int8=given.int8,
        drafter=NgramDrafter() if given.draft else None,
    )  # fmt: skip
    uvicorn.run(Server(engine, tokenizer, given.model.name).app, host=given.host, port=given.port, log_level="info")
    return 0
