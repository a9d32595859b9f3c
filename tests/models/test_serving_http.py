"""The server over a real socket: OpenAI's shape, clear refusals, clients that go away, an intact pool after it all."""

import concurrent.futures
import http.client
import json
import socket
import threading
import time

import pytest
import torch
import uvicorn

from genai_kernels.nn import load_adapter
from python_models import llama_files
from python_models.llama_cache import generate
from python_models.llama_train import CHECKPOINT
from python_models.serving_draft import NgramDrafter
from python_models.serving_http import MOST_CHOICES, Server, Text, load

PROMPT = "def main(argv=None):\n    parser = argparse."


class Served:
    """A server in a thread of this process, on a port of its own."""

    def __init__(self):
        adapters = {name: CHECKPOINT.with_name(f"lora_{name}") for name in ("headers", "manual")}
        engine, tokenizer = load(CHECKPOINT, adapters=adapters, num_blocks=256, drafter=NgramDrafter())
        self.tokenizer, self.server = tokenizer, Server(engine, tokenizer, "small")
        config = uvicorn.Config(self.server.app, host="127.0.0.1", port=0, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        return connection.getresponse()

    def complete(self, **body):
        response = self.send("POST", "/v1/completions", body)
        return response.status, json.load(response)

    def stream(self, **body):
        """The text of each choice, put together from the events, and why each ended."""
        response = self.send("POST", "/v1/completions", {**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line]
        assert events.pop() == b"[DONE]"
        texts, reasons = {}, {}
        for choice in (json.loads(e)["choices"][0] for e in events):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
        return texts, reasons

    def settled(self):
        """The statistics once nothing runs any more."""
        for _ in range(300):
            stats = json.load(self.send("GET", "/stats"))
            if not stats["running"] + stats["waiting"] + stats["sequences"]:
                return stats
            time.sleep(0.02)
        raise AssertionError(stats)


@pytest.fixture(scope="module")
def served():
    served = Served()
    yield served
    served.uvicorn.should_exit = True
    served.thread.join()
    assert not served.server.engine.thread.is_alive()


@pytest.fixture(autouse=True)
def _pool_is_intact(served):
    yield
    assert served.settled()["used"] == 0
    served.server.engine.engine.blocks._check_invariants()
    assert served.send("GET", "/health").status == 200


def test_a_completion(served):
    status, answer = served.complete(model="small", prompt=PROMPT, max_tokens=12, temperature=0)
    assert status == 200
    (choice,) = answer["choices"]
    ids = torch.tensor([served.tokenizer.encode(PROMPT).ids])
    expected = generate(served.server.engine.engine.model, ids, 12)[0].tolist()
    assert choice["text"] == served.tokenizer.decode(expected)
    assert (answer["object"], choice["index"], choice["finish_reason"]) == ("text_completion", 0, "length")
    tokens = len(served.tokenizer.encode(PROMPT).ids)
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 12, "total_tokens": tokens + 12}
    echoed = served.complete(prompt=PROMPT, max_tokens=12, temperature=0, echo=True)[1]["choices"][0]["text"]
    assert echoed == PROMPT + choice["text"]
    by_tokens = served.complete(prompt=served.tokenizer.encode(PROMPT).ids, max_tokens=12, temperature=0)[1]
    assert by_tokens["choices"][0]["text"] == choice["text"]
    models = json.load(served.send("GET", "/v1/models"))["data"]
    assert [(m["id"], m.get("parent")) for m in models] == [("small", None), ("headers", "small"), ("manual", "small")]


def test_the_model_of_a_request_is_its_adapter(served):
    """Base and both adapters at once over HTTP: each says what it says alone, and what its adapter says."""
    bodies = [
        {"model": m, "prompt": PROMPT, "max_tokens": 12, "temperature": 0} for m in ("small", "headers", "manual")
    ]
    alone = [served.complete(**body)[1] for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda body: served.complete(**body)[1], bodies * 2))
    assert [t["choices"] for t in together] == [a["choices"] for a in alone] * 2
    assert [a["model"] for a in alone] == ["small", "headers", "manual"]
    ids = torch.tensor([served.tokenizer.encode(PROMPT).ids])
    for body, answer in zip(bodies, alone, strict=True):
        model = llama_files.load(CHECKPOINT)
        if body["model"] != "small":
            load_adapter(model, CHECKPOINT.with_name(f"lora_{body['model']}"))
        expected = served.tokenizer.decode(generate(model.eval(), ids, 12)[0].tolist())
        assert answer["choices"][0]["text"] == expected
    assert len({a["choices"][0]["text"] for a in alone}) == 3


def test_streaming_says_the_same(served):
    body = {"prompt": [PROMPT, "import os\n"], "max_tokens": 24, "temperature": 0.9, "seed": 5, "n": 2}
    whole = served.complete(**body)[1]["choices"]
    texts, reasons = served.stream(**body)
    assert [texts[c["index"]] for c in whole] == [c["text"] for c in whole]
    assert [reasons[c["index"]] for c in whole] == [c["finish_reason"] for c in whole]
    assert len({c["text"] for c in whole}) == 4
    assert served.complete(**body)[1]["choices"] == whole  # a seed is a promise
    assert served.complete(prompt=PROMPT, max_tokens=6, num_beams=3)[0] == 200


