"""`snn-bert serve` by a real client over loopback: answers, limits, bad requests, clients that leave, the end."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
import uvicorn
from command_line import run_command

from modeling_snn_bert import SNNBertForSequenceClassification
from modeling_snn_bert.commands.classifier import Prediction, TextClassifier
from modeling_snn_bert.commands.serve import (
    BadRequest,
    Batcher,
    Full,
    Limits,
    listen,
    make_app,
    parse_request,
    server_settings,
)
from modeling_snn_bert.event_driven import is_event_driven

SECONDS = 60
LIMITS = Limits(body_bytes=20_000, texts=8, characters=1000, waiting=64)
JSON = {"Content-Type": "application/json"}
WORDS = "the quick brown fox river old clock dog sun film nobody knew why stopped noon empty wagon".split()


class Running:
    """A server in a thread, from entering to leaving."""

    def __init__(self, classifier, batch_size=8, limits=LIMITS):
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = make_app(classifier, "a model", batch_size, limits)
        self.server = uvicorn.Server(uvicorn.Config(app, **server_settings(limits)))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + SECONDS
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *exception):
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "the server did not stop"
        self.listener.close()

    def health(self):
        return httpx.get(f"{self.url}/health").json()


class Slow:
    """Labels a text by itself, once `go` is set; it notes its batches, and fails on the text "fail"."""

    labels, reads_pairs = ("a", "b"), None

    def __init__(self):
        self.go, self.started, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, texts):
        self.batches.append(list(texts))
        self.started.set()
        assert self.go.wait(SECONDS)
        if "fail" in texts:
            raise RuntimeError("secret")
        return [Prediction(text, 1.0, [1.0, 0.0]) for text in texts]


def label_of(response):
    assert response.status_code == 200, response.text
    return [row["label"] for row in response.json()["predictions"]]


@pytest.fixture
def model(make_config):
    return SNNBertForSequenceClassification(make_config(num_labels=3)).eval()


@pytest.fixture
def server(model, tokenizer):
    with Running(TextClassifier(model, tokenizer)) as running:
        yield running


@pytest.fixture
def slow():
    """A slow classifier, and the server in which it runs in batches of two."""
    classifier = Slow()
    with Running(classifier, 2) as running:
        try:
            yield classifier, running
        finally:
            classifier.go.set()


def test_answers(server, model, tokenizer, texts, assert_spikes_flow):
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    expected = torch.stack(logits).softmax(-1)
    assert is_event_driven(model)
    assert_spikes_flow(model, **tokenizer(texts, padding=True, return_tensors="pt"))
    response = httpx.post(f"{server.url}/predict", json={"texts": texts, "all_scores": True})
    assert label_of(response) == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
    rows = response.json()["predictions"]
    torch.testing.assert_close(torch.tensor([list(row["scores"].values()) for row in rows]), expected)
    assert [row["score"] for row in rows] == [max(row["scores"].values()) for row in rows]
    (row,) = httpx.post(f"{server.url}/predict", json={"text": texts[0]}).json()["predictions"]
    assert row.keys() == {"label", "score"} and row["label"] == rows[0]["label"]
    health = server.health()
    assert health["status"] == "ok" and health["model"] == "a model" and health["labels"] == list(rows[0]["scores"])
    assert (health["waiting"], health["texts"]) == (0, 7) and health["limits"]["texts"] == 8


def test_pairs(server, model, tokenizer, texts):
    """A model that does not say what it reads takes both, in one batch too."""
    pair = {"text": texts[0], "text_pair": texts[1]}
    with torch.no_grad():
        batches = [tokenizer(*each, return_tensors="pt") for each in ((texts[0], texts[1]), (texts[2],))]
        expected = torch.cat([model(**batch).logits.softmax(-1) for batch in batches])
    for request in ({"texts": [pair, texts[2]]}, pair):
        response = httpx.post(f"{server.url}/predict", json={**request, "all_scores": True})
        found = torch.tensor([list(row["scores"].values()) for row in response.json()["predictions"]])
        torch.testing.assert_close(found, expected[: len(found)])
    assert server.health()["reads_pairs"] is None


@pytest.mark.parametrize(
    ("reads_pairs", "good", "bad", "message"),
    [
        (True, {"text": "a", "text_pair": "b"}, {"text": "a"}, "`text` must be one of a pair, "),
        (True, {"texts": [{"text": "a", "text_pair": "b"}]}, {"texts": ["a"]}, "`texts[0]` must be one of a pair, "),
        (False, {"text": "a"}, {"text": "a", "text_pair": "b"}, "`text` must stand alone, without `text_pair`"),
        (False, {"texts": ["a"]}, {"texts": [{"text": "a", "text_pair": "b"}]}, "`texts[0].text` must stand alone"),
    ],
)
def test_a_model_knows_what_it_reads(reads_pairs, good, bad, message):
    def parsed(request):
        return parse_request("application/json", json.dumps(request).encode(), LIMITS, reads_pairs)[0]

    assert parsed(good) == ([("a", "b")] if reads_pairs else ["a"])
    with pytest.raises(BadRequest, match=re.escape(message)) as caught:
        parsed(bad)
    assert caught.value.status == 422


def test_texts_that_are_odd(server):
    odd = ["\x07\x1b[2J", "😀👩\u200d👩", "漢字", "\u200b", "a" * 1000, "\ufeff", "a\x00b"]
    assert len(label_of(httpx.post(f"{server.url}/predict", json={"texts": odd}))) == len(odd)


def test_under_load(server, model, tokenizer):
    """Many clients at once, each with texts of its own: every request gets the answers to its texts, in order."""
    rng = random.Random(0)
    requests = [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5))] for _ in range(300)
    ]
    with torch.no_grad():
        inputs = [[tokenizer(text, return_tensors="pt") for text in texts] for texts in requests]
        expected = [torch.cat([model(**one).logits for one in each]).softmax(-1) for each in inputs]

    async def ask(client, slots, texts):
        async with slots:
            # Told to come back where the queue is full, a client does.
            while (
                response := await client.post("/predict", json={"texts": texts, "all_scores": True})
            ).status_code == 503:
                await asyncio.sleep(float(response.headers["Retry-After"]) / 10)
            return [list(row["scores"].values()) for row in response.json()["predictions"]]

    async def ask_all():
        slots = asyncio.Semaphore(32)
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:
            return await asyncio.gather(*(ask(client, slots, texts) for texts in requests))

    for scores, wanted in zip(asyncio.run(ask_all()), expected, strict=True):
        torch.testing.assert_close(torch.tensor(scores), wanted)
    # The answers tell the texts apart, so that a mix-up would be seen.
    assert len({tuple(row) for each in expected for row in each.tolist()}) > 300
    health = server.health()
    assert health["texts"] == sum(map(len, requests)) and health["waiting"] == 0
    assert health["batches"] < health["texts"] / 2


# The body, headers other than those of JSON, the status, and what the error must say.
BAD_REQUESTS = {
    "no_body": (b"", {}, 400, "the body must be JSON"),
    "no_json": (b"{", {}, 400, "the body must be JSON: Expecting property name"),
    "not_utf-8": (b'{"text": "\xe9"}', {}, 400, "the body must be UTF-8: invalid continuation byte at byte 10"),
    "nested_too_deeply": (b"[" * 19_000, {}, 400, "the body must be JSON that is not nested so deeply"),
    "a_number_too_long": (b'{"texts": ' + b"1" * 9000 + b"}", {}, 400, "the body must be JSON: Exceeds the limit"),
    "another_type": (b'{"text": "a"}', {"Content-Type": "text/plain"}, 415, "must say Content-Type: application/json"),
    "a_form": (b"text=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "got 'application/x-www-form"),
    "a_list": (b'["a"]', {}, 422, 'the body must be an object such as {"texts": ["a text"]}'),
    "no_texts": (b"{}", {}, 422, "give either `texts`, a list, or `text`"),
    "both": (b'{"text": "a", "texts": ["a"]}', {}, 422, "give either `texts`, a list, or `text`"),
    "an_unknown_key": (b'{"text": "a", "inputs": 1}', {}, 422, '`all_scores` are known, got "inputs"'),
    "a_flag_of_text": (b'{"text": "a", "all_scores": "no"}', {}, 422, '`all_scores` must be true or false, got "no"'),
    "texts_of_text": (b'{"texts": "a"}', {}, 422, '`texts` must be a list of at least one text, got "a"'),
    "texts_empty": (b'{"texts": []}', {}, 422, "`texts` must be a list of at least one text, got []"),
    "a_number": (b'{"texts": ["a", 3]}', {}, 422, "`texts[1]` must be a text that is not blank, got 3"),
    "a_blank": (b'{"text": " \\n"}', {}, 422, '`text` must be a text that is not blank, got " \\n"'),
    "null": (b'{"text": null}', {}, 422, "`text` must be a text that is not blank, got null"),
    "a_second_text_alone": (b'{"text_pair": "a"}', {}, 422, "`text_pair` is the second text beside `text`"),
    "a_blank_in_a_pair": (b'{"text": "a", "text_pair": ""}', {}, 422, "`text_pair` must be a text that is not blank"),
    "half_a_pair": (b'{"texts": [{"text": "a"}]}', {}, 422, '`texts[0]` must be a text that is not blank, got {"text"'),
    "half_a_surrogate": (b'{"text": "\\ud83d"}', {}, 422, "`text` holds half of a surrogate pair"),
    "a_text_too_long": (b'{"text": "' + b"a" * 1001 + b'"}', {}, 413, "at most 1,000 characters, got 1,001"),
    "too_many_texts": (json.dumps({"texts": ["a"] * 9}).encode(), {}, 413, "`texts` must hold at most 8 texts, got 9"),
    "a_body_too_large": (b'{"text": "' + b"a" * 30_000 + b'"}', {}, 413, "the body must hold at most 20,000 bytes"),
}


def test_bad_requests(server, subtests):
    for name, (body, headers, status, message) in BAD_REQUESTS.items():
        with subtests.test(name):
            response = httpx.post(f"{server.url}/predict", content=body, headers={**JSON, **headers})
            assert response.status_code == status and message in response.json()["error"]
            assert response.headers["content-type"] == "application/json" and len(response.content) < 400
    assert server.health()["texts"] == 0


def test_other_addresses(server):
    for method, path, status in (("GET", "/", 404), ("POST", "/health", 405), ("GET", "/predict", 405)):
        response = httpx.request(method, f"{server.url}{path}")
        assert response.status_code == status and "there are POST /predict and GET /health" in response.json()["error"]


def test_a_body_without_a_length(server):
    def body():
        for _ in range(40):
            yield b" " * 1000

    response = httpx.post(f"{server.url}/predict", content=body(), headers=JSON)
    assert response.status_code == 413


def test_a_body_without_an_end(server):
    """It is not kept, however much is sent, and the connection ends."""
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        # The server closes while there is more to come, which the sender may see as a broken connection.
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"2710\r\n" + b"a" * 10_000 + b"\r\n")
            while part := client.recv(1 << 16):
                answer += part
        assert not answer or answer.startswith(b"HTTP/1.1 413")
    assert server.health()["status"] == "ok"


def test_answers_do_not_wait_for_acknowledgements(server):
    assert server.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_is_no_http(server):
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert server.health()["status"] == "ok"


def test_clients_that_leave(slow):
    """What they asked for is not run, and nobody else's answer is affected."""
    classifier, server = slow
    body = json.dumps({"texts": ["left", "left"]}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    results = []
    first = threading.Thread(target=lambda: results.append(post(server, ["first"])))
    first.start()
    assert classifier.started.wait(SECONDS)
    leaving = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
    for client in leaving[:4]:
        client.sendall(head.encode() + body)
    leaving[4].sendall(head.encode() + body[:5])
    wait_for(lambda: server.health()["waiting"] == 8)
    last = threading.Thread(target=lambda: results.append(post(server, ["last"])))
    last.start()
    wait_for(lambda: server.health()["waiting"] == 9)
    for client in leaving:
        client.close()
    wait_for(lambda: server.health()["waiting"] == 1)
    classifier.go.set()
    first.join()
    last.join()
    assert sorted(results) == [["first"], ["last"]] and classifier.batches == [["first"], ["last"]]


def post(server, texts):
    return label_of(httpx.post(f"{server.url}/predict", json={"texts": texts}, timeout=SECONDS))


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_queue_turns_away_at_once(slow):
    classifier, server = slow
    results = []
    threads = [threading.Thread(target=lambda i=i: results.append(post(server, [f"{i}"] * 8))) for i in range(8)]
    for thread in threads:
        thread.start()
    # One batch of two runs.
    wait_for(lambda: server.health()["waiting"] == 62)
    response = httpx.post(f"{server.url}/predict", json={"texts": ["a"] * 3})
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    assert "64 texts wait already" in response.json()["error"]
    classifier.go.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [[f"{i}"] * 8 for i in range(8)]


def test_no_answer_in_time():
    classifier = Slow()
    with Running(classifier, limits=Limits(seconds=0.2)) as server:
        response = httpx.post(f"{server.url}/predict", json={"text": "a"})
        assert response.status_code == 503 and "no answer within 0.2 seconds" in response.json()["error"]
        classifier.go.set()
        assert post(server, ["b"]) == ["b"]


def test_a_text_that_fails_takes_no_other_along(slow):
    classifier, server = slow
    results = []
    first = threading.Thread(target=lambda: post(server, ["first"]))
    first.start()
    assert classifier.started.wait(SECONDS)

    def ask(text):
        results.append((text, httpx.post(f"{server.url}/predict", json={"text": text}, timeout=SECONDS)))

    threads = [threading.Thread(target=ask, args=(text,)) for text in ("fail", "fine")]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.health()["waiting"] == 2)
    classifier.go.set()
    for thread in (first, *threads):
        thread.join()
    assert sorted(classifier.batches[1]) == ["fail", "fine"]
    answers = dict(results)
    assert answers["fail"].status_code == 500 and "secret" not in answers["fail"].text
    assert label_of(answers["fine"]) == ["fine"]
    assert post(server, ["later"]) == ["later"]


