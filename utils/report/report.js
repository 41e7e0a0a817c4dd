// The report in the page: its legend, pictures and tables, from the JSON in #data; its curves are in charts.js.
// Texts come into the page by textContent alone, and into plotly's labels by plain(): a name is never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Okabe and Ito's colours, which the colour-blind tell apart, and dashes from the seventh run on.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const STROKES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" };
const WINDOWS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000];
const LOSS_BY_T = "loss by t";
const MAX_NAME = 48; // letters of a name in a chart
const MAX_MARKED = 30; // points of a curve that are marked one by one

const colour = (run) => COLOURS[run % COLOURS.length];
const dash = (run) => DASHES[Math.floor(run / COLOURS.length) % DASHES.length];
const number = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 3 });

// --- State: kept over a reload, so that a page that --watch rewrites stays as it is looked at ---

const KEY = `report ${location.pathname}`;
const steps = slider_steps();
const panels = [...data.panels, ...(data.runs.some((run) => run.losses.length) ? [LOSS_BY_T] : [])];
const state = Object.assign(
  { hidden: [], axis: "steps", smooth: 0, logX: false, logY: false, filter: "", step: null, panel: null,
    open: {}, sort: {}, scroll: 0 },
  read_state(),
);
if (!panels.includes(state.panel)) state.panel = panels.find((name) => /^sample_cfg_[1-9]/.test(name)) || panels[0];

function read_state() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) || "{}");
  } catch {
    return {}; // no storage here: nothing is kept
  }
}

function keep_state() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...state, scroll: window.scrollY }));
  } catch { /* nothing is kept */ }
}

function is_shown(run) {
  return !state.hidden.includes(data.runs[run].name);
}

// --- Small things ---

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function plain(text) {
  // plotly reads a few HTML tags and entities in its labels; escaped, they are characters. Marks that turn the direction
  // of writing would turn what follows, too, and a long name would fill the chart.
  const visible = [...text.replace(/[\u0000-\u001f\u200e\u200f\u202a-\u202e\u2066-\u2069]+/g, " ")];
  const short = visible.length > MAX_NAME ? [...visible.slice(0, MAX_NAME - 1), "…"] : visible;
  return short.join("").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function theme(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// --- Evaluations: pictures, and losses by t, of one step of every run ---

function slider_steps() {
  const all = data.runs.flatMap((run) => [
    ...run.losses.map((frame) => frame.step),
    ...Object.values(run.panels).flatMap((pictures) => pictures.map(([step]) => step)),
  ]);
  return [...new Set(all)].sort((a, b) => a - b);
}

function newest(items, step_of, step) {
  // The newest that is not after the step.
  return items.filter((item) => step_of(item) <= step).pop();
}

function draw_evaluation() {
  const step = steps[Number($("step").value)];
  $("step-text").textContent = `${number(step)}`;
  if (state.panel === LOSS_BY_T) return draw_losses(step);
  const figures = data.runs.flatMap((run, i) => {
    const found = is_shown(i) && newest(run.panels[state.panel] || [], ([each]) => each, step);
    return found ? [make_figure(run, i, ...found)] : [];
  });
  $("side").replaceChildren(...(figures.length ? figures : [element("p", { textContent: "no picture yet" })]));
}

function make_figure(run, i, step, url) {
  const title = `${run.name}, step ${number(step)}`;
  const image = element("img", { src: url, alt: `${state.panel} of ${title}` });
  const button = element("button", { type: "button", title: "larger or smaller" }, image);
  const name = element("bdi", { textContent: run.name });
  const caption = element("figcaption", {}, swatch(i), " ", name, `, step ${number(step)}`);
  const figure = element("figure", {}, caption, button);
  button.addEventListener("click", () => figure.classList.toggle("large"));
  return figure;
}

function draw_losses(step) {
  const made = [];
  data.runs.forEach((run, i) => {
    const frame = is_shown(i) && newest(run.losses, (each) => each.step, step);
    for (const [name, loss] of Object.entries(frame ? frame.losses : {})) {
      const title = `${run.name}, ${name.replace("_loss_t", "")}, step ${number(frame.step)}`;
      made.push({ type: "scatter", mode: "lines+markers", x: loss.t, y: loss.values, name: plain(title),
        hovertemplate: "%{y:.4~g}", marker: { color: colour(i), size: 5 },
        line: { color: colour(i), dash: name.startsWith("validation") ? "dash" : "solid" } });
    }
  });
  const [chart] = $("side").getElementsByClassName("chart");
  const kept = chart || element("div", { className: "chart large" });
  if (!chart) $("side").replaceChildren(kept);
  const title = "loss by t: training solid, validation dashed";
  Plotly.react(kept, made, { ...layout(title, "t", false, state.logY), uirevision: state.logY }, CONFIG);
}

function choose_panel(panel) {
  state.panel = panel;
  for (const button of $("panels").children) button.setAttribute("aria-pressed", button.panel === panel);
  draw_evaluation();
  keep_state();
}

function make_evaluations() {
  if (!steps.length) return void ($("evaluations").hidden = true);
  for (const panel of panels) {
    const button = element("button", { type: "button", textContent: panel, panel });
    button.addEventListener("click", () => choose_panel(panel));
    $("panels").append(button);
  }
  // The last evaluation, unless another one was chosen.
  const slider = $("step");
  slider.max = steps.length - 1;
  const place = steps.indexOf(state.step);
  slider.value = place < 0 ? steps.length - 1 : place;
  slider.addEventListener("input", () => {
    const value = Number(slider.value);
    state.step = value === steps.length - 1 ? null : steps[value];
    draw_evaluation();
    keep_state();
  });
  choose_panel(state.panel);

  // From the first to the last evaluation, in some seconds.
  let timer = null;
  $("play").addEventListener("click", () => {
    const stop = () => { clearInterval(timer); timer = null; $("play").textContent = "Play"; };
    if (timer) return stop();
    $("play").textContent = "Stop";
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    else slider.value = Number(slider.value) + 1;
    slider.dispatchEvent(new Event("input"));
    timer = setInterval(() => {
      if (Number(slider.value) === steps.length - 1) return stop();
      slider.value = Number(slider.value) + 1;
      slider.dispatchEvent(new Event("input"));
    }, Math.max(150, Math.min(800, 8000 / steps.length)));
  });
}

// --- Tables ---

function make_table(parent, name, table) {
  if (!table) return void (parent.hidden = true);
  const head = element("tr");
  const body = element("tbody");
  table.columns.forEach((title, column) => {
    const is_number = table.rows.some((row) => row[column].value !== null);
    const button = element("button", { type: "button", textContent: title });
    const cell = element("th", { scope: "col", className: is_number ? "number" : "" }, button);
    button.addEventListener("click", () => {
      const before = state.sort[name];
      state.sort[name] = { column, descending: before && before.column === column ? !before.descending : false };
      sort_table(head, body, state.sort[name]);
      keep_state();
    });
    head.append(cell);
  });
  table.rows.forEach((row, i) => {
    const cells = row.map((cell) => {
      const kinds = { number: cell.value !== null, best: cell.best };
      const className = Object.keys(kinds).filter((kind) => kinds[kind]).join(" ");
      return element("td", { className }, element("div", {}, ...contents(cell)));
    });
    body.append(Object.assign(element("tr", {}, ...cells), { row, run: table.runs[i] }));
  });
  parent.append(element("div", { className: "scroll", tabIndex: 0 },
    element("table", {}, element("thead", {}, head), body)));
  if (state.sort[name]) sort_table(head, body, state.sort[name]);
}

function contents(cell) {
  if (!cell.links) return [cell.text];
  return cell.links.map(({ text, href }) => element("a", { href, textContent: text }));
}

function sort_table(head, body, { column, descending }) {
  // Numbers by value, texts by their words; what is missing comes last either way.
  const key = (line) => line.row[column].value ?? line.row[column].text;
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  const lines = [...body.children].sort((a, b) => {
    const [left, right] = [key(a), key(b)];
    if ((left === "") !== (right === "")) return left === "" ? 1 : -1;
    return descending ? compare(right, left) : compare(left, right);
  });
  body.append(...lines);
  [...head.children].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
    cell.firstChild.textContent = cell.firstChild.textContent.replace(/ [▲▼]$/, "")
      + (i === column ? (descending ? " ▼" : " ▲") : "");
  });
}