def test_stop_texts(served):
    whole = served.complete(prompt=PROMPT, max_tokens=30, temperature=0)[1]["choices"][0]["text"]
    stop = whole[9:12]
    expected = whole[: whole.find(stop)]
    answer = served.complete(prompt=PROMPT, max_tokens=30, temperature=0, stop=stop)[1]["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
    texts, reasons = served.stream(prompt=PROMPT, max_tokens=30, temperature=0, stop=["\x00", stop])
    assert (texts[0], reasons[0]) == (expected, "stop")


def test_no_half_characters(served):
    """A token may end within a character: it is said when the rest has come."""
    snowman = served.tokenizer.encode("a \u2603 b").ids
    assert len(snowman) > 4
    text = Text(served.tokenizer, served.tokenizer.encode("x").ids, ["b!"])
    pieces = [text.add(t) for t in snowman]
    assert "".join(pieces) + text.add(None) == "a \u2603 b"
    assert not any("\ufffd" in p for p in pieces)
    assert pieces[-1] == " "  # "b" may begin a stop text


def test_many_at_once(served):
    bodies = [{"prompt": PROMPT[: 5 + i], "max_tokens": 20, "temperature": 0.7, "seed": i} for i in range(24)]
    alone = [served.complete(**body)[1]["choices"] for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda body: served.complete(**body)[1]["choices"], bodies))
    assert together == alone


BAD = [
    (b"{", 400, "expected JSON"),
    (b"\xff\xfe", 400, "expected JSON"),
    (b"[" * 100_000, 400, "expected JSON"),
    (b"[]", 400, "expected a JSON object"),
    (b"{}", 400, "prompt: expected one"),
    ({"prompt": PROMPT, "logit_bias": {}}, 400, "logit_bias: unknown field; there are model, prompt"),
    ({"prompt": ""}, 400, "prompt: expected a text"),
    ({"prompt": []}, 400, "prompt: expected a text"),
    ({"prompt": [[]]}, 400, "prompt: expected a text or token ids"),
    ({"prompt": [1.5]}, 400, "prompt: expected a text or token ids"),
    ({"prompt": [1, "a"]}, 400, "prompt: expected a text or token ids"),
    ({"prompt": [5, 10**9]}, 400, "tokens from 0 to 2047"),
    ({"prompt": None}, 400, "prompt: expected"),
    ({"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens: expected an integer of at least 1, got 0"),
    ({"prompt": PROMPT, "max_tokens": True}, 400, "max_tokens: expected an integer"),
    ({"prompt": PROMPT, "temperature": -1}, 400, "temperature: expected a number from 0"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "temperature: expected a number"),
    ({"prompt": PROMPT, "top_p": 0}, 400, "top_p: expected"),
    ({"prompt": PROMPT, "seed": 2**63}, 400, "seed: expected"),
    ({"prompt": PROMPT, "stop": [1]}, 400, "stop: expected"),
    ({"prompt": PROMPT, "model": "gpt-5"}, 404, "model: expected 'small' or 'headers' or 'manual', got 'gpt-5'"),
    ({"prompt": PROMPT, "n": MOST_CHOICES + 1}, 400, "n: expected"),
    ({"prompt": [PROMPT] * MOST_CHOICES, "n": 2}, 400, "n: expected at most 64 choices in all"),
    ({"prompt": [3] * 510, "max_tokens": 3}, 400, "at most 512 tokens"),
    ({"prompt": "x " * 3_000_000}, 413, "a body of at most"),
    ({"prompt": "x " * 300_000}, 400, "at most 512 tokens"),
]


@pytest.mark.parametrize(("body", "status", "text"), BAD, ids=[text[:30] for *_, text in BAD])
def test_what_makes_no_sense_is_refused(served, body, status, text):
    response = served.send("POST", "/v1/completions", body)
    error = json.load(response)["error"]
    assert response.status == status
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_batch_with_one_bad_prompt_leaves_nothing_behind(served):
    status, answer = served.complete(prompt=[PROMPT, "x " * 600, PROMPT], max_tokens=5)
    assert status == 400
    assert "at most 512 tokens" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(served, stream):
    """Its request is cancelled: the pool is free again long before it could have been answered."""
    before = json.load(served.send("GET", "/stats"))["steps"]
    body = json.dumps({"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(6)]
    for client in clients:
        client.sendall(head + body)
    time.sleep(0.3)
    for client in clients:
        client.close()
    after = served.settled()["steps"]
    assert after - before < 470
    half = socket.create_connection(("127.0.0.1", served.port))
    half.sendall(head + body[:10])  # and one that never finishes its request
    half.close()


def test_a_failing_engine_is_told(monkeypatch):
    """Whoever waits gets an answer, and so does whoever comes later."""
    other = Served()
    try:
        monkeypatch.setattr(other.server.engine.engine, "step", lambda: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        for _ in range(2):
            status, answer = other.complete(prompt=PROMPT)
            assert (status, answer["error"]["type"]) == (503, "server_error")
            assert "division by zero" in answer["error"]["message"]
        assert other.send("GET", "/health").status == 503
    finally:
        other.uvicorn.should_exit = True
        other.thread.join()
