"""Answers for the page while it stays usable: quick ones in a thread, slow ones in a process that can be ended.

A model's own code takes seconds and a lock that every other answer needs, and whatever a stranger's options make slow
must have an end: so only an inference by formula with usual options is answered in the page's own process.
"""

import asyncio
import multiprocessing
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock, Timer
from typing import Any, Final

from hfvram.answer.course import Course, course_of
from hfvram.answer.curve import Point, curve_of
from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.answer.supported import by_code
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.web.asked import Asked

LIMIT_SECONDS: Final = 180.0
"""The longest that one answer may take."""
LOOK_SECONDS: Final = 0.02
TELL_SECONDS: Final = 0.5
"""So often a visitor is told how long it has taken."""
QUICK: Final = frozenset(("ctx", "batch", "quant", "engine", "gpu", "dtype", "attention", "padding", "kernels"))
"""Options with which an inference takes milliseconds, whatever their value."""
WARM_SECONDS: Final = 15.0
THREADS: Final = 16
END: Final = "end"
PRELOAD: Final = (
    "hfvram.answer.course",
    "hfvram.answer.curve",
    "hfvram.memory.exact.simulate",
    "torch",
    "transformers",
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing yet, for so many seconds; `queued` while others' answers come first."""

    seconds: float
    queued: bool


@dataclass(frozen=True, slots=True)
class Pictures:
    """What is drawn beside an answer, one or both: memory over contexts, and through a training step."""

    curve: tuple[Point, ...]
    course: Course | None


Step = Waiting | Estimate | Pictures


class Runner:
    """Answers everybody. `stop` ends what one visitor waits for."""

    def __init__(self) -> None:
        ways = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
        if "forkserver" in ways:
            self._context.set_forkserver_preload(list(PRELOAD))
        self._threads = ThreadPoolExecutor(THREADS, "answer")
        self._slots = asyncio.Semaphore(max(1, os.cpu_count() or 1))
        self._models = RecentModels()
        self._stopped: dict[str, asyncio.Event] = {}

    def warm(self) -> None:
        """Soon start what answers slow questions, so that the first of them need not wait for its imports; not at
        once, when the first visitor's page is made."""
        if self._context.get_start_method() == "forkserver":
            from multiprocessing.forkserver import ensure_running

            timer = Timer(WARM_SECONDS, ensure_running)
            timer.daemon = True
            timer.start()

    def stop(self, visitor: str) -> bool:
        """Whether there was something to end."""
        if event := self._stopped.get(visitor):
            event.set()
        return event is not None

    async def answer(self, asked: Asked, visitor: str) -> AsyncGenerator[Step, None]:
        """The estimate, then pictures; `Waiting` before it. Ends early where it is stopped. Raises `HfvramError`."""
        request = asked.request
        if not asked.model:
            raise HfvramError("usage", "which model? An id of the Hub, as in mistralai/Mixtral-8x7B")
        self.stop(visitor)
        self._stopped[visitor] = stopped = asyncio.Event()
        try:
            quick = is_quick(asked, request)
            if quick:
                async with aclosing(self._in_thread(asked)) as steps:
                    async for step in steps:
                        quick = step is not None
                        if step is not None:
                            yield step
            if not quick:
                async with aclosing(self._in_process(asked, stopped)) as steps:
                    async for step in steps:
                        yield step
        finally:
            if self._stopped.get(visitor) is stopped:
                del self._stopped[visitor]

    async def _in_thread(self, asked: Asked) -> AsyncGenerator[Step | None, None]:
        """The steps; or None where the model turns out to have no formula."""
        loop, start = asyncio.get_running_loop(), time.monotonic()
        steps = quick_work(asked, self._models.session(asked.model))
        while True:
            coming = asyncio.ensure_future(loop.run_in_executor(self._threads, next, steps, END))
            while not coming.done():
                await asyncio.wait({coming}, timeout=TELL_SECONDS)
                if not coming.done():
                    yield Waiting(time.monotonic() - start, False)
            try:
                step = coming.result()
            except HfvramError:
                self._models.forget(asked.model)
                raise
            if isinstance(step, str):
                return
            yield step

    async def _in_process(self, asked: Asked, stopped: asyncio.Event) -> AsyncGenerator[Step, None]:
        start = time.monotonic()
        while True:
            if stopped.is_set():
                return
            try:
                await asyncio.wait_for(self._slots.acquire(), TELL_SECONDS)
                break
            except TimeoutError:
                yield Waiting(time.monotonic() - start, True)
        try:
            start = told = time.monotonic()
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_send, args=(theirs, asked), daemon=True)
            await asyncio.to_thread(process.start)
            theirs.close()
            answered = False
            try:
                while not stopped.is_set():
                    if ours.poll():
                        try:
                            step = ours.recv()
                        except EOFError:  # it ended: well after its last step, badly before its first
                            if not answered:
                                raise HfvramError("io", "the answer's process ended before it had one") from None
                            return
                        if isinstance(step, HfvramError):
                            raise step
                        answered = True
                        yield step
                        continue
                    now = time.monotonic()
                    if now - start > LIMIT_SECONDS:
                        message = f"no answer within {LIMIT_SECONDS:.0f} s: the command line has no such limit"
                        raise HfvramError("io", message)
                    if now - told > TELL_SECONDS:
                        told = now
                        yield Waiting(now - start, False)
                    await asyncio.sleep(LOOK_SECONDS)
            finally:
                ours.close()
                process.kill()
                await asyncio.to_thread(process.join)
        finally:
            self._slots.release()


