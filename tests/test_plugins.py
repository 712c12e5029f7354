"""The plugin host: finds, checks, orders and names plugins. Fake ones are real distributions on a path of their own."""

import re
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from core import hookimpl
from core.config import EngineConfig
from core.contracts import Bid, Refusal
from core.errors import CheckpointError, ConfigError, CoreError, NoImplementation, PluginError
from core.plugin_checks import HOOKS
from core.plugins import PluginHost
from core.spec import ModelSpec

SPEC = ModelSpec(Path("/models/tiny"), "hf", {"model_type": "tiny"})
CONFIG = EngineConfig(device="cpu")
HEAD = "from core import hookimpl\nfrom core.contracts import Bid, Refusal\nCORE_API = (1, 0)\n"
BIDS = "@hookimpl\ndef resolve_model_impl(spec, options):\n    return Bid('{name}', 7, None)\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution that holds one plugin."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def install(name, source=None, distribution=None, version="1.2"):
        distribution = distribution or f"dist-{name}"
        module = f"fake_{re.sub('[^a-z0-9]', '_', distribution)}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source or HEAD + BIDS.format(name=name)))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[core_serve]\n{name} = {module}\n")
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def plugin(**hooks):
    """Make a plugin object of functions, by the names of their hooks."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


def bidder(*answers):
    return plugin(resolve_model_impl=lambda spec, options: list(answers))


def without_installed(**extra):
    """Load only the plugins given here and the core's own."""
    names = [one.name for one in PluginHost.load().plugins if one.name != "builtin"]
    return PluginHost.load(disable=names, extra=extra)


# ------------------------------------------------------------------------------------------------ finding


def test_an_installed_plugin_is_found_with_its_distribution_and_hooks(install):
    install("zebra")
    found = {one.name: one for one in PluginHost.load().plugins}["zebra"]
    assert (found.distribution, found.version, found.hooks) == ("dist-zebra", "1.2", ("resolve_model_impl",))
    assert found.api == "1.0"


def test_plugins_are_asked_in_the_order_of_their_names_and_the_builtin_ones_last(install):
    for name in ("zoo", "aardvark", "mole"):
        install(name)
    host = PluginHost.load()
    names = [one.name for one in host.plugins]
    assert names[:-1] == sorted(names[:-1])
    assert names[-1] == "builtin"
    asked = [plugin for plugin, _ in host._ask("resolve_model_impl", spec=SPEC, options=CONFIG)]
    assert [name for name in asked if name in ("zoo", "aardvark", "mole")] == ["aardvark", "mole", "zoo"]


def test_a_disabled_plugin_is_not_imported(install):
    module = install("broken", "raise RuntimeError('imported')")
    host = PluginHost.load(disable=["broken"])
    assert module not in sys.modules
    assert "broken" not in [one.name for one in host.plugins]
    assert host.disabled == ("broken",)


def test_an_unknown_name_to_disable_lists_what_is_installed(install):
    install("zebra")
    with pytest.raises(ConfigError, match=r"--disable-plugin zebar: .*Installed: .*zebra"):
        PluginHost.load(disable=["zebar"])


def test_the_core_itself_cannot_be_disabled():
    with pytest.raises(ConfigError, match="builtin"):
        PluginHost.load(disable=["builtin"])


