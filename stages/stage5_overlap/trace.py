"""A picture of an engine's first steps: what Python did, what the GPU did, and what each request got of it.

Run `python -m minisgl.launch --stage 5 --trace out.json`, send requests, and open the file at
https://ui.perfetto.dev. It is written whenever the engine runs out of work and when the last step is done,
and holds all that was recorded. A request that comes while it is written (seconds, with a GPU) waits.

Until then the methods that a step goes through are wrapped. Their times come from the clock to which the
profiler of PyTorch converts its own, so both share an axis. It profiles kernels and copies only: to record
operators too would slow down the very code whose times are drawn.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stages.interface import Engine, Request, TokenOutput
from stages.stage2_paged.batch import Batch
from stages.stage2_paged.request_table import SampledToken
from stages.stage2_paged.runner import Computed, Pending

logger = logging.getLogger(__name__)

_Args = dict[str, Any] | None
_Row = tuple[int, int]  # process, thread; they differ, as a thread numbered as its process is shown apart
_HOST, _GPU, _REQUESTS = 1, 2, 3
_SCHEDULER, _LAUNCHES, _COPIES = (_HOST, 11), (_HOST, 12), (_HOST, 13)
_UPLOAD, _GRAPH_UPLOAD = "upload of inputs", "upload of a graph's inputs"


def trace_engine(engine: Any, path: Path, steps: int = 300) -> Engine:
    """The same engine, an OverlapEngine or PagedEngine without requests; its first batches are recorded.

    These are `steps`, from schedule to commit, and what happens meanwhile: with overlap, one launch more.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        path.write_text('{"traceEvents": []}')
    except OSError as error:
        raise ValueError(f"the trace cannot be written to {path}: {error.strerror}") from error
    _Recorder(engine, path, steps)
    traced: Engine = engine
    return traced