class RecentModels:
    """A session for each of the models asked for lately, so that a slider that moves asks the Hub nothing."""

    MOST, SECONDS = 64, 300.0

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: OrderedDict[str, tuple[float, Session]] = OrderedDict()

    def session(self, model: str) -> Session:
        """The model's, if it is no older than some minutes: what failed may work again, what was pushed is seen."""
        now = time.monotonic()
        with self._lock:
            since, session = self._known.pop(model, (-self.SECONDS, None))
            if session is None or now - since >= self.SECONDS:
                since, session = now, Session(local=False)
            self._known[model] = since, session
            while len(self._known) > self.MOST:
                self._known.popitem(last=False)
        return session

    def forget(self, model: str) -> None:
        """A failure is not kept."""
        with self._lock:
            self._known.pop(model, None)


def is_quick(asked: Asked, request: Request) -> bool:
    """Whether it takes milliseconds."""
    return request.mode == "inference" and not by_code(request) and QUICK.issuperset(asked.options)


def work(asked: Asked, session: Session) -> Iterator[Step]:
    """The answer, then its pictures."""
    request = asked.request
    estimate = session.estimate(asked.model, request, **asked.source)
    yield estimate
    model = session.model(asked.model, request, **asked.source)
    yield Pictures(curve_of(model, estimate.request), None)
    if found := course_of(model, estimate.request):
        yield Pictures((), found)


def quick_work(asked: Asked, session: Session) -> Iterator[Step | None]:
    """The same by formula; None where only the model's own code, or the code of one of its parts, would do."""
    request = asked.request.with_(method="formula")
    try:
        model = session.model(asked.model, request, **asked.source)
    except HfvramError as error:
        if error.kind != "unknown_architecture":
            raise
        yield None
        return
    if model.components or not model.architecture.closed_form:
        yield None
        return
    estimate = session.estimate(asked.model, request, **asked.source)
    yield estimate
    yield Pictures(curve_of(model, estimate.request), None)


def _send(pipe: Connection, asked: Asked) -> None:
    """In a process of its own: each step as it comes, or why there is none."""
    try:
        for step in work(asked, Session(local=False)):
            pipe.send(step)
    except HfvramError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(HfvramError("io", f"internal error, {type(error).__name__}: {error}"))
    pipe.close()