# ------------------------------------------------------------------------------------------------ failing


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_library\n", "failed to import: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def broken(:\n", "failed to import: SyntaxError"),
        (HEAD + "@hookimpl\ndef resolve_model_imp(spec, options): ...\n", "Did you mean resolve_model_impl?"),
        (HEAD + "@hookimpl\ndef resolve_model_impl(spec, option): ...\n", "option"),
        (HEAD + "def resolve_model_impl(spec, options): ...\n", "without @hookimpl"),
        (HEAD, "implements no hook"),
        (HEAD + "@hookimpl(wrapper=True)\ndef on_step(stats):\n    yield\n", "wraps the hook on_step"),
        (HEAD.replace("(1, 0)", "None") + BIDS, "lacks `CORE_API = "),
        (HEAD.replace("(1, 0)", "'1.0'") + BIDS, "'1.0', which is not a pair"),
        (HEAD.replace("(1, 0)", "(1, 7)") + BIDS, "needs API 1.7, but this core-serve has API 1.0"),
        (HEAD.replace("(1, 0)", "(2, 0)") + BIDS, "needs API 2.0"),
        (HEAD + "CORE_API_RANGE = ((1, 0), (1, 4))\n" + BIDS, "both CORE_API and CORE_API_RANGE"),
        (HEAD.replace("API = (1, 0)", "API_RANGE = ((1, 4), (1, 0))") + BIDS, "ends before it starts"),
        (HEAD.replace("API = (1, 0)", "API_RANGE = (1, 4)") + BIDS, "the API version 1, which is not a pair"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_the_way_on(install, source, said):
    install("faulty", source, version="3.4")
    with pytest.raises(PluginError) as caught:
        PluginHost.load()
    message = str(caught.value)
    assert said in message
    assert "'faulty' (distribution dist-faulty 3.4)" in message
    assert "--disable-plugin faulty" in message
    PluginHost.load(disable=["faulty"])


def test_two_plugins_of_one_name_are_an_error_that_names_both_distributions(install):
    install("twin", distribution="one-twin", version="1.0")
    install("twin", distribution="other-twin", version="2.0")
    with pytest.raises(PluginError, match=r"one-twin 1\.0|other-twin 2\.0") as caught:
        PluginHost.load()
    assert "one-twin" in str(caught.value)
    assert "other-twin" in str(caught.value)


def test_a_plugin_may_not_take_the_builtin_name(install):
    install("builtin")
    with pytest.raises(PluginError, match="core's own plugin"):
        PluginHost.load()


def test_a_class_as_plugin_is_refused(install):
    module = install("classy", HEAD + "class Plugin:\n    @hookimpl\n    def on_step(self, stats): ...\n")
    Path(sys.path[0], "dist_classy-1.2.dist-info", "entry_points.txt").write_text(
        f"[core_serve]\nclassy = {module}:Plugin\n"
    )
    with pytest.raises(PluginError, match="is the class Plugin"):
        PluginHost.load()


@pytest.mark.parametrize(
    ("api", "stated", "fits"),
    [
        ((2, 3), "CORE_API = (2, 3)", True),
        ((2, 3), "CORE_API = (2, 4)", False),
        ((2, 3), "CORE_API = (1, 9)", True),
        ((3, 0), "CORE_API = (1, 9)", False),
        ((3, 0), "CORE_API_RANGE = ((1, 0), (2, 1))", True),
        ((2, 3), "CORE_API_RANGE = ((2, 0), (3, 0))", True),
    ],
)
def test_the_current_and_the_previous_major_are_loaded(install, monkeypatch, api, stated, fits):
    install("old", HEAD.replace("CORE_API = (1, 0)", stated) + BIDS.format(name="old"))
    monkeypatch.setattr("core.plugin_loading.API_VERSION", api)
    monkeypatch.setattr("core.builtin.CORE_API", api)
    disable = [name for name in entry_points(group="core_serve").names if name != "old"]
    if fits:
        assert "old" in [one.name for one in PluginHost.load(disable=disable).plugins]
    else:
        with pytest.raises(PluginError, match="'old'"):
            PluginHost.load(disable=disable)


# ------------------------------------------------------------------------------------------------ the resolved set


def test_a_worker_with_the_same_plugins_passes_the_check(install):
    install("zebra")
    here = PluginHost.load()
    PluginHost.load().check_resolved([list(pair) for pair in here.resolved])


def test_a_worker_with_other_plugins_is_told_both_sides(install):
    install("zebra")
    expected = PluginHost.load().resolved
    with pytest.raises(PluginError) as caught:
        PluginHost.load(disable=["zebra"]).check_resolved(expected)
    before, after = str(caught.value).split("Found:")
    assert "zebra 1.2" in before
    assert "zebra" not in after


# ------------------------------------------------------------------------------------------------ asking


def test_an_exception_of_a_plugin_goes_on_with_the_plugin_named():
    def fail(spec, options):
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError) as caught:
        without_installed(clumsy=plugin(resolve_model_impl=fail)).choose_model(SPEC, CONFIG)
    assert "raised by plugin 'clumsy' in its hook resolve_model_impl" in caught.value.__notes__


def test_the_first_answer_wins_and_nobody_else_is_asked():
    asked = []

    def opener(name, answer):
        return plugin(provide_checkpoint=lambda path, options: asked.append(name) or answer)

    host = without_installed(a=opener("a", None), b=opener("b", "opened by b"), c=opener("c", "opened by c"))
    assert host.open_checkpoint("/", CONFIG) == "opened by b"
    assert asked == ["a", "b"]


def test_a_path_that_does_not_exist_is_named_with_who_was_asked():
    with pytest.raises(CheckpointError, match=r"'/no/such/place'.*Asked: .*builtin"):
        PluginHost.load().open_checkpoint("/no/such/place", CONFIG)


def test_a_model_that_is_not_in_the_cache_says_how_to_get_it():
    with pytest.raises(CheckpointError, match=r"hf download nobody/nothing-at-all"):
        PluginHost.load().open_checkpoint("nobody/nothing-at-all", CONFIG)


def test_a_folder_without_config_lists_what_it_holds(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no config\.json\. It holds: readme\.txt"):
        PluginHost.load().open_checkpoint(str(tmp_path), CONFIG)


def test_a_file_that_nobody_opens_names_its_type(tmp_path):
    (tmp_path / "model.xyz").write_text("hello")
    with pytest.raises(CheckpointError, match=r"'\.xyz'"):
        PluginHost.load().open_checkpoint(str(tmp_path / "model.xyz"), CONFIG)


def test_several_bids_of_one_plugin_are_ranked_and_walked_down():
    tiers = bidder(Bid("t/slow", 10, None, family="t"), Refusal("no state"), Bid("t/fast", 30, None, family="t"))
    choice = without_installed(tiers=tiers).choose_model(SPEC, CONFIG)
    assert [bid.name for bid in choice.eligible] == ["t/fast", "t/slow"]
    assert choice.refusals == (("tiers", "no state"),)


def test_an_answer_that_is_no_bid_names_the_plugin():
    host = without_installed(odd=plugin(resolve_model_impl=lambda spec, options: "me"))
    with pytest.raises(PluginError, match=r"'odd' answered resolve_model_impl with 'me'"):
        host.choose_model(SPEC, CONFIG)


def test_attention_on_the_cpu_is_the_cpu_backend_with_the_reference_behind_it():
    choice = without_installed().choose_attention(SPEC, CONFIG)
    assert [bid.name for bid in choice.eligible] == ["cpu", "torch_reference"]
    assert choice.winner.bid.build().name == "cpu"


def test_the_attention_backend_asked_for_is_taken(monkeypatch):
    asked = EngineConfig(device="cpu", attention_backend="torch_reference")
    assert without_installed().choose_attention(SPEC, asked).winner.bid.name == "torch_reference"
    monkeypatch.setenv("CORE_ATTENTION_BACKEND", "torch_reference")
    assert without_installed().choose_attention(SPEC, CONFIG).winner.bid.name == "torch_reference"


def test_the_cpu_backend_declines_another_device_with_the_reason():
    choice = without_installed().choose_attention(SPEC, EngineConfig(device="cuda"))
    assert choice.winner.bid.name == ("triton" if find_spec("triton") else "torch_reference")
    assert "'cuda'" in choice.refusals[0][1]


def test_an_unknown_attention_backend_lists_those_that_there_are():
    with pytest.raises(NoImplementation, match=r"--attention-backend flash.*cpu.*torch_reference"):
        without_installed().choose_attention(SPEC, EngineConfig(device="cpu", attention_backend="flash"))


def test_a_format_without_a_tokenizer_says_what_to_do():
    with pytest.raises(CoreError, match="--skip-tokenizer-init"):
        without_installed().tokenizer(ModelSpec(Path("/m"), "odd", {}), CONFIG)


# ------------------------------------------------------------------------------------------------ quantization


def quantized(method):
    return ModelSpec(Path("/models/q"), "hf", {"model_type": "tiny", "quantization_config": {"quant_method": method}})


def claims(name, on_the_fly=False):
    method = SimpleNamespace(name=name, on_the_fly=on_the_fly)
    return plugin(provide_quant_method=lambda spec, options: method)


def test_a_plain_checkpoint_has_no_quant_method():
    assert without_installed().quant_method(SPEC, CONFIG) is None


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"quant_method": "zzz"}, "'zzz', and no installed plugin takes it. It is none of core-serve's own"),
        ({"bits": 4}, "names no quant_method"),
        ({"quant_method": "gguf"}, "give the .gguf file itself"),
    ],
)
def test_what_no_plugin_of_ours_can_read_is_not_said_to_be_one_install_away(stated, words):
    spec = replace(SPEC, config=SPEC.config | {"quantization_config": stated})
    with pytest.raises(ConfigError, match=words):
        without_installed().quant_method(spec, CONFIG)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("awq", "awq"),
        ("bitsandbytes", "bnb"),
        ("compressed-tensors", "compressed-tensors"),
        ("auto-round", "gptq"),
    ],
)
def test_a_quantization_that_nobody_takes_names_what_to_install(method, package):
    with pytest.raises(ConfigError, match=rf"'{method}'.*pip install core-serve-quant-{package}$"):
        without_installed().quant_method(quantized(method), CONFIG)


