"""Passes and rules of modules outside the package: where they go, that they run, and what is said of what is wrong."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import expecttest
import pytest
import torch
from torch import Tensor, nn

import spcompile
from spcompile.diagnostics import IllegalOption, IllegalPlugin
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes_api import Pass
from spcompile.program import plugins
from spcompile.program.plugins import plugin_identities, with_plugins
from spcompile.sharding.rules import rule as rule_module

PREFIX = """
from dataclasses import dataclass
from typing import ClassVar
import torch
import torch.fx as fx
from spcompile.passes_api import Context, Pass, Stage
"""
# A negation of a negation is what was negated.
PASS = """
@dataclass(frozen=True)
class {kind}(Pass):
    name: ClassVar[str] = "{name}"
    stage: ClassVar[Stage] = Stage.{stage}

    def run(self, gm, ctx):
        {run}
"""
FOLD = """count = 0
        for outer in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default):
            inner = outer.args[0]
            if inner.target is torch.ops.aten.neg.default:
                outer.replace_all_uses_with(inner.args[0])
                count += 1
        gm.graph.eliminate_dead_code()
        return count"""
Write = Callable[..., str]


def a_pass(kind: str = "Fold", name: str = "fold", stage: str = "GLOBAL", run: str = "return 0") -> str:
    return PREFIX + PASS.format(kind=kind, name=name, stage=stage, run=run)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module that can be imported, and gives its name. What it registers is forgotten behind the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rule_module, "_REGISTRY", dict(rule_module._REGISTRY))
    monkeypatch.setattr(plugins, "_loaded", set())
    plugins._load.cache_clear()
    plugins._installed.cache_clear()
    before = set(sys.modules)

    def file(text: str, name: str = "its_plugin") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    yield file
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    plugins._load.cache_clear()
    plugins._installed.cache_clear()


def names_of(passes: tuple[Pass, ...]) -> list[str]:
    return [p.name for p in passes]


def refusal(write: Write, text: str) -> str:
    name = write(text)
    with pytest.raises(IllegalPlugin) as caught:
        with_plugins(PIPELINE, Options(plugins=[name]))
    return str(caught.value)


class Negated(nn.Module):
    """Attention on a value that was negated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_B1SD = self.project(x_BSD)[:, None].neg().neg()
        y_B1SD = nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True)
        return y_B1SD.square().mean()


def test_without_plugins_the_pipeline_is_as_it_was() -> None:
    assert with_plugins(PIPELINE, Options()) == PIPELINE


def test_passes_go_behind_those_that_they_name_in_their_order(write: Write) -> None:
    text = a_pass("A", "a") + PASS.format(kind="B", name="b", stage="GLOBAL", run="return 0")
    one = write(text + 'PASSES = [("recognize-loss", A()), ("recognize-loss", B())]', "one")
    two = write(
        a_pass("C", "c")
        + PASS.format(kind="D", name="d", stage="SCHEDULE", run="return 0")
        # behind what another plugin brings, and the first of all
        + PASS.format(kind="E", name="e", stage="GLOBAL", run="return 0")
        + 'PASSES = [("b", C()), ("overlap-collectives", D()), ("capture", E())]',
        "two",
    )
    found = names_of(with_plugins(PIPELINE, Options(plugins=[one, two, one])))
    at = found.index("recognize-loss")
    assert found[at : at + 5] == ["recognize-loss", "a", "b", "c", "widen-sums"]
    assert found[0] == "e"
    assert found[found.index("overlap-collectives") + 1] == "d"
    assert [name for name in found if name not in "abcde"] == names_of(PIPELINE)


def test_a_pass_runs_has_options_and_keeps_the_meaning(write: Write) -> None:
    name = write(a_pass(run=FOLD) + 'PASSES = [("recognize-loss", Fold())]')
    inputs = (torch.randn(2, 8, 4, dtype=torch.float64),)
    model = Negated().double()
    plan = spcompile.explain(model, inputs, {"cp": 2}, plugins=[name])
    assert [row.rewrites for row in plan.passes if row.name == "fold"] == [1]
    assert "aten.neg" in plan.graph("recognize-loss")
    assert "aten.neg" not in plan.graph("fold")
    assert spcompile.verify(model, inputs, {"cp": 2}, plugins=name).ok
    without = spcompile.explain(model, inputs, {"cp": 2}, plugins=[name], passes={"fold": False})
    assert "fold" not in [row.name for row in without.passes]


RULE = """
import torch
from spcompile.sharding.rules.elementwise import pointwise
from spcompile.sharding.rules.rule import register

@torch.library.custom_op("its_lib::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, grad: grad * 2)

@register("its_lib::twice")
def rule(node):
    return {made}
"""


