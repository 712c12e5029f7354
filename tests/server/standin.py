"""An engine without a model: it says its prompt again, byte by byte. Runs in a real engine process.

It is here for what a real model cannot be made to do on demand: die in a step, fail one sample, refuse, be slow.
"""

import argparse
import asyncio
import logging
import sys
import time

from core.config import EngineConfig
from core.contracts import RequestRecord, StepStats
from core.engine_info import EngineInfo
from core.errors import ConfigError, InvalidParameter, Overloaded, PromptTooLong
from core.outputs import Delta, Logprob
from core.plugins import PluginHost
from core.server.client import EngineClient, RestartPolicy
from core.server.options import ServerOptions
from core.server.run import Service

VOCAB = 260  # bytes and a few that stand for nothing
EOS = 256
MAX_LEN = 200


class ByteTokenizer:
    """One token a byte."""

    eos_token_ids = (EOS,)
    bos_token_id = None
    vocab_size = VOCAB
    has_chat_template = True

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return bytes(one for one in ids if one < 256).decode(errors="replace")

    def id_to_token(self, token_id):
        return f"<0x{token_id:02X}>" if token_id < 256 else "<eos>"

    def render_chat(self, messages, tools=None, add_generation_prompt=True, **options):
        if options.get("shout"):
            messages = [{**message, "content": message["content"].upper()} for message in messages]
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        return "|".join(lines) + ("|" if add_generation_prompt else "")


class Sample:
    def __init__(self, request, index):
        self.request, self.index, self.done = request, index, []
        self.arrival = time.monotonic()

    def next(self):
        """The prompt over and over; EOS where the prompt has a full stop."""
        params, prompt = self.request.params, self.request.prompt_ids
        token = prompt[len(self.done) % len(prompt)]
        token = EOS if token == ord(".") and not params.ignore_eos else token
        self.done.append(token)
        text = "" if token == EOS else bytes([token]).decode(errors="replace")
        finish, reason = self.finish(token, params)
        first = len(self.done) == 1 and params.prompt_logprobs is not None
        return Delta(
            self.request.id,
            self.index,
            [token],
            "" if reason is not None else text,
            None if params.logprobs is None else [entry(token, params.logprobs)],
            finish,
            reason,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=min(3, len(prompt) - 1),
            prompt_logprobs=[None, *(entry(one, params.prompt_logprobs) for one in prompt[1:])] if first else None,
        )

    def finish(self, token, params):
        if token == EOS:
            return "stop", None
        if token < 256 and chr(token) in params.stop:
            return "stop", chr(token)
        limit = params.max_tokens or MAX_LEN - len(self.request.prompt_ids)
        return ("length", None) if len(self.done) >= limit else (None, None)

    def record(self, reason):
        now = time.monotonic()
        return RequestRecord(
            f"{self.request.id}#{self.index}", reason, len(self.request.prompt_ids), 0, len(self.done), 0, 0.0,
            0.1 if self.done else None, now - self.arrival,
        )  # fmt: skip


def entry(token, count):
    """The chosen token is always the second best."""
    others = {(token + 1 + rank) % 256: Logprob(-0.5 - rank, 1 if rank == 0 else rank + 2) for rank in range(count)}
    return dict([(token, Logprob(-1.0, 2)), *list(others.items())[: max(1, count - 1) if count else 0]])


class StandIn:
    def __init__(self, config):
        self.pause = config.extra.get("pause", 0.0)  # seconds a step
        self.samples, self.stats = [], []
        self.resets = 0
        self.info = EngineInfo(
            "echo", "/models/echo", "standin", "none", "float32", "cpu", MAX_LEN, VOCAB, 10, 16, True, None,
            (("builtin", "0"),), (("echo", None),), "it is a test",
        )  # fmt: skip

    @property
    def has_work(self):
        return bool(self.samples)

    def add(self, request):
        text = bytes(one for one in request.prompt_ids if one < 256)
        if b"FULL" in text:
            raise Overloaded("The queue is full.")
        if b"BUG" in text:
            raise RuntimeError("add has a bug")
        if len(request.prompt_ids) + (request.params.max_tokens or 1) > MAX_LEN:
            raise PromptTooLong("Too long.", "prompt")
        if "§" in request.params.stop:
            raise InvalidParameter("No such stop.", "stop")
        self.samples += [Sample(request, index) for index in range(request.params.n)]

    def abort(self, request_id):
        self.stats += [sample.record("abort") for sample in self.samples if sample.request.id == request_id]
        self.samples = [sample for sample in self.samples if sample.request.id != request_id]

    def step(self):
        time.sleep(self.pause)
        if any(bytes(sample.request.prompt_ids[:5]) == b"CRASH" for sample in self.samples):
            raise RuntimeError("the model is broken")
        deltas = []
        for sample in list(self.samples):
            delta = sample.next()
            if bytes(sample.request.prompt_ids[:3]) == b"NAN" and len(sample.done) == 2:
                delta = Delta(sample.request.id, sample.index, finish_reason="error", stop_reason="no usable logits")
            deltas.append(delta)
            if delta.finish_reason:
                self.samples.remove(sample)
                self.stats.append(sample.record(delta.finish_reason))
        self.stats.append(StepStats(len(self.samples), 0, len(deltas), 0, len(deltas), 0, 9, 10, 0.001))
        return deltas

    def take_stats(self):
        taken, self.stats = self.stats, []
        return taken

    def reset_prefix_cache(self):
        self.resets += 1

    def close(self):
        self.samples = []


def build(config, resolved, hand_over):
    if config.extra.get("refuse"):
        raise ConfigError("This model cannot be served.")
    if config.extra.get("die_loading"):
        sys.exit(7)
    hand_over(None if config.skip_tokenizer_init else ByteTokenizer())
    return StandIn(config)


def make_client(restart=None, tokenizer=True, **extra):
    return EngineClient(
        EngineConfig(model="echo", extra=extra, skip_tokenizer_init=not tokenizer),
        PluginHost.load(),
        build=build,
        restart=restart or RestartPolicy(backoff=0.01),
        log_level="critical",
    )


def main():
    """A whole server in a process of its own, for signals."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--grace", type=float, default=30.0)
    given = parser.parse_args()
    logging.basicConfig(level="INFO")
    service = Service(make_client(pause=given.pause), ServerOptions(port=0, shutdown_grace=given.grace))
    sys.exit(asyncio.run(service.run()))


if __name__ == "__main__":
    main()
