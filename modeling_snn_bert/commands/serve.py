"""`snn-bert serve`: a classifier behind a port, JSON over HTTP.

    POST /predict   {"texts": ["a joy from start to end"]}, answered by {"predictions": [{"label": ..., "score": ...}]}
    POST /predict   {"texts": [{"text": "it rains", "text_pair": "it is wet"}]}, of a model that reads pairs
    GET /health     what is served, and how many texts wait

Texts of all requests go through one queue. While a batch runs the next ones gather, so that concurrent requests share a
batch and a single one does not wait. Nothing of a checkpoint is ever run as code.
"""

import asyncio
import collections
import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text_files import Text, is_unicode
from .classifier import Prediction, TextClassifier, WeightDtype
from .common import BatchSize, MaxLength, Model, Revision, at_least_one, check_max_length, load_classifier, reported

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

# A body that is too large is read to its end, up to so many times the limit, so that its sender sees the answer.
DRAINED = 8
# Seconds in which a body must arrive, and for which open requests are waited for when the server is stopped.
BODY_SECONDS, STOP_SECONDS = 20.0, 10
# Of a body that was not read to its end the rest may still come: its connection is of no more use.
CLOSED = {"Connection": "close"}
# Keys of an object that is a pair of texts.
PAIR = ("text", "text_pair")
# A client that has left gets no answer; this status is what others use to name the case in logs.
CLIENT_LEFT = 499


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body_bytes: of a request.
        texts: of a request.
        characters: of a text.
        waiting: texts of all requests that wait; more are turned away at once.
        seconds: for which a request waits for its answer.
        connections: open at once.
    """

    body_bytes: int = 1 << 20
    texts: int = 64
    characters: int = 20_000
    waiting: int = 1024
    seconds: float = 30.0
    connections: int = 512


def _limit(option: str, help: str) -> Any:
    return typer.Option(option, callback=at_least_one, help=help)


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; 0.0.0.0 is open to the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = 8000,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    weight_dtype: WeightDtype = "float32",
    max_texts: Annotated[int, _limit("--max_texts", "Texts that one request may hold.")] = Limits.texts,
    max_characters: Annotated[
        int, _limit("--max_characters", "Characters that one text may hold.")
    ] = Limits.characters,
    max_body_bytes: Annotated[int, _limit("--max_body_bytes", "Bytes that one request may hold.")] = Limits.body_bytes,
    max_waiting: Annotated[int, _limit("--max_waiting", "Texts that may wait; more get status 503.")] = Limits.waiting,
    revision: Revision = None,
) -> None:
    """Serve a classifier as JSON over HTTP: POST /predict and GET /health.

    Inference is event-driven, on the CPU; concurrent requests run in shared batches. There is no authentication: put a
    proxy that has one in front before you listen on more than this machine.
    """
    if max_waiting < max_texts:
        raise typer.BadParameter(f"must be >= --max_texts, {max_texts}, got {max_waiting}", param_hint="--max_waiting")
    limits = Limits(max_body_bytes, max_texts, max_characters, max_waiting)
    with reported():
        try:
            import uvicorn
        except ImportError as error:
            raise ImportError(MISSING) from error
        classifier = TextClassifier(*load_classifier(model, revision), weight_dtype, max_length)
        check_max_length(max_length, classifier.tokenizer, pairs=classifier.reads_pairs is not False)
        app = make_app(classifier, model, batch_size, limits)
        listener = listen(host, port)
        # Lays out the weights, so that no request waits for it.
        classifier(["a"])
        config = uvicorn.Config(app, **server_settings(limits))
        host, port = listener.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        typer.echo(f"serving {model} on http://{where}:{port} (POST /predict, GET /health); Ctrl-C ends it")
        if not ipaddress.ip_address(host).is_loopback:
            typer.echo("Warning: open to the network, and there is no authentication", err=True)
        with listener, contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


MISSING = 'the server needs starlette and uvicorn: pip install "snn-bert[serve]"'


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: if the port is taken or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Its connections inherit this. asyncio sets it where a socket names its protocol, which this one does not; and
        # without it an answer waits some 40 ms for the client's acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host}, port {port} ({why}): choose another --port or --host") from error


def server_settings(limits: Limits) -> dict[str, Any]:
    """The settings of uvicorn."""
    return {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "limit_concurrency": limits.connections,
        "timeout_graceful_shutdown": STOP_SECONDS,
    }


class Full(Exception):
    """So many texts wait that no more are taken."""


class Batcher:
    """Runs the texts of all requests in shared batches, in the order in which they came.

    Args:
        classify: takes texts and returns a prediction for each; it runs in a thread of its own, one call at a time.
        batch_size: texts of a call at most.
        max_waiting: texts that may wait.
    """

    def __init__(
        self, classify: Callable[[Sequence[Text]], Sequence[Prediction]], batch_size: int, max_waiting: int
    ) -> None:
        self.classify, self.batch_size, self.max_waiting = classify, batch_size, max_waiting
        self.queue: collections.deque[tuple[Text, asyncio.Future[Prediction]]] = collections.deque()
        self.arrived = asyncio.Event()
        self.texts = self.batches = 0

    def waiting(self) -> int:
        """Texts that wait for their batch and whose requests have not been given up."""
        return sum(not future.done() for _, future in self.queue)

    def submit(self, texts: Sequence[Text]) -> list["asyncio.Future[Prediction]"]:
        """A future for the prediction of each text; one that is cancelled is not run.

        Raises:
            Full: if there is no room for all of them; then none is taken.
        """
        if len(self.queue) + len(texts) > self.max_waiting:
            # Those given up hold places until their turn comes, unless the places are needed.
            self.queue = collections.deque(item for item in self.queue if not item[1].done())
            if len(self.queue) + len(texts) > self.max_waiting:
                raise Full
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Prediction]] = [loop.create_future() for _ in texts]
        self.queue.extend(zip(texts, futures, strict=True))
        self.arrived.set()
        return futures

    async def run(self) -> None:
        """Runs batches until it is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="snn-bert") as thread:
            while True:
                await self.arrived.wait()
                # Lets the requests that have arrived already join.
                await asyncio.sleep(0)
                batch = self._next_batch()
                if not batch:
                    self.arrived.clear()
                    continue
                try:
                    results = await loop.run_in_executor(thread, self._outcomes, [text for text, _ in batch])
                except asyncio.CancelledError:
                    for _, future in batch:
                        future.cancel()
                    raise
                self.batches += 1
                self.texts += len(batch)
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)

    def _next_batch(self) -> list[tuple[Text, "asyncio.Future[Prediction]"]]:
        batch: list[tuple[Text, asyncio.Future[Prediction]]] = []
        while self.queue and len(batch) < self.batch_size:
            item = self.queue.popleft()
            if not item[1].done():
                batch.append(item)
        return batch

    def _outcomes(self, texts: Sequence[Text]) -> Sequence[Prediction | Exception]:
        """A prediction or an error of each text. One that fails does not take the others of its batch along."""
        try:
            return self.classify(texts)
        except Exception as error:
            if len(texts) == 1:
                return [error]
            return [outcome for text in texts for outcome in self._outcomes([text])]