def test_a_quantization_asked_for_that_nobody_takes_is_an_error():
    with pytest.raises(ConfigError, match=r"--quantization asks for 'int3'"):
        without_installed().quant_method(SPEC, EngineConfig(quantization="int3"))


def test_a_format_of_files_that_the_checkpoint_is_not_in_is_an_error():
    with pytest.raises(ConfigError, match=r"--quantization awq is for checkpoints in that format, and /models/tiny is"):
        without_installed().quant_method(SPEC, EngineConfig(quantization="awq"))


@pytest.mark.parametrize("plugins", [{}, {"int": claims("int8", on_the_fly=True)}], ids=["nobody", "on the fly"])
def test_a_quantization_that_does_not_fit_the_checkpoints_own_is_an_error(plugins):
    host = without_installed(**plugins)
    with pytest.raises(ConfigError, match=r"--quantization int8 does not fit .*, which is quantized with 'awq'"):
        host.quant_method(quantized("awq"), EngineConfig(quantization="int8"))


def test_the_one_claim_takes_the_checkpoint():
    assert without_installed(q=claims("awq")).quant_method(quantized("awq"), CONFIG).name == "awq"


def test_two_claims_are_an_error_that_prefer_settles():
    host = without_installed(q1=claims("awq"), q2=claims("awq_fast"))
    with pytest.raises(PluginError, match=r"'q1' \(awq\) and 'q2' \(awq_fast\)"):
        host.quant_method(quantized("awq"), CONFIG)
    assert host.quant_method(quantized("awq"), EngineConfig(prefer=("q2",))).name == "awq_fast"


