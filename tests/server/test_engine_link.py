"""Both ends of the link between the processes, with a scripted engine."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import zmq
import zmq.asyncio

from minisgl.server.engine_client import EngineClient, EngineDied
from minisgl.server.engine_process import Link, serve_engine
from minisgl.server.messages import Abort, Add, Died, Outputs, Ready, Refused
from stages.interface import Request, RequestRefused, SamplingParams, Statistics, TokenOutput

LONG = 100_000  # tokens: minutes


def request(name: str, tokens: int = 3, prompt: int = 1) -> Request:
    return Request(name, [prompt], SamplingParams(max_tokens=tokens, logit_bias={3: 1.0}), seed=-5)


class CountingEngine:
    """Token number i of a request is i; each step brings one token to every request."""

    context_length = 100

    def __init__(self) -> None:
        self.running: dict[str, Request] = {}
        self.made: dict[str, int] = {}
        self.aborted: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    @property
    def statistics(self) -> Statistics:
        return Statistics(running=len(self.running))

    def add(self, request: Request) -> None:
        if request.prompt == [0]:
            raise RequestRefused("prompts of 0 are refused", "prompt")
        if request.prompt == [666]:
            raise ZeroDivisionError("a bug")
        self.running[request.id] = request
        self.made[request.id] = 0

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def step(self) -> list[TokenOutput]:
        time.sleep(0.001)
        outputs = []
        for name, one in list(self.running.items()):
            last = self.made[name] + 1 == one.params.max_tokens
            outputs.append(TokenOutput(name, self.made[name], None, "length" if last else None))
            self.made[name] += 1
            if last:
                del self.running[name]
        return outputs


class Ended(BaseException):
    """Ends the loop from within, without looking like an engine's failure."""


class ScriptedLink:
    """Delivers messages in order, and records what is sent; ends the loop when it would wait for ever."""

    def __init__(self, *messages: Add | Abort | None) -> None:
        self.messages = list(messages)  # None: nothing there at the moment
        self.sent: list[object] = []
        self.waits: list[bool] = []

    def receive(self, wait: bool) -> Add | Abort | None:
        self.waits.append(wait)
        if not self.messages:
            if wait:
                raise Ended
            return None
        return self.messages.pop(0)

    def send(self, message: object) -> None:
        self.sent.append(message)


def serve(engine: CountingEngine, link: ScriptedLink) -> None:
    with pytest.raises(Ended):
        serve_engine(engine, link)  # type: ignore[arg-type]


def test_the_loop_steps_while_there_is_work_and_waits_otherwise() -> None:
    engine, link = CountingEngine(), ScriptedLink(Add(request("a", 2)), None, Add(request("b", 1)))
    serve(engine, link)
    sent = [[(token.request_id, token.token_id) for token in message.tokens] for message in link.sent]  # type: ignore[attr-defined]
    assert sent == [[("a", 0)], [("a", 1), ("b", 0)]]
    assert link.waits == [True, False, False, False, True]


def test_the_loop_aborts_and_refuses() -> None:
    engine = CountingEngine()
    link = ScriptedLink(Add(request("a", 9)), Add(request("b", prompt=0)), Abort("a"))
    serve(engine, link)
    assert engine.aborted == ["a"]
    refused, emptied = link.sent
    assert refused == Refused("b", "prompts of 0 are refused", "prompt")
    assert emptied == Outputs([], Statistics(running=0)), "nobody is shown as running for ever"


def test_a_bug_in_the_engine_ends_the_loop() -> None:
    with pytest.raises(ZeroDivisionError):
        serve_engine(CountingEngine(), ScriptedLink(Add(request("a", prompt=666))))  # type: ignore[arg-type]


