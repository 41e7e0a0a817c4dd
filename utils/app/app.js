"use strict";
// Every text of the model or of the server becomes a text node: no name can become an element.
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const TITLES = { sample: "New images", interpolate: "Between two", invert: "Invert", inpaint: "Fill a hole" };
const MAX_CHIPS = 60; // of a chooser; a search finds the others
let model, task, hasChosenSolver = false, choosers = {}, controller = null, shown = null, timer = null;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Of a few pixels the eye makes out more when they are smoothed; of some more, when they are squares.
const isSmall = (width) => width >= 16 && width < 128;

function say(text, isBad = false) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = isBad ? "bad" : "";
}

// --- Choosing classes ---

class Chooser {
  // Chips of classes in a fieldset; `chosen` has their labels in the order of the clicks.
  constructor(box, classes, empty) {
    this.classes = classes;
    this.chosen = [];
    this.most = Infinity;
    this.search = make("input", { type: "search", placeholder: `Search ${classes.length} classes`, hidden: classes.length <= 20 });
    this.search.setAttribute("aria-label", "Search classes");
    this.search.addEventListener("input", () => this.render());
    this.chips = make("div", { className: "chips" });
    this.empty = new Set(empty);
    box.append(this.search, this.chips);
    this.render();
  }

  render() {
    const words = this.search.value.toLowerCase();
    const found = [...this.classes.keys()].filter((label) => !this.chosen.includes(label) && this.classes[label].toLowerCase().includes(words));
    const left = found.length - MAX_CHIPS;
    const labels = [...this.chosen, ...found.slice(0, MAX_CHIPS)].sort((a, b) => (words ? 0 : a - b));
    const chips = labels.map((label) => {
      const box = make("input", { type: "checkbox", checked: this.chosen.includes(label), value: label });
      box.addEventListener("change", () => this.toggle(label, box.checked));
      const note = this.empty.has(label) ? " (not trained)" : "";
      return make("label", {}, box, make("span", { dir: "auto" }, this.classes[label] + note));
    });
    this.chips.replaceChildren(...chips, ...(left > 0 ? [make("p", { className: "hint" }, `and ${left} more`)] : []));
  }

  toggle(label, isChosen) {
    this.chosen = this.chosen.filter((other) => other !== label);
    if (isChosen) this.chosen = [...this.chosen, label].slice(-this.most);
    this.render();
    this.chips.querySelector(`input[value="${label}"]`)?.focus();
  }

  limit(most) {
    this.most = most;
    this.chosen = this.chosen.slice(-most);
    this.render();
  }
}

// --- Other conditions ---

function addCondition() {
  const row = make("div", { className: "condition" });
  for (const field of model.fields) row.append(makeField(field));
  const remove = make("button", { type: "button" }, "Remove");
  remove.addEventListener("click", () => row.remove());
  row.append(remove);
  $("rows").append(row);
}

function makeField(field) {
  // A number is a slider within the range of training, a class one of a list, all else a text.
  let input;
  if (field.low !== undefined) {
    const text = make("output");
    input = make("input", { type: "range", min: field.low, max: field.high, step: "any", value: field.typical });
    const write = () => { text.textContent = Number(Number(input.value).toPrecision(4)); };
    input.addEventListener("input", write);
    write();
    input.dataset.field = field.name;
    return make("label", { className: "slider" }, field.name, input, text);
  }
  if (field.classes) {
    const list = make("datalist", { id: `list-${Math.random()}` }, ...field.classes.map((name) => make("option", { value: name })));
    input = make("input", { type: "text", value: field.classes[0] ?? "" });
    input.setAttribute("list", list.id);
    input.dataset.field = field.name;
    return make("label", {}, field.name, input, list);
  }
  input = make("textarea", { rows: 2, maxLength: 2000, required: true });
  input.dataset.field = field.name;
  return make("label", {}, field.name, input);
}

function readConditions() {
  return all("#rows .condition").map((row) => {
    const inputs = [...row.querySelectorAll("[data-field]")];
    return Object.fromEntries(inputs.map((input) => [input.dataset.field, input.type === "range" ? Number(input.value) : input.value]));
  });
}

function toBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

// --- The request ---

function number(id) {
  const input = $(id);
  if (!input.checkValidity() || input.value === "") throw new Error(`${input.closest("label").firstChild.textContent.trim()}: ${input.validationMessage || "give a number"}`);
  return Number(input.value);
}