class _Recorder:
    """Wraps methods of an engine and its parts. Times are nanoseconds, in the file microseconds."""

    def __init__(self, engine: Any, path: Path, steps: int) -> None:
        self._engine, self._path = engine, path
        self._to_launch = self._to_wait = steps
        self._zero = time.time_ns()
        self._events: list[dict[str, Any]] = []
        self._rows: dict[str, _Row] = {}  # by request id, of requests that have not ended
        self._since: dict[_Row, int] = {}  # when a request came, or its last step was done
        self._streams: dict[_Row, int] = {}  # when a stream's last kernel was done
        self._waited = 0  # when the last batch was done
        self._launched: tuple[int, _Args, list[_Row]] = 0, None, []  # when the last launch began, and of whom
        self._profile: profile | None = None
        for process, name in ((_HOST, "host"), (_GPU, "GPU"), (_REQUESTS, "requests")):
            self._name((process, process), "process", name)
        for row, name in ((_SCHEDULER, "scheduler"), (_LAUNCHES, "launches"), (_COPIES, "host copies")):
            self._name(row, "thread", name)
        self._hooks: list[tuple[Any, str]] = []
        self._hook(engine, "add", self._add)
        self._hook(engine, "abort", self._abort)
        self._hook(engine, "step", self._step)
        self._hook(engine._scheduler, "schedule", partial(self._timed, _SCHEDULER, "schedule"))
        self._hook(engine._table, "commit", self._commit)
        self._hook(engine._runner, "forward", self._forward)
        self._hook(engine._runner, "sample", self._sample)
        self._hook(engine._runner._slots, "upload", partial(self._timed, _COPIES, _UPLOAD))
        if hasattr(engine._runner, "_upload"):  # a GraphRunner's, for batches that it replays
            self._hook(engine._runner, "_upload", partial(self._timed, _COPIES, _GRAPH_UPLOAD))

    def _hook(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        setattr(owner, name, partial(around, getattr(owner, name)))
        self._hooks.append((owner, name))

    def _add(self, add: Callable[[Request], None], request: Request) -> None:
        now = time.time_ns()
        add(request)
        row = self._rows[request.id] = (_REQUESTS, 11 + len(self._since))
        self._since[row] = now
        self._name(row, "thread", request.id)

    def _abort(self, abort: Callable[[str], None], request_id: str) -> None:
        abort(request_id)
        if request_id in self._rows:
            self._end(request_id, "abort")
            if not self._engine.has_work:
                self._write()

    def _step(self, step: Callable[[], list[TokenOutput]]) -> list[TokenOutput]:
        if not self._engine.has_work:
            return step()
        if self._profile is None and torch.cuda.is_available():
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        outputs = step()
        if not self._to_wait:
            while self._hooks:
                delattr(*self._hooks.pop())  # the class's method appears again
        if not self._hooks or not self._engine.has_work:
            self._write()
        return outputs

    def _forward(self, forward: Callable[[Batch], Computed], batch: Batch) -> Computed:
        start = time.time_ns()
        computed = forward(batch)
        args = {
            "decode rows": batch.num_decode,
            "prefill rows": len(batch.rows) - batch.num_decode,
            "tokens": sum(row.length for row in batch.rows),
            "graph": self._events[-1]["name"] == _GRAPH_UPLOAD,  # the last that it calls
        }
        requests = [self._rows[row.sequence.request.id] for row in batch.rows]  # before one of them may end
        self._launched = start, args, requests
        if batch.masked:
            self._span(_LAUNCHES, "launch", start, time.time_ns(), args)
        return computed

    def _sample(self, sample: Callable[[Computed], Pending], computed: Computed) -> Pending:
        """The second half of a launch; a span of its own where there is a commit between the two."""
        batch, begin = computed.batch, time.time_ns()
        pending = sample(computed)
        start, args, requests = self._launched
        span = ("sample", begin) if batch.masked else ("launch", start)
        self._span(_LAUNCHES, *span, time.time_ns(), None if batch.masked else args)
        if self._to_launch:
            self._to_launch -= 1
            pending.wait = partial(self._wait, pending.wait, batch, requests, start)  # type: ignore[method-assign]
        return pending

    def _wait(
        self, wait: Callable[[], list[SampledToken]], batch: Batch, requests: list[_Row], launched: int
    ) -> list[SampledToken]:
        sampled: list[SampledToken] = self._timed(_COPIES, "wait for tokens", wait)
        begin, end = max(launched, self._waited), time.time_ns()  # it computes when the one before is done
        for i, (request, row) in enumerate(zip(requests, batch.rows, strict=True)):
            if row.enters:  # for the first time, or again after it was preempted
                self._span(request, "waiting", self._since[request], begin)
            args = {"tokens": row.length, "start": row.start, "dropped": row.sequence.done}
            prompt = row.start < len(row.sequence.request.prompt)  # its last token computes as decode rows do
            name = "prefill" if prompt or i >= batch.num_decode else "decode"
            self._span(request, name, begin, end, args)
            self._since[request] = end
        self._waited = end
        self._to_wait -= 1
        return sampled

    def _commit(self, commit: Callable[..., list[TokenOutput]], *args: Any) -> list[TokenOutput]:
        outputs: list[TokenOutput] = self._timed(_SCHEDULER, "commit", commit, *args)
        for output in outputs:
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason)
        return outputs

    def _timed(self, row: _Row, name: str, method: Callable[..., Any], *args: Any) -> Any:
        start = time.time_ns()
        result = method(*args)
        self._span(row, name, start, time.time_ns())
        return result

    def _span(self, row: _Row, name: str, start: int, end: int, args: _Args = None) -> None:
        """A nanosecond short: the viewer drops spans that overlap on their row, be it by rounding."""
        times = {"ts": (start - self._zero) / 1000, "dur": max(0, end - start - 1) / 1000}
        self._event(row, "X", name, **times, args=args or {})

    def _end(self, request_id: str, reason: str) -> None:
        self._event(self._rows.pop(request_id), "i", reason, s="t", ts=(time.time_ns() - self._zero) / 1000)

    def _name(self, row: _Row, kind: str, name: str) -> None:
        self._event(row, "M", f"{kind}_name", args={"name": name})
        self._event(row, "M", f"{kind}_sort_index", args={"sort_index": row[1]})

    def _event(self, row: _Row, phase: str, name: str, **more: Any) -> None:
        self._events.append({"ph": phase, "pid": row[0], "tid": row[1], "name": name, **more})

    def _write(self) -> None:
        """Also ends the profile, if there is one; the next step begins another."""
        try:
            if self._profile is not None:
                self._profile.stop()  # waits for the GPU
                with tempfile.TemporaryDirectory() as folder:
                    self._profile.export_chrome_trace(f"{folder}/gpu.json")
                    self._add_gpu(json.loads(Path(folder, "gpu.json").read_text()))
                self._profile = None
            self._events.sort(key=_time)
            self._path.write_text(json.dumps({"traceEvents": self._events}))
        except OSError as error:  # no reason to stop serving
            logger.error("the trace could not be written to %s: %s", self._path, error.strerror)

    def _add_gpu(self, exported: dict[str, Any]) -> None:
        """The kernels and copies of the profiler's own trace.

        A kernel may begin before its stream's last one ends, to wait for it there; it is drawn from that end.
        """
        base = int(exported.get("baseTimeNanoseconds", 0))
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        for event in sorted((e for e in exported["traceEvents"] if e.get("cat") in kinds), key=_time):
            row, start = (_GPU, int(event["tid"])), base + round(event["ts"] * 1000)
            if row not in self._streams:
                self._name(row, "thread", f"stream {row[1]}")
            end = start + round(event["dur"] * 1000)
            start = max(start, self._streams.get(row, 0))
            end = self._streams[row] = max(start, end)
            args = {key: value for key, value in event["args"].items() if key in ("grid", "block", "bytes")}
            self._span(row, event["name"], start, end, args)


def _time(event: dict[str, Any]) -> float:
    return float(event.get("ts", 0))
