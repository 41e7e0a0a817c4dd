"use strict";
// The curves of the report: x values, smoothing, and charts that are drawn when they come into sight. `data`, `state`
// and small things are in report.js, which follows in the page.

function hours_at(clock, curve_steps) {
  // Between the known steps; before the first one from zero, after the last one at the last pace.
  const { steps: known, seconds } = clock;
  let next = 0;
  return curve_steps.map((step) => {
    while (next < known.length - 1 && known[next] < step) next++;
    const [x0, y0] = next ? [known[next - 1], seconds[next - 1]] : [0, 0];
    const [x1, y1] = [known[next], seconds[next]];
    return (x1 === x0 ? y1 : y0 + ((y1 - y0) * (step - x0)) / (x1 - x0)) / 3600;
  });
}

function places(run, curve_steps) {
  // Where steps of a run stand on the x axis; null where it has not recorded what that takes.
  if (state.axis === "steps") return curve_steps;
  if (state.axis === "images") return run.batch_size ? curve_steps.map((step) => step * run.batch_size) : null;
  return run.clock.steps.length ? hours_at(run.clock, curve_steps) : null;
}

function running_mean(values, window) {
  // The mean of each value and those before it, `window` in all; gaps do not count.
  let sum = 0;
  let count = 0;
  return values.map((value, i) => {
    if (value !== null) [sum, count] = [sum + value, count + 1];
    const gone = i >= window ? values[i - window] : null;
    if (gone !== null) [sum, count] = [sum - gone, count - 1];
    return count && value !== null ? sum / count : null;
  });
}

function smooth(curve, window) {
  // Of a thinned curve, the sections' means stand for the points in them.
  if (!curve.means) return [curve.steps, running_mean(curve.values, window)];
  return [curve.mean_steps, running_mean(curve.means, Math.max(1, Math.round(window / curve.section)))];
}

function traces(metric) {
  const window = WINDOWS[state.smooth];
  const made = [];
  data.runs.forEach((run, i) => {
    const curve = run.curves[metric];
    if (!curve || !is_shown(i)) return;
    const line = { color: colour(i), dash: dash(i), width: 2 };
    const mode = curve.steps.length <= MAX_MARKED ? "lines+markers" : "lines";
    const common = { type: "scatter", name: plain(run.name), hovertemplate: "%{y:.5~g}", meta: i };
    const x = places(run, curve.steps);
    if (x === null) return;
    if (window > 1) {
      const [mean_steps, means] = smooth(curve, window);
      made.push({ ...common, x, y: curve.values, mode: "lines", line: { ...line, width: 1 }, opacity: 0.3,
        hoverinfo: "skip", hovertemplate: undefined });
      made.push({ ...common, x: places(run, mean_steps), y: means, mode: "lines", line });
    } else {
      made.push({ ...common, x, y: curve.values, mode, line, marker: { color: colour(i), size: 5 } });
    }
  });
  return made;
}

const COARSE = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page: charts do not catch it

function layout(title, x_title, log_x, log_y) {
  const line = { gridcolor: theme("line"), zerolinecolor: theme("line"), linecolor: theme("line"), automargin: true };
  return {
    title: { text: plain(title), font: { size: 13 }, x: 0.02, xanchor: "left", y: 0.97 },
    margin: { l: 52, r: 14, t: 32, b: 38 },
    paper_bgcolor: theme("back"),
    plot_bgcolor: theme("back"),
    font: { color: theme("text"), size: 11, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: theme("card"), bordercolor: theme("line"), font: { color: theme("text") }, namelength: 40 },
    xaxis: { ...line, nticks: 6, exponentformat: "SI", title: { text: x_title, standoff: 6 }, type: log_x ? "log" : "linear" },
    yaxis: { ...line, nticks: 6, exponentformat: "power", type: log_y ? "log" : "linear" },
    hovermode: "x unified",
    hoverdistance: -1, // the nearest point, however far it is
    dragmode: COARSE ? false : "zoom",
    showlegend: false,
    uirevision: `${state.axis} ${log_x} ${log_y}`, // a zoom outlives all but another axis
  };
}

// The buttons by name: plotly has one that uploads a chart.
const CONFIG = { displaylogo: false, responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const AXIS_TITLES = { steps: "step", images: "images seen", hours: "hours" };

function draw_chart(chart) {
  chart.isStale = false;
  const metric = chart.dataset.metric;
  Plotly.react(chart, traces(metric), layout(metric, AXIS_TITLES[state.axis], state.logX, state.logY), CONFIG);
}

// Charts are drawn when they come into sight, and again when something changes.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.isVisible = isIntersecting;
    if (isIntersecting && target.isStale) draw_chart(target);
  }
}, { rootMargin: "200px" });

function redraw_charts() {
  for (const chart of document.querySelectorAll("#curves .chart")) {
    chart.isStale = true;
    if (chart.isVisible) draw_chart(chart);
  }
}

function make_chart(metric) {
  const chart = element("div", { className: "chart", tabIndex: 0 });
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", `chart of ${metric}`);
  chart.dataset.metric = metric;
  chart.isStale = true;
  chart.addEventListener("keydown", (event) => walk(chart, event));
  observer.observe(chart);
  return chart;
}

function walk(chart, event) {
  // The arrow keys move what the pointer would: the values at one place are shown, and said.
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const shown = (chart.data || []).filter((trace) => trace.hoverinfo !== "skip");
  const xs = [...new Set(shown.flatMap((trace) => trace.x))].sort((a, b) => a - b);
  if (!move || event.target !== chart || !xs.length) return;
  event.preventDefault();
  chart.place = Math.min(xs.length - 1, Math.max(0, chart.place === undefined ? 0 : chart.place + move));
  const x = xs[chart.place];
  const values = shown.flatMap((trace) => {
    const i = trace.x.indexOf(x);
    return i < 0 || trace.y[i] === null ? [] : [`${data.runs[trace.meta].name} ${trace.y[i].toPrecision(5)}`];
  });
  Plotly.Fx.hover(chart, { xval: state.logX ? Math.log10(x) : x }, "xy");
  $("said").textContent = `${AXIS_TITLES[state.axis]} ${number(x)}: ${values.join(", ")}`;
}

function group_of(metric) {
  if (data.main.includes(metric)) return "";
  return metric.includes("/") && !metric.includes("_loss_t/") ? metric.split("/")[0] : "evaluation";
}

function make_curves() {
  // The main ones in sight, the others by group.
  const groups = new Map([["", []]]);
  for (const metric of data.metrics) groups.set(group_of(metric), [...(groups.get(group_of(metric)) || []), metric]);
  for (const [group, metrics] of groups) {
    if (!metrics.length) continue;
    const charts = element("div", { className: "charts" }, ...metrics.map(make_chart));
    if (group === "") {
      $("curves").append(charts);
      continue;
    }
    const details = element("details", {}, element("summary", { textContent: `${group} (${metrics.length})` }), charts);
    details.open = state.open[group] ?? !data.main.length;
    details.addEventListener("toggle", () => { state.open[group] = details.open; keep_state(); });
    $("curves").append(details);
  }
}

function filter_curves() {
  const wanted = state.filter.trim().toLowerCase();
  for (const chart of document.querySelectorAll("#curves .chart")) {
    chart.hidden = !chart.dataset.metric.toLowerCase().includes(wanted);
  }
  for (const details of document.querySelectorAll("#curves details")) {
    const count = details.querySelectorAll(".chart:not([hidden])").length;
    details.hidden = !count;
    if (wanted) details.open = count > 0;
  }
}