# ------------------------------------------------------------------------------------------------ registering


def test_a_plugin_adds_a_command_and_may_not_replace_one():
    cli = click.Group()
    without_installed(
        p=plugin(register_commands=lambda cli: cli.add_command(click.Command("hello")))
    ).register_commands(cli)
    assert "hello" in cli.commands
    again = without_installed(rival=plugin(register_commands=lambda cli: cli.add_command(click.Command("hello"))))
    with pytest.raises(PluginError, match=r"'rival' replaces the command 'hello'"):
        again.register_commands(cli)


def test_every_observer_sees_every_step():
    seen = []
    host = without_installed(
        one=plugin(on_step=lambda stats: seen.append(("one", stats))),
        two=plugin(
            on_step=lambda stats: seen.append(("two", stats)), on_request_finished=lambda record: seen.append(record)
        ),
    )
    host.on_step("stats")
    host.on_request_finished("record")
    assert seen == [("one", "stats"), ("two", "stats"), "record"]


def test_routes_of_plugins_are_added_to_the_app():
    from fastapi import FastAPI

    app = FastAPI()
    host = without_installed(p=plugin(register_routes=lambda app, engine: app.add_api_route("/extra", lambda: engine)))
    host.register_routes(app, "engine")
    assert "/extra" in app.openapi()["paths"]


def test_an_implementation_may_take_fewer_arguments_than_the_hook():
    host = without_installed(short=plugin(resolve_model_impl=lambda spec: Bid("short", 5, None)))
    assert host.choose_model(SPEC, CONFIG).winner.plugin == "short"


def test_tracing_prints_every_call_with_plugin_and_answer(monkeypatch, capsys):
    monkeypatch.setenv("CORE_TRACE_PLUGINS", "1")
    without_installed(shy=bidder(Refusal("not today")), bold=bidder(Bid("bold", 1, None))).choose_model(SPEC, CONFIG)
    lines = capsys.readouterr().err.splitlines()
    assert any("resolve_model_impl: shy -> " in line and "not today" in line for line in lines)
    assert any("resolve_model_impl: bold -> " in line for line in lines)


def test_the_core_implements_its_own_hooks():
    own = PluginHost.load().plugins[-1]
    assert own.hooks == ("provide_checkpoint", "provide_tokenizer", "provide_kernels", "resolve_attention_backend")
    assert set(own.hooks) <= set(HOOKS)