function hide_rows() {
  for (const line of document.querySelectorAll("tbody tr")) line.hidden = state.hidden.includes(line.run);
}

// --- The legend, the controls, the start ---

function swatch(run) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", 26);
  svg.setAttribute("height", 10);
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const drawn = { x1: 1, x2: 25, y1: 5, y2: 5, stroke: colour(run), "stroke-width": 4,
    "stroke-dasharray": STROKES[dash(run)] };
  for (const [name, value] of Object.entries(drawn)) line.setAttribute(name, value);
  svg.append(line);
  return svg;
}

function make_legend() {
  data.runs.forEach((run, i) => {
    const button = element("button", { type: "button", title: run.name }, swatch(i),
      element("bdi", { textContent: run.name }));
    button.setAttribute("aria-pressed", is_shown(i));
    button.addEventListener("click", () => {
      state.hidden = is_shown(i) ? [...state.hidden, run.name] : state.hidden.filter((name) => name !== run.name);
      button.setAttribute("aria-pressed", is_shown(i));
      redraw_charts();
      if (steps.length) draw_evaluation();
      hide_rows();
      keep_state();
    });
    $("legend").append(button);
  });
}

function show_smoothing() {
  const window = WINDOWS[state.smooth];
  $("smooth-text").textContent = window === 1 ? "none" : `mean of ${window}`;
}

function bind(id, name, property, change) {
  const control = $(id);
  control[property] = state[name];
  control.addEventListener("input", () => {
    state[name] = id === "smooth" ? Number(control.value) : control[property];
    change();
    keep_state();
  });
}

$("written").textContent = data.watch ? `as of ${data.written}; rewritten while the runs go on` : `as of ${data.written}`;
make_legend();
bind("axis", "axis", "value", redraw_charts);
bind("smooth", "smooth", "value", () => { show_smoothing(); redraw_charts(); });
bind("log-x", "logX", "checked", redraw_charts);
bind("log-y", "logY", "checked", () => { redraw_charts(); if (state.panel === LOSS_BY_T) draw_evaluation(); });
bind("filter", "filter", "value", filter_curves);
show_smoothing();
make_curves();
filter_curves();
make_evaluations();
make_table($("scores"), "scores", data.tables.scores);
make_table($("facts"), "runs", data.tables.runs);
hide_rows();
window.scrollTo(0, state.scroll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  redraw_charts();
  if (steps.length) draw_evaluation();
});
window.addEventListener("pagehide", keep_state);
if (data.watch) setTimeout(() => { keep_state(); location.reload(); }, 1000 * data.watch);