async function readRequest() {
  const body = { stream: true, solver: $("solver").value };
  if (body.solver !== "dopri5") body.num_steps = number("num_steps");
  if (task !== "invert") body.seed = number("seed");
  if (model.can_guide) {
    body.cfg_scale = number("cfg_scale");
    if (body.cfg_scale !== 1) body.cfg_interval = [number("cfg_low"), number("cfg_high")];
  }
  if (model.can_guide_by_inner_head) body.inner_scale = number("inner_scale");
  if (model.can_guide_by_model) body.guide_scale = number("guide_scale");

  // What the task has of its own.
  const isOwn = task === "invert" || task === "inpaint";
  if (task === "sample") Object.assign(body, { num_samples: number("num_samples"), frames: number("frames") });
  if (task === "interpolate") Object.assign(body, { columns: number("columns"), between: $("between").value });
  if (isOwn && !own.data) throw new Error("Choose an image first");
  if (isOwn) body.image = own.data;
  if (task === "inpaint") Object.assign(body, { mask: makeMask(), repeats: number("repeats") });
  if (task === "invert" && choosers.edit.chosen.length) body.edit = choosers.edit.chosen;

  // Conditions.
  if (model.is_class && choosers.classes.chosen.length) body.classes = choosers.classes.chosen;
  const rows = readConditions();
  if (rows.length && model.fields.length) body.conditions = rows;
  const files = [...$("given-files").files];
  if (files.length) body.condition_images = await Promise.all(files.map(toBase64));
  return body;
}