class Twice(nn.Module):
    """An op that the package does not know, in front of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_B1SD = torch.ops.its_lib.twice(self.project(x_BSD))[:, None]
        return nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).square().mean()


@pytest.fixture
def library() -> Iterator[None]:
    """Forgets the ops of `its_lib`, so that another test may define them."""
    yield
    from torch._library import custom_ops

    for name in [name for name in custom_ops.OPDEFS if name.startswith("its_lib::")]:
        custom_ops.OPDEFS.pop(name)._lib._destroy()


@pytest.mark.usefixtures("library")
def test_a_rule_shards_an_op(write: Write) -> None:
    name = write(RULE.format(made="pointwise(node)"))
    inputs = (torch.randn(2, 8, 4, dtype=torch.float64),)
    plan = spcompile.explain(Twice().double(), inputs, {"cp": 2}, plugins=[name])
    assert not [r for r in plan.remarks if r.code == "SPR102"]
    assert spcompile.verify(Twice().double(), inputs, {"cp": 2}, plugins=[name]).ok


@pytest.mark.thinned(2)
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("made", "told"),
    [("1 / 0", "failed: ZeroDivisionError"), ("[]", "gives a list"), ("OpRule(((),), ((),), {})", "dims")],
)
def test_a_rule_that_is_wrong_is_named_with_the_users_line(write: Write, made: str, told: str) -> None:
    name = write("from spcompile.sharding.rules.rule import OpRule\n" + RULE.format(made=made))
    with pytest.raises(IllegalPlugin, match=rf"its_plugin\.rule of its_lib\.twice.* {told}") as caught:
        spcompile.explain(Twice(), (torch.randn(2, 8, 4),), {"cp": 2}, plugins=[name])
    assert caught.value.where is not None
    assert "twice(self.project" in str(caught.value)


def test_rules_of_a_module_that_fails_are_not_kept(write: Write) -> None:
    known = len(rule_module.registered_rules())
    text = 'from spcompile.sharding.rules.rule import register\nregister("its_lib::gone")(print)\nPASSES = 3'
    assert "its PASSES are a int" in refusal(write, text)
    assert len(rule_module.registered_rules()) == known


def test_a_second_rule_for_an_op_is_refused(write: Write) -> None:
    text = (
        "import torch\nfrom spcompile.sharding.rules.rule import register\nregister(torch.ops.aten.neg.default)(print)"
    )
    assert "aten.neg.default has a rule already: elementwise" in refusal(write, text)


class TestWhatIsWrong(expecttest.TestCase):
    """One case a line: what a module holds, and what is said."""

    @pytest.fixture(autouse=True)
    def _write(self, write: Write) -> None:
        self.write = write

    def told(self, text: str) -> str:
        found = refusal(self.write, text)
        return "\n".join(line[:100] for line in found.splitlines())

    def test_no_such_module(self) -> None:
        with pytest.raises(IllegalPlugin) as caught:
            with_plugins(PIPELINE, Options(plugins="no_such.module"))
        self.assertExpectedInline(
            str(caught.value),
            """\
SP107 illegal plugin: plugin 'no_such.module' cannot be imported: ModuleNotFoundError: No module named 'no_such'
  legal: the name of a module that Python finds, as `package.module`, and that can be imported""",
        )

    def test_a_module_that_fails(self) -> None:
        found = self.told("x = 1\ny = x / 0")
        assert "importlib" not in found
        assert "y = x / 0" in found
        self.assertExpectedInline(
            found.splitlines()[0][:100],
            """SP107 illegal plugin: plugin 'its_plugin' cannot be imported: ZeroDivisionError: division by zero""",
        )

    def test_nothing_in_it(self) -> None:
        self.assertExpectedInline(
            self.told("PASES = []"),
            """\