def make_app(classifier: TextClassifier, name: str, batch_size: int = 32, limits: Limits | None = None) -> "Starlette":
    """The application, for any ASGI server.

    Args:
        classifier: what is served.
        name: what `/health` calls it.
        batch_size: texts that run at once.
        limits: what is taken, by default `Limits()`.

    Raises:
        ImportError: if starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(MISSING) from error
    limits = limits or Limits()
    batcher = Batcher(classifier, batch_size, limits.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    async def health(request: Request) -> Response:
        facts = {"labels": classifier.labels, "reads_pairs": classifier.reads_pairs, "waiting": batcher.waiting()}
        counts = {"texts": batcher.texts, "batches": batcher.batches}
        return JSONResponse({"status": "ok", "model": name, **facts, **counts, "limits": dataclasses.asdict(limits)})

    async def predict(request: Request) -> Response:
        try:
            body = await asyncio.wait_for(_body(request, limits.body_bytes), BODY_SECONDS)
            content_type = request.headers.get("content-type", "")
            texts, all_scores = parse_request(content_type, body, limits, classifier.reads_pairs)
            futures = batcher.submit(texts)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"the body must arrive within {BODY_SECONDS:g} seconds", CLOSED) from error
        except BadRequest as error:
            raise HTTPException(error.status, str(error), CLOSED if error.status == 413 else None) from error
        except Full as error:
            message = f"{limits.waiting} texts wait already: try again in a moment"
            raise HTTPException(503, message, {"Retry-After": "1"}) from error
        # After the body the next message can only be that the client has left.
        left = asyncio.ensure_future(request.receive())
        answers = asyncio.ensure_future(asyncio.wait(futures))
        try:
            await asyncio.wait((left, answers), timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                found = [_answer(future.result(), classifier.labels, all_scores) for future in futures]
                return JSONResponse({"predictions": found})
            if left.done():
                return Response(status_code=CLIENT_LEFT)
            raise HTTPException(503, f"no answer within {limits.seconds:g} seconds: try again", {"Retry-After": "1"})
        finally:
            left.cancel()
            answers.cancel()
            for future in futures:
                future.cancel()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        hint = ": there are POST /predict and GET /health" if error.status_code in (404, 405) else ""
        return JSONResponse({"error": f"{error.detail}{hint}"}, error.status_code, error.headers)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed on this request; its log says why"}, 500)

    return Starlette(
        routes=[Route("/predict", predict, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: refused, Exception: failed},
        lifespan=lifespan,
    )


async def _body(request: "Request", limit: int) -> bytes:
    """The body, or one byte more than `limit` of it if it is longer."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        body += chunk[: limit + 1 - len(body)]
        if size > DRAINED * limit:
            break
    return bytes(body)


