"use strict";
// Sets text only as textContent: nothing of a model is ever read as HTML.
const element = id => document.getElementById(id);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const STATE = /\b(?:dp|cp|tp)=(S\([^)]*\)|[RIP])/g;
const COMM = /= (?:spx\.|_c10d_functional\.|reshard\()/;
let data, graphs, current = 0, picked = "", opened = new Set(), hits = [], hit = -1, rows = [];

async function read(id) {
  const bytes = Uint8Array.from(atob(element(id).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
function linesOf(graph) {
  if (graph.text) return graph.text;
  graph.text = [];
  for (let i = 0; i < graph.lines.length; i += 2)
    for (let k = 0; k < graph.lines[i + 1]; k++) graph.text.push(data.lines[graph.lines[i] + k]);
  return graph.text;
}
function rowsOf(graph) {
  const found = [], runs = graph.rows, step = (first, k) => first < 0 ? -1 : first + k;
  for (let i = 0; i < runs.length; i += 3)
    for (let k = 0; k < runs[i + 2]; k++) found.push([step(runs[i], k), step(runs[i + 1], k)]);
  return found;
}
const nameOf = line => line.startsWith("#") ? "" : line.split(":", 1)[0];

function fill(cell, line, graph) {
  const query = element("search").value.toLowerCase();
  const text = (into, part) => {
    for (let low = part.toLowerCase(), at; query && (at = low.indexOf(query)) >= 0; low = part.toLowerCase()) {
      into.append(part.slice(0, at), make("mark", "", part.slice(at, at + query.length)));
      part = part.slice(at + query.length);
    }
    into.append(part);
  };
  if (line.startsWith("#")) { cell.classList.add("note"); text(cell, line); return; }
  const head = COMM.test(line) ? cell.appendChild(make("span", "comm")) : cell;
  let last = 0;
  for (const found of line.matchAll(STATE)) {
    text(head, line.slice(last, found.index));
    const state = head.appendChild(make("span", found[1][0]));
    text(state, found[0]);
    last = found.index + found[0].length;
  }
  text(head, line.slice(last));
  const sent = (data.sends[graph.name] || {})[nameOf(line)];
  if (sent) cell.append(make("span", "comm", "  \u21c4 " + sent));
}
function drawRow([left, right], before, after, graph) {
  const row = make("div", "row"), texts = [left < 0 ? "" : before[left], right < 0 ? "" : after[right]];
  texts.forEach((line, side) => {
    const there = side ? right >= 0 : left >= 0, cell = row.appendChild(make("div"));
    if (!there) { cell.className = "empty"; return; }
    const name = nameOf(line);
    if (graph.before !== null)
      if (left < 0) cell.classList.add("add"); else if (right < 0) cell.classList.add("del");
      else if (texts[0] !== texts[1]) cell.classList.add("chg");
    if (name && name === picked) cell.classList.add("pick", "wide");
    else if (picked && uses(line, picked)) cell.classList.add("use");
    fill(cell, line, side ? graph : graphs[graph.before]);
    cell.dataset.name = name;
    cell.addEventListener("click", () => pick(name, line));
  });
  return row;
}
const uses = (line, name) => new RegExp("(^|[^\\w])" + name.replace(/[^\w]/g, "\\$&") + "([^\\w]|$)").test(line);

function show(keep) {
  const graph = graphs[current], view = element("view"), after = linesOf(graph);
  const before = graph.before === null ? [] : linesOf(graphs[graph.before]);
  rows = rowsOf(graph);
  element("pick").selectedIndex = current;
  view.className = "panes" + (graph.before === null ? " one" : "");
  element("state").textContent = graph.before === null ? after.length + " lines"
    : graph.changed ? graph.changed + " rows differ from " + graphs[graph.before].name : "nothing changed";
  const only = element("changes").checked && graph.before !== null, all = document.createDocumentFragment();
  const differs = ([l, r]) => l < 0 || r < 0 || before[l] !== after[r];
  const near = only ? rows.map((_, i) => rows.slice(Math.max(0, i - 2), i + 3).some(differs)) : null;
  let at = 0;
  const draw = (from, to) => {
    for (let i = from; i < to; i++)
      if (!only || near[i]) { const row = drawRow(rows[i], before, after, graph); row.dataset.row = i; all.append(row); }
  };
  for (const [start, period, count] of graph.folds) {
    draw(at, start);
    const key = graph.name + "@" + start, open = opened.has(key);
    const bar = make("div", "fold"), button = bar.appendChild(make("button", "", open ? "fold" : "show all"));
    bar.append("  " + count + " times the same " + period + " rows" + (open ? "" : ", here the first"));
    button.addEventListener("click", () => { open ? opened.delete(key) : opened.add(key); show(true); });
    all.append(bar);
    draw(start, start + period * (open ? count : 1));
    at = start + period * count;
  }
  draw(at, rows.length);
  const top = view.scrollTop;
  view.replaceChildren(all);
  if (keep) view.scrollTop = top; else if (picked) reveal(picked);
}
function reveal(name) {
  const cell = [...element("view").querySelectorAll("[data-name]")].find(c => c.dataset.name === name);
  if (cell) cell.scrollIntoView({block: "center"});
  return Boolean(cell);
}
function openAt(row) {
  for (const [start, period, count] of graphs[current].folds)
    if (row >= start + period && row < start + period * count) opened.add(graphs[current].name + "@" + start);
}
function pick(name, line) {
  if (name) picked = name;
  show(true);
  const place = line && line.match(/^# ([^ ]+):(\d+)/);
  if (place) source(place[1] + ":" + place[2]);
}
function go(graphName, name) {
  const found = graphs.findIndex(g => g.name === graphName);
  if (found < 0) return;
  current = found; picked = name || picked;
  element("changes").checked = false;
  const lines = linesOf(graphs[current]), place = name ? lines.findIndex(l => nameOf(l) === name) : -1;
  if (place >= 0) openAt(rowsOf(graphs[current]).findIndex(row => row[1] === place));
  show(false);
  element("graphs").scrollIntoView();
}
function source(place) {
  const line = [...element("sources").children].find(l => l.dataset.place === place);
  if (!line) return;
  for (const other of element("sources").querySelectorAll(".pick")) other.classList.remove("pick");
  line.classList.add("pick");
  line.scrollIntoView({block: "nearest"});
}
function fromSource(place) {
  const lines = linesOf(graphs[current]), start = lines.findIndex(l => l.startsWith("# " + place + "  ") || l === "# " + place);
  source(place);
  if (start < 0) return;
  const next = lines.findIndex((l, i) => i > start && nameOf(l));
  openAt(rows.findIndex(row => row[1] === start));
  picked = next < 0 ? picked : nameOf(lines[next]);
  show(false);
}
function search(step) {
  const query = element("search").value.toLowerCase(), graph = graphs[current];
  const before = graph.before === null ? [] : linesOf(graphs[graph.before]), after = linesOf(graph);
  const has = line => line !== undefined && line.toLowerCase().includes(query);
  hits = query ? rows.flatMap(([l, r], i) => has(before[l]) || has(after[r]) ? [i] : []) : [];
  hit = hits.length ? step ? (hit + step + hits.length) % hits.length : 0 : -1;
  element("found").textContent = query ? (hit + 1) + " of " + hits.length : "";
  if (hit >= 0) openAt(hits[hit]);
  show(true);
  const row = hit < 0 ? null : element("view").querySelector(`[data-row="${hits[hit]}"]`);
  if (row) row.scrollIntoView({block: "center"});
}
function change(step) {  // to the next row that differs
  const graph = graphs[current];
  if (graph.before === null) return;
  const before = linesOf(graphs[graph.before]), after = linesOf(graph);
  const differing = rows.flatMap(([l, r], i) => l < 0 || r < 0 || before[l] !== after[r] ? [i] : []);
  if (!differing.length) return;
  const seen = Number(element("view").dataset.change ?? -1);
  const next = step > 0 ? differing.find(i => i > seen) ?? differing[0] : differing.findLast(i => i < seen) ?? differing.at(-1);
  element("view").dataset.change = next;
  openAt(next);
  show(true);
  const row = element("view").querySelector(`[data-row="${next}"]`);
  if (row) row.scrollIntoView({block: "center"});
}
function drawTimeline(canvas, events) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth * ratio, height = canvas.clientHeight * ratio;
  canvas.width = width; canvas.height = height;
  const pen = canvas.getContext("2d"), lanes = events.streams.length, lane = height / lanes;
  const end = events.start.reduce((most, start, i) => Math.max(most, start + events.ms[i]), 0) || 1;
  const style = getComputedStyle(document.documentElement), left = 70 * ratio, scale = (width - left) / end;
  pen.font = 12 * ratio + "px sans-serif";
  events.streams.forEach((name, i) => {
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.fillText(name, 4 * ratio, (i + .6) * lane);
  });
  const colours = ["#3b6fb6", "#b3641d", "#2c8a5b", "#7a5ab8"];
  events.start.forEach((start, i) => {
    pen.fillStyle = colours[events.stream[i] % 4];
    const x = left + start * scale, w = Math.max(.5, events.ms[i] * scale - (events.ms[i] * scale > 3 ? 1 : 0));
    pen.fillRect(x, events.stream[i] * lane + 3, w, lane - 6);
  });
  const at = event => {
    const box = canvas.getBoundingClientRect(), ms = ((event.clientX - box.left) * ratio - left) / scale;
    const stream = Math.floor((event.clientY - box.top) / box.height * lanes);
    return events.start.findIndex((start, i) => events.stream[i] === stream && ms >= start && ms <= start + events.ms[i]);
  };
  canvas.onmousemove = event => {
    const i = at(event);
    canvas.title = i < 0 ? "" : events.node[i] + ", " + events.ms[i] + " ms at " + events.start[i] + " ms";
  };
  canvas.onclick = event => { const i = at(event); if (i >= 0) go(canvas.dataset.graph, events.node[i]); };
}
function drawSources() {
  for (const [file, lines] of Object.entries(data.sources))
    for (const [number, text] of Object.entries(lines)) {
      const place = file + ":" + number, line = make("div", data.made.includes(place) ? "made" : "note", place + "  " + text);
      line.dataset.place = place;
      if (line.className === "made") {
        line.tabIndex = 0;
        line.addEventListener("click", () => fromSource(place));
        line.addEventListener("keydown", event => { if (event.key === "Enter") fromSource(place); });
      }
      element("sources").append(line);
    }
}
function keys(event) {
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    else if (event.key === "Enter" && event.target.id === "search") search(event.shiftKey ? -1 : 1);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = {"]": 1, "[": -1}[event.key];
  if (step) { current = Math.min(graphs.length - 1, Math.max(0, current + step)); show(false); }
  else if (event.key === "j" || event.key === "k") change(event.key === "j" ? 1 : -1);
  else if (event.key === "/") { element("search").focus(); event.preventDefault(); }
  else if (event.key === "Escape") { picked = ""; show(true); }
}
async function start() {
  data = await read("data");
  graphs = data.graphs;
  for (const graph of graphs)
    element("pick").append(make("option", "", graph.name + (graph.before !== null && !graph.changed ? " (nothing changed)" : "")));
  element("pick").addEventListener("change", () => { current = element("pick").selectedIndex; show(false); });
  element("changes").addEventListener("change", () => show(false));
  element("search").addEventListener("input", () => search(0));
  element("previous").addEventListener("click", () => change(-1));
  element("next").addEventListener("click", () => change(1));
  document.addEventListener("keydown", keys);
  document.addEventListener("click", event => {
    const link = event.target.closest("button.link");
    if (!link) return;
    if (link.dataset.graph) go(link.dataset.graph, link.dataset.node);
    else if (link.dataset.place) { fromSource(link.dataset.place); element("graphs").scrollIntoView(); }
  });
  drawSources();
  const draw = () => { for (const canvas of document.querySelectorAll("canvas")) drawTimeline(canvas, data.events[canvas.dataset.graph]); };
  draw();
  window.addEventListener("resize", draw);
  current = Math.max(0, graphs.findIndex(g => g.name === "forward"));
  show(false);
  document.body.dataset.ready = "yes";
}
start();