SP107 illegal plugin: plugin 'its_plugin': it has no PASSES and registers no sharding rule
  legal: PASSES = [("name of a pass", the pass that goes behind it), ...], or sharding rules that it""",
        )

    def test_no_pair(self) -> None:
        self.assertExpectedInline(
            self.told(a_pass() + 'PASSES = ["recognize-loss"]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': PASSES[0] is 'recognize-loss'
  legal: PASSES = [("name of a pass", the pass that goes behind it), ...], or sharding rules that it""",
        )

    def test_a_class(self) -> None:
        self.assertExpectedInline(
            self.told(a_pass() + 'PASSES = [("recognize-loss", Fold)]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': PASSES[0] has the class Fold, not a pass of it
  legal: Fold()""",
        )

    def test_no_pass(self) -> None:
        self.assertExpectedInline(
            self.told('PASSES = [("recognize-loss", 3)]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': PASSES[0] has a int, which is no Pass
  legal: PASSES = [("name of a pass", the pass that goes behind it), ...], or sharding rules that it""",
        )

    def test_no_name(self) -> None:
        text = PREFIX + "@dataclass(frozen=True)\nclass P(Pass):\n    pass\n"
        self.assertExpectedInline(
            self.told(text + 'PASSES = [("recognize-loss", P())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': P has no name
  legal: a str as `name`""",
        )

    def test_no_dataclass(self) -> None:
        text = a_pass().replace("@dataclass(frozen=True)", "")
        self.assertExpectedInline(
            self.told(text + 'PASSES = [("recognize-loss", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': Fold is no dataclass of its own
  legal: @dataclass(frozen=True) above it""",
        )

    def test_a_name_that_is_taken(self) -> None:
        self.assertExpectedInline(
            self.told(a_pass(name="lower") + 'PASSES = [("capture", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': there is a pass 'lower' already
  legal: a name of its own""",
        )

    def test_behind_what_is_not_there(self) -> None:
        self.assertExpectedInline(
            self.told(a_pass() + 'PASSES = [("recognise-loss", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': fold is to stand behind 'recognise-loss', which is no pas
  legal: capture, recognize-softmax, recognize-attention, recognize-mask, recognize-likelihood, reco""",
        )

    def test_a_stage_that_is_over(self) -> None:
        self.assertExpectedInline(
            self.told(a_pass() + 'PASSES = [("share-tile-tables", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': fold is of stage global
  legal: stage local or schedule behind share-tile-tables""",
        )

    def test_a_stage_that_has_not_begun(self) -> None:
        text = a_pass(stage="SCHEDULE") + 'PASSES = [("recognize-loss", Fold())]'
        self.assertExpectedInline(
            self.told(text),
            """\
SP107 illegal plugin: plugin 'its_plugin': fold is of stage schedule
  legal: stage global behind recognize-loss""",
        )

    def test_before_what_it_says_it_is_behind(self) -> None:
        text = a_pass().replace("    def run", '    after: ClassVar[frozenset] = frozenset({"lower"})\n\n    def run')
        self.assertExpectedInline(
            self.told(text + 'PASSES = [("recognize-loss", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': fold behind recognize-loss would run before lower
  legal: what its `after` says""",
        )

    def test_it_leaves_a_stage(self) -> None:
        text = a_pass().replace("    def run", "    leaves: ClassVar[Stage] = Stage.LOCAL\n\n    def run")
        self.assertExpectedInline(
            self.told(text + 'PASSES = [("recognize-loss", Fold())]'),
            """\
SP107 illegal plugin: plugin 'its_plugin': fold leaves another stage behind
  legal: leaves = None: shapes change in `lower`""",
        )


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("raise KeyError('bias')", "pass fold of its_plugin failed: KeyError: 'bias'"),
        ("return None", "pass fold of its_plugin returns None as its number of rewrites"),
        (FOLD.replace("return count", "return 0"), "returns 0 as its number of rewrites, and the graph has changed"),
    ],
)
def test_a_pass_that_fails_or_counts_wrongly(write: Write, run: str, told: str) -> None:
    name = write(a_pass(run=run) + 'PASSES = [("recognize-loss", Fold())]')
    with pytest.raises(IllegalPlugin) as caught:
        spcompile.explain(Negated(), (torch.randn(2, 8, 4),), {"cp": 2}, plugins=[name])
    assert told in str(caught.value)


@pytest.mark.parametrize("value", [3, "a b", ["a", 3], {"a": 1}, ["a..b"]])
def test_what_names_no_modules(value: object) -> None:
    with pytest.raises(IllegalOption, match="plugins="):
        Options.parse({"plugins": value})


def test_text_names_several(write: Write) -> None:
    assert Options(plugins="a,b.c,a").plugins == ("a", "b.c")


def test_the_source_is_part_of_what_ranks_and_caches_compare(write: Write, tmp_path: Path) -> None:
    name = write(a_pass() + 'PASSES = [("recognize-loss", Fold())]')
    with_plugins(PIPELINE, Options(plugins=[name]))
    before = dict(plugin_identities())
    assert set(before) == {name}
    assert before[name]
    write(a_pass(run="return 1 - 1") + 'PASSES = [("recognize-loss", Fold())]')
    assert plugin_identities() != before


def test_installed_packages_bring_theirs(write: Write, tmp_path: Path) -> None:
    name = write(a_pass() + 'PASSES = [("recognize-loss", Fold())]')
    folder = tmp_path / "its_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: its-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[spcompile.plugins]\nfold = {name}\n")
    assert "fold" in names_of(with_plugins(PIPELINE, Options()))
    assert "fold" in names_of(with_plugins(PIPELINE, Options(plugins=[name])))