def test_batcher_makes_room_of_what_was_given_up():
    async def check():
        batcher = Batcher(lambda texts: [], 2, 4)
        given_up = batcher.submit(["a", "b"])
        kept = batcher.submit(["c", "d"])
        with pytest.raises(Full):
            batcher.submit(["e"])
        for future in given_up:
            future.cancel()
        assert batcher.waiting() == 2
        batcher.submit(["e", "f"])
        with pytest.raises(Full):
            batcher.submit(["g"])
        assert [text for text, _ in batcher.queue] == ["c", "d", "e", "f"] and not kept[0].done()

    asyncio.run(check())


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_as_a_user_starts_and_stops_it(checkpoint, signal_name):
    # Code beside the weights is not run.
    (checkpoint / "modeling_snn_bert.py").write_text("raise SystemExit('the code of a checkpoint ran')")
    command = [sys.executable, "-m", "modeling_snn_bert", "serve", str(checkpoint), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        assert httpx.get(f"{url}/health").json()["model"] == str(checkpoint)
        answers = httpx.post(f"{url}/predict", json={"texts": ["a", "b"]}).json()["predictions"]
        assert len(answers) == 2
        process.send_signal(getattr(signal, signal_name))
        _, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert "Traceback" not in stderr and "Error" not in stderr


# Exit code, arguments after `serve`, and what the message must say. {…} are filled in.
BAD_SERVING = {
    "no_such_model": (1, ["./nowhere"], "nowhere"),
    "port_of_text": (2, ["{model}", "--port", "http"], "Invalid value for '--port'"),
    "port_too_high": (2, ["{model}", "--port", "70000"], "Invalid value for '--port'"),
    "port_in_use": (1, ["{model}", "--port", "{port}"], "(Address already in use): choose another --port or --host"),
    "host_of_another_machine": (1, ["{model}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000"),
    "fewer_waiting_than_a_request": (2, ["{model}", "--max_waiting", "9"], "must be >= --max_texts, 64, got 9"),
    "batch_size_0": (2, ["{model}", "--batch_size", "0"], "must be >= 1, got 0"),
    "max_length_1": (2, ["{model}", "--max_length", "1"], "Invalid value for '--max_length': must be >= 3, got 1"),
    "max_length_4": (2, ["{model}", "--max_length", "4"], "Invalid value for --max_length: must be >= 5 for pairs"),
}


def test_bad_serving(checkpoint, subtests):
    with listen("127.0.0.1", 0) as taken:
        places = {"model": checkpoint, "port": taken.getsockname()[1]}
        for name, (exit_code, arguments, message) in BAD_SERVING.items():
            with subtests.test(name):
                result = run_command("serve", *(a.format(**places) for a in arguments), exit_code=exit_code)
                assert message in " ".join(result.stderr.split()) and not result.stdout


@pytest.mark.parametrize("module", ["uvicorn", "starlette.applications"])
def test_without_a_server_library(checkpoint, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "snn-bert[serve]"' in run_command("serve", checkpoint, exit_code=1).stderr