class BadRequest(ValueError):
    """A request that makes no sense, with the status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse_request(
    content_type: str, body: bytes, limits: Limits, reads_pairs: bool | None = None
) -> tuple[list[Text], bool]:
    """The texts of a request, or its pairs, and whether it asks for the scores of all labels.

    Raises:
        BadRequest: if it is not what is wanted, beyond `limits`, or not of the kind of `reads_pairs` (`None`: either).
    """
    if len(body) > limits.body_bytes:
        raise BadRequest(413, f"the body must hold at most {limits.body_bytes:,} bytes")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise BadRequest(415, f"the header must say Content-Type: application/json, got {content_type!r}")
    try:
        request = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(400, f"the body must be UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise BadRequest(400, f"the body must be JSON: {error}") from error
    except RecursionError as error:
        raise BadRequest(400, "the body must be JSON that is not nested so deeply") from error
    if not isinstance(request, dict):
        raise BadRequest(422, 'the body must be an object such as {"texts": ["a text"]}')
    unknown = sorted(set(request) - {"text", "text_pair", "texts", "all_scores"})
    if unknown:
        known = "`texts` (or `text`, and for pairs `text_pair`) and `all_scores`"
        raise BadRequest(422, f"{known} are known, got {_clipped(unknown[0])}")
    if "text_pair" in request and "text" not in request:
        raise BadRequest(422, "`text_pair` is the second text beside `text`; in `texts` it stands in each object")
    if ("text" in request) == ("texts" in request):
        raise BadRequest(422, "give either `texts`, a list, or `text`")
    all_scores = request.get("all_scores", False)
    if not isinstance(all_scores, bool):
        raise BadRequest(422, f"`all_scores` must be true or false, got {_clipped(all_scores)}")
    return [_checked(fields, limits, reads_pairs) for fields in _inputs(request, limits)], all_scores


def _inputs(request: dict[str, Any], limits: Limits) -> list[dict[str, Any]]:
    """The values that are to be the text, or the two texts, of each input, by their places in the request."""
    if "text" in request:
        return [{key: request[key] for key in PAIR if key in request}]
    texts = request["texts"]
    if not isinstance(texts, list) or not texts:
        raise BadRequest(422, f"`texts` must be a list of at least one text, got {_clipped(texts)}")
    if len(texts) > limits.texts:
        raise BadRequest(413, f"`texts` must hold at most {limits.texts} texts, got {len(texts):,}")
    return [
        {f"texts[{i}].{key}": item[key] for key in PAIR}
        if isinstance(item, dict) and item.keys() == set(PAIR)
        else {f"texts[{i}]": item}
        for i, item in enumerate(texts)
    ]


def _checked(fields: dict[str, Any], limits: Limits, reads_pairs: bool | None) -> Text:
    """The text or the pair that `fields` hold, see `_inputs`."""
    first_name, is_pair = next(iter(fields)), len(fields) == 2
    if reads_pairs is not None and is_pair != reads_pairs:
        wanted = "stand alone, without `text_pair`: the model reads single texts"
        if reads_pairs:
            wanted = 'be one of a pair, {"text": "a text", "text_pair": "another"}: the model reads pairs'
        raise BadRequest(422, f"`{first_name}` must {wanted}")
    for name, text in fields.items():
        if not isinstance(text, str) or not text.strip():
            raise BadRequest(422, f"`{name}` must be a text that is not blank, got {_clipped(text)}")
        if len(text) > limits.characters:
            raise BadRequest(413, f"`{name}` must hold at most {limits.characters:,} characters, got {len(text):,}")
        if not is_unicode(text):
            raise BadRequest(422, f"`{name}` holds half of a surrogate pair, which is no character")
    texts = list(fields.values())
    return (texts[0], texts[1]) if is_pair else texts[0]


def _clipped(value: Any) -> str:
    """The beginning of a value as JSON writes it, in ASCII."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _answer(prediction: Prediction, labels: Sequence[str], all_scores: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"label": prediction.label, "score": prediction.score}
    if all_scores:
        answer["scores"] = dict(zip(labels, prediction.scores, strict=True))
    return answer
