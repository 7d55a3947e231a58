"""The page of a plan: its data, what is escaped, and, where there is a Chromium, what it does when it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Tab, browser
from explained import plan_of

from spcompile.machine.host import cores
from spcompile.machine.mesh import MeshShape
from spcompile.report.mesh_picture import mesh_picture
from spcompile.report.page_data import graph_rows, packed, source_lines, unpacked
from spcompile.report.plan import Plan

IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def saved(plan: Plan, folder: Path) -> Path:
    file = folder / "plan.html"
    plan.save(str(file))
    return file


def data_of(text: str) -> dict:
    found = re.search(r'id="data">([A-Za-z0-9+/=]*)</script>', text)
    assert found is not None
    return unpacked(found[1])


def lines_of(data: dict, graph: dict) -> list[str]:
    runs = graph["lines"]
    return [data["lines"][runs[i] + k] for i in range(0, len(runs), 2) for k in range(runs[i + 1])]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(2, layers=6, attention="ring")


@pytest.mark.thinned(6)
def test_the_page_holds_every_graph(plan: Plan, tmp_path: Path) -> None:
    data = data_of(saved(plan, tmp_path).read_text())
    assert [graph["name"] for graph in data["graphs"]] == list(plan.graphs)
    for graph in data["graphs"]:
        lines = plan.graph(graph["name"]).splitlines()
        assert lines_of(data, graph) == [line for line in lines if not line.startswith("# stage ")]
    by_name = {graph["name"]: graph for graph in data["graphs"]}
    for name, before in (("lower", "insert-reshards"), ("overlap-collectives", "lower-collectives")):
        assert data["graphs"][by_name[name]["before"]]["name"] == before
    assert by_name["lower"]["changed"] < len(plan.graph("lower").splitlines()) * 1.5
    assert max(count for _, _, count in by_name["capture"]["folds"]) >= 5


@pytest.mark.thinned(6)
def test_figures_of_the_page_are_those_of_the_plan(plan: Plan, tmp_path: Path) -> None:
    text = saved(plan, tmp_path).read_text()
    data = data_of(text)
    assert len(data["sends"]["forward"]) == sum(row.count for row in plan.collectives if row.phase == "forward")
    for phase in plan.predicted.phases:
        events = data["events"][phase.phase]
        assert sum(ms for ms, at in zip(events["ms"], events["stream"], strict=True) if at == 0) == pytest.approx(
            1e3 * phase.compute, rel=0.02
        )
    assert f"{plan.memory.phases[1].phase}:" in text
    assert "explained.py" in data["sources"]
    assert any("scaled_dot_product" in line for line in data["sources"]["explained.py"].values())


def test_nothing_is_remote_and_everything_is_escaped(tmp_path: Path) -> None:
    plan = plan_of(2, attention="ring")
    plan.model = HOSTILE
    plan.graphs["capture"] += f"# {HOSTILE}\n"
    text = saved(plan, tmp_path).read_text()
    assert text.count("<script") == 2
    assert "<img" not in text
    assert not re.search(
        r"https?:|\bsrc=|\bhref=|@import|url\(", re.sub(r'id="data">[^<]*', "", text).replace("src=x", "")
    )
    assert text.isascii() or not set(text) - set(map(chr, range(32, 127))) - {"\n"}


def test_what_is_packed_is_the_same_again() -> None:
    data = {"a": ["</script>", "\u2028"], "b": [1, None]}
    assert unpacked(packed(data)) == data
    assert re.fullmatch("[A-Za-z0-9+/=]+", packed(data))


def test_a_graph_that_autograd_made_has_none_before_it() -> None:
    texts = {"capture": "a\n", "lower": "a\nb\n", "late": "c\n", "forward": "c\n", "backward": "d\n"}
    rows = {graph["name"]: graph for graph in graph_rows(texts, {"late"})["graphs"]}
    assert [graph["before"] for graph in rows.values()] == [None, 0, None, 2, None]
    assert rows["lower"]["rows"] == [0, 0, 1, -1, 1, 1]


def test_lines_of_files_that_python_does_not_know_are_those_of_the_graph() -> None:
    graphs = {"capture": '# gone.py:7  y = x + 1\ny: "f32[]" = aten.add(x, 1)\n'}
    assert source_lines(graphs, {"gone.py": "/no/such/gone.py"}) == {"gone.py": {7: "y = x + 1"}}
    assert source_lines(graphs, {}) == {"gone.py": {7: "y = x + 1"}}


def test_the_mesh_says_who_holds_what() -> None:
    text = mesh_picture(MeshShape.of({"cp": 2, "tp": 2}), "zigzag", 30)
    assert text.count("<td") == 4
    assert text.count("tokens 0-7 and 24-29") == 2
    assert re.findall(r'title="tokens ([^"]*)"', text) == ["0-7", "8-15", "16-23", "24-29"]
    assert "part 2 of 2 of heads" in text
    assert "and 192 more" in mesh_picture(MeshShape.of({"cp": 256}), "contiguous", 8)
    assert "padding" in mesh_picture(MeshShape.of({"cp": 4}), "zigzag", 5)


# In a browser.


@pytest.fixture(scope="module")
def page(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(plan, tmp_path_factory.mktemp("page"))


@pytest.fixture
def tab(page: Path) -> Iterator[Tab]:
    with browser() as opened:
        opened.open(page)
        yield opened
        assert opened.asked == [page.as_uri()]
        assert opened.errors == []


ROWS = 'document.querySelectorAll("#view .row").length'
CHOSEN = 'document.getElementById("pick").selectedOptions[0].textContent.split(" (")[0]'
PICKED = '[...document.querySelectorAll("#view .pick")].map(c => c.dataset.name)'


@IN_BROWSER
@pytest.mark.thinned(2)
def test_passes_are_switched_and_layers_unfolded(tab: Tab) -> None:
    tab.run('go("lower", "")')
    folded = tab.run(ROWS)
    assert tab.run(CHOSEN) == "lower"
    count = tab.run('document.querySelectorAll("#view .fold").length')
    tab.run('document.querySelector("#view .fold button").click()')
    assert tab.run(ROWS) > folded
    assert tab.run('document.querySelectorAll("#view .fold").length') == count
    tab.press("]")
    assert tab.run(CHOSEN) == "split-all-to-alls"
    tab.press("[")
    tab.press("[")
    assert tab.run(CHOSEN) == "insert-reshards"


@IN_BROWSER
@pytest.mark.thinned(2)
def test_a_click_marks_the_node_on_both_sides_and_its_uses(tab: Tab) -> None:
    tab.run('go("lower", "")')
    tab.run('[...document.querySelectorAll("#view [data-name=linear]")][0].click()')
    assert tab.run(PICKED) == ["linear", "linear"]
    assert tab.run('document.querySelectorAll("#view .use").length') >= 2
    tab.press("Escape")
    assert tab.run(PICKED) == []


@IN_BROWSER
@pytest.mark.thinned(2)
def test_search_counts_and_opens_what_is_folded(tab: Tab) -> None:
    tab.run('go("forward", "")')
    tab.press("/")
    tab.send("Input.insertText", text="= spx.ring_attention(")
    assert tab.run('document.getElementById("found").textContent') == "1 of 6"
    assert tab.run('document.querySelectorAll("#view mark").length') > 0
    for _ in range(5):
        tab.press("Enter")
    assert tab.run('document.getElementById("found").textContent') == "6 of 6"
    assert tab.run('document.querySelector(`[data-row="${hits[hit]}"]`) !== null')


@IN_BROWSER
@pytest.mark.thinned(2)
def test_rows_of_tables_lead_to_graphs_and_lines(tab: Tab) -> None:
    links = 'document.querySelectorAll("button.link[data-graph]")'
    assert tab.run(f"[...{links}].every(l => graphs.some(g => g.name === l.dataset.graph))")
    tab.run(f'[...{links}].find(l => l.textContent === "ring_attention_backward").click()')
    assert tab.run(CHOSEN) == "backward"
    assert tab.run(PICKED)[0].startswith("ring_attention_backward")
    tab.run('document.querySelector("button.link[data-place]").click()')
    assert tab.run('document.querySelector("#sources .pick").dataset.place').startswith("explained.py:")
    marks = '[...document.querySelectorAll("#view .comm")].filter(m => m.textContent.includes("KiB")).length'
    assert tab.run(marks) > 0


@IN_BROWSER
@pytest.mark.thinned(2)
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screens_and_dark_ones(page: Path, width: int, dark: bool) -> None:
    with browser(width, 800, dark) as tab:
        tab.open(page)
        assert tab.run("document.documentElement.scrollWidth") <= width
        shown = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (shown == "rgb(13, 17, 23)") == dark
        columns = tab.run(
            'getComputedStyle(document.querySelector("#view .row")).gridTemplateColumns.split(" ").length'
        )
        assert columns == (1 if width < 760 else 2)


@IN_BROWSER
@pytest.mark.thinned(2)
def test_what_is_injected_stays_text(tmp_path: Path) -> None:
    hostile = plan_of(2, attention="ring")
    hostile.model = HOSTILE
    hostile.graphs["capture"] += f"# {HOSTILE}\n"
    with browser() as tab:
        tab.open(saved(hostile, tmp_path))
        tab.run('go("capture", "")')
        assert tab.run("document.title") == f"{HOSTILE} on mesh cp=2"
        assert tab.run('document.querySelectorAll("img").length') == 0
        assert tab.run('document.getElementById("view").textContent').count("<script>") == 1


def many_layers(plan: Plan, layers: int) -> Plan:
    """The same with graphs of so many layers: what one layer adds to each graph, repeated with other numbers."""
    few = plan_of(2, layers=2, attention="ring")
    for name, text in plan.graphs.items():
        extra = text.splitlines()[len(few.graphs[name].splitlines()) :] if name in few.graphs else []
        copies = [
            re.sub(r"_(\d+)", lambda m, n=n: f"_{int(m[1]) + 1000 * n}", line)
            for n in range(1, layers // 4)
            for line in extra
        ]
        plan.graphs[name] = text + "\n".join(copies) + "\n"
    return plan


@IN_BROWSER
@pytest.mark.slow
def test_eighty_layers_are_a_small_page_that_answers_at_once(tmp_path: Path) -> None:
    file = saved(many_layers(plan_of(2, layers=6, attention="ring"), 80), tmp_path)
    assert file.stat().st_size < 2e6
    most = 2000 * max(1.0, os.getloadavg()[0] / cores())  # on a machine that does nothing else
    with browser() as tab:
        tab.open(file)
        since = "performance.now()"
        assert tab.run(since) < most
        for what in ('go("lower", "")', 'go("backward", "")', 'element("search").value = "all_reduce"; search(0)'):
            took = tab.run(f"(() => {{ const t = {since}; {what}; return {since} - t; }})()")
            assert took < most, what