class Ends:
    """A client, and a thread that serves a `CountingEngine` as the engine process would."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", name: str) -> None:
        self.engine = CountingEngine()
        to, back = context.socket(zmq.PUSH), zmq.asyncio.Socket(context, zmq.PULL)
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket, address in ((to, "to"), (back, "back")):
            socket.bind(f"inproc://{name}-{address}")
        inbox.connect(f"inproc://{name}-to")
        outbox.connect(f"inproc://{name}-back")
        self.sockets = [to, back, inbox, outbox]
        self.link = Link(inbox, outbox)
        self.client = EngineClient(to, back)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run)
        thread.start()
        return thread

    def _run(self) -> None:
        self.link.send(Ready(self.engine.context_length))
        try:
            serve_engine(self.engine, self.link)
        except Exception as error:
            self.link.send(Died(f"it failed: {error}"))


@pytest.fixture
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    with zmq.Context() as context:
        ends = Ends(context, request.node.name)
        thread = ends.start()
        listening = asyncio.create_task(ends.client.listen())
        assert await ends.client.ready() == 100
        yield ends
        ends.client._send(Add(globals()["request"]("end", prompt=666)))  # ends the thread
        await asyncio.to_thread(thread.join)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        for socket in ends.sockets:
            socket.close(linger=0)


async def test_tokens_of_several_requests(ends: Ends) -> None:
    got: list[TokenOutput] = []
    async for tokens in ends.client.generate([request("a", 3), request("b", 2)]):
        got += tokens
    assert [token.token_id for token in got if token.request_id == "a"] == [0, 1, 2]
    assert [token.token_id for token in got if token.request_id == "b"] == [0, 1]
    assert ends.engine.aborted == []


async def test_what_piles_up_comes_at_once(ends: Ends) -> None:
    async with aclosing(ends.client.generate([request("a", 50)])) as arrivals:
        first = await anext(arrivals)
        while ends.engine.has_work:  # noqa: ASYNC110 (a slow client)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # its messages are on their way
        assert len(first) + len(await anext(arrivals)) == 50


async def test_closing_aborts_what_is_unfinished(ends: Ends) -> None:
    async with aclosing(ends.client.generate([request("a", LONG), request("b", 1)])) as arrivals:
        while "b" not in [token.request_id for token in await anext(arrivals)]:
            pass
    assert [tokens async for tokens in ends.client.generate([request("c", 1)])]
    assert ends.engine.aborted == ["a"]
    assert ends.engine.made["a"] < LONG


async def test_cancelling_aborts(ends: Ends) -> None:
    async def read() -> None:
        async with aclosing(ends.client.generate([request("a", LONG)])) as arrivals:
            async for _ in arrivals:
                pass

    reading = asyncio.create_task(read())
    while not ends.engine.made:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert [tokens async for tokens in ends.client.generate([request("c", 1)])]
    assert ends.engine.aborted == ["a"]


async def test_aborting_one_of_two_leaves_the_other(ends: Ends) -> None:
    seen: list[str] = []
    async for tokens in ends.client.generate([request("a", LONG), request("b", 3)]):
        seen += [token.request_id for token in tokens]
        ends.client.abort("a")
    assert seen.count("b") == 3
    assert ends.engine.aborted == ["a"]


async def test_a_refused_request_fails_the_call_and_aborts_the_rest(ends: Ends) -> None:
    with pytest.raises(RequestRefused, match="prompts of 0") as caught:
        async for _ in ends.client.generate([request("a", LONG), request("b", prompt=0)]):
            pass
    assert caught.value.param == "prompt"
    assert [tokens async for tokens in ends.client.generate([request("c", 1)])]
    assert ends.engine.aborted == ["a"]


async def test_a_dead_engine_fails_what_is_open_and_what_comes(ends: Ends) -> None:
    arrivals = ends.client.generate([request("a", LONG)])
    await anext(arrivals)
    ends.client._send(Add(request("b", prompt=666)))
    with pytest.raises(EngineDied, match="it failed: a bug"):
        async for _ in arrivals:
            pass
    assert ends.client.died.result() == "it failed: a bug"
    with pytest.raises(EngineDied):
        await anext(ends.client.generate([request("c")]))
