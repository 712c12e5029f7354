"""The profile: every part is found, nothing else changes, and nothing of it stays."""

import pytest

from core.bench.offline import run_requests
from core.bench.profile import Profile, Profiler
from core.bench.profile_parts import ATTENTION, BATCH, LINEARS, PARTS, SAMPLING, SCHEDULE, SMALL, hooks_of
from core.errors import ConfigError
from core.request import ClientRequest
from core.sampling_params import SamplingParams
from core.testing import tiny_checkpoint

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def profiled(engine):
    profile = Profile()
    with Profiler(engine) as profiler:
        run_requests(engine, PROMPTS, 4, 2, lambda step: profile.add(profiler.take()))
    return profile


def answers(engine):
    found = {"a": [], "b": []}
    for name, prompt in zip(found, PROMPTS, strict=True):
        engine.add(ClientRequest(name, prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)))
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.token_ids
    return found


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_every_part_of_a_llama_is_found(make_engine, impl):
    profile = profiled(make_engine(model_impl=impl))
    assert [part for part in PARTS if not profile.seconds[part] > 0] == []
    assert sum(profile.share(part) for part in PARTS) == pytest.approx(1)


def test_a_screened_head_counts_as_a_linear(make_engine, tmp_path, monkeypatch):
    screen = pytest.importorskip("core_cpu_kernels.screen", reason="not installed where there is no C++ compiler")
    monkeypatch.setattr(screen, "LEAST_NUMBERS", 0)
    engine = make_engine(tiny_checkpoint("llama", tmp_path, vocab_size=3000))
    assert ("highest", LINEARS) in [(hook.name, hook.part) for hook in hooks_of(engine)]


def test_a_model_that_keeps_its_own_cache_has_its_attention_found_too(make_engine, tmp_path):
    folder = tiny_checkpoint("deepseek_v3", tmp_path)
    engine = make_engine(folder)
    profile = profiled(engine)
    for part in (SCHEDULE, BATCH, LINEARS, ATTENTION, SMALL, SAMPLING):
        assert profile.seconds[part] > 0, part


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_answers_are_the_same_under_the_profile(make_engine, impl):
    engine = make_engine(model_impl=impl)
    wanted = answers(engine)
    engine.reset_prefix_cache()
    with Profiler(engine):
        assert answers(engine) == wanted


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_afterwards_nothing_of_it_is_left(make_engine, impl):
    engine = make_engine(model_impl=impl)
    before = [(hook.name, vars(hook.owner).get(hook.name)) for hook in hooks_of(engine)]
    with Profiler(engine):
        assert "step" in vars(engine)
    assert [(hook.name, vars(hook.owner).get(hook.name)) for hook in hooks_of(engine)] == before
    assert "step" not in vars(engine)


def test_an_error_inside_a_part_ends_the_profile_as_well(make_engine):
    engine = make_engine()
    with pytest.raises(RuntimeError, match="in between"), Profiler(engine):
        raise RuntimeError("in between")
    assert "step" not in vars(engine)


def test_the_time_of_a_part_inside_another_is_counted_once(make_engine):
    engine = make_engine()
    profile = Profile()
    measured = []
    with Profiler(engine) as profiler:

        def watch(step):
            measured.append(step.seconds)
            profile.add(profiler.take())

        run_requests(engine, PROMPTS, 4, 2, watch)
    assert profile.total <= sum(measured)
    assert profile.total > 0.5 * sum(measured)


def test_the_profile_says_what_it_costs_itself(make_engine):
    engine = make_engine()
    profiler = Profiler(engine)
    assert 0 < profiler.seconds_per_call < 1e-3
    profile = Profile(seconds_per_call=profiler.seconds_per_call)
    with profiler:
        run_requests(engine, PROMPTS, 4, 2, lambda step: profile.add(profiler.take()))
    assert profile.calls > profile.steps * 5
    assert 0 < profile.overhead < 1


def test_a_device_that_computes_behind_pythons_back_is_refused(make_engine):
    from dataclasses import replace

    engine = make_engine()
    engine.info = replace(engine.info, device="cuda")
    with pytest.raises(ConfigError, match="Use torch's own profiler there"):
        Profiler(engine)