async function draw() {
  let body;
  try {
    body = await readRequest();
  } catch (error) {
    return say(error.message, true);
  }
  controller = new AbortController();
  setBusy(true);
  say("Sent");
  try {
    const answer = await fetch(`api/${task}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? answer.statusText);
    await readLines(answer.body, (line) => show(JSON.parse(line), body));
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled" : error.message, error.name !== "AbortError");
  }
  setBusy(false);
}

async function readLines(stream, take) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) await take(line);
  }
}

function setBusy(isBusy) {
  $("draw").disabled = isBusy;
  $("cancel").hidden = $("bar").hidden = !isBusy;
  $("bar").removeAttribute("value");
}

// --- The answer ---

async function show(update, body) {
  if (update.state === "waiting") say(`Waiting: ${update.place} request${update.place > 1 ? "s" : ""} before this one`);
  if (update.state === "working") {
    if (update.total) Object.assign($("bar"), { max: update.total, value: update.done });
    const left = update.seconds_left == null ? "" : `, ${Math.ceil(update.seconds_left)} s left`;
    const steps = update.done ? `${update.done} of ${update.total} steps${left}` : "Starting …";
    say(update.doing === "steps" ? steps : `${update.doing} …`);
  }
  if (update.state === "failed") throw new Error(update.error);
  if (update.state === "finished") await showResult(update, body);
}

async function load(png) {
  const image = make("img", { src: `data:image/png;base64,${png}` });
  await image.decode();
  return image;
}

async function showResult(result, body) {
  // The images, each with its title; of a film, all frames of a sample are below one another in one image.
  stop();
  const { width, height } = model.image;
  const sources = await Promise.all((result.films ?? result.images.map((image) => image.png)).map(load));
  const figures = result.images.map(({ title }) => {
    const canvas = make("canvas", { width, height, className: isSmall(width) ? "pixelated" : "" });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title || "sample");
    return make("figure", {}, canvas, make("figcaption", { dir: "auto" }, title));
  });
  shown = { sources, canvases: figures.map((figure) => figure.firstChild), frames: result.frames ?? 1 };
  $("images").replaceChildren(...figures);
  $("images").className = result.columns ? "table" : "";
  $("images").style.setProperty("--columns", result.columns ?? 1);
  $("images").style.setProperty("--tile", width < 128 ? "88px" : `${Math.min(width, 160)}px`);
  $("film").hidden = !result.films;
  Object.assign($("frame"), { max: shown.frames - 1, value: shown.frames - 1 });
  showFrame();

  // Remarks, files, and the command.
  $("remarks").replaceChildren(...result.remarks.map((remark) => make("li", {}, remark)));
  $("grid").href = `api/results/${result.result}/grid.png`;
  $("npz").href = `api/results/${result.result}/samples.npz`;
  $("command").textContent = result.command ?? "";
  $("as-command").hidden = !result.command;
  const hole = body.mask ? ", and the mask as MASK.png" : "";
  $("command-hint").textContent = body.image || body.condition_images ? `Put your image into FOLDER${hole}.` : "";
  if (body.mask) Object.assign($("mask"), { href: body.mask, hidden: false });
  $("results").hidden = false;
  if (innerWidth <= 760) $("results").scrollIntoView();
  say(`Drawn in ${result.seconds} s`);
}

function showFrame() {
  const { width, height } = model.image;
  const frame = Number($("frame").value);
  shown.canvases.forEach((canvas, place) =>
    canvas.getContext("2d").drawImage(shown.sources[place], 0, frame * height, width, height, 0, 0, width, height));
  $("frame-text").textContent = `${Math.round((100 * frame) / Math.max(1, shown.frames - 1))} %`;
}

function stop() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (timer) return stop();
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-pressed", "true");
  if (Number($("frame").value) === shown.frames - 1) $("frame").value = -1;
  timer = setInterval(() => {
    $("frame").value = Number($("frame").value) + 1;
    showFrame();
    if (Number($("frame").value) === shown.frames - 1) stop();
  }, Math.max(30, 3000 / shown.frames));
}

// --- The form ---

function chooseTask(name) {
  task = name;
  for (const part of all("[data-tasks]")) part.hidden = !part.dataset.tasks.split(" ").includes(task);
  const isOwn = task === "invert" || task === "inpaint";
  const { solvers } = model.tasks[task];
  const before = $("solver").value;
  $("solver").replaceChildren(...solvers.map((solver) => make("option", {}, solver)));
  // Heun's steps lead back to where they came from; what a user has chosen stays, where it can.
  const preferred = hasChosenSolver && solvers.includes(before) ? before : task === "invert" ? "heun" : model.defaults.solver;
  $("solver").value = preferred;
  if (!$("solver").value) $("solver").selectedIndex = 0;
  chooseSolver();

  // Conditions: chips for classes alone, rows of fields for all others.
  $("classes").hidden = !model.is_class;
  $("conditions").hidden = model.is_class || isOwn;
  $("classes-title").textContent = isOwn ? "Class of the image" : "Classes";
  choosers.classes?.limit({ sample: model.limits.samples, interpolate: 2 }[task] ?? 1);
  $("edit").hidden = task !== "invert" || !model.is_class;
  if (own.hole) paintOwn();
}

function chooseSolver() {
  $("steps-label").hidden = $("solver").value === "dopri5";
}

function buildForm() {
  const { run, image, limits, defaults, fields, tasks } = model;
  document.title = `${run}: samples`;
  $("run").textContent = run;
  $("facts").textContent = `images of ${image.height}×${image.width}${image.channels === 1 ? ", grey" : ""}`;
  for (const name of Object.keys(tasks)) {
    const radio = make("input", { type: "radio", name: "task", value: name, checked: name === "sample" });
    radio.addEventListener("change", () => chooseTask(name));
    $("tasks").append(make("label", {}, radio, make("span", {}, TITLES[name])));
  }
  $("tasks").className = "chips";

  // Bounds and defaults.
  Object.assign($("num_samples"), { max: limits.samples, value: Math.min(16, limits.samples) });
  Object.assign($("columns"), { max: limits.samples, value: Math.min(8, limits.samples) });
  Object.assign($("num_steps"), { max: limits.steps, value: defaults.num_steps });
  Object.assign($("frames"), { max: limits.frames, value: Math.max(image.width, image.height) < 128 ? Math.min(16, limits.frames) : 0 });
  Object.assign($("brush"), { max: Math.max(2, Math.max(image.width, image.height) >> 2), value: Math.max(1, image.width >> 3) });
  if (model.step_counts) {
    const select = make("select", { id: "num_steps" }, ...model.step_counts.map((count) => make("option", {}, String(count))));
    $("num_steps").replaceWith(select);
    select.value = defaults.num_steps;
  }
  $("own").className = "pixelated";

  // Guidance of the kinds that the model knows.
  const kinds = { cfg: model.can_guide, inner: model.can_guide_by_inner_head, guide: model.can_guide_by_model };
  $("guidance").hidden = !kinds.cfg;
  for (const part of all("[data-guide]")) part.hidden = !kinds[part.dataset.guide];
  $("more").hidden = !Object.values(kinds).some(Boolean);
  const write = () => { $("cfg_scale-text").textContent = $("cfg_scale").value === "1" ? "none" : $("cfg_scale").value; };
  $("cfg_scale").value = defaults.cfg_scale ?? 1;
  $("cfg_scale").addEventListener("input", write);
  write();

  // Conditions.
  if (model.is_class) {
    choosers.classes = new Chooser($("classes"), fields[0].classes, fields[0].empty);
    choosers.edit = new Chooser($("edit"), fields[0].classes, fields[0].empty);
  }
  $("given").hidden = !model.condition_image;
  $("add").hidden = !fields.length;
  chooseTask("sample");
}

async function start() {
  const answer = await fetch("api/model");
  model = await answer.json();
  if (!answer.ok) return say(model.error, true);
  buildForm();
  listenToBrush();
  $("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  $("form").noValidate = true; // `number` says what is wrong, also where it is folded
  $("cancel").addEventListener("click", () => controller.abort());
  $("solver").addEventListener("change", () => { hasChosenSolver = true; chooseSolver(); });
  $("add").addEventListener("click", addCondition);
  $("dice").addEventListener("click", () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; });
  $("frame").addEventListener("input", () => { stop(); showFrame(); });
  $("play").addEventListener("click", play);
  $("copy").addEventListener("click", async () => { await navigator.clipboard.writeText($("command").textContent); say("Copied"); });

  // An image, chosen or dropped.
  $("file").addEventListener("change", () => takeImage($("file").files[0]));
  $("clear").addEventListener("click", () => { if (own.hole) { own.hole.fill(0); paintOwn(); } });
  for (const name of ["dragover", "drop", "dragleave"])
    $("drop").addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.toggle("over", name === "dragover"); });
  $("drop").addEventListener("drop", (event) => takeImage(event.dataTransfer.files[0]));
}

start().catch((error) => say(error.message, true));
